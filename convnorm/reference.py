"""The measurement in plain PyTorch: the fallback of every device, and what the other backends are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import LayerPlan, Lists, read_plan
from .winners import as_matrix, merge_taps


def measure_reference(weights: Sequence[Tensor], plan: str) -> tuple[Tensor, Tensor, Tensor]:
    """The l1 norms, the linf norms and their winners: see ``library.MEASURE`` for the contract of every backend."""
    layers = [measure_layer(weight, layer) for weight, layer in zip(weights, read_plan(plan), strict=True)]
    dtype = result_dtype(weights)
    l1, linf, winners = (torch.stack(column) for column in zip(*layers, strict=True))
    return l1.to(dtype), linf.to(dtype), winners


def result_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(weight.dtype == torch.float64 for weight in weights) else torch.float32


def measure_layer(weight: Tensor, layer: LayerPlan) -> tuple[Tensor, Tensor, Tensor]:
    kernel = merge_taps(as_matrix(weight, layer), layer.axes).abs()  # [groups, rows, columns, *merged taps]
    columns = _largest(kernel.sum(1), [axis.inputs for axis in layer.axes])
    rows = _largest(kernel.sum(2), [axis.outputs for axis in layer.axes])
    (l1, l1_winner), (linf, linf_winner) = (rows, columns) if layer.transposed else (columns, rows)
    return l1, linf, torch.stack([l1_winner, linf_winner])


def _largest(table: Tensor, windows: Sequence[Lists]) -> tuple[Tensor, Tensor]:
    """The largest sum over a channel and a window of ``table[groups, channels, *merged taps]``, and where it is."""
    return largest(window_sums(table, windows))


def window_sums(table: Tensor, windows: Sequence[Lists]) -> Tensor:
    """[channels, windows] of ``table[groups, channels, *merged taps]``."""
    for axis_windows in windows:  # each turns the first remaining tap dimension into a last one of windows
        table = torch.stack([_sum_window(table.movedim(2, -1), window) for window in axis_windows], -1)
    return table.reshape(table.shape[0] * table.shape[1], -1)


def largest(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of ``sums[channels, windows]``, and its channel and window."""
    best = sums.flatten().argmax()  # the first of equals; NaN counts as largest
    winner = torch.stack([best // sums.shape[1], best % sums.shape[1]])
    return sums.flatten().gather(0, best[None]).squeeze(0), winner


def _sum_window(table: Tensor, window: Sequence[int]) -> Tensor:
    """A tap outside the window is not multiplied by 0: it may be NaN. And no list of indices goes to the device, which
    would have to be waited for.
    """
    step = window[1] - window[0] if len(window) > 1 else 1
    if window and step > 0 and tuple(window) == tuple(range(window[0], window[-1] + 1, step)):
        return table[..., window[0] : window[-1] + 1 : step].sum(-1)
    return sum((table.select(-1, tap) for tap in window), table.new_zeros(table.shape[:-1]))
