"""What the Triton kernel of norm decay is told: where the slices of each layer stand, in the weight, in the gradient
and in the ring of terms. All of it depends on shapes, strides and windows alone.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..kept import kept
from ..plan import AxisPlan, LayerPlan, Lists, read_plan
from .triton_schedule import Pool, entry_counts, entry_offsets, longest, padded, window_entries

BLOCK = 256  # elements of a slice that a program takes
AGES = 4  # terms that a program takes: few programs, since each waits for a ticket, and few turns where winners change
CHUNK = 8  # terms that are read at once
LAYERS = 400  # of a launch: the addresses of their gradients are parameters, for which every GPU has 4 KiB
NO_GRADIENT = (1 << 62) + 1  # in place of an address

Numbers = tuple[int, ...]


class Slice(NamedTuple):
    """A layer, in the order in which the kernel reads it: how to find the slice of a channel, [others, taps]."""

    first_block: int
    blocks: int
    layer: int
    place: int  # among the gradients of the launch
    begin: int  # in a row of the ring
    size: int  # others x taps
    taps: int
    per_group: int  # channels of a group
    weight_group: int  # strides of the weight
    weight_channel: int
    weight_other: int
    grad_group: int  # strides of the gradient
    grad_channel: int
    grad_other: int
    grad_taps: int  # position of the offsets of the taps in the gradient
    merged_each: int  # how many merged taps hold a tap, at most
    holding: int  # position of which ones they are [taps, merged_each], -1 where there are fewer
    taps_each: int  # how many taps a merged tap has, at most
    entries: int  # position of their offsets in the weight [merged taps, taps_each], -1 where there are fewer
    merged: int  # how many merged taps there are
    counts: int  # position of how often each window counts each of them [windows, merged taps]


class Pair(NamedTuple):
    """All of a weight and its gradient that the records depend on besides the plan.

    ``turn`` counts the layers before this one that have the same gradient: they may not be in one launch.
    """

    dtypes: tuple[torch.dtype, torch.dtype]
    turn: int
    shape: Numbers
    weight_stride: Numbers
    grad_stride: Numbers


class DecaySchedule(NamedTuple):
    """One launch."""

    dtypes: tuple[torch.dtype, torch.dtype]  # of weights and gradients
    records: Tensor
    owners: Tensor  # [blocks]: where in the records the layer stands
    layers: Numbers


@lru_cache(maxsize=256)
def decay_schedules(device: torch.device, plan: str, pairs: tuple[Pair, ...], linf: bool) -> tuple[DecaySchedule, ...]:
    """In the order in which they are to be launched."""
    launches: dict[tuple, list[Slices]] = {}
    begin = 0
    for i, (layer, pair) in enumerate(zip(read_plan(plan), pairs, strict=True)):
        alike = launches.setdefault((pair.turn, pair.dtypes), [])
        if not alike or len(alike[-1].layers) == LAYERS:
            alike.append(Slices())
        begin += alike[-1].add(i, begin, layer, pair, column=layer.over_columns(linf))
    in_turn = sorted(launches.items(), key=lambda launch: launch[0][0])
    made = [partial(slices.schedule, dtypes, device) for (_, dtypes), alike in in_turn for slices in alike]
    return kept(device, lambda: tuple(make() for make in made))


class Slices:
    """The records of the layers of one launch, and the lists that they point to."""

    def __init__(self) -> None:
        self.lists = Pool()
        self.layers: list[Slice] = []

    def schedule(self, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device) -> DecaySchedule:
        """One tensor of the lists, then the layers."""
        owners = [len(self.lists) + i * len(one) for i, one in enumerate(self.layers) for _ in range(one.blocks)]
        numbers = [*self.lists, *(number for one in self.layers for number in one)]
        records, owners = (torch.tensor(column, dtype=torch.int64, device=device) for column in (numbers, owners))
        return DecaySchedule(dtypes, records, owners, tuple(one.layer for one in self.layers))

    def add(self, index: int, begin: int, layer: LayerPlan, pair: Pair, column: bool) -> int:
        """The size of the layer's slices."""
        axes, rows, columns, *taps = layer.axes, pair.shape[0] // layer.groups, *pair.shape[1:]
        others, per_group = (rows, columns) if column else (columns, rows)
        other, channel = (0, 1) if column else (1, 0)  # their dimensions
        size = others * prod(taps)
        holding = window_entries(axes, [_holding(axis) for axis in axes])
        windows = window_entries(axes, [axis.inputs if column else axis.outputs for axis in axes])
        entries = entry_offsets(axes, pair.weight_stride[2:])
        grad_taps = entry_offsets([replace(axis, merged=()) for axis in axes], pair.grad_stride[2:])
        self.layers.append(
            Slice(
                first_block=self.layers[-1].first_block + self.layers[-1].blocks if self.layers else 0,
                blocks=-(-size // BLOCK),
                layer=index,
                place=len(self.layers),
                begin=begin,
                size=size,
                taps=prod(taps),
                per_group=per_group,
                weight_group=rows * pair.weight_stride[0],
                weight_channel=pair.weight_stride[channel],
                weight_other=pair.weight_stride[other],
                grad_group=rows * pair.grad_stride[0],
                grad_channel=pair.grad_stride[channel],
                grad_other=pair.grad_stride[other],
                grad_taps=self.lists.put(padded(grad_taps)),
                merged_each=longest(holding),
                holding=self.lists.put(padded(holding)),
                taps_each=longest(entries),
                entries=self.lists.put(padded(entries)),
                merged=len(entries),
                counts=self.lists.put(entry_counts(windows, len(entries))),
            )
        )
        return size


def _holding(axis: AxisPlan) -> Lists:
    """The merged taps that hold each tap."""
    if not axis.merged:
        return tuple((tap,) for tap in range(axis.taps))
    return tuple(tuple(i for i, taps in enumerate(axis.merged) if tap in taps) for tap in range(axis.taps))
