"""The norm of a zero padded layer from above, sharper than its circle's: the circle's largest modes, cut to the layer.

The layer is its circle's convolution ``T`` with inputs and outputs left out, and those are what keeps its norm below
the circle's. In the Fourier basis ``T`` is known: singular values ``s_i`` and vectors, *modes*, that are waves. With
``w_i = (left_i, right_i) / sqrt(2)``,

    [0, T; T^*, 0]  <=  rest I + sum over s_i > rest of (s_i - rest) w_i w_i^*

and so, cut to the layer's outputs and inputs,

    norm of the layer  <=  rest + largest eigenvalue of  D W D,    D = diag(sqrt(s_i - rest)),    W[i, j] = w_i . w_j

The more modes, the sharper, but even all of them may leave it some percent above the norm: they make up the positive
part of the left side alone. Modes come in pairs of conjugates, whose real and imaginary parts stand for them, so that W
is real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from .circle import Arc, Circle, half_grid, symbol
from .definite import is_below, unit_roundoff

MODES = (256, 1024, 2048, 3072, 4096)  # real ones, tried one after another
LEAST = 0.02  # of the largest singular value: modes below it stay in the rest, so that all vectors are well determined
CHUNK = 1 << 26  # bytes of symbols at a time
BISECTIONS = 5


def modes_upper(circle: Circle, level: float, bound: float, counts: Sequence[int] = MODES) -> float:
    """A bound for the norm of a layer of one group: ``level`` where that can be proved by so many modes, tried one
    after another, else as near to it as can be. ``bound`` is certain already.
    """
    level, bound = level / circle.scale, bound / circle.scale
    found = largest_modes(circle, counts[-1])
    for most in counts:
        modes = found.first(most)
        weighted = modes.cut_and_weighted(circle.arcs)
        if modes.rest < level and bool(is_below(weighted, level - modes.rest)):
            return level * circle.scale
        if most >= 2 * len(found.values):
            break
    low = max(level, modes.rest)
    for _ in range(BISECTIONS):
        middle = (low + bound) / 2
        if bool(is_below(weighted, middle - modes.rest)):
            bound = middle
        else:
            low = middle
    return bound * circle.scale


@dataclass(frozen=True)
class Modes:
    """The largest modes: one of each pair of conjugates, or a single one at a frequency that is its own negative.

    ``place[modes, axes]`` is the frequency, in steps of the circle; ``left[modes, rows]``, ``right[modes, columns]``.
    """

    values: Tensor
    place: Tensor
    left: Tensor
    right: Tensor
    single: Tensor
    rest: float  # at least every other singular value, and what rounding may have moved

    def first(self, real: int) -> Modes:
        """Those that make about so many real modes: one of a single, two of a pair."""
        most = real // 2
        if most >= len(self.values):
            return self
        rest = max(self.rest, float(self.values[most]) + rounding(self))
        return Modes(
            self.values[:most], self.place[:most], self.left[:most], self.right[:most], self.single[:most], rest
        )

    def cut_and_weighted(self, arcs: Sequence[Arc]) -> Tensor:
        """D W D of the real modes, sqrt(2) Re w and sqrt(2) Im w of each pair."""
        same = self._cut(arcs, self.left.conj(), self.right.conj(), -1)
        crossed = self._cut(arcs, self.left, self.right, 1)
        real, imaginary = same + crossed, same - crossed
        gram = torch.cat([torch.cat([real.real, real.imag], 1), torch.cat([real.imag.T, imaginary.real], 1)])
        weight = (self.values - self.rest).clamp_min(0).sqrt()
        weight = torch.cat(
            [torch.where(self.single, weight / math.sqrt(2), weight), weight.masked_fill(self.single, 0)]
        )
        return weight[:, None] * gram * weight

    def _cut(self, arcs: Sequence[Arc], left: Tensor, right: Tensor, sign: int) -> Tensor:
        """Inner products, over the layer's outputs and inputs, of the modes with waves of ``sign`` times their
        frequency and vectors ``left`` and ``right``.
        """
        steps = self.place[None] + sign * self.place[:, None]
        outputs = left @ self.left.T
        for axis, arc in enumerate(arcs):
            outputs = outputs * _kept(arc.outputs, steps[..., axis])
        strides = [arc.stride for arc in reversed(arcs)]  # as the polyphase components stand in the columns
        right, own = right.unflatten(1, (*strides, -1)), self.right.unflatten(1, (*strides, -1))
        inputs = torch.zeros_like(outputs)
        for phases in product(*map(range, strides)):
            part = right[(slice(None), *phases)] @ own[(slice(None), *phases)].T
            for axis, (arc, phase) in enumerate(zip(arcs, reversed(phases), strict=True)):
                part = part * _kept(arc.inputs[phase], steps[..., axis])
            inputs += part
        return (outputs + inputs) / 2


def rounding(modes: Modes) -> float:
    """By how much eigenvectors found in float64 may be off, in terms of the circle's convolution."""
    size = min(modes.left.shape[1], modes.right.shape[1])
    return 64 * size * unit_roundoff(torch.float64) / LEAST * float(modes.values[0])


def _kept(places: Tensor, steps: Tensor) -> Tensor:
    """(1 / N) sum over the places kept of exp(2 pi i step place / N)."""
    return torch.fft.ifft(places.to(steps.device, torch.float64))[steps % len(places)]


def largest_modes(circle: Circle, real: int) -> Modes:
    """As many modes of a circle of one group as make up ``real`` real ones, or all that stand above ``LEAST``."""
    points = torch.tensor(circle.points, device="cpu")
    frequencies = half_grid(circle.points)
    place = (frequencies * points / (2 * math.pi)).round().long()
    single = (2 * place % points == 0).all(1)
    chunk = max(1, CHUNK // (circle.kernel.numel() * 16))
    best, rest, least = None, 0.0, 0.0
    for own in (single, ~single):
        for part in own.nonzero().flatten().split(chunk) if own.any() else ():
            matrices = symbol(circle, frequencies[part])[0].detach()
            matrices = matrices.real if own is single else matrices
            found, left_out = _modes_at(matrices, place[part].to(matrices.device), least)
            joined = found if best is None else tuple(map(torch.cat, zip(best, found, strict=True)))
            order = joined[0].argsort(descending=True)
            order, others = order[: real // 2], joined[0][order[real // 2 :]]
            rest = max([rest, left_out, *others[:1].tolist()])
            best = tuple(part[order] for part in joined)
            least = best[0][-1].item() if len(order) == real // 2 else 0.0
    values, *parts = best
    clear = values >= LEAST * values[0]
    rest = max([rest, *values[~clear][:1].tolist()])
    modes = Modes(values[clear], *(part[clear] for part in parts), rest)
    return replace(modes, rest=rest + rounding(modes))


def _modes_at(matrices: Tensor, place: Tensor, least: float) -> tuple[tuple[Tensor, ...], float]:
    """Singular values and vectors of ``matrices[F, rows, columns]``, with their place, and whether they are single. And
    the largest value of those left out, which are all below ``least``.
    """
    few_rows = matrices.shape[1] <= matrices.shape[2]
    small = matrices.mH if few_rows else matrices  # [F, more, fewer]
    squares, vectors = torch.linalg.eigh(small.mH @ small)
    values = squares.clamp_min(0).sqrt()
    few = int((values < least).sum(1).min())
    left_out = values[:, :few].amax().item() if few else 0.0
    values, vectors = values[:, few:], vectors[..., few:]
    others = (small @ vectors) / values.clamp_min(torch.finfo(values.dtype).tiny)[:, None]
    own, other = (v.mT.flatten(0, 1).to(torch.complex128) for v in (vectors, others))
    left, right = (own, other) if few_rows else (other, own)
    count = values.shape[1]
    single = torch.full((values.numel(),), not matrices.is_complex(), device=values.device)
    return (values.flatten(), place.repeat_interleave(count, 0), left, right, single), left_out
