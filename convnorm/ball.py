"""The nearest weights of bounded norm: exact Euclidean projection of a layer's channels, all of them at once.

A norm of a layer is the largest over its channels, so the bound holds one channel at a time. With ``x[others, taps]``
the weights of a channel (a column of the layer's matrix for l1, a row for linf), ``P`` the merged taps and ``u`` the
windows (``geometry.py``), the nearest weights to ``x0`` solve

    minimise ||x - x0||^2   such that   sum_a u[a] sum_i |(P x_i)_a| <= bound   for every window u

The solution lies on a *face*: some merged taps are held at zero, the others keep a sign, and some windows are *active*,
their sums equal to the bound. On a face the projection is linear in weight and bound together, so the face gives the
value (``on_face``) and, being the same for all weights nearby, the derivatives. It is found

- where windows are disjoint and nothing merges (the usual case): as the threshold of one l1 ball for each channel and
  window, by Newton's iteration, which ends at the exact one (Michelot, 1986);
- where windows overlap (inputs smaller than the kernel): by Newton's method on the few *pressures* of the windows,
  their multipliers;
- where that circles, and where padding merges taps, by an interior-point method (``interior_point.py``).

All arithmetic is in float64; ``settle`` then rounds such that the bound holds for the weights as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .gradients import static
from .interior_point import InteriorPoint
from .plan import LayerPlan, Lists, read_plan

MOST_STEPS = 40  # of Newton's method on the pressures; some 8 are usual
MOST_TRIES = 50  # to round merged taps that cancel: 1 to 3 are usual


@dataclass(frozen=True, eq=False)
class Ball:
    """What the weights of a channel must lie in.

    ``merged[merged taps, taps]`` holds 0 and 1; it is None where nothing merges, and the merged taps are the taps.
    ``counts[windows, merged taps]`` holds the windows that no other implies, ``counted`` the taps that are in any,
    and ``disjoint``, where windows share no tap, their taps: indices [windows of one size, size].
    """

    merged: Tensor | None
    counts: Tensor
    counted: Tensor
    disjoint: tuple[Tensor, ...] | None

    def merge(self, x: Tensor) -> Tensor:
        return x if self.merged is None else x @ self.merged.T

    def sums(self, x: Tensor) -> Tensor:
        """[channels, windows] of ``x[channels, others, taps]``, in float64: a channel's norm is the largest."""
        x = x if self.merged is None else self.merge(x.double())
        return x.abs().sum(1, dtype=torch.float64) @ self.counts.T


@dataclass(frozen=True, eq=False)
class Face:
    """signs[channels, others, merged taps], 0 where held at zero; active[channels, windows]."""

    signs: Tensor
    active: Tensor


@dataclass(frozen=True, eq=False)
class Tables:
    """``Ball`` as arrays, and how hard it is: ``disjoint`` holds the windows' taps, or None where they share any."""

    merged: np.ndarray | None
    counts: np.ndarray
    disjoint: tuple[np.ndarray, ...] | None


@lru_cache(maxsize=1024)
def tables_of(plan: str, column: bool) -> Tables:
    """The windows of one layer; of several uses of one weight, those of all."""
    tables = [_tables(layer, column) for layer in read_plan(plan)]
    merged, ids = np.unique(np.concatenate([merged for merged, _ in tables]), axis=0, return_inverse=True)
    windows, ids = [], ids.reshape(-1)
    for _, counts in tables:
        own, ids = ids[: counts.shape[1]], ids[counts.shape[1] :]
        windows.append(np.zeros((len(counts), len(merged))))
        windows[-1][:, own] = counts
    counts = _not_implied(np.concatenate(windows), merged)
    needed = counts.any(0)
    if (merged[needed].sum(1) > 1).any():
        return Tables(merged[needed], counts[:, needed], None)
    counts = counts[:, needed] @ merged[needed]  # in the order of the taps
    if counts.sum(0).max() > 1:
        return Tables(None, counts, None)
    of_size: dict[int, list[np.ndarray]] = {}
    for window in counts:
        of_size.setdefault(int(window.sum()), []).append(window.nonzero()[0])
    return Tables(None, counts, tuple(np.stack(taps) for size, taps in of_size.items() if size))


@lru_cache(maxsize=1024)
def ball_of(plan: str, column: bool, device: torch.device) -> Ball:
    tables = tables_of(plan, column)
    counted = (tables.counts if tables.merged is None else tables.counts @ tables.merged).any(0)
    return Ball(
        None if tables.merged is None else torch.tensor(tables.merged, device=device),
        torch.tensor(tables.counts, device=device),
        torch.tensor(counted, device=device),
        None if tables.disjoint is None else tuple(torch.tensor(taps, device=device) for taps in tables.disjoint),
    )


def _tables(layer: LayerPlan, column: bool) -> tuple[np.ndarray, np.ndarray]:
    """merged[merged taps, taps] and counts[windows, merged taps]: the products of those of the axes."""
    merged, counts = np.ones((1, 1)), np.ones((1, 1))
    for axis in layer.axes:
        taps = axis.merged or tuple((tap,) for tap in range(axis.taps))
        merged = np.kron(merged, _counts(taps, axis.taps))
        counts = np.kron(counts, _counts(axis.inputs if column else axis.outputs, len(taps)))
    return merged, counts


def _counts(lists: Lists, size: int) -> np.ndarray:
    return np.stack([np.bincount(np.array(one, dtype=int), minlength=size) for one in lists]).astype(float)


def _not_implied(windows: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """The windows less those that another one bounds: entry by entry, or since |a + b| <= |a| + |b| tap by tap."""
    single = merged.sum(1) == 1
    spread, alone = windows @ merged, windows[:, single] @ merged[single]
    kept: list[int] = []
    for i in np.lexsort((-alone.sum(1), -spread.sum(1))):  # whatever implies a window counts more taps, or merges less
        implied = (windows[kept] >= windows[i]).all(1) | (alone[kept] >= spread[i]).all(1)
        if not implied.any():
            kept.append(i)
    return windows[kept]


def nearest(x0: Tensor, bound: Tensor, ball: Ball) -> tuple[Tensor, Face]:
    """The projection of ``x0[channels, others, taps]`` onto sums of at most ``bound[channels]``, and its face.

    In float64, for channels that offend, with a bound above 0.
    """
    scale = x0.abs().amax((1, 2))
    x0, bound = x0 / scale[:, None, None], bound / scale
    if ball.disjoint is not None:
        x, face = _by_threshold(x0, bound, ball)
    elif ball.merged is None:
        x, face, found = _by_pressures(x0, bound, ball)
        left = (~found).nonzero().squeeze(1)
        if len(left):
            x[left], other = _by_interior_points(x0[left], bound[left], ball)
            face.signs[left], face.active[left] = other.signs, other.active
    else:
        x, face = _by_interior_points(x0, bound, ball)
    return x * scale[:, None, None], face


def _by_threshold(x0: Tensor, bound: Tensor, ball: Ball) -> tuple[Tensor, Face]:
    x = x0.clone()
    for taps in ball.disjoint:
        part = x0[:, :, taps].transpose(1, 2).flatten(2)  # [channels, windows, others * taps of a window]
        offends = part.abs().sum(2) > bound[:, None]
        part[offends] = shrink(part[offends], bound[:, None].expand_as(offends)[offends])
        x[:, :, taps] = part.unflatten(2, (x0.shape[1], -1)).transpose(1, 2)
    return x, Face(x.sign().to(torch.int8), ball.sums(x0) > bound[:, None])


def shrink(x: Tensor, bound: Tensor) -> Tensor:
    """The nearest ``[rows, entries]`` with absolute sums ``bound[rows]`` > 0: sign(x) relu(|x| - threshold).

    Newton's iteration for the threshold, counted from the largest entry down so that nothing cancels: ``height`` is
    that of the largest entry of the result, and falls to it.

    >>> shrink(torch.tensor([[3.0, -2.0, 0.5]]), torch.tensor([2.0]))
    tensor([[ 1.5000, -0.5000,  0.0000]])
    """
    sizes = x.abs()
    below = sizes.amax(1, keepdim=True) - sizes
    bound = bound[:, None]
    height = (bound + below.sum(1, keepdim=True)) / below.shape[1]
    number = None
    while True:
        left = (height - below).clamp_(min=0)
        excess = left.sum(1, keepdim=True) - bound
        number, before = left.sign_().sum(1, keepdim=True), number
        lower = height - excess / number
        if before is not None and torch.equal(number, before):
            return (lower - below).clamp_(min=0).copysign_(x)
        height = torch.minimum(height, torch.maximum(lower, bound / number))  # it falls, whatever the rounding


def on_face(
    x0: Tensor, bound: Tensor, face: Face, counts: Tensor, merged: Tensor | None = None, *, disjoint: bool = False
) -> Tensor:
    """The nearest point on a face: linear in ``x0`` and ``bound``, and differentiable.

    The held merged taps are subspaces, the active windows hyperplanes:  x = N x0 - G^T (G G^T)^+ (G x0 - bound)
    with N the projection onto the subspaces and G = N (signs times counts) the normals of the hyperplanes.
    """
    signs, counts = face.signs.to(x0.dtype), face.active[:, :, None] * counts.to(x0.dtype)
    held = (signs == 0) & counts.any(1)[:, None]
    target = torch.where(face.active, bound[:, None], 0)  # a bound may be inf
    if merged is None:  # all normals at one tap are parallel
        kept = x0.masked_fill(held, 0)
        excess = (counts @ (signs * kept).sum(1)[:, :, None]).squeeze(2) - target
        number = signs.abs().sum(1)
        if disjoint:
            pressure = excess / (counts @ number[:, :, None]).squeeze(2).clamp(min=1)
        else:
            pressure = _solve(counts * number[:, None] @ counts.mT, excess)
        return kept - signs * (pressure[:, None] @ counts)
    merged = merged.to(x0.dtype)
    project = _null_space(held, merged)
    kept = (project @ x0[..., None]).squeeze(3)
    normals = torch.einsum("bwa,bia,at->bwit", counts, signs, merged)
    normals = torch.einsum("bits,bwis->bwit", project, normals).flatten(2)
    excess = (normals @ x0.flatten(1)[:, :, None]).squeeze(2) - target
    pressure = _solve(normals @ normals.mT, excess)
    return kept - (pressure[:, None] @ normals).view_as(kept)


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """The least solution where windows say the same."""
    return (torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ right[:, :, None]).squeeze(2)


def _null_space(held: Tensor, merged: Tensor) -> Tensor:
    """[..., taps, taps]: the projection onto ``P x = 0`` in the merged taps that are held. There are few such sets."""
    sets, which = held.flatten(0, 1), slice(None)
    if not static():
        sets, which = torch.unique(sets, dim=0, return_inverse=True)
    normals = sets[:, :, None] * merged
    project = (
        torch.eye(normals.shape[2], dtype=normals.dtype, device=held.device) - torch.linalg.pinv(normals) @ normals
    )
    return project[which].unflatten(0, held.shape[:2])


def _by_pressures(x0: Tensor, bound: Tensor, ball: Ball) -> tuple[Tensor, Face, Tensor]:
    """sign(x0) relu(|x0| - sum_w pressure_w u_w), where Newton's method on the pressures of the windows ends at it.

    The last tensor says for which channels: those with sums of at most the bound, and equal to it where there is any
    pressure, which no other point has. In the others, some in a hundred, Newton's method circles.
    """
    sizes, signs = x0.abs(), x0.sign()
    pressure = bound.new_zeros(len(bound), len(ball.counts))
    near = 1e-13 * (bound + ball.sums(x0).amax(1))[:, None]
    eye = torch.eye(len(ball.counts), dtype=x0.dtype, device=x0.device)
    for _ in range(MOST_STEPS):
        left = (sizes - (pressure @ ball.counts)[:, None]).clamp_(min=0)
        excess = left.sum(1) @ ball.counts.T - bound[:, None]
        number = left.sign_().sum(1)
        done = torch.where(pressure > 0, excess.abs(), excess).amax(1) <= near.squeeze(1)
        if done.all():
            break
        gram = ball.counts * number[:, None] @ ball.counts.T
        diagonal = gram.diagonal(dim1=1, dim2=2)
        active = pressure + excess / diagonal.clamp(min=1) > 0
        # the excess of the active windows to 0, the pressure of the others too
        target = torch.where(active, excess + (gram @ torch.where(active, 0, pressure)[:, :, None]).squeeze(2), 0)
        gram = torch.where(active[:, :, None] & active[:, None], gram * (1 + 1e-13 * eye), eye)
        change, _ = torch.linalg.solve_ex(gram, target[:, :, None])
        change = torch.where(done[:, None], 0, change.squeeze(2))
        pressure = torch.where(done[:, None] | active, pressure + change, 0).clamp(min=0)
    face = Face((signs * left).to(torch.int8), pressure > 0)
    return on_face(x0, bound, face, ball.counts), face, done


def _by_interior_points(x0: Tensor, bound: Tensor, ball: Ball) -> tuple[Tensor, Face]:
    """The face, and the better of two points: that of the method, or the one on the face, exact where the face is."""
    if ball.merged is None:  # a tap in no window stays as it is
        taps = ball.counted.nonzero().squeeze(1)
        inner, inner_signs, active = InteriorPoint(x0[:, :, taps], bound, None, ball.counts[:, taps]).solve()
        found = x0.index_copy(2, taps, inner)
        signs = torch.zeros_like(x0, dtype=torch.int8).index_copy(2, taps, inner_signs)
    else:
        found, signs, active = InteriorPoint(x0, bound, ball.merged, ball.counts).solve()
    face = Face(signs, active)
    inside, on = (
        _scale_into(point, bound, ball) for point in (found, on_face(x0, bound, face, ball.counts, ball.merged))
    )
    better = (on - x0).square().sum((1, 2)) <= (inside - x0).square().sum((1, 2))
    return torch.where(better[:, None, None], on, inside), face


def _scale_into(x: Tensor, bound: Tensor, ball: Ball) -> Tensor:
    factor = (bound / ball.sums(x).amax(1)).clamp(max=1)
    return torch.where(ball.counted, x * factor[:, None, None], x)


def settle(x: Tensor, bound: Tensor, ball: Ball, dtype: torch.dtype) -> Tensor:
    """``x`` in the weights' own precision, its sums at most ``bound`` as anyone adds them up in float64.

    Rounded towards zero, which shrinks every sum but those of merged taps that cancel: what still is over is scaled
    down, by more each time, at last to zero.
    """
    limit = below(bound, x[0].numel() * ball.counts.shape[1])
    for tries in range(MOST_TRIES + 1):
        stored = toward_zero(x, dtype)
        sums = ball.sums(stored)
        if ball.merged is not None:  # adding up in another order may differ by parts of what cancels
            sums = sums + 2.0**-50 * (ball.merge(stored.double().abs()).sum(1) @ ball.counts.T)
        norm = sums.amax(1)
        over = norm > limit
        if not over.any():
            break
        factor = limit / norm * (1 - 2.0 ** (tries - MOST_TRIES))
        x = torch.where(over[:, None, None] & ball.counted, x * factor[:, None, None], x)
    return stored


def below(bound: Tensor, additions: int) -> Tensor:
    """Less than the bound by what so many additions in float64 may lose."""
    return bound * (1 - additions * 2.0**-52)


def toward_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in another precision, nowhere larger.

    >>> toward_zero(torch.tensor([1.0039, -0.3], dtype=torch.float64), torch.bfloat16).tolist()
    [1.0, -0.298828125]
    """
    if dtype == x.dtype:
        return x
    rounded = x.to(dtype)
    bits = rounded.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    return (bits - (rounded.double().abs() > x.abs()).to(bits.dtype)).view(dtype)
