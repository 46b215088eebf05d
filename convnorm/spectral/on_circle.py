"""The norm of a circle's convolution from above: the largest over its frequencies, each a small Gram matrix.

The Gram matrix of the symbol is itself a trigonometric polynomial,

    G(f) = K(f)^* K(f) = sum_t C[t] exp(i f . t),    C[t] = sum_a K[a]^T K[a + t]

(or ``K K^*``, whichever is smaller) so that the kernel is read once and each frequency costs a sum of few matrices. All
that is asked of most frequencies is whether they stay below a level, which a Cholesky factorisation answers.

Where the circle has more points than it needs, fewer are looked at: the symbol of ``k`` taps is of degree
``(k - 1) / 2``, and between points that are ``2 h`` apart exceeds the largest of their values at most by
``1 / cos((k - 1) h / 2)`` (Duffin and Schaeffer), on each axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor

from .circle import Circle, half_grid
from .definite import factorisation_error, is_below, largest_eigenvalue, unit_roundoff

CHUNK = {"cpu": 1 << 23}  # bytes of Gram matrices at a time: what caches hold,
CHUNK_ELSEWHERE = 1 << 28  # or what keeps a GPU busy


class GramSymbol:
    """G[groups, F, n, n] of a circle's convolution, ``n`` the fewer of its rows and columns.

    It is a function of the phases ``spacing * f`` from one tap to the next.
    """

    def __init__(self, circle: Circle) -> None:
        kernel = circle.kernel.detach()
        self._kernel = kernel if kernel.shape[2] <= kernel.shape[1] else kernel.transpose(1, 2)
        self._taps = kernel.shape[3:]
        self.groups, self.size = self._kernel.shape[0], self._kernel.shape[2]
        lags = list(product(*(range(1 - taps, taps) for taps in self._taps)))
        sizes = torch.linalg.matrix_norm(kernel.reshape(*kernel.shape[:3], -1).movedim(-1, 1))
        self._absolute = float(sizes.sum(1).max()) ** 2  # at least the sum of |K[a]|^T |K[b]|, in the spectral norm
        spans = [arc.spacing * (taps - 1) for arc, taps in zip(circle.arcs, self._taps, strict=True)]
        self._angle = 2 * math.pi * sum(spans)  # at least that of any wave at any lag
        self._lags = torch.tensor(lags[len(lags) // 2 :], dtype=torch.float64)
        self._half = torch.stack([self._coefficient(lag) for lag in lags[len(lags) // 2 :]], 1)  # C[0] first

    def _coefficient(self, lag: Sequence[int]) -> Tensor:
        here = [slice(max(0, -t), taps - max(0, t)) for t, taps in zip(lag, self._taps, strict=True)]
        there = [slice(max(0, t), taps - max(0, -t)) for t, taps in zip(lag, self._taps, strict=True)]
        one, other = (self._kernel[(..., *place)].movedim(2, -1).flatten(1, -2) for place in (here, there))
        return one.mT @ other

    def rounding(self, dtype: torch.dtype) -> float:
        """By how much a matrix rounded to this precision may be off, in the spectral norm."""
        sizes = 2 * float(torch.linalg.matrix_norm(self._half).sum(1).max())
        terms = self._kernel.shape[1] * math.prod(self._taps) + 2 * self._half.shape[1]
        exact = (terms + 4 * self._angle + 8) * unit_roundoff(torch.float64)  # angles are rounded as well
        return 2 * sizes * unit_roundoff(dtype) + self._absolute * exact

    def at(self, phases: Tensor, dtype: torch.dtype = torch.complex128) -> Iterator[tuple[slice, Tensor]]:
        """Chunk by chunk of phases[F, axes], ``G[groups, chunk, n, n]``, rounded to ``dtype``. As C[-t] = C[t]^T,

            G = C[0] + sum over half of the lags t of  cos(f . t) (C[t] + C[t]^T) + i sin(f . t) (C[t] - C[t]^T)

        Summed in float64: what float32 means in a product of matrices is for its user to set (TF32, bfloat16).
        """
        even, odd = self._half + self._half.mT, self._half - self._half.mT
        even[:, 0] /= 2
        angles = (phases @ self._lags.T).to(even.device)
        budget = CHUNK.get(even.device.type, CHUNK_ELSEWHERE)
        step = max(1, budget // (self.groups * self.size**2 * dtype.itemsize))
        for first in range(0, len(phases), step):
            part = slice(first, first + step)
            gram = (angles[part].cos() @ even.flatten(2)).to(dtype.to_real())
            if angles[part].any():
                gram = torch.complex(gram, (angles[part].sin() @ odd.flatten(2)).to(dtype.to_real()))
            yield part, gram.unflatten(-1, (self.size, self.size))


def circle_phases(circle: Circle) -> Tensor:
    """phases[F, axes] of the circle's own frequencies."""
    return half_grid(circle.points) * torch.tensor([float(arc.spacing) for arc in circle.arcs], dtype=torch.float64)


def coarse_phases(circle: Circle, share: float) -> tuple[Tensor, float]:
    """Phases enough to find the norm up to a factor of about ``1 + share``, and that factor.

    On each axis those of its circle, or of fewer points.
    """
    points, spacings, factor = [], [], 1.0
    for arc, taps in zip(circle.arcs, circle.kernel.shape[3:], strict=True):
        angle = math.pi * (taps - 1) / 2
        enough = max(taps, math.ceil(angle / math.acos(1 / (1 + share / len(circle.arcs)))))
        if taps == 1 or enough < arc.points:
            points.append(enough)
            spacings.append(1.0)
            factor /= math.cos(angle / enough)
        else:
            points.append(arc.points)
            spacings.append(float(arc.spacing))
    return half_grid(points) * torch.tensor(spacings, dtype=torch.float64), factor


def circle_upper(circle: Circle, level: float, rtol: float) -> Tensor:
    """upper[groups] of the norm on the circle: ``level`` for groups proved to stay below it, else more.

    A part of ``rtol`` may be lost to save time.
    """
    gram = GramSymbol(circle)
    phases, factor = coarse_phases(circle, rtol / 4)
    square = (level / factor) ** 2
    dtype = torch.complex64
    error = gram.rounding(dtype)
    if gram.size * factorisation_error(gram.size, dtype) * square + error > rtol / 2 * square:
        dtype = torch.complex128
        error = gram.rounding(dtype)
    above = torch.cat([~is_below(part, square, error) for _, part in gram.at(phases, dtype)], 1).cpu()
    upper = torch.full((gram.groups,), square, dtype=torch.float64)
    doubtful = above.any(0)
    if not doubtful.any():
        return factor * upper.sqrt() * (1 + 4 * unit_roundoff(torch.float64))
    above = above[:, doubtful]
    error = gram.rounding(torch.complex128)
    for part, matrices in gram.at(phases[doubtful]):
        group, _ = above[:, part].nonzero(as_tuple=True)
        largest = largest_eigenvalue(matrices[above[:, part].to(matrices.device)], error).cpu()
        upper.scatter_reduce_(0, group, largest, "amax")
    return factor * upper.sqrt() * (1 + 4 * unit_roundoff(torch.float64))
