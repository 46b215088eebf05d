"""A model stays what it is while it runs on fake tensors, whatever it writes: counters, constraints, caches."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

ASSIGN = Tensor.data.__set__
WRITING = frozenset(  # add_, __iadd__, __setitem__
    getattr(Tensor, name)
    for name in dir(Tensor)
    if (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))
)
CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)  # of these types only: others may do more than hold


def held_by(model: nn.Module) -> list[Any]:
    """All that the modules of a model hold, and what lies in their lists and dictionaries."""
    found: dict[int, Any] = {}
    pending: list[Any] = [vars(module) for module in model.modules()]
    while pending:
        one = pending.pop()
        if id(one) not in found:
            found[id(one)] = one
            if type(one) in (*CONTAINERS, tuple):
                pending += one.values() if isinstance(one, dict) else one
    return list(found.values())


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Its modules hold afterwards what they held before: training flags, and all that a forward pass replaces or adds.

    >>> model = nn.Module()
    >>> model.cache = {}
    >>> with restored(model):
    ...     model.cache["positions"] = 1
    >>> model.cache
    {}
    """
    before = [(one, copy(one)) for one in held_by(model) if type(one) in CONTAINERS]
    try:
        yield
    finally:
        for one, content in before:
            one.clear()
            (one.extend if isinstance(one, (list, deque)) else one.update)(content)


@contextmanager
def unlogged() -> Iterator[None]:
    """Of an operator that refuses fake tensors PyTorch logs the whole stack, and raises an error that says it all."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addFilter(nothing := lambda record: False)
    try:
        yield
    finally:
        log.removeFilter(nothing)


class Unwritten(TorchFunctionMode):
    """Within a ``FakeTensorMode``: these true tensors hold at the end what they held before.

    PyTorch runs ``x.add_(1)`` and the like of true tensors truly even there, and ``x.data = fake`` would leave ``x``
    without values for good: it is not done.

    >>> from torch._subclasses.fake_tensor import FakeTensorMode
    >>> count = torch.zeros(())
    >>> with FakeTensorMode(allow_non_fake_inputs=True), Unwritten([count]):
    ...     _ = count.add_(1)
    >>> count
    tensor(0.)
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = {id(x) for x in held}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == ASSIGN and id(args[0]) in self._held and isinstance(args[1], FakeTensor):
            return None
        if func in WRITING or "out" in kwargs:
            for x in tree_iter((args, kwargs)):
                if id(x) in self._held and id(x) not in self._before:
                    with unset_fake_temporarily():
                        self._before[id(x)] = x, x.clone()
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with unset_fake_temporarily(), torch.inference_mode():  # which may write all
            for x, before in self._before.values():
                x.copy_(before)
