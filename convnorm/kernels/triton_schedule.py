"""What the two Triton kernels are told: which tiles and blocks there are, and what each of them reads and writes.

All of it depends on the layers' shapes, strides and windows alone. A kernel finds its numbers in one tensor,
``records``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from ..plan import AxisPlan, LayerPlan, Lists, read_plan

ROWS = 64  # of a tile
SEGMENT = 512  # bytes of a row in a dense tile: 16 for each lane of a warp
WIDE = 512  # columns of a gathered tile
CHANNELS, TERMS = 32, 64  # of a block of the second launch
FEW_CHANNELS = 16  # groups of no more rows and columns than this have no tables
FEW_WINDOWS = 8  # a dense tile has no more sums than this for each row

ALIGNED, DENSE, GATHERED = range(3)  # how a tile is read

Offsets = tuple[int, ...]


class TiledLayer(NamedTuple):
    """A layer of the first launch, in the order in which the kernel reads it. Positions are those in the records."""

    first_tile: int
    programs: int  # tiles
    mode: int
    row_tiles: int
    column_tiles: int
    groups: int
    rows: int  # of a group
    columns: int  # of a group: channels x entries. An entry is a merged tap
    row_stride: int
    channel_stride: int
    entries: int
    divisor: int  # column // divisor % entries is the entry of a column
    taps_each: int  # at most, in an entry
    taps: int  # position of the offsets of the taps [entries, taps_each], -1 where there are fewer
    windows: int  # output windows
    counts: int  # position of how often each counts an entry [windows, entries], -1 where one window counts all once
    column_table: int
    row_table: int
    weight: int  # which of the weights


class Job(NamedTuple):
    """One window of one norm in the second launch: a list of terms, which are partial sums of a table, or weights."""

    first_block: int
    programs: int  # blocks
    layer: int
    norm: int  # 0: l1, 1: linf
    norm_first: int  # the first block of the norm's first window
    norm_blocks: int  # of all its windows
    window: int
    windows: int
    channels: int
    per_group: int
    group_stride: int
    channel_stride: int
    origin: int  # of the table
    terms: int
    taps_each: int  # at most, in a term: 1 in a table
    taps: int  # position of the offsets of the terms [terms, taps_each], -1 where there are fewer
    weight: int  # which of the weights, or -1: the tables


class Layout(NamedTuple):
    """All that the records depend on besides the plan."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    aligned: bool


class Schedule(NamedTuple):
    """The launches for the weights of one dtype."""

    dtype: torch.dtype
    records: Tensor
    tile_owners: Tensor  # [tiles, 2]: where in the records the layer stands, and its weight
    block_owners: Tensor  # [blocks, 2]: the same of the job
    table_size: int
    gathers: bool


@lru_cache(maxsize=256)
def schedules(device: torch.device, plan: str, layouts: tuple[Layout, ...]) -> tuple[Schedule, ...]:
    layers = read_plan(plan)
    schedules = []
    for dtype in dict.fromkeys(layout.dtype for layout in layouts):
        records = Records()
        for i, (layer, layout) in enumerate(zip(layers, layouts, strict=True)):
            if layout.dtype == dtype:
                records.add(i, layer, layout)
        schedules.append(kept(device, partial(records.schedule, dtype, device)))
    return tuple(schedules)


class Pool(list[int]):
    """The lists that records point to, one after another."""

    def put(self, numbers: Sequence[int]) -> int:
        """The position of a list among the records."""
        self += numbers
        return len(self) - len(numbers)


class Records:
    """The records of the layers, and the lists that they point to."""

    def __init__(self) -> None:
        self.lists = Pool()
        self.layers: list[TiledLayer] = []
        self.jobs: list[Job] = []
        self.table_size = 0

    def schedule(self, dtype: torch.dtype, device: torch.device) -> Schedule:
        """One tensor of the lists, then the layers, then the jobs."""
        numbers = list(self.lists)

        def owners(records: Sequence[TiledLayer] | Sequence[Job]) -> Tensor:
            rows = []
            for record in records:
                rows.append((len(numbers), record.weight))
                numbers.extend(record)
            repeats = torch.tensor([record.programs for record in records], dtype=torch.int64)
            return torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).repeat_interleave(repeats, 0).to(device)

        return Schedule(
            dtype=dtype,
            tile_owners=owners(self.layers),
            block_owners=owners(self.jobs),
            records=torch.tensor(numbers, device=device),
            table_size=self.table_size,
            gathers=any(layer.mode == GATHERED for layer in self.layers),
        )

    def add(self, index: int, layer: LayerPlan, layout: Layout) -> None:
        """Choose how to read a layer, in tiles or, where its groups are small, in the second launch alone."""
        groups, rows, channels = layer.groups, layout.shape[0] // layer.groups, layout.shape[1]
        row_stride, channel_stride, *tap_strides = layout.stride
        entries = entry_offsets(layer.axes, tap_strides)
        inputs = window_entries(layer.axes, [axis.inputs for axis in layer.axes])
        outputs = window_entries(layer.axes, [axis.outputs for axis in layer.axes])
        norm = int(layer.transposed)  # of the columns
        add_columns = partial(self._norm, index, norm, channels=groups * channels, per_group=channels)
        add_rows = partial(self._norm, index, 1 - norm, channels=groups * rows, per_group=rows)
        if max(rows, channels) <= FEW_CHANNELS:
            place = {"weight": index, "origin": 0, "group_stride": rows * row_stride}
            add_columns(_terms(inputs, entries, rows, row_stride), **place, channel_stride=channel_stride)
            add_rows(_terms(outputs, entries, channels, channel_stride), **place, channel_stride=row_stride)
            return

        # A dense tile takes columns as they stand in memory, where channels may vary fastest; and so do its tables.
        steps = _dense_steps(channels, [axis.taps for axis in layer.axes], channel_stride, tap_strides)
        dense = steps is not None and len(outputs) <= FEW_WINDOWS and not any(axis.merged for axis in layer.axes)
        channel_step, entry_step = steps if steps and dense else (len(entries), 1)
        columns = channels * len(entries)
        size = layout.dtype.itemsize
        aligned = layout.aligned and row_stride * size % 16 == 0 and columns * size % 16 == 0
        row_tiles = -(-rows // ROWS)
        column_tiles = -(-columns // (SEGMENT // size if dense else WIDE))
        all_once = len(outputs) == 1 and sorted(outputs[0]) == list(range(len(entries)))
        column_table = self.table_size
        row_table = column_table + row_tiles * groups * columns
        self.table_size = row_table + column_tiles * len(outputs) * groups * rows
        self.layers.append(
            TiledLayer(
                first_tile=_programs(self.layers),
                programs=row_tiles * column_tiles * groups,
                mode=(ALIGNED if aligned else DENSE) if dense else GATHERED,
                row_tiles=row_tiles,
                column_tiles=column_tiles,
                groups=groups,
                rows=rows,
                columns=columns,
                row_stride=row_stride,
                channel_stride=channel_stride,
                entries=len(entries),
                divisor=entry_step,
                taps_each=longest(entries),
                taps=self.lists.put(padded(entries)),
                windows=len(outputs),
                counts=-1 if all_once else self.lists.put(entry_counts(outputs, len(entries))),
                column_table=column_table,
                row_table=row_table,
                weight=index,
            )
        )
        place = {"weight": -1, "origin": column_table, "group_stride": columns}
        in_table = [(e * entry_step,) for e in range(len(entries))]
        add_columns(_terms(inputs, in_table, row_tiles, groups * columns), **place, channel_stride=channel_step)
        place = {"weight": -1, "origin": row_table, "group_stride": rows}
        windows = range(len(outputs))  # tiles have summed the entries of each
        in_table = [(window * groups * rows,) for window in windows]
        terms = _terms([(window,) for window in windows], in_table, column_tiles, len(windows) * groups * rows)
        add_rows(terms, **place, channel_stride=1)

    def _norm(self, layer: int, norm: int, windows: list[list[Offsets]], channels: int, **place: int) -> None:
        first, blocks = _programs(self.jobs), -(-channels // CHANNELS)
        for window, terms in enumerate(windows):
            job = Job(
                first_block=first + window * blocks,
                programs=blocks,
                layer=layer,
                norm=norm,
                norm_first=first,
                norm_blocks=blocks * len(windows),
                window=window,
                windows=len(windows),
                channels=channels,
                terms=len(terms),
                taps_each=longest(terms),
                taps=self.lists.put(padded(terms)),
                **place,
            )
            self.jobs.append(job)


def _programs(records: Sequence[TiledLayer] | Sequence[Job]) -> int:
    return records[-1][0] + records[-1].programs if records else 0


def entry_offsets(axes: Sequence[AxisPlan], tap_strides: Sequence[int]) -> list[Offsets]:
    """For each merged tap of all axes together the offsets in memory of its taps."""
    merged = [axis.merged or tuple((tap,) for tap in range(axis.taps)) for axis in axes]
    offsets = [[[tap * step for tap in taps] for taps in one] for one, step in zip(merged, tap_strides, strict=True)]
    return [tuple(sum(taps) for taps in product(*choice)) for choice in product(*offsets)]


def window_entries(axes: Sequence[AxisPlan], windows: Sequence[Lists]) -> list[Offsets]:
    """The products of the windows of the axes, the last axis fastest, as the other backends number them."""
    steps = [prod(axis.merged_taps for axis in axes[i + 1 :]) for i in range(len(axes))]
    scaled = [[[a * step for a in window] for window in one] for one, step in zip(windows, steps, strict=True)]
    return [tuple(sum(taps) for taps in product(*choice)) for choice in product(*scaled)]


def _terms(windows: list[Offsets], entries: list[Offsets], parts: int, part_stride: int) -> list[list[Offsets]]:
    """The terms of each window: all parts of its entries."""
    steps = [part * part_stride for part in range(parts)]
    return [[tuple(tap + step for tap in entries[e]) for step in steps for e in window] for window in windows]


def _dense_steps(
    channels: int, taps: Sequence[int], channel_stride: int, tap_strides: Sequence[int]
) -> tuple[int, int] | None:
    """The steps of channel and tap where a row is one run of memory, taps or channels fastest; else None."""
    for channel_step, tap_step in ((prod(taps), 1), (1, channels)):
        expected = [tap_step * prod(taps[i + 1 :]) for i in range(len(taps))]
        sizes, strides = (channels, *taps), (channel_stride, *tap_strides)
        if all(n == 1 or a == b for n, a, b in zip(sizes, strides, (channel_step, *expected), strict=True)):
            return channel_step, tap_step
    return None


def longest(lists: Sequence[Offsets]) -> int:
    return max(map(len, lists), default=1)


def padded(lists: Sequence[Offsets]) -> list[int]:
    width = longest(lists)
    return [i for one in lists for i in (*one, *[-1] * (width - len(one)))]


def entry_counts(windows: Sequence[Offsets], entries: int) -> list[int]:
    counts = [0] * (len(windows) * entries)
    for i, window in enumerate(windows):
        for entry in window:
            counts[i * entries + entry] += 1
    return counts
