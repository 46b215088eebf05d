"""The measurement in Triton: all layers of a network in two launches.

    sum_tiles       reads every weight once. A program sums |K'| over one tile of a layer, along both sides, into
                    partial tables: column sums [row tiles, groups, columns] and, for each output window, row sums
                    [column tiles, windows, groups, rows]
    find_largest    adds up the partial sums of each channel and window, and finds the largest and the first winner

The tables take a few per cent of the weights: in elements 1 / min(rows, 64) + output windows / 128 of them, with merged
taps (1 / min(rows, 64) + output windows / 512) x merged taps / taps. Layers whose groups have few rows and few columns
(depthwise ones) have no tables: the second launch sums their weights themselves, once for each norm, the second time
from cache. Weights are addressed through their strides, never copied. Each dtype among them takes two launches.

What depends on shapes alone, the records of ``triton_schedule.py``, stays on the device between calls, and so do the
addresses of the weights while they do not change: then a call only launches, and a CUDA graph can capture it. New
addresses cost one small copy, for which the host waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..kept import kept
from ..reference import result_dtype
from .triton_schedule import CHANNELS, ROWS, SEGMENT, TERMS, WIDE, Layout, schedules


def measure_triton(weights: Sequence[Tensor], plan: str) -> tuple[Tensor, Tensor, Tensor]:
    """The l1 norms, the linf norms and their winners: see ``library.MEASURE`` for the contract of every backend."""
    from triton import language  # late: convnorm works without Triton

    from . import triton_kernels as kernels

    device = weights[0].device
    layouts = tuple(Layout(w.dtype, w.shape, w.stride(), w.data_ptr() % 16 == 0) for w in weights)
    addresses = addresses_of(weights)
    l1 = torch.empty(len(weights), dtype=result_dtype(weights), device=device)
    linf = torch.empty_like(l1)
    winners = torch.empty(len(weights), 2, 2, dtype=torch.int64, device=device)
    for schedule in schedules(device, plan, layouts):
        keep_while_captured(schedule, addresses)
        wide = schedule.dtype == torch.float64
        tables = torch.empty(schedule.table_size, dtype=torch.float64 if wide else torch.float32, device=device)
        tiles, blocks = len(schedule.tile_owners), len(schedule.block_owners)
        tickets = (torch.empty if tiles else torch.zeros)(2 * len(weights), dtype=torch.int64, device=device)
        candidates = torch.empty(blocks, 2, dtype=torch.int64, device=device)
        dtype = getattr(language, str(schedule.dtype).removeprefix("torch."))
        with torch.cuda.device_of(weights[0]):
            if tiles:
                kernels.sum_tiles_kernel[(tiles,)](
                    addresses, schedule.records, schedule.tile_owners, tables, tickets, 2 * len(weights),
                    WEIGHT=dtype, GATHERS=schedule.gathers, ROWS=ROWS, COLUMNS=SEGMENT // schedule.dtype.itemsize,
                    WIDE=WIDE, num_warps=8,
                )  # fmt: skip
            kernels.find_largest_kernel[(blocks,)](
                addresses, schedule.records, schedule.block_owners, tables, tickets, candidates, l1, linf, winners,
                WEIGHT=dtype, CHANNELS=CHANNELS, TERMS=TERMS, num_warps=4,
            )  # fmt: skip
    return l1, linf, winners


def addresses_of(weights: Sequence[Tensor]) -> Tensor:
    return _addresses(weights[0].device, tuple(w.data_ptr() for w in weights))


@lru_cache(maxsize=256)
def _addresses(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    return kept(device, lambda: torch.tensor(addresses, dtype=torch.int64, device=device))


_captured: list[tuple] = []


def keep_while_captured(schedule: tuple, addresses: Tensor) -> None:
    """A CUDA graph reads what it captured at every replay, so that may not leave with the caches."""
    if addresses.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append((schedule, addresses))
