"""Lanczos: the largest singular value of a layer from applying it and its adjoint, a lower bound at every step.

From a random start it also yields an upper bound that holds with a probability that can be chosen. Let ``p_j`` be the
orthonormal polynomials of the process, ``q_j = p_j(A) q_0`` its orthonormal vectors, ``A`` the layer's Gram matrix, and
``v`` a unit eigenvector of its largest eigenvalue ``lambda``. By Bessel's inequality

    1 >= sum_j (v . q_j)^2 = (v . q_0)^2 sum_j p_j(lambda)^2

and ``|v . q_0| > t`` but with probability ``t sqrt(2 n / pi)``, as ``q_0`` is uniform on the sphere. So ``lambda`` is
at most where ``sum_j p_j(lambda)^2 = 1 / t^2``. This is at least as sharp as the bound of Kuczynski and Wozniakowski
(1992), whose Chebyshev polynomial is one of those that the ``p_j`` do best among, and far sharper where the largest
singular value stands alone.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..layers import Layer
from .rayleigh import without_scale

MEMORY = 1 << 30  # bytes of vectors
LOOK_BACK = 5  # steps: a few of them may add little
ORDER = 3  # the error is taken to fall as this power of the steps: it is then steps / ORDER times what a step adds
STARTS = 2  # of the probable bound, which fails only if all of them do: each may fail too often for rounding to matter
ROUNDING = 1e-12  # of a vector's component, over a whole process in float64


def in_precision(layer: Layer, precision: torch.dtype) -> Layer:
    """The layer for a search: without its scale, which could overflow."""
    weight = without_scale(layer).weight.detach().to(precision)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    return replace(layer, weight=weight)


class Lanczos:
    """The process on the layer's smaller side, with all its vectors kept orthogonal to each other.

    They lie in memory with channels last, which is fastest.
    """

    def __init__(self, layer: Layer, start: Tensor | None = None, generator: torch.Generator | None = None) -> None:
        ins, outs = (layer.in_channels, *layer.in_shape), (layer.out_channels, *layer.geometry.out_shape)
        self._on_inputs = math.prod(ins) <= math.prod(outs)
        self._there, self._back = (layer, layer.adjoint) if self._on_inputs else (layer.adjoint, layer)
        channels, *places = ins if self._on_inputs else outs
        self._shape = (1, *places, channels)
        weight = layer.weight
        if start is None:
            if generator is None:
                generator = torch.Generator(weight.device).manual_seed(0)
            first = torch.randn(self._shape, dtype=weight.dtype, device=weight.device, generator=generator)
        else:
            first = (start.to(weight) if self._on_inputs else layer(start.to(weight))).movedim(1, -1)
        self.size = first.numel()
        self._next = first.flatten() / torch.linalg.vector_norm(first).clamp_min(torch.finfo(weight.dtype).tiny)
        self._basis = first.new_empty(0, self.size)
        self._diagonal: list[float] = []
        self._beside: list[float] = []  # the diagonal; the last leads out of the space
        self._least = 32 * torch.finfo(weight.dtype).eps

    @property
    def steps(self) -> int:
        return len(self._diagonal)

    @property
    def exhausted(self) -> bool:
        """Whether the space holds all that can be reached from its start, or as much as fits into memory."""
        reached = bool(self._beside) and self._beside[-1] <= self._least * max(self._diagonal)
        full = (self.steps + 1) * self.size * self._basis.element_size() > MEMORY
        return reached or (full and self.steps > 0) or self.steps >= self.size

    def run(self, rtol: float, steps: int, look_back: int = LOOK_BACK) -> None:
        """Until the largest singular value is found to about ``rtol``, or that many steps are done."""
        squares: list[float] = []
        while self.steps < steps and not self.exhausted:
            self.extend()
            squares.append(self.ritz())
            if len(squares) > look_back:
                added = (squares[-1] - squares[-1 - look_back]) / look_back
                if added * self.steps / ORDER <= 2 * rtol * squares[-1]:
                    break

    @torch.no_grad()
    def extend(self) -> None:
        """One step: the layer and its adjoint, once each."""
        basis = self._kept(self._next)
        image = self._there(self._next.view(self._shape).movedim(-1, 1))
        self._diagonal.append(torch.linalg.vector_norm(image, dtype=torch.float64).item() ** 2)
        rest = self._back(image).movedim(1, -1).flatten().sub(self._next, alpha=self._diagonal[-1])
        if self._beside:
            rest.sub_(basis[-2], alpha=self._beside[-1])
        rest -= basis.T @ (basis @ rest)  # of which little is left: once is enough
        self._beside.append(torch.linalg.vector_norm(rest, dtype=torch.float64).item())
        self._next = rest / max(self._beside[-1], torch.finfo(rest.dtype).tiny)

    def _kept(self, vector: Tensor) -> Tensor:
        if self.steps == len(self._basis):
            grown = vector.new_empty(max(1, 2 * self.steps), self.size)
            grown[: self.steps] = self._basis
            self._basis = grown
        self._basis[self.steps] = vector
        return self._basis[: self.steps + 1]

    def ritz(self) -> float:
        """The square of the largest singular value found."""
        return float(np.linalg.eigvalsh(self._projected())[-1])

    def _projected(self) -> np.ndarray:
        """The Gram matrix in coordinates of the basis."""
        beside = self._beside[:-1]
        return np.diag(self._diagonal) + np.diag(beside, 1) + np.diag(beside, -1)

    def right(self) -> Tensor:
        """[1, channels, *in_shape]: the input whose image is the longest found."""
        basis = self._basis[: self.steps]
        largest = torch.from_numpy(np.linalg.eigh(self._projected())[1][:, -1]).to(basis)
        side = (largest @ basis).view(self._shape).movedim(-1, 1)
        if self._on_inputs:
            return side
        right = self._there(side)
        return right if right.any() else torch.ones_like(right)  # of a layer that is zero any input does

    def upper(self, failure: float) -> float:
        """At least the largest squared singular value, but with this probability, given a random start."""
        t = failure / math.sqrt(2 * self.size / math.pi) - ROUNDING
        low = max(self.ritz(), 0.0)
        high = low + sum(self._beside) + self._least
        if t <= 0:
            return math.inf
        while self._christoffel(high) < 1 / t**2:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            if self._christoffel(middle) < 1 / t**2:
                low = middle
            else:
                high = middle
        return high

    def _christoffel(self, at: float) -> float:
        """sum_j p_j(at)^2, by their recurrence; beyond the Ritz values it grows with every step."""
        before, value, total, beside_before = 0.0, 1.0, 1.0, 0.0
        noise = self._least * max(*self._diagonal, sys.float_info.min)
        for diagonal, beside in zip(self._diagonal, self._beside, strict=True):
            before, value = value, ((at - diagonal) * value - beside_before * before) / (beside + noise)
            beside_before = beside
            total += value * value
            if total > 1e40:
                break
        return total
