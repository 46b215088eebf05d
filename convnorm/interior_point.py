"""An interior-point method for the projection where windows overlap or padding merges taps (``ball.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_GAP = 1e-14  # at least ||x - solution||^2 / 2; as near as that the face is known
MOST_STEPS = 80  # 10 to 20 are usual
STIFFEST = 1e12  # a larger ratio of multiplier to slack would leave no digits in Cholesky's factors


class InteriorPoint:
    """minimise ||x - x0||^2 / 2  such that  sum_a u[a] sum_i |(P x_i)_a| <= bound  for every window u

    for each of many channels at once: ``x0[channels, others, taps]`` with entries of order 1, ``bound[channels]``,
    ``merged[merged taps, taps]`` (P, or None for the identity) and ``counts[windows, merged taps]`` (u).

    Mehrotra's predictor-corrector method. With sizes ``y`` beside ``x``, in the slacks s >= 0 and their multipliers:

        s1 = y - P x  (p)      s2 = y + P x  (q)      s3 = bound - sum_i counts y_i  (pressure)
        x - x0 + P^T (p - q) = 0      p + q = counts^T pressure      p s1 = q s2 = pressure s3 = 0

    Eliminating all but the pressures leaves a system of taps for each x_i and one of windows for each channel.
    """

    def __init__(self, x0: Tensor, bound: Tensor, merged: Tensor | None, counts: Tensor) -> None:
        self.x0, self.merged, self.counts = x0, merged, counts
        norm = self.sums(self.merge(x0).abs()).amax(1)
        self.x = x0 * (bound / (2 * norm))[:, None, None]
        room = bound / (4 * x0.shape[1] * counts.sum(1).max())
        self.y = self.merge(self.x).abs() + room[:, None, None]
        self.bound = bound[:, None]
        pressure = x0.new_ones(len(x0), len(counts))
        half = (self.loads(pressure) / 2).expand_as(self.y)
        self.slacks = self.room()
        self.multipliers = [half, half, pressure]

    def room(self) -> list[Tensor]:
        """What the slacks should be."""
        along = self.merge(self.x)
        return [self.y - along, self.y + along, self.bound - self.sums(self.y)]

    def merge(self, x: Tensor) -> Tensor:
        return x if self.merged is None else x @ self.merged.T

    def spread(self, z: Tensor) -> Tensor:
        """The transpose of ``merge``."""
        return z if self.merged is None else z @ self.merged

    def sums(self, y: Tensor) -> Tensor:
        return y.sum(1) @ self.counts.T

    def loads(self, pressure: Tensor) -> Tensor:
        """The transpose of ``sums``: what presses on each merged tap."""
        return (pressure @ self.counts)[:, None]

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, the signs of P x (0 where held at zero) and which windows are active."""
        number = sum(slack[0].numel() for slack in self.slacks)
        for _ in range(MOST_STEPS):
            gap = self.products(self.slacks, self.multipliers)
            p, q, pressure = self.multipliers
            self.far_x = self.x - self.x0 + self.spread(p - q)
            self.far_y = self.loads(pressure) - p - q
            self.far_slacks = [should - s for should, s in zip(self.room(), self.slacks, strict=True)]
            misses = [far.flatten(1).abs().amax(1) for far in (self.far_x, self.far_y, *self.far_slacks)]
            miss = torch.stack(misses).amax(0)
            moving = (gap > LARGEST_GAP) | (miss > 1e-12)
            if not moving.any():
                break
            self.factor()
            zeros = [-m * s for m, s in zip(self.multipliers, self.slacks, strict=True)]
            _, _, slacks, multipliers = self.direction(zeros)
            step = self.longest(slacks, multipliers)
            ahead = self.products(
                self.moved(self.slacks, slacks, step), self.moved(self.multipliers, multipliers, step)
            )
            aim = gap / number * (ahead / gap) ** 3
            corrected = [zero + self.shaped(aim, zero) - ds * dm
                         for zero, ds, dm in zip(zeros, slacks, multipliers, strict=True)]  # fmt: skip
            dx, dy, slacks, multipliers = self.direction(corrected)
            step = 0.99 * self.longest(slacks, multipliers)
            finite = dx.isfinite().all(2).all(1) & multipliers[2].isfinite().all(1)
            step = torch.where(moving & finite, step, 0)
            if not step.any():
                break
            self.x, self.y = self.moved([self.x, self.y], [dx, dy], step)
            self.slacks = self.moved(self.slacks, slacks, step)
            self.multipliers = self.moved(self.multipliers, multipliers, step)
        (s1, s2, s3), (p, q, pressure) = self.slacks, self.multipliers
        signs = (p - q).sign() * (2 * torch.minimum(p, q) <= s1 + s2)  # of either, the one that tends to 0 is smaller
        return self.x, signs.to(torch.int8), pressure > s3

    @staticmethod
    def shaped(values: Tensor, like: Tensor) -> Tensor:
        return values.view(-1, *[1] * (like.dim() - 1))

    @staticmethod
    def products(slacks: list[Tensor], multipliers: list[Tensor]) -> Tensor:
        return sum((s * m).flatten(1).sum(1) for s, m in zip(slacks, multipliers, strict=True))

    def moved(self, points: list[Tensor], directions: list[Tensor], step: Tensor) -> list[Tensor]:
        """Where the step is 0, nothing moves, not even to NaN."""
        steps = [self.shaped(step, point) for point in points]
        return [torch.where(s > 0, p + s * d, p) for s, p, d in zip(steps, points, directions, strict=True)]

    def longest(self, slacks: list[Tensor], multipliers: list[Tensor]) -> Tensor:
        """The longest step, of at most 1, at which nothing is below 0."""
        step = torch.ones_like(self.x0[:, 0, 0])
        for point, direction in zip([*self.slacks, *self.multipliers], [*slacks, *multipliers], strict=True):
            ratio = torch.where(direction < 0, -point / direction, 1).flatten(1).amin(1)
            step = torch.minimum(step, ratio)
        return step

    def factor(self) -> None:
        p, q, pressure = self.multipliers
        self.softened = [torch.maximum(s, m / STIFFEST) for s, m in zip(self.slacks, self.multipliers, strict=True)]
        s1, s2, s3 = self.softened
        self.e, self.f = p / s1 + q / s2, q / s2 - p / s1
        self.slope = self.f / self.e
        stiffness = 4 * (p / s1) * (q / s2) / self.e
        if self.merged is None:
            self.diagonal = 1 + stiffness
            of_taps = self.slope.square() / self.diagonal
            coupling = self.counts * (1 / self.e + of_taps).sum(1)[:, None] @ self.counts.T
        else:
            eye = torch.eye(self.x0.shape[2], dtype=self.x0.dtype, device=self.x0.device)
            self.lower, _ = torch.linalg.cholesky_ex(eye + self.merged.T * stiffness[:, :, None] @ self.merged)
            pushed = self.merged.T * self.slope[:, :, None] @ self.counts.T  # [channels, others, taps, windows]
            pulled = torch.linalg.solve_triangular(self.lower, pushed, upper=False).flatten(1, 2)
            coupling = self.counts * (1 / self.e).sum(1)[:, None] @ self.counts.T + pulled.mT @ pulled
        self.coupling, _ = torch.linalg.cholesky_ex(coupling + torch.diag_embed(s3 / pressure))

    def direction(self, changes: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
        """Newton's step of x, y, the slacks and the multipliers that changes the products of the latter by so much."""
        (s1, s2, _), (p, q, pressure) = self.softened, self.multipliers
        t = [change - m * far for change, m, far in zip(changes, self.multipliers, self.far_slacks, strict=True)]
        a1, a2, a3 = t[0] / s1, t[1] / s2, t[2] / pressure
        h = a1 + a2 - self.far_y

        def x_and_y(load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            right = -self.far_x - self.spread(a1 - a2 + self.slope * (h - load))
            if self.merged is None:
                dx = right / self.diagonal
            else:
                dx = torch.cholesky_solve(right[..., None], self.lower).squeeze(3)
            along = self.merge(dx)
            return dx, along, (h - load - self.f * along) / self.e

        right = a3 + self.sums(x_and_y(torch.zeros_like(h[:, :1]))[2])
        d_pressure = torch.cholesky_solve(right[:, :, None], self.coupling).squeeze(2)
        dx, along, dy = x_and_y(self.loads(d_pressure))
        moves = [dy - along, dy + along, -self.sums(dy)]
        slacks = [move + far for move, far in zip(moves, self.far_slacks, strict=True)]
        return dx, dy, slacks, [a1 - p / s1 * moves[0], a2 - q / s2 * moves[1], d_pressure]
