"""What ``torch.compile`` is told of functions, without importing it: that takes as long as importing PyTorch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy

Function = TypeVar("Function", bound=Callable)


def constant_when_compiled(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``"""
    function._dynamo_marked_constant = True
    return function


def run_as_it_is(function: Function) -> Function:
    """Compilers take an operator as a whole. But after a graph break ``torch.compile`` goes on with each function of
    Python that still runs, and what an operator does would be compiled in pieces, for every size anew: not this one,
    nor what it calls.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def break_graph(function: Function) -> Function:
    """``torch.compiler.disable``: compiled code stops before a call of this function, and goes on after it."""
    function._torchdynamo_disable = True
    return run_as_it_is(function)
