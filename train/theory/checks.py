"""``python -m train theory``: builds the networks, checks what is said of them, draws them, and writes a table."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from . import proposition1
from .figure import draw
from .proposition2 import steep_classifier, steepest_inputs
from .search import Logits, Margins, least_margin, survivors, worst
from .separation import closest_pair, scattered
from .smooth import smoothed
from .theorem2 import NearestClass, certified, robust_classifier

POINTS, CLASSES = 40, 4  # AutoAttack's targeted loss needs four classes
DEPTH = 5
SMOOTH_ERROR = 0.25


@dataclass(frozen=True)
class Check:
    """What was claimed and what was measured, in words, and whether it holds."""

    name: str
    claimed: str
    measured: str
    holds: bool


def run(
    out: Path, *, eps: float = 0.04, xi: float = 1000.0, norm: float = 1000.0, iterations: int = 100
) -> list[Check]:
    """Writes ``theory.md`` and the figures into ``out``. ``iterations`` are AutoAttack's, 100 as published."""
    if not 0 < eps < 0.5:
        raise ValueError(f"eps is {eps:g} and must be between 0 and 0.5, for balls in [0, 1]^2")
    generator = torch.Generator().manual_seed(0)
    shapes = {"fully connected": (2,), "3x3 convolutions": (3, 8, 8)}
    annulled = {
        "fully connected": proposition1.fully_connected(norm, DEPTH, generator=generator),
        "3x3 convolutions": proposition1.convolutional(norm, DEPTH, generator=generator),
    }
    try:
        points, labels = scattered(POINTS, 2, CLASSES, apart=2.5 * eps, inset=eps, generator=generator)
    except ValueError as error:
        raise ValueError(f"eps is {eps:g}: {error}") from error
    robust = robust_classifier(points, labels, eps)
    steep = steep_classifier(points, labels, eps, xi)

    out.mkdir(parents=True, exist_ok=True)
    draw(out, annulled["fully connected"], norm, robust, steep, points, labels, eps)
    found = []
    for kind, network in annulled.items():
        found += proposition1_checks(kind, network, shapes[kind], norm, generator)
    found += theorem2_checks(robust, points, labels, eps, iterations, generator)
    found += proposition2_checks(steep, points, labels, eps, xi, iterations, generator)

    (out / "theory.md").write_text(table(found), encoding="utf-8")
    return found


def table(checks: list[Check]) -> str:
    """In Markdown."""
    rows = [f"| {one.name} | {one.claimed} | {one.measured} | {'yes' if one.holds else '**no**'} |" for one in checks]
    return "\n".join(["| | claimed | measured | holds |", "| --- | --- | --- | --- |", *rows, ""])


def proposition1_checks(
    kind: str, network: nn.Sequential, shape: tuple[int, ...], norm: float, generator: torch.Generator
) -> Iterator[Check]:
    name = f"Proposition 1, {DEPTH} layers, {kind}"
    least = min(min(norms) for norms in proposition1.layer_norms(network, [1, *shape]))
    yield Check(name, f"l1, l2 and linf norm of each layer ≥ {norm:g}", f"≥ {least:.10g}", least >= norm)
    proved = proposition1.annuls(network)
    yield Check(name, "output 0, by the signs", "no positive weight behind a ReLU" if proved else "not proved", proved)
    scales = torch.logspace(-6, 6, 1000, dtype=torch.float64).view(-1, *[1] * len(shape))
    x, other = (scales * torch.randn(1000, *shape, dtype=torch.float64, generator=generator) for _ in range(2))
    *hidden, last = proposition1.stretches(network, x, other)
    measured = f"{last:g}; before the last layer {hidden[-1]:.3g}"
    yield Check(name, "Lipschitz constant 0, on 1,000 pairs", measured, last == 0 < hidden[-1])
    highest = proposition1.highest(network, x[::10])
    yield Check(name, "nothing passes the last ReLU, uphill from 100 inputs", f"at most {highest:.3g}", highest <= 0)


def theorem2_checks(
    network: NearestClass, points: Tensor, labels: Tensor, eps: float, iterations: int, generator: torch.Generator
) -> Iterator[Check]:
    count, apart = len(points), closest_pair(points, labels).distance
    name = f"Theorem 2, {count} points, eps {eps:g}"
    yield certificate(name, network, points, labels, eps)
    yield searched(name, network, points, labels, eps, generator)
    for of, logits in {"output": Logits(network, CLASSES), "distances": Margins(network)}.items():
        yield attacked(f"{name}, AutoAttack on the {of}", logits, points, labels, eps, iterations)
        left = survivors(logits, points, labels, beyond := 0.75 * apart, iterations=iterations)
        measured = f"{left} of {count} left at eps {beyond:.3g}"
        yield Check(f"{name}, AutoAttack on the {of}", "finds some beyond the separation", measured, left < count)
    margin = least_margin(network, points, labels, eps, generator=generator)
    claimed = f"margin of distances ≥ {network.margin:.4g}"
    yield Check(f"{name}, PGD on the distances", claimed, f"≥ {margin:.4g}", margin >= network.margin * (1 - 1e-4))
    smooth = smoothed(network, [1, 2], SMOOTH_ERROR)
    yield searched(f"{name}, softplus for ReLU", smooth, points, labels, eps, generator, SMOOTH_ERROR)


def proposition2_checks(
    network: NearestClass,
    points: Tensor,
    labels: Tensor,
    eps: float,
    xi: float,
    iterations: int,
    generator: torch.Generator,
) -> Iterator[Check]:
    name = f"Proposition 2, {len(points)} points, eps {eps:g}"
    with torch.no_grad():
        ends = steepest_inputs(network, points, labels)
        climb = network(ends).diff().abs()
    slopes = {p: (climb / torch.linalg.vector_norm(ends[1] - ends[0], p)).item() for p in (1, 2, math.inf)}
    measured = ", ".join(f"l{p} {slope:.7g}" for p, slope in slopes.items())
    yield Check(name, f"Lipschitz constant ≥ {xi:g}", measured, min(slopes.values()) >= xi)
    yield certificate(name, network, points, labels, eps)
    yield searched(name, network, points, labels, eps, generator)
    yield attacked(f"{name}, AutoAttack on the output", Logits(network, CLASSES), points, labels, eps, iterations)


def certificate(name: str, network: NearestClass, points: Tensor, labels: Tensor, eps: float) -> Check:
    lower, upper = certified(network, points, labels, eps)
    accuracy = (((lower - labels).abs() < 0.5) & ((upper - labels).abs() < 0.5)).double().mean().item()
    return Check(name, "robust accuracy 1, by the distances", f"{accuracy:g}", accuracy == 1)


def searched(
    name: str,
    network: nn.Module,
    points: Tensor,
    labels: Tensor,
    eps: float,
    generator: torch.Generator,
    error: float = 1e-6,
) -> Check:
    """``error``: what is allowed to rounding, or to a smooth activation."""
    off = worst(network, points, labels, eps, generator=generator)
    return Check(
        name,
        f"output within {error:g} of the label on each ball",
        f"at most {off:.2g} off, on grids",
        off <= error < 0.5,
    )


def attacked(name: str, logits: nn.Module, points: Tensor, labels: Tensor, eps: float, iterations: int) -> Check:
    left = survivors(logits, points, labels, eps, iterations=iterations)
    return Check(name, "finds nothing within eps", f"{left} of {len(points)} left", left == len(points))
