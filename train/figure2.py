"""Figure 2 from the rows on disk: norms of adversarially trained networks against plain ones, and claim 3's verdict."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from . import claims, norm_claim, plots
from .published import METHODS, MODELS
from .report import Report, image, norms_of, table, write
from .rows import Row
from .statistics import geometric_mean

NORMS = ("linf", "l1")  # as the paper's text has it, as its released code computes it


def render(rows: Iterable[Row], out: Path) -> Path:
    """Writes ``out/figure2.md`` and the figures that it shows, of those of ``rows`` that belong to Figure 2."""
    report = Report.of(rows, "figure2")
    figures = out / "figures"
    for norm in NORMS:
        plots.densities(report, norm, figures / f"figure2-{norm}")
    plots.histories(report, norm_claim.NORMS, figures / "figure2-norms")
    for model in MODELS:
        plots.layers(report, model, NORMS, figures / f"figure2-layers-{model}")
    folded = any("folded" in row for row in report.rows.values())  # older rows are without
    parts = ["norms", "folded"] if folded else ["norms"]
    verdicts = [norm_claim.verdict(report, norm, part) for part in parts for norm in norm_claim.NORMS]
    return write(out / "figure2.md", _sections(report, verdicts, [norm_claim.CAVEATS[part] for part in parts]))


def _sections(report: Report, verdicts: list[claims.Verdict], caveats: list[str]) -> list[str]:
    return [
        "# Figure 2: norms of the layers of adversarially trained networks",
        report.header(),
        *(
            f"**{norm} norms** of all layers ({why}):\n\n"
            + image(f"figures/figure2-{norm}", f"Densities of {norm} norms")
            for norm, why in zip(NORMS, ("the paper's text", "the paper's released code"), strict=True)
        ),
        f"Clean and robust accuracy in %, {report.spread}; the geometric mean of the norms of all layers, and how "
        "many times the plain network's it is.",
        networks(report),
        "## The paper's claim",
        claims.summary(verdicts),
        'The paper\'s text says "comparable or even larger" of a figure that prints no norms.',
        "\n".join(f"- {caveat}" for caveat in (*report.caveats(), *caveats)),
        *map(str, verdicts),
        claims.LEGEND,
        "## More figures",
        image("figures/figure2-norms", "Norms of the layers during training"),
        *(image(f"figures/figure2-layers-{model}", f"Norms of the layers of {MODELS[model]}") for model in MODELS),
    ]


def networks(report: Report) -> str:
    """A line for each model and method."""
    lines = []
    for model in MODELS:
        plain = report.seeds(model, "plain", None)
        for method, strength in report.settings:
            found = report.seeds(model, method, strength)
            accuracies = [report.written(model, method, strength, which) for which in ("clean", "robust")]
            absent = report.absent(model, method, strength)
            norms = [_norm(found, plain, norm) if found else absent for norm in norm_claim.NORMS]
            lines.append([MODELS[model], METHODS[method], *accuracies, *norms])
    return table(["", "", "clean", "robust", *(f"{norm} norm" for norm in norm_claim.NORMS)], lines)


def _norm(rows: list[Row], plain: list[Row], norm: str) -> str:
    value = geometric_mean(_norms(rows, norm))
    ratio = f" (x {value / geometric_mean(_norms(plain, norm)):.2f})" if plain and rows != plain else ""
    return f"{value:.3g}{ratio}"


def _norms(rows: list[Row], norm: str) -> np.ndarray:
    """Of all layers and seeds."""
    return np.concatenate([norms_of(row, norm) for row in rows])
