"""The moving average of a norm's subgradients, kept as the few terms that it is a sum of.

A subgradient p is zero outside one slice of the weight, and there sign and count: small integers. So the average

    h_t = γ h_{t-1} + (1 - γ) p_t = (1 - γ) (p_t + γ p_{t-1} + γ² p_{t-2} + ...)

is a sum over slices, and adding it to a gradient touches these slices only. As many terms are kept as it takes until
what is dropped, at most γ^terms of the largest element that h can have, is below rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .plan import AxisPlan, LayerPlan, read_plan
from .reference import measure_reference, result_dtype
from .winners import as_matrix, slice_index, slice_subgradient, winning_slice


@dataclass
class Momentum:
    """What norm decay remembers of N layers between steps: a ring of terms, of which step t writes number t mod terms.

    norms[N]                  at the last step
    winners[N, 2]             where they were attained: channel and window
    signs[terms, length]      the terms p, the slices of one layer after another: int8, or int32 where it has to be
    channels[terms, N]        the channel that each term is a slice of; -1: no term yet
    clock[1]                  t, the steps so far
    """

    norms: Tensor
    winners: Tensor
    signs: Tensor
    channels: Tensor
    clock: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.norms, self.winners, self.signs, self.channels, self.clock


def no_momentum(weights: Sequence[Tensor], plan: str, linf: bool, momentum: float) -> Momentum:
    """The state before the first step."""
    layers, device = read_plan(plan), weights[0].device
    terms = count_terms(momentum, result_dtype(weights))
    length = sum(slice_lengths(weights, layers, linf))
    fits = all(largest_count(layer, layer.over_columns(linf)) < 128 for layer in layers)
    return Momentum(
        norms=torch.zeros(len(weights), dtype=result_dtype(weights), device=device),
        winners=torch.zeros(len(weights), 2, dtype=torch.int64, device=device),
        signs=torch.zeros(terms, length, dtype=torch.int8 if fits else torch.int32, device=device),
        channels=torch.full((terms, len(weights)), -1, dtype=torch.int64, device=device),
        clock=torch.zeros(1, dtype=torch.int64, device=device),
    )


def count_terms(momentum: float, dtype: torch.dtype = torch.float32) -> int:
    """How many terms it takes until γ^terms is below half a unit of rounding.

    >>> count_terms(0.0), count_terms(0.5), count_terms(0.9)
    (1, 24, 158)
    """
    return 1 if momentum == 0 else math.ceil(math.log(torch.finfo(dtype).eps / 2) / math.log(momentum))


def slice_lengths(weights: Sequence[Tensor], layers: Sequence[LayerPlan], linf: bool) -> list[int]:
    """Elements of a slice of each layer: [rows, *taps] of a column, or [columns, *taps] of a row."""
    return [
        math.prod(_slice_shape(weight, layer, layer.over_columns(linf)))
        for weight, layer in zip(weights, layers, strict=True)
    ]


def slice_counts(weights: Sequence[Tensor], layers: Sequence[LayerPlan], linf: bool) -> list[int]:
    """Channels of each layer, of which one wins: columns, or rows, of all groups."""
    shapes = [as_matrix(weight, layer).shape for weight, layer in zip(weights, layers, strict=True)]
    return [shape[0] * shape[2 if layer.over_columns(linf) else 1] for shape, layer in zip(shapes, layers, strict=True)]


def _slice_shape(weight: Tensor, layer: LayerPlan, column: bool) -> list[int]:
    _, rows, columns, *taps = as_matrix(weight, layer).shape
    return [rows if column else columns, *taps]


def largest_count(layer: LayerPlan, column: bool) -> int:
    """How often, at most, one weight counts in a norm."""
    return math.prod(_largest_count(axis, column) for axis in layer.axes)


def _largest_count(axis: AxisPlan, column: bool) -> int:
    merged = axis.merged or tuple((tap,) for tap in range(axis.taps))
    return max(
        sum(tap in merged[i] for i in window)
        for window in (axis.inputs if column else axis.outputs)
        for tap in range(axis.taps)
    )


def decay_reference(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    norms: Tensor,
    winners: Tensor,
    signs: Tensor,
    channels: Tensor,
    clock: Tensor,
    rates: Tensor,
    momentum: float,
    plan: str,
    linf: bool,
    measured: bool,
) -> None:
    """One step of norm decay in plain PyTorch: see ``library.DECAY`` for the contract of every backend."""
    check_apart(grads)
    if not measured:
        values = measure_reference(weights, plan)
        norms.copy_(values[int(linf)])
        winners.copy_(values[2][:, int(linf)])
    layers = read_plan(plan)
    slot = clock % len(signs)
    channels.index_copy_(0, slot, winners[None, :, 0])
    for i, ring in enumerate(signs.split(slice_lengths(weights, layers, linf), 1)):
        column = layers[i].over_columns(linf)
        write_term(weights[i], layers[i], column, winners[i], ring, slot)
        if grads[i].numel():
            add_terms(grads[i], layers[i], column, ring, channels[:, i], slot, rates[i], momentum)
    clock += 1


def check_apart(grads: Sequence[Tensor]) -> None:
    """Of an expanded tensor one element would be written many times."""
    for grad in grads:
        if any(size > 1 and step == 0 for size, step in zip(grad.shape, grad.stride(), strict=True)):
            raise RuntimeError("convnorm: elements of a gradient share memory")


def write_term(
    weight: Tensor,
    layer: LayerPlan,
    column: bool,
    winner: Tensor,
    ring: Tensor,
    slot: Tensor,
    mask: Tensor | None = None,
) -> None:
    """Write a layer's subgradient, times a ``mask`` of [rows (or columns)] or [], into its ring[terms, length]."""
    term = slice_subgradient(winning_slice(weight, layer, winner, column), layer, winner, column)
    if mask is not None:
        term = term * mask.view(-1, *[1] * (term.dim() - 1))
    ring.index_copy_(0, slot, term.reshape(1, -1).to(ring.dtype))


def add_terms(
    grad: Tensor,
    layer: LayerPlan,
    column: bool,
    ring: Tensor,
    channels: Tensor,
    slot: Tensor,
    rate: Tensor,
    momentum: float,
) -> None:
    """grad += rate h. All terms of a channel are added up before they meet the gradient."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    ages = (slot - torch.arange(len(ring), device=ring.device)) % len(ring)
    coefficients = torch.where(channels >= 0, rate * (1 - momentum) * momentum ** ages.double(), 0)
    same = channels == channels[:, None]
    newest = (~(same & (ages < ages[:, None]))).all(1)  # of those of its channel
    with torch.autocast(ring.device.type, enabled=False):  # in which the product would be of half precision
        sums = (same * newest[:, None] * coefficients).to(dtype) @ ring.to(dtype)
    matrix = as_matrix(grad, layer)
    index = slice_index(grad, layer, channels.clamp(min=0)[:, None], column)
    slices = sums.to(grad.dtype).view(len(ring), *_slice_shape(grad, layer, column))
    matrix.index_put_(index, slices, accumulate=True)
