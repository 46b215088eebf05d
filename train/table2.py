"""Table 2 from the rows on disk: beside the paper's numbers, with its figures and a verdict on claims 1 and 2."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean

from . import accuracy_claims, claims, plots
from .published import CLEAN_IMAGES, METHODS, MODELS, ROBUST_IMAGES, TABLE2
from .report import Report, image, table, write
from .rows import Row
from .statistics import wilson

NORMS = ("l1", "linf", "l2")


def render(rows: Iterable[Row], out: Path) -> Path:
    """Writes ``out/table2.md`` and the figures that it shows, of those of ``rows`` that belong to Table 2."""
    report = Report.of(rows, "table2")
    figures = out / "figures"
    plots.accuracies(report, figures / "table2-accuracy")
    plots.histories(report, NORMS, figures / "table2-norms")
    for model in MODELS:
        plots.layers(report, model, NORMS[:2], figures / f"table2-layers-{model}")
    made = (accuracy_claims.IMPROVES_CLEAN, accuracy_claims.COSTS_ROBUST)
    verdicts = [accuracy_claims.verdict(report, claim) for claim in made]
    return write(out / "table2.md", _sections(report, verdicts))


def _sections(report: Report, verdicts: list[claims.Verdict]) -> list[str]:
    return [
        "# Table 2: regularising norms, clean and robust accuracy",
        report.header(),
        f"Clean and robust accuracy in %, {report.spread}. Below each, in parentheses, the paper's: "
        f"one seed, ± {_half(0):.1f} (clean) and ± {_half(1):.1f} (robust, on {ROBUST_IMAGES:,} images) on average.",
        accuracies(report),
        "## The paper's claims",
        claims.summary(verdicts),
        "\n".join(f"- {caveat}" for caveat in report.caveats()),
        *map(str, verdicts),
        claims.LEGEND,
        "## Figures",
        image("figures/table2-accuracy", "Robust against clean accuracy, here and in the paper"),
        image("figures/table2-norms", "Norms of the layers during training"),
        *(image(f"figures/table2-layers-{model}", f"Norms of the layers of {MODELS[model]}") for model in MODELS),
    ]


def accuracies(report: Report) -> str:
    """A line for each setting, and two columns for each model."""
    head = ["", *(f"{MODELS[model]} {which}" for model in MODELS for which in ("clean", "robust"))]
    lines = []
    for method, strength in report.settings:
        line = [METHODS[method] + ("" if strength is None else f" {strength:g}")]
        for model in MODELS:
            for which, printed in zip(("clean", "robust"), TABLE2[model, method, strength], strict=True):
                ours = report.written(model, method, strength, which)
                line.append(f"{ours}<br>({'-' if printed is None else printed})")
        lines.append(line)
    return table(head, lines)


def _half(column: int) -> float:
    """In percent: half of the interval of the paper's accuracies, on average over Table 2."""
    images = (CLEAN_IMAGES, ROBUST_IMAGES)[column]
    printed = [accuracies[column] for accuracies in TABLE2.values() if accuracies[column] is not None]
    intervals = [wilson(round(percent / 100 * images), images) for percent in printed]
    return 50 * mean(interval.high - interval.low for interval in intervals)
