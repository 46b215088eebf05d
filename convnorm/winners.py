"""From a winner, the channel and window where a norm is attained, back to the few weights that the norm depends on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .kept import kept
from .plan import AxisPlan, LayerPlan, Lists, read_plan


def as_matrix(weight: Tensor, layer: LayerPlan) -> Tensor:
    """[groups, rows, columns, *taps], a view: the matrix of each group, were every tap an input of its own."""
    return weight.unflatten(0, (layer.groups, -1))


def merge_taps(kernel: Tensor, axes: Sequence[AxisPlan]) -> Tensor:
    """Sum ``kernel[..., *taps]`` over merged taps. In float64, since what is merged may cancel."""
    if kernel.dtype != torch.float64:
        kernel = kernel.to(torch.float64 if any(axis.merged for axis in axes) else torch.float32)
    for dim, axis in enumerate(axes, kernel.dim() - len(axes)):
        if axis.merged:
            parts = [sum(kernel.select(dim, tap) for tap in taps) for taps in axis.merged]
            kernel = torch.stack(parts, dim)
    return kernel


def slice_index(weight: Tensor, layer: LayerPlan, channel: Tensor, column: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the column (or row) of a ``channel[..., 1]`` stands in ``as_matrix(weight)``, found without anything
    leaving the device.
    """
    _, rows, columns, *_ = as_matrix(weight, layer).shape
    every = torch.arange(rows if column else columns, device=weight.device)
    channels = columns if column else rows
    group, channel = channel // channels, channel % channels
    return (group, every, channel) if column else (group, channel, every)


def winning_slice(weight: Tensor, layer: LayerPlan, winner: Tensor, column: bool) -> Tensor:
    """[rows (or columns), *taps] of the channel that won; differentiable."""
    if layer.groups == 1:  # the fast case of the same
        dim = 1 if column else 0
        return weight.index_select(dim, winner[:1]).squeeze(dim)
    return as_matrix(weight, layer)[slice_index(weight, layer, winner[:1], column)]


def add_to_slice(weight: Tensor, layer: LayerPlan, winner: Tensor, column: bool, change: Tensor) -> None:
    """Add to what ``winning_slice`` takes."""
    if layer.groups == 1:
        dim = 1 if column else 0
        weight.index_add_(dim, winner[:1], change.unsqueeze(dim))
    else:
        matrix = as_matrix(weight, layer)
        matrix.index_put_(slice_index(weight, layer, winner[:1], column), change, accumulate=True)


def slice_norm(part: Tensor, layer: LayerPlan, winner: Tensor, column: bool) -> Tensor:
    """The norm once more, differentiable: from its winning slice ``part[rows (or columns), *taps]`` alone.

        sum_a u[a] |part'[:, a]|      with u the winning window, and part' summed over merged taps

    Built from PyTorch's own operators, so that every transform of ``torch.func`` and every compiler sees through it.
    """
    kernel = merge_taps(part, layer.axes)
    if layer.sees_all(column):
        return torch.linalg.vector_norm(kernel, 1)
    counts = torch.ops.convnorm.window_counts(winner, layer.text, column)
    return torch.where(counts > 0, kernel.abs() * counts, 0).sum()


def slice_subgradient(part: Tensor, layer: LayerPlan, winner: Tensor, column: bool) -> Tensor:
    """[rows (or columns), *taps] of integers: the gradient of ``slice_norm``, sign(part') u carried back through the
    merged taps. 0 where an element is 0 or NaN.
    """
    signs = merge_taps(part, layer.axes).sign().nan_to_num(0)
    if not layer.sees_all(column):
        signs = signs * torch.ops.convnorm.window_counts(winner, layer.text, column)
    for dim, axis in enumerate(layer.axes, signs.dim() - len(layer.axes)):
        if axis.merged:
            taps = signs.new_zeros(*signs.shape[:dim], axis.taps, *signs.shape[dim + 1 :])
            for merged, its_taps in enumerate(axis.merged):
                for tap in its_taps:
                    taps.select(dim, tap).add_(signs.select(dim, merged))
            signs = taps
    return signs


def window_counts(winner: Tensor, plan: str, column: bool) -> Tensor:
    """counts[*merged taps] of the window that won. An operator, so that its tables stay on the device between calls."""
    return _window_table(plan, column, winner.device).index_select(0, winner[1:]).squeeze(0)


@lru_cache(maxsize=1024)
def _window_table(plan: str, column: bool, device: torch.device) -> Tensor:
    """counts[windows, *merged taps]: the products of the windows of the axes."""
    (layer,) = read_plan(plan)
    table = torch.ones(1, dtype=torch.float32)  # whatever the default: library.py promises it to compilers
    for axis in layer.axes:
        side = _counts(axis.inputs if column else axis.outputs, axis.merged_taps)
        table = torch.einsum("w...,va->wv...a", table, side).flatten(0, 1)
    return kept(device, lambda: table.to(device))


def _counts(windows: Lists, merged_taps: int) -> Tensor:
    return torch.stack(
        [torch.bincount(torch.tensor(w, dtype=torch.int64), minlength=merged_taps).float() for w in windows]
    )
