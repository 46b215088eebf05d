"""Measured norms as functions of the weights: each depends on the one slice of a weight where it is attained.

There are two ways to say so to PyTorch, with the same results. Where nothing but autograd looks, an
``autograd.Function`` writes the gradients of both norms of a weight into one tensor. Where a transform of
``torch.func``, a mode or a compiler follows what happens to tensors, the norms are composed anew of PyTorch's own
operators, through which all of them see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from .plan import LayerPlan
from .winners import add_to_slice, slice_norm, slice_subgradient, winning_slice

PLAIN = (Tensor, nn.Parameter)  # and no subclass


class Attained(NamedTuple):
    """Where a norm is: in a column, or row, of the weight of this number."""

    weight: int
    layer: LayerPlan
    winner: Tensor
    column: bool


def transformed() -> bool:
    """Inside ``torch.func`` or forward differentiation, where a tensor does not say whether it takes part."""
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def static() -> bool:
    """Where shapes must not depend on values: compilers have none, ``vmap`` has several."""
    return torch.compiler.is_compiling() or transformed()


def followed() -> bool:
    """Whether more than autograd may follow what happens to plain tensors."""
    return bool(transformed() or _len_torch_dispatch_stack() or _len_torch_function_stack() or _get_tracing_state())


def differentiable(
    values: Sequence[Tensor], weights: Sequence[Tensor], places: Sequence[Attained]
) -> tuple[Tensor, ...]:
    """``values``, tensors of norms that are attained in ``places``, one after another: now functions of the weights."""
    if followed() or not all(type(weight) in PLAIN for weight in weights):
        return _composed(values, weights, places)
    return _Norms.apply(values, places, *weights)


def _composed(values: Sequence[Tensor], weights: Sequence[Tensor], places: Sequence[Attained]) -> tuple[Tensor, ...]:
    """Sums that are not finite stay what they are."""
    sums = []
    for number, layer, winner, column in places:
        sums.append(slice_norm(winning_slice(weights[number], layer, winner, column), layer, winner, column))
    measured = torch.stack(tuple(values))
    again = torch.stack(sums).to(measured.dtype).view_as(measured)
    return (again + (measured - again.detach()).nan_to_num(0, 0, 0)).unbind()


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Sequence[Tensor], places: Sequence[Attained], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.places = places
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Itself differentiable."""
        weights, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        gradients = [
            torch.zeros_like(weight) if needed else None for weight, needed in zip(weights, wanted, strict=True)
        ]
        of_norms = [norm for grad in grads for norm in ([None] * len(weights) if grad is None else grad.unbind())]
        for (number, layer, winner, column), of_norm in zip(ctx.places, of_norms, strict=True):
            if of_norm is not None and gradients[number] is not None:
                part = winning_slice(weights[number], layer, winner, column)
                change = slice_subgradient(part, layer, winner, column) * of_norm
                add_to_slice(gradients[number], layer, winner, column, change.to(part.dtype))
        return None, None, *gradients
