"""Times of many methods on a logarithmic scale, each a line with its name at its end. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
PUBLISHED = "0.6"

Series = Mapping[str, Sequence[float | None]]


def require() -> None:
    """Before anything is measured for a plot that could not be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install -e '.[benchmark]'") from error


def draw(panels: Mapping[str, tuple[Series, Series]], columns: Sequence[str], title: str, path: Path) -> None:
    """A panel for each title, one below another: measured and, dashed and grey, published seconds by column."""
    require()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "convnorm", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 7), layout="constrained")
        figure.suptitle(title, fontsize=10)
        heights = [len(measured) + len(published) for measured, published in panels.values()]
        rows = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for axes, (name, (measured, published)) in zip(rows, panels.items(), strict=True):
            axes.set(yscale="log", ylabel="seconds for 100 calls")
            axes.set_title(name, fontsize=9, loc="left")
            axes.grid(axis="y", color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            ends = [line(axes, label, seconds, PUBLISHED) for label, seconds in published.items()]
            coloured = zip(measured.items(), COLOURS, strict=False)
            ends += [line(axes, label, seconds, colour) for (label, seconds), colour in coloured]
            name_lines(axes, ends, len(columns) - 1)
        rows[-1].set_xticks(range(len(columns)), columns)
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def line(axes, label: str, seconds: Sequence[float | None], colour: str) -> tuple[float, str, str]:
    """Draws it; returns where it ends."""
    points = [(i, s) for i, s in enumerate(seconds) if s is not None]
    how = {"ls": "--", "marker": "x"} if colour == PUBLISHED else {"marker": "o"}
    axes.plot(*zip(*points, strict=True), lw=1.3, ms=4, color=colour, **how)
    return points[-1][1], label, colour


def name_lines(axes, ends: list[tuple[float, str, str]], last: int) -> None:
    """Beside their ends, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    apart = (high / low) ** (0.9 / (len(ends) + 4))
    at = 0.0
    for value, label, colour in sorted(ends):
        at = max(value, at * apart)
        leader = {"arrowstyle": "-", "color": "0.85", "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
        colour = "0.4" if colour == PUBLISHED else colour
        axes.annotate(label, (last, value), (last + 0.3, at), va="center", color=colour, arrowprops=leader)
