"""Norms by depth and their distribution, of one report or of several beside each other. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .axis import drawable
from .optional import optional
from .row import ords_of
from .text import NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..report import Report

STYLE = {"svg.hashsalt": "convnorm", "svg.fonttype": "none", "font.size": 9}
MOST_NAMES = 40  # below the axis


def plot_report(report: Report, path: str | Path | None) -> Figure:
    """Bars from 1 by depth for each norm, those with a batch norm as marks, and histograms beside them."""
    with optional("matplotlib").rc_context(STYLE):
        figure, rows = _panels(report.title, [report])
        for ord, by_depth, beside in rows:
            plain = [_drawable(row.norms.norm(ord)) for row in report.rows]
            by_depth.bar(range(len(plain)), [value - 1 for value in plain], bottom=1, color="tab:blue", width=0.8)
            folded = [_drawable(row.folded.norm(ord) if row.folded else None) for row in report.rows]
            if not all(map(math.isnan, folded)):
                by_depth.plot(folded, "_", color="tab:orange", ms=6, mew=2, label="with batch norm")
                by_depth.legend(frameon=False, fontsize=8)
            _finish(ord, by_depth, beside, [plain], ["tab:blue"])
        if len(report.rows) <= MOST_NAMES:
            by_depth.set_xticks(range(len(report.rows)), [row.name for row in report.rows], rotation=90)
        return _saved(figure, path)


def plot_reports(reports: Sequence[Report], path: str | Path | None) -> Figure:
    """A line for each report, by depth from its first to its last layer; with batch norms, where they follow."""
    with optional("matplotlib").rc_context(STYLE):
        figure, rows = _panels("", reports)
        for ord, by_depth, beside in rows:
            each = [[_drawable(row.whole.norm(ord)) for row in report.rows] for report in reports]
            lines = []
            for report, values in zip(reports, each, strict=True):
                depth = [i / max(1, len(values) - 1) for i in range(len(values))]
                lines += by_depth.plot(depth, values, "o-", ms=3, lw=1, label=report.title)
            _finish(ord, by_depth, beside, each, [line.get_color() for line in lines])
        figure.axes[0].legend(frameon=False, fontsize=8)
        by_depth.set_xlabel("depth, from the first layer to the last")
        return _saved(figure, path)


def _panels(title: str, reports: Sequence[Report]) -> tuple[Figure, list]:
    """A row of two axes for each norm that all of them have."""
    from matplotlib.figure import Figure

    norms = ords_of(l2=all(report.rtol is not None for report in reports)).values()
    figure = Figure(figsize=(11, 2.2 * len(norms) + 1), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(norms), 2, width_ratios=[4, 1], squeeze=False)
    for row in axes[:-1]:
        row[0].sharex(axes[-1, 0])
        row[0].tick_params(labelbottom=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return figure, [(ord, *row) for ord, row in zip(norms, axes, strict=True)]


def _finish(ord: float, by_depth: Any, beside: Any, each: Sequence[Sequence[float]], colours: Sequence[str]) -> None:
    """What surrounds the norms by depth; and beside it how many layers have which, over the same logarithmic bins."""
    by_depth.axhline(1, color="0.5", lw=0.8)
    by_depth.set(ylabel=NAMES[ord], yscale="log")
    _plain(by_depth.yaxis)
    values = [[math.log10(value) for value in own if not math.isnan(value)] for own in each]
    together = [value for own in values for value in own]
    if together:
        low, high = min(together) - 0.05, max(together) + 0.05
        edges = [10 ** (low + i * (high - low) / 16) for i in range(17)]
        beside.hist([[10**value for value in own] for own in values], edges, color=colours)
    beside.set(xscale="log", ylabel="layers")
    _plain(beside.xaxis)


def _plain(axis: Any) -> None:
    """1, 2, 5, 10 rather than powers of ten, which are too far apart."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = sorted(axis.get_view_interval())
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _drawable(value: float | None) -> float:
    """NaN, of which nothing is drawn, for what has no place on a logarithmic axis."""
    return value if drawable(value) else math.nan


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)
    return figure
