"""The l2 norm of a layer between a lower and an upper bound, both certified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import GeometryError
from ..layers import Layer
from ..uncompiled import break_graph
from .admit import admitted, admitted_start
from .bounds import frobenius, sqrt_l1_linf
from .circle import Circle, circle_of, groups_of, half_grid, power_of_two, with_read_taps
from .definite import unit_roundoff
from .explicit import LARGEST, explicit_uppers, matrix_sizes
from .krylov import STARTS, Lanczos, in_precision
from .lanczos import search
from .modes import MODES, modes_upper
from .on_circle import circle_upper
from .outward import upward
from .rayleigh import attained, downward, in_best_group, rounding_error, unit
from .wave import Wave, over_inputs

EIGENVECTORS = 55.0  # what those of a matrix cost, in factorisations of a real one of the size
MOST_WORK = 1e12  # that modes may cost, in cubes of sizes that are factorised
NARROW = 1.06  # how far above the norm a circle may be for its modes to close the bracket
MOST_STEPS = 1000
LOOK_BACK = 2  # steps: where a search is given up too soon, the proof shows it
LOOK_EVERY = 2  # steps of the probable bound


@dataclass(frozen=True)
class Bracket:
    """``lower <= l2 norm <= upper``, 0-dim float64 tensors; ``lower`` is differentiable once, in the weight.

    ``certificate`` says what proves the upper bound; ``stopped`` why the bracket is wider than was asked, and is
    empty where it is not. ``right[1, channels, *in_shape]``, of l2 norm 1, is what the layer maps to an output of l2
    norm ``lower``.
    """

    lower: Tensor
    upper: Tensor
    certificate: str
    stopped: str
    right: Tensor

    @property
    def ratio(self) -> float:
        """upper / lower; 1 where both are 0."""
        lower, upper = self.lower.item(), self.upper.item()
        return upper / lower if lower else math.inf if upper else 1.0

    def __repr__(self) -> str:
        stopped = f", stopped={self.stopped!r}" if self.stopped else ""
        return f"Bracket({self.lower.item():.6g}, {self.upper.item():.6g}, {self.certificate!r}{stopped})"


@break_graph  # there is nothing in it that could be compiled
def l2(
    layer: nn.Module | Tensor | Layer,
    in_shape: Sequence[int] = (),
    *,
    rtol: float = 1e-2,
    failure: float | None = None,
    scale: Tensor | None = None,
    start: Tensor | None = None,
    **options: Any,
) -> Bracket:
    """The l2 norm of any layer, its largest singular value, in a bracket with ``upper <= (1 + rtol) * lower``.

    The lower bound is what an input attains, found by Lanczos. The upper bound is proved: on a circle that the layer is
    embedded in, by that circle's modes, or from the explicit matrix where it is small. Where none of them closes the
    bracket, ``failure``, for instance 1e-12, admits a bound that fails with at most this probability: Lanczos from
    starts drawn by PyTorch's random numbers.

    ``scale`` multiplies the output channels, as in ``convnorm.norms``; ``start`` is the ``right`` of an earlier
    bracket.

    >>> l2(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1, rtol=1e-6)
    Bracket(1.80194, 1.80194, 'explicit matrix')
    """
    if not 1e-9 <= rtol < math.inf:
        raise GeometryError(f"convnorm: rtol {rtol} must be at least 1e-9, what float64 can tell")
    if failure is not None and not 0 < failure < 1:
        raise GeometryError(f"convnorm: failure {failure} must be a probability between 0 and 1")
    one = with_read_taps(admitted(layer, in_shape, options, scale))
    search = Search(one, rtol, admitted_start(start, one))
    proof = prove(search)
    if failure is not None and not search.closed(proof.upper):
        probable = prove_probably(search, failure)
        proof = probable if probable.upper < proof.upper else replace(proof, limit=probable.limit)
    upper = upward(torch.tensor(proof.upper, dtype=torch.float64, device=one.weight.device), search.size)
    stopped = "" if search.closed(proof.upper) else proof.limit
    if upper.isinf():
        stopped = "float64, which has no number as large"
    return Bracket(downward(search.length, search.size), upper, proof.certificate, stopped, search.right)


class Search:
    """The largest singular value from below, in ever more steps; the layer's scale ``size`` is taken out.

    ``length`` is what the input ``right`` attains, differentiable in the layer's weight, and ``lower`` its value.
    """

    def __init__(self, layer: Layer, rtol: float, start: Tensor | None) -> None:
        self.size = power_of_two(layer.weight)
        self.layer = in_precision(layer, torch.float64)
        self.rtol = rtol
        self._given = layer
        self._rough = in_precision(layer, torch.float64 if rtol < 1e-5 else torch.float32)
        self.lower = -1.0
        self.begin(start)

    def begin(self, start: Tensor | None) -> None:
        self.process = search(self._rough, self.rtol / 5, MOST_STEPS, start, LOOK_BACK)
        self.keep(self.process.right())

    def begin_with(self, circle: Circle, wave: Wave) -> None:
        if circle.arcs:  # without them the wave is what was searched for already
            with torch.autocast(circle.kernel.device.type, enabled=False):
                self.begin(over_inputs(self._rough, circle, wave, self.rtol))

    def run(self, rtol: float) -> None:
        """Twice the steps, and more of them: a search may rest on another singular value for a while."""
        for _ in range(self.process.steps):
            if not self.process.exhausted:
                self.process.extend()
        self.process.run(rtol, MOST_STEPS)
        self.keep(self.process.right())

    def reach(self, upper: float) -> None:
        """On and on, until the bracket closes or nothing is left: for an ``upper`` that is the norm itself."""
        while not (self.closed(upper) or self.process.exhausted or self.process.steps >= MOST_STEPS):
            self.run(self.rtol / 50)

    def keep(self, right: Tensor) -> None:
        right = unit(in_best_group(self._rough, right))
        length = attained(self._given, right)
        if (lower := length.item()) > self.lower:
            self.lower, self.length, self.right = lower, length, right

    @property
    def level(self) -> float:
        """What an upper bound may be."""
        return self.lower * (1 + self.rtol) * (1 - 64 * unit_roundoff(torch.float64))

    def closed(self, upper: float) -> bool:
        return upper <= self.lower * (1 + self.rtol)


@dataclass(frozen=True)
class Proof:
    """``upper`` is at least the norm; what shows it, and what stood in the way of less."""

    upper: float
    certificate: str
    limit: str = ""


def prove(search: Search) -> Proof:
    """The cheapest proof that closes the bracket, or the sharpest."""
    cheap = norms_upper(search.layer)
    if search.closed(cheap.upper):
        return cheap
    circle = circle_of(search.layer)
    upper, most = circle_upper(circle, search.level, search.rtol)
    if most and not search.closed(float(upper.max())):  # the lower bound may be at fault
        search.begin_with(circle, Wave(*most))
        if not search.closed(float(upper.max())):
            search.run(search.rtol / 50)
    proof = Proof(float(upper.max()), "circle", "a lower bound that does not rise")
    if not search.closed(proof.upper) and not circle.whole:
        proof = sharpen(search, circle, upper)
    if circle.whole or proof.certificate == "explicit matrix":
        search.reach(proof.upper)
    return replace(cheap, limit=proof.limit) if cheap.upper < proof.upper else proof


def norms_upper(layer: Layer) -> Proof:
    """What the l1 side gives away."""
    named = {"l1 and linf norms": float(sqrt_l1_linf(layer)), "Frobenius norm": float(frobenius(layer))}
    certificate = min(named, key=named.__getitem__)
    return Proof(named[certificate], certificate)


def sharpen(search: Search, circle: Circle, upper: Tensor) -> Proof:
    """For groups whose circle, of norms up to ``upper[groups]``, does not prove enough: their matrices, where those are
    small or modes would cost more, or the modes of their circles.
    """
    layer = search.layer
    doubtful = torch.tensor([i for i, one in enumerate(upper.tolist()) if not search.closed(one)], device="cpu")
    size = min(matrix_sizes(layer))
    modes_work = EIGENVECTORS * len(half_grid(circle.points)) * min(circle.kernel.shape[1:3]) ** 3 + 8 * MODES[1] ** 3

    def proof(uppers: Tensor, certificate: str, limit: str) -> Proof:
        return Proof(float(upper.scatter(0, doubtful, uppers).max()), certificate, limit)

    def by_matrix() -> Proof:
        uppers = explicit_uppers(groups_of(layer, doubtful), search.level)
        return proof(uppers, "explicit matrix", "rounding in float64")

    if size <= LARGEST and (size**3 <= modes_work or upper.max() > NARROW * search.level):
        return by_matrix()
    limit = "a matrix of {} x {}, too large to decompose".format(*matrix_sizes(layer))
    if circle.factor != 1:
        found = proof(
            upper[doubtful], "circle", f"padding_mode {layer.padding_mode!r}, not shown by circles, and {limit}"
        )
    elif modes_work * len(doubtful) > MOST_WORK:
        points = list(circle.points)
        found = proof(upper[doubtful], "circle", f"circles of {points} points, too many for their modes, and {limit}")
    else:
        circles = [replace(circle, kernel=circle.kernel[group : group + 1]) for group in doubtful.tolist()]
        bounds = zip(circles, upper[doubtful].tolist(), strict=True)
        most = [count for count in MODES if size > LARGEST or count < size / 2]
        uppers = upper.new_tensor([modes_upper(one, search.level, bound, most) for one, bound in bounds])
        limit = f"modes of the circle, up to {MODES[-1]}, which show no more, and {limit}"
        found = proof(uppers, "modes of the circle", limit)
    return found if search.closed(found.upper) or size > LARGEST else by_matrix()


def prove_probably(search: Search, failure: float) -> Proof:
    """By Lanczos from random starts, until the bracket closes."""
    device = search.layer.weight.device
    seeds = torch.randint(2**62, (STARTS,), device="cpu").tolist()
    processes = [Lanczos(search.layer, generator=torch.Generator(device).manual_seed(seed)) for seed in seeds]
    rounding = float(rounding_error(search.layer))
    while True:
        for process in processes:
            for _ in range(LOOK_EVERY):
                if not process.exhausted:
                    process.extend()
        best = max(processes, key=lambda process: process.ritz())
        square = max(process.upper(failure ** (1 / STARTS)) for process in processes)
        upper = math.sqrt(square) * (1 + 1e-12) + rounding
        stuck = all(process.exhausted or process.steps >= MOST_STEPS for process in processes)
        if stuck or upper <= (1 + search.rtol) * max(search.lower, math.sqrt(best.ritz())):
            search.keep(best.right())
            if stuck or search.closed(upper):
                break
    limit = f"{best.steps} steps of Lanczos, after which there is no memory or nothing left"
    return Proof(upper, f"Lanczos, fails with probability {failure:g}", limit)
