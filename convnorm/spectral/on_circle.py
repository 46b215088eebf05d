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
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from .circle import Circle, half_grid
from .definite import factorisation_error, is_below, largest_eigenvalue, unit_roundoff

CHUNK = 1 << 28  # bytes of matrices at a time, at most
CACHED = 1 << 21  # on a CPU what its caches hold,
AT_ONCE = 32  # or so many matrices, that the coefficients are not read too often


class GramSymbol:
    """G[groups, F, n, n] of a circle's convolution, ``n`` the fewer of its rows and columns.

    It is a function of the phases ``spacing * f`` from one tap to the next.
    """

    def __init__(self, circle: Circle) -> None:
        kernel = circle.kernel.detach()
        kernel = kernel if kernel.shape[2] <= kernel.shape[1] else kernel.transpose(1, 2)
        taps = kernel.shape[3:]
        self.groups, self._rows, self.size = kernel.shape[:3]
        sizes = torch.linalg.matrix_norm(kernel.reshape(*kernel.shape[:3], -1).movedim(-1, 1))
        self._absolute = float(sizes.sum(1).max()) ** 2  # at least the sum of |K[a]|^T |K[b]|, in the spectral norm
        self._turns = sum(k - 1 for k in taps)  # at least those of a wave at any lag, where G is sampled
        self._more_turns = sum(arc.spacing * (k - 1) for arc, k in zip(circle.arcs, taps, strict=True))  # and elsewhere
        lags = list(product(*(range(1 - k, k) for k in taps)))
        self._lags = torch.tensor(lags[len(lags) // 2 :], dtype=torch.float64, device="cpu")  # 0 first
        self._even, self._odd = self._coefficients(kernel)

    def _coefficients(self, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """``C[t] + C[t]^T`` and ``C[t] - C[t]^T`` of half of the lags, [groups, lags, n * n].

        From as many values of G as it has lags, half of them conjugates of the others.
        """
        taps = kernel.shape[3:]
        points = half_grid([2 * k - 1 for k in taps])[1:]  # frequency 0, which comes first, is real
        places = torch.tensor(list(product(*map(range, taps))), dtype=torch.float64, device="cpu")
        read = (points @ places.T).to(kernel.device)
        spread = (points @ self._lags.T).to(kernel.device)
        waves = torch.stack([read.cos(), read.sin()], 1)  # [points, 2, taps]
        kernel = kernel.reshape(*kernel.shape[:3], -1).movedim(-1, 1)  # [groups, taps, rows, n]
        share = 2 / (2 * len(points) + 1)
        real = kernel.sum(1)
        even = (share * (real.mT @ real)).flatten(1)[:, None].repeat(1, len(self._lags), 1)
        odd = torch.zeros_like(even)
        kernel = kernel.flatten(2)
        step = max(1, CHUNK // (16 * real.numel()))
        for part in torch.arange(len(points), device=kernel.device).split(step) if len(points) else ():
            values = _summed(waves[part].flatten(0, 1), kernel).view(self.groups, len(part), 2, self._rows, self.size)
            both, (real, imaginary) = values.flatten(2, 3), values.unbind(2)
            crossed = real.mT @ imaginary
            even += _summed(2 * share * spread[part].cos().T, (both.mT @ both).flatten(2))
            odd += _summed(2 * share * spread[part].sin().T, (crossed - crossed.mT).flatten(2))
        even[:, 0] /= 2
        return even, odd

    def rounding(self, dtype: torch.dtype) -> float:
        """By how much a matrix rounded to this precision may be off, in the spectral norm."""
        sizes = 2 * float(torch.linalg.vector_norm(self._even, dim=2).sum(1).max())
        sizes += 2 * float(torch.linalg.vector_norm(self._odd, dim=2).sum(1).max())
        lags = 2 * len(self._lags)
        of_each = 3 * self._rows + 60 * self._turns + 5 * lags + 20  # roundings of a coefficient, and of their sum:
        roundings = lags * of_each + 30 * self._more_turns + 2 * lags + 8  # angles, 2 pi a turn, are rounded as well
        return sizes * unit_roundoff(dtype) + self._absolute * roundings * unit_roundoff(torch.float64)

    def at(self, phases: Tensor, dtype: torch.dtype = torch.complex128) -> Iterator[tuple[slice, Tensor]]:
        """Chunk by chunk of phases[F, axes], ``G[groups, chunk, n, n]``, rounded to ``dtype``. As C[-t] = C[t]^T,

            G = C[0] + sum over half of the lags t of  cos(f . t) (C[t] + C[t]^T) + i sin(f . t) (C[t] - C[t]^T)

        Summed in float64: what float32 means in a product of matrices is for its user to set (TF32, bfloat16).
        """
        angles = (phases @ self._lags.T).to(self._even.device)
        size = self.groups * self.size**2 * dtype.itemsize
        step = max(1, CHUNK // size)
        if angles.device.type == "cpu":
            step = min(step, max(AT_ONCE, CACHED // size))
        for first in range(0, len(phases), step):
            part = slice(first, first + step)
            gram = _summed(angles[part].cos(), self._even).to(dtype.to_real())
            if angles[part].any():
                gram = torch.complex(gram, _summed(angles[part].sin(), self._odd).to(dtype.to_real()))
            yield part, gram.unflatten(-1, (self.size, self.size))


def _summed(factors: Tensor, terms: Tensor) -> Tensor:
    """factors[F, T] @ terms[groups, T, size], in one product: one for each group would read all factors each time."""
    return torch.tensordot(factors, terms, ([1], [1])).movedim(0, 1)


def circle_phases(circle: Circle) -> Tensor:
    """phases[F, axes] of the circle's own frequencies."""
    spacings = [float(arc.spacing) for arc in circle.arcs]
    return half_grid(circle.points) * torch.tensor(spacings, dtype=torch.float64, device="cpu")


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
    return half_grid(points) * torch.tensor(spacings, dtype=torch.float64, device="cpu"), factor


def circle_upper(circle: Circle, level: float, rtol: float) -> tuple[Tensor, tuple[int, Tensor] | None]:
    """upper[groups] of the norm of the layer on the circle: ``level`` for groups proved to stay below it, else more,
    and then a group and phases[axes] where the circle does as much.

    A part of ``rtol`` may be lost to save time.
    """
    gram = GramSymbol(circle)
    phases, factor = coarse_phases(circle, rtol / 4)
    factor *= circle.scale * circle.factor
    square = (level / factor) ** 2
    dtype = torch.complex64
    error = gram.rounding(dtype)
    if gram.size * factorisation_error(gram.size, dtype) * square + error > rtol / 2 * square:
        dtype = torch.complex128
        error = gram.rounding(dtype)
    above = torch.cat([~is_below(part, square, error) for _, part in gram.at(phases, dtype)], 1).cpu()
    squares = torch.full((gram.groups,), square, dtype=torch.float64, device="cpu")
    most, error = None, gram.rounding(torch.complex128)
    while len(doubtful := above.nonzero()):  # eigenvalues cost many factorisations: of one matrix, for a new level
        group, at = doubtful[len(doubtful) // 2].tolist()
        most = group, phases[at]
        ((_, matrix),) = gram.at(phases[at : at + 1])
        slack = rtol / 64 if len(doubtful) > 1 else 0.0  # others may do as much, but for rounding
        square = max(square, float(largest_eigenvalue(matrix[group, 0], error)) * (1 + slack))
        squares[above.any(1)] = square
        left = above.any(0).nonzero().flatten()
        for part, matrices in gram.at(phases[left]):
            above[:, left[part]] &= ~is_below(matrices, square, error).cpu()
        above[group, at] = False
    return factor * squares.sqrt() * (1 + 4 * unit_roundoff(torch.float64)), most
