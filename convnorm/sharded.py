"""Norm decay of weights that ``fully_shard`` (FSDP2) has cut up: every rank reads its own rows, and no weight travels.

Dimension 0 of a weight, which is what is cut (``Shard(0)``), counts the rows of all groups. With a rank holding
``K'[rows, columns, *merged taps]``, a norm is

    over columns    max_(j, u)  sum_ranks  sum_rows sum_a u[a] |K'[row, j, a]|     one all_reduce of [channels, windows]
    over rows       max_ranks   max_(row, v)  sum_j sum_a v[a] |K'[row, j, a]|     one all_gather of [3]

for every layer, all layers in one collective. So all ranks know the same norms and winners, to the last bit, and each
writes down and adds its own rows of the winning column, or the winning row if it is the one that holds it.

Several groups of ranks that hold the same (HSDP) do this each for itself. Sums travel in float64 and are rounded to
float32 before they are compared, so that the groups agree even if they add up in another order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import library
from .batch import Batch, plan_of, weight_of
from .momentum import add_terms, write_term
from .plan import LayerPlan
from .reference import largest, window_sums
from .released import Released
from .uses import Use
from .winners import merge_taps

READ_AT_ONCE = {"cpu": 2**18}  # elements: on a CPU what fits into a cache
READ_AT_ONCE_ELSEWHERE = 2**24


class Place(NamedTuple):
    """Where a weight is: on a device; and if it is a DTensor, cut along ``dim`` of a mesh, or whole on every rank."""

    device: torch.device
    mesh: Any = None
    dim: int | None = None


def is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where nobody imported it, there are none
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_sharded(model: nn.Module, instead: str) -> None:
    """A sharded model runs on all ranks at once, not on the fake tensors of an example."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    reshard(model)  # parameters that are whole for the time being are not those that are trained
    for name, module in model.named_modules():
        if any(is_dtensor(parameter) for parameter in module.parameters(recurse=False)):
            raise RuntimeError(f"convnorm: layer {name!r} is sharded: {instead}")


def reshard(model: nn.Module) -> None:
    """A forward pass after the last backward pass has left parameters whole, in place of the optimizer's shards."""
    module = sys.modules.get("torch.distributed.fsdp")
    for child in model.modules() if module is not None else ():
        if isinstance(child, module.FSDPModule):
            child.reshard()


def place_of(use: Use) -> Place:
    weight = weight_of(use)
    if not is_dtensor(weight):
        return Place(weight.device)
    from torch.distributed.tensor import Shard

    cut = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if len(cut) > 1 or any(type(weight.placements[dim]) is not Shard or weight.placements[dim].dim != 0 for dim in cut):
        raise RuntimeError(
            f"convnorm: the weight of layer {use.name!r} is placed as {list(weight.placements)}: norm decay takes "
            "weights that are cut along dimension 0 once, Shard(0), or whole on every rank, Replicate()"
        )
    return Place(weight.device, weight.device_mesh, cut[0] if cut else None)


def kind_of(place: Place, variant: str) -> type[Batch]:
    if place.mesh is None:
        return Released if variant == "released" else Batch
    if variant == "released":
        raise RuntimeError("convnorm: variant 'released' is not there for sharded weights, only 'paper'")
    return Sharded


@dataclass(frozen=True)
class Part:
    """Rows ``begin`` to ``end``, the rank's own, of those that a layer has in all groups together."""

    layer: LayerPlan
    rows: int  # of each group
    columns: int
    begin: int
    end: int
    column: bool  # whether the norm is one over columns

    @property
    def own_layer(self) -> LayerPlan:
        """These rows as a layer of one group: the rows that a column of another group has are zero in it."""
        return replace(self.layer, groups=1)


class Sharded(Batch):
    """Layers whose weights lie in one ``Place``.

    Every rank takes part in every step, also one that holds no rows or has no gradient. Norms and winners are those of
    the whole weights, the same on all ranks; of the moving averages each rank keeps its own rows, and saves them.
    """

    def __init__(self, uses: Sequence[Use], members: Sequence[int], linf: bool, momentum: float) -> None:
        self._hold(uses, members, linf, momentum)
        self.place = place_of(uses[0])
        self._parts = [self._part(use, weight) for use, weight in zip(uses, self.weights, strict=True)]
        self._remember(self._own(self.weights), [part.own_layer for part in self._parts])
        # columns of a single group have the same numbers here as in the whole weight: one operator takes all layers
        self._at_once = all(part.column and part.layer.groups == 1 and part.begin < part.end for part in self._parts)
        self._compared = False

    def _part(self, use: Use, weight: Tensor) -> Part:
        """Rows are dealt out as ``torch.chunk`` does it: as many to each rank until none are left."""
        layer, mesh, dim = plan_of(use), self.place.mesh, self.place.dim
        count, begin, size = weight.shape[0], 0, weight.shape[0]
        if dim is not None:
            size = -(-count // mesh.size(dim))
            begin = min(mesh.get_local_rank(dim) * size, count)
        end = min(begin + size, count)
        if self._own([weight])[0].shape[0] != end - begin:
            raise RuntimeError(f"convnorm: the weight of layer {use.name!r} is not cut as torch.chunk would cut it")
        return Part(layer, count // layer.groups, weight.shape[1], begin, end, layer.over_columns(self.linf))

    def rows(self, i: int) -> list[int]:
        return [self._parts[i].begin, self._parts[i].end, self.weights[i].shape[0]]

    @torch.no_grad()
    def _own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [tensor.to_local() for tensor in tensors]

    @property
    def _group(self) -> Any:
        return self.place.mesh.get_group(self.place.dim)

    def _gather(self, own: Tensor) -> Tensor:
        """[ranks, ...]; of one rank, if each has everything."""
        if self.place.dim is None:
            return own[None]
        every = [torch.empty_like(own) for _ in range(self.place.mesh.size(self.place.dim))]
        torch.distributed.all_gather(every, own, group=self._group)
        return torch.stack(every)

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """grads += rates * h, each rank its own rows."""
        weights, state = self._own(self.weights), self.state
        self._measure(weights)
        if self._at_once:
            grads = [self._no_grad if grad is None else grad for grad in map(self._own_grad, range(len(weights)))]
            library.decay(weights, grads, state, rates, self.momentum, self.plan, self.linf, measured=True)
            return
        slot = state.clock % len(state.signs)
        for i, (ring, part) in enumerate(zip(state.signs.split(self._lengths, 1), self._parts, strict=True)):
            if part.begin < part.end:
                layer, channels, grad = part.own_layer, state.channels[:, i], self._own_grad(i)
                winner, mine = _own_winner(state.winners[i], part)
                channels.index_copy_(0, slot, winner[:1])
                write_term(weights[i], layer, part.column, winner, ring, slot, mine)
                if grad is not None:
                    add_terms(grad, layer, part.column, ring, channels, slot, rates[i], self.momentum)
        state.clock += 1

    def _own_grad(self, i: int) -> Tensor | None:
        weight, grad = self.weights[i], self.weights[i].grad
        if grad is None or not weight.requires_grad:
            return None
        if not is_dtensor(grad) or grad.placements != weight.placements:
            placed = list(grad.placements) if is_dtensor(grad) else "nowhere, a plain tensor"
            raise RuntimeError(
                f"convnorm: the gradient of layer {self.uses[i].name!r} is placed as {placed}, its weight as "
                f"{list(weight.placements)}"
            )
        return grad.to_local()

    def _measure(self, weights: Sequence[Tensor]) -> None:
        """The norms and their winners, from each rank's own rows of the weights."""
        if not self._compared:
            self._compare()
        self._measure_columns(weights)
        self._measure_rows(weights)

    def _measure_columns(self, weights: Sequence[Tensor]) -> None:
        members = [i for i, part in enumerate(self._parts) if part.column]
        if not members:
            return
        sums = [_sum_columns(weights[i], self._parts[i]) for i in members]
        together = torch.cat([one.flatten() for one in sums])  # in float64: the order of ranks is below rounding
        if self.place.dim is not None:
            torch.distributed.all_reduce(together, group=self._group)
        parts = together.to(self.state.norms.dtype).split([one.numel() for one in sums])
        for i, part, one in zip(members, parts, sums, strict=True):
            self.state.norms[i], self.state.winners[i] = largest(part.view_as(one))

    def _measure_rows(self, weights: Sequence[Tensor]) -> None:
        members = [i for i, part in enumerate(self._parts) if not part.column]
        if not members:
            return
        best = torch.full((len(members), 3), -1.0, dtype=torch.float64, device=self.place.device)
        held = [(n, i) for n, i in enumerate(members) if weights[i].numel()]
        if held:
            plan = "".join(self._parts[i].own_layer.text for _, i in held)
            values = library.read([weights[i] for _, i in held], plan)
            for k, (n, i) in enumerate(held):
                best[n, 0] = values[int(self.linf)][k]
                best[n, 1:] = values[2][k, int(self.linf)]
                best[n, 1] += self._parts[i].begin
        every = self._gather(best)
        first = every[..., 0].argmax(0)  # of ranks that have the largest; NaN counts as such
        best = every[first, torch.arange(len(members), device=every.device)]
        for n, i in enumerate(members):
            self.state.norms[i], self.state.winners[i] = best[n, 0], best[n, 1:]

    def _compare(self) -> None:
        """Ranks that saw different layers, or sizes of them, would wait for each other or add up what is not alike."""
        named = repr([(i, use.name, plan_of(use).text) for i, use in zip(self.members, self.uses, strict=True)])
        digest = int.from_bytes(sha256(named.encode()).digest()[:7], "little")
        own = torch.tensor([digest], device=self.place.device)
        if bool((self._gather(own) != own).any()):
            raise RuntimeError(
                "convnorm: ranks see different layers or input sizes: give the same example to NormDecay on each"
            )
        self._compared = True


def _own_winner(winner: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
    """A winner among one's own rows; and which elements of its slice exist there: [rows], or [] for a whole row."""
    channel, window = winner[:1], winner[1:]
    if not part.column:
        own = channel - part.begin
        held = (own >= 0) & (own < part.end - part.begin)
        return torch.cat([own.clamp(0, part.end - part.begin - 1), window]), held[0]
    own = torch.cat([channel % part.columns, window])
    if part.layer.groups == 1:
        return own, None
    rows = torch.arange(part.begin, part.end, device=winner.device)
    return own, rows // part.rows == channel // part.columns


def _sum_columns(weight: Tensor, part: Part) -> Tensor:
    """[channels, windows] in float64: what these rows contribute to the sums of which a norm is the largest."""
    merged = [axis.merged_taps for axis in part.layer.axes]
    table = torch.zeros(part.layer.groups, part.columns, *merged, dtype=torch.float64, device=weight.device)
    most = READ_AT_ONCE.get(weight.device.type, READ_AT_ONCE_ELSEWHERE) // max(math.prod(weight.shape[1:]), 1)
    for group, groups, rows in _pieces(part, max(most, 1)):
        kernel = merge_taps(weight[rows].unflatten(0, (groups, -1)), part.layer.axes)
        table[group : group + groups] += kernel.abs().sum(1)
    return window_sums(table, [axis.inputs for axis in part.layer.axes])


def _pieces(part: Part, most: int) -> Iterator[tuple[int, int, slice]]:
    """Cut one's own rows into pieces, of ``most`` rows or fewer, that are whole groups or lie in a single one: the
    first group, how many, and the rows.
    """
    row = part.begin
    while row < part.end:
        group, within = divmod(row, part.rows)
        groups = 0 if within else min(part.end - row, most) // part.rows
        size = groups * part.rows or min(part.rows - within, part.end - row, most)
        yield group, max(groups, 1), slice(row - part.begin, row - part.begin + size)
        row += size
