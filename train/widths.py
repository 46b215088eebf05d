"""Width and robustness: ``python -m train widths``, after Wu et al., *Does Network Width Really Help Adversarial
Robustness?*, 2021.

They train networks of growing width by TRADES. Clean accuracy grows with the width, perturbation stability falls, and
so the regularisation parameter β should grow with the width. Here: a ResNet-18 of each width with each β, its accuracy,
stability, robust accuracy and empirical local Lipschitz constant, and for each width the β that was best.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cell import Cell, Protocol
from .plots import drawing
from .report import image, table, write
from .rows import Row
from .rows import read as read_rows

STRENGTHS = (1.0, 3.0, 9.0)  # β of TRADES
WIDTHS = {"smoke": (1 / 16, 1 / 8, 1 / 4), "paper": (1 / 4, 1 / 2, 1, 2), "full": (1 / 4, 1 / 2, 1, 2)}
COLOURS = ("#56B4E9", "#0072B2", "#000000")  # the darker, the stronger
MEASURES = {
    "right": "clean accuracy, %",
    "stable": "perturbation stability, %",
    "robust": "robust accuracy, %",
    "lipschitz": "local Lipschitz constant",
}

Found = dict[str, Any]  # evaluation.json


def parts(how: Protocol, out: Path) -> Iterator[tuple[Protocol, Path, list[Cell]]]:
    """For each width its protocol, folder and cells."""
    for width in WIDTHS[how.preset]:
        seeds, strengths = range(how.seeds), STRENGTHS
        cells = [Cell("resnet18", "trades", strength, seed) for seed in seeds for strength in strengths]
        yield replace(how, width=width), out / f"width-{width:g}", cells


def evaluation(out: Path, cell: Cell) -> Path:
    return out / "evaluations" / cell.name


def read(out: Path) -> list[Found]:
    """What was measured of all that were trained."""
    return [json.loads(file.read_text()) for file in sorted(out.glob("width-*/evaluations/*/evaluation.json"))]


def diverged(out: Path) -> list[Row]:
    """The rows of networks that there is nothing to measure of."""
    return [row for folder in sorted(out.glob("width-*")) for row in read_rows(folder) if "diverged" in row]


def value(found: Found, measure: str) -> float:
    if measure == "lipschitz":
        return float(np.mean(found["local_lipschitz"]))
    return 100 * found[measure]["right"] / found[measure]["images"]


def best(found: Sequence[Found], width: float) -> float:
    """The β of the largest robust accuracy, on average over seeds."""
    robust = {strength: mean for (at, strength), mean in over_seeds(found, "robust").items() if at == width}
    return max(robust, key=robust.__getitem__)


def over_seeds(found: Sequence[Found], measure: str) -> dict[tuple[float, float], float]:
    """The mean, by width and strength."""
    values = defaultdict(list)
    for one in found:
        values[one["protocol"]["width"], one["cell"]["strength"]].append(value(one, measure))
    return {setting: float(np.mean(values[setting])) for setting in sorted(values)}


def render(out: Path) -> Path:
    """Writes ``out/widths.md`` and its figure, of all that lies in ``out``."""
    found = read(out)
    if not found:
        raise ValueError(f"folder {str(out)!r} holds no evaluation: there is nothing to show")
    draw(found, out / "figures" / "widths")
    return write(out / "widths.md", _sections(found, diverged(out)))


def _sections(found: Sequence[Found], diverged: Sequence[Row]) -> Iterator[str]:
    first = found[0]
    protocol, made, images = first["protocol"], first["made"], first["right"]["images"]
    half = np.mean([np.diff(one["robust"]["interval"]) for one in found]) * 50
    widths = sorted({one["protocol"]["width"] for one in found})
    chosen = [f"β {best(found, width):g} at width {width:g}" for width in widths]
    yield "# Width and robustness: ResNet-18 by TRADES"
    yield "\n".join(
        [
            f"- **training**: preset `{protocol['preset']}`, {protocol['epochs']} epochs of "
            f"{protocol['training_images']:,} images of {protocol['dataset']}, "
            f"seeds: {len({one['cell']['seed'] for one in found})}",
            f"- **attacks**: {', '.join(first['attacks'])} ({first['iterations']} iterations), linf, eps "
            f"{255 * first['eps']:.3g}/255, on {images:,} test images: robust accuracy ± {half:.1f} (95 %)",
            f"- **made by**: commit {made['commit']}, torch {made['torch']}, on {made['device']}, {made['date']}",
        ]
    )
    yield (
        "Wu et al., 2021: clean accuracy grows with the width, stability falls, so that wider networks need a larger "
        f"β. The largest robust accuracy here: {', '.join(chosen)}."
    )
    yield image("figures/widths", "Accuracy, stability and local Lipschitz constant against width")
    ordered = sorted(
        [*found, *diverged], key=lambda one: (one["protocol"]["width"], one["cell"]["strength"], one["cell"]["seed"])
    )
    yield table(
        ["width", "β", *MEASURES.values()],
        [
            [f"{one['protocol']['width']:g}", f"{one['cell']['strength']:g}"]
            + ["diverged" if "diverged" in one else f"{value(one, measure):.1f}" for measure in MEASURES]
            for one in ordered
        ],
    )


def draw(found: Sequence[Found], file: Path) -> None:
    with drawing(file, (10, 2.8)) as figure:
        for axes, (measure, name) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            means = over_seeds(found, measure)
            for strength, colour in zip(STRENGTHS, COLOURS, strict=True):
                widths = [width for width, at in means if at == strength]
                line = [means[width, strength] for width in widths]
                axes.plot(widths, line, "o-", color=colour, lw=1.6, ms=4, label=f"β = {strength:g}")
            axes.set_xscale("log", base=2)
            axes.set_xlabel("width")
            axes.set_title(name, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
