"""Accuracy against cost, a marker with its name for each method. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Protocol

from .plot import require
from .record import Quantiles

LOOKS = {"upper bound": ("v", "tab:blue"), "lower bound": ("^", "tab:green"), "no bound": ("x", "tab:red")}
AROUND = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]  # a marker: where its name may stand
DISTANCES = (8, 14, 22, 32, 44)  # points


class Shown(Protocol):
    """What is drawn of a method: its times, and how far off it is on each layer, |value / true norm - 1|."""

    name: str
    gives: str
    milliseconds: Quantiles
    off: Sequence[float]


def draw(methods: Sequence[Shown], title: str, path: Path) -> None:
    """A marker at the median time, where a method is off the most; from there lines to where it is off in the median,
    and from the 10th to the 90th percentile of its times.
    """
    require()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "convnorm", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        axes = figure.subplots()
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="milliseconds a layer: the marker at the median, its line from 10th to 90th percentile",
        )
        axes.set_ylabel("|value / true norm - 1|: the marker at worst, its line to the median")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(color="0.93")
        axes.spines[["top", "right"]].set_visible(False)
        places, lines = [], []
        for method in methods:
            marker, colour = LOOKS[method.gives]
            times, worst, median = method.milliseconds, floored(max(method.off)), floored(statistics.median(method.off))
            lines += axes.plot([times.median] * 2, [median, worst], lw=1, color=colour, alpha=0.3)
            lines += axes.plot([times.p10, times.p90], [worst] * 2, lw=1, color=colour, alpha=0.3)
            axes.plot(times.median, worst, marker, ms=6, color=colour)
            places.append((method.name, colour, (times.median, worst)))
        for gives, (marker, colour) in LOOKS.items():
            axes.plot([], [], marker, ms=6, color=colour, label=gives)
        axes.legend(frameon=False)
        axes.margins(0.1, 0.05)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        name_markers(axes, places, lines)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def floored(off: float, least: float = 1e-7) -> float:
    """A logarithmic scale has no 0."""
    return max(off, least)


def name_markers(axes, places: Sequence[tuple[str, str, tuple[float, float]]], lines: Sequence) -> None:
    """Each beside its marker, as near as its name meets no other, no marker and no line; the lines matter least."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    renderer, pixel = axes.figure.canvas.get_renderer(), axes.figure.dpi / 72
    centres = [axes.transData.transform(at) for _, _, at in places]
    taken = [Bbox.from_bounds(x - 4 * pixel, y - 4 * pixel, 8 * pixel, 8 * pixel) for x, y in centres]
    taken.append(axes.get_legend().get_window_extent(renderer))
    crossed = [line.get_window_extent(renderer) for line in lines]
    for name, colour, at in places:
        found = []
        for distance, (right, up) in product(DISTANCES, AROUND):
            label = axes.annotate(
                name,
                at,
                (distance * right, distance * up),
                textcoords="offset points",
                ha=("center", "left", "right")[right],
                va=("center", "bottom", "top")[up],
                color=colour,
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": "0.8", "shrinkB": 3} if distance > DISTANCES[0] else None,
            )
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without its arrow
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            found.append(
                (10 * box.count_overlaps(taken) + box.count_overlaps(crossed) + 100 * (not inside), label, box)
            )
        _, best, box = min(found, key=lambda one: one[0])  # the nearest of them
        taken.append(box)
        for _, label, _ in found:
            if label is not best:
                label.remove()
