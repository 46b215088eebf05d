"""The nearest kernel of a layer's own taps whose convolution on the circle has no singular value above a bound:

    minimise 1/2 ||w - w0||^2   such that   ||K_w(f)|| <= c   at each frequency f

by the method of multipliers. Its function of ``w`` is smooth, with corrections ``Y(f)`` and a penalty ``p``:

    1/2 ||w - w0||^2 + p/2 sum_f ||E(f)||^2    where    E(f) = excess(K_w(f) + Y(f) / p)    (``excess.py``)

At its minimum ``p E`` is the next ``Y``, and ``K_w`` is as far from what is within the bound as ``Y / p`` moves.
Newton's method finds the minimum; its systems

    (1 + p A* E' A) d = -gradient    with    A: w -> K_w    and    A* its adjoint

are solved by conjugate gradients, for which nothing is decomposed, and in few steps, as ``|A| <= 1`` and few singular
values reach the bound. So some 50 decompositions of a block are enough, where alternating projections (Dykstra's, which
are the proximal gradient method for ``Y``) take thousands, even with momentum.

Only frequencies at which the bound was exceeded take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import Layer
from .circle import circle_of, half_grid, power_of_two, waves
from .definite import is_below
from .excess import Excess
from .on_circle import GramSymbol

NEAR = 1e-6  # relative to the bound: what is left over it, rescaling takes away
LEAST = 1e-10  # a bound relative to the weight: below, float64 has not the digits, and the nearest only becomes smaller
PENALTIES = (100.0, 1e5)
GROWTH = 2.0
RTOL = 0.1  # of a Newton system: its solution is far from the minimum anyway
MOST_STEPS, MOST_PRODUCTS, MOST_HALVINGS = 300, 300, 10


def nearest(weight: Tensor, layers: Sequence[Layer], bound: float) -> Tensor:
    """The weight nearest to ``weight`` whose norm on the circle is at most ``bound``, but for ``NEAR``, in each use.

    In float64.
    """
    scale = power_of_two(weight)
    w0 = weight.detach().double().flatten() / scale
    uses = [Use(replace(layer, weight=weight.detach())) for layer in layers]
    problem = _Multipliers(w0, uses, max(bound / scale, LEAST))
    w = w0
    while problem.extend(w):
        w = problem.solve()
    return (w * scale).view(weight.shape)


class _Multipliers:
    """The corrections of each use, at its frequencies where the bound was exceeded."""

    def __init__(self, w0: Tensor, uses: Sequence[Use], bound: float) -> None:
        self._w0, self._uses = w0, uses
        self._bounds = [bound / use.factor for use in uses]
        self._active = [torch.empty(0, dtype=torch.long, device=w0.device) for _ in uses]
        self._corrections = [use.blocks(w0, active) for use, active in zip(uses, self._active, strict=True)]

    def extend(self, w: Tensor) -> bool:
        """Take in the frequencies where the bound is exceeded, if any were not in yet."""
        grown = False
        for i, use in enumerate(self._uses):
            over = use.exceeding(w, self._bounds[i] * (1 + 2 * NEAR))
            new = over[~torch.isin(over, self._active[i])]
            if len(new):
                blocks = use.blocks(w, new)
                excess = Excess(blocks, self._bounds[i])
                start = torch.zeros_like(blocks).index_copy(0, excess.at, excess.blocks / len(self._uses))
                self._active[i] = torch.cat([self._active[i], new])
                self._corrections[i] = torch.cat([self._corrections[i], start])
                grown = True
        return grown

    def solve(self) -> Tensor:
        """The nearest weight that is within the bound at the frequencies taken in so far, but for ``NEAR``."""
        penalty, last = PENALTIES
        w = self._w0 - sum(map(Use.adjoint, self._uses, self._corrections, self._active))
        here = self._at(w, penalty)
        for _ in range(MOST_STEPS):
            if here.slope > max(here.off, NEAR):
                here = self._newton(here, penalty)
            elif here.off > NEAR:
                self._corrections = [
                    y + penalty * change for y, change in zip(self._corrections, here.changes, strict=True)
                ]
                penalty = min(GROWTH * penalty, last)
                here = self._at(here.w, penalty)
            else:
                break
        return here.w

    def _at(self, w: Tensor, penalty: float) -> _Point:
        gradient, excesses, changes, off = w - self._w0, [], [], 0.0
        for use, bound, active, y in zip(self._uses, self._bounds, self._active, self._corrections, strict=True):
            excess = Excess(use.blocks(w, active) + y / penalty, bound)
            gradient = gradient + penalty * use.adjoint(excess.blocks, active[excess.at])
            change = (-y / penalty).index_add(0, excess.at, excess.blocks)
            if len(active):
                off = max(off, torch.linalg.vector_norm(change, dim=(2, 3)).amax().item() / bound)
            excesses.append(excess)
            changes.append(change)
        slope = torch.linalg.vector_norm(gradient).item() / min(self._bounds)
        return _Point(w, gradient, excesses, changes, slope, off)

    def _newton(self, here: _Point, penalty: float) -> _Point:
        parts = [
            (use, active[excess.at], excess)
            for use, active, excess in zip(self._uses, self._active, here.excesses, strict=True)
        ]

        def hessian(d: Tensor) -> Tensor:
            moved = [use.adjoint(excess.derivative(use.blocks(d, at)), at) for use, at, excess in parts]
            return d + penalty * sum(moved)

        size = torch.linalg.vector_norm(here.gradient)
        step = size * _solved(hessian, (-here.gradient / size).float()).double()
        down = here.gradient @ step
        for _ in range(MOST_HALVINGS):
            there = self._at(here.w + step, penalty)
            if there.gradient @ step <= -down / 2:  # of a convex function: else it went too far
                break
            step, down = step / 2, down / 2
        return there


@dataclass(frozen=True)
class _Point:
    """A weight, the gradient there, and by what the corrections would change, in units of the penalty.

    In units of the bound ``slope`` is the size of the gradient, and ``off`` that of the largest change: so far, at
    most, is the symbol from one that is within the bound.
    """

    w: Tensor
    gradient: Tensor
    excesses: list[Excess]
    changes: list[Tensor]
    slope: float
    off: float


def _solved(matrix: Callable[[Tensor], Tensor], right: Tensor) -> Tensor:
    """x with ``matrix(x) = right``, but for ``RTOL``, by conjugate gradients: of a positive definite matrix."""
    x, residual, direction = torch.zeros_like(right), right, right
    square = right @ right
    enough = RTOL**2 * square
    for _ in range(MOST_PRODUCTS):
        product = matrix(direction)
        length = square / (direction @ product)
        x, residual = x + length * direction, residual - length * product
        previous, square = square, residual @ residual
        if square <= enough:
            break
        direction = residual + square / previous * direction
    return x


class Use:
    """A weight in one of its uses: the linear map from the weight, flat, to the symbol on the circle; its adjoint.

    The inner product of two symbols is that of their convolutions' kernels on the circle. A frequency stands for
    itself and its negative, which is the ``share`` that it has of the circle.
    """

    def __init__(self, layer: Layer) -> None:
        count = layer.weight.numel()
        numbered = torch.arange(1, count + 1, dtype=torch.float64, device=layer.weight.device)
        self._layer = replace(layer, weight=numbered.view(layer.weight.shape))
        circle = circle_of(self._layer)
        self.factor = circle.factor
        self._shape = circle.kernel.shape  # [groups, rows, columns, *taps]
        number = (circle.kernel * circle.scale).flatten().long()
        # a weight that reads nothing but padding has no place on the circle: it goes behind the last
        self._place = torch.full((count,), len(number), device=number.device)
        self._place[number[number > 0] - 1] = number.nonzero().squeeze(1)
        taps, arcs = self._shape[3:], circle.arcs
        # of one tap, all frequencies of an axis are the same
        points = [1 if k == 1 else arc.points for k, arc in zip(taps, arcs, strict=True)]
        grid = half_grid(points)
        self._phases = grid * torch.tensor([float(arc.spacing) for arc in arcs], dtype=torch.float64, device="cpu")
        off = ((grid / math.pi).round() * math.pi - grid).abs()
        self._share = (torch.where((off < 1e-9).all(1), 1.0, 2.0).double() / math.prod(points)).to(number.device)
        places = [torch.arange(k, device="cpu") for k in taps]
        self._wave = waves(self._phases, places).reshape(len(grid), -1).to(number.device)
        self._taps = self._wave.shape[1]

    def blocks(self, w: Tensor, frequencies: Tensor) -> Tensor:
        """A w, at some frequencies: [F, groups, rows, columns]."""
        kernel = w.new_zeros(math.prod(self._shape) + 1).index_copy(0, self._place, w)[:-1].view(-1, self._taps).mT
        wave = self._wave[frequencies]
        blocks = torch.complex(wave.real.to(w.dtype) @ kernel, wave.imag.to(w.dtype) @ kernel)
        return blocks.view(len(frequencies), *self._shape[:3])

    def adjoint(self, blocks: Tensor, frequencies: Tensor) -> Tensor:
        """A* of blocks that are zero at other frequencies."""
        wave = (self._wave[frequencies] * self._share[frequencies, None]).to(blocks.dtype)
        kernel = (wave.mH @ blocks.flatten(1)).real.mT
        return F.pad(kernel.flatten(), (0, 1))[self._place]

    def exceeding(self, w: Tensor, bound: float) -> Tensor:
        """The frequencies at which the norm is not proved to be at most ``bound``, in any group."""
        circle = circle_of(replace(self._layer, weight=w.view(self._layer.weight.shape)))
        square = (bound / circle.scale) ** 2
        within = [is_below(gram, square).all(0) for _, gram in GramSymbol(circle).at(self._phases)]
        return (~torch.cat(within)).nonzero().squeeze(1)
