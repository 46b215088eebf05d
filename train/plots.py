"""The figures, each as PNG and SVG. Needs matplotlib.

A method has one colour in all of them, and the paler it is, the weaker the method's strength.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .cell import Setting, strongest
from .published import METHODS, MODELS, TABLE2
from .report import Report, accuracy, middles, norms_of
from .rows import Row
from .statistics import geometric_mean, scipy_stats

COLOURS = {  # after Okabe & Ito and Tol: told apart by colour-blind readers
    "plain": "#000000",
    "weight-decay": "#E69F00",
    "clip": "#0072B2",
    "l1-decay": "#D55E00",
    "linf-decay": "#009E73",
    "pgd-at": "#AA4499",
    "alp": "#56B4E9",
    "trades": "#999933",
}
NORM = {"l1": "l1 norm", "linf": "linf norm", "l2": "l2 norm"}


def densities(report: Report, norm: str, file: Path) -> None:
    """Figure 2: how the norms of all layers are distributed, as Gaussian densities of their logarithms over a rug."""
    gaussian_kde = scipy_stats().gaussian_kde
    with drawing(file, (10, 6.4)) as figure:
        for axes, model in zip(figure.subplots(2, 2).flat, MODELS, strict=True):
            for place, (method, strength) in enumerate(report.settings):
                rows = report.seeds(model, method, strength)
                values = np.concatenate([norms_of(row, norm) for row in rows]) if rows else np.empty(0)
                values = np.log10(values[np.isfinite(values) & (values > 0)])
                if not len(values):
                    continue
                label = f"{METHODS[method]} ({_percent(rows, 'clean')} | {_percent(rows, 'robust')})"
                if np.ptp(values) > 0:  # else there is no density
                    density = gaussian_kde(values)
                    reach = 3 * float(np.sqrt(density.covariance[0, 0]))
                    at = np.linspace(values.min() - reach, values.max() + reach, 300)
                    axes.plot(10**at, density(at), color=COLOURS[method], lw=1.6, label=label)
                rug = axes.get_xaxis_transform()
                low = -0.035 * (place + 1)  # a line of it for each method, below the axis
                axes.vlines(10**values, low, low + 0.03, color=COLOURS[method], lw=0.8, transform=rug, clip_on=False)
            axes.set(xscale="log", ylabel="density per decade", xlabel=f"{NORM[norm]} of a layer")
            axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
            axes.set_title(f"{MODELS[model]} (clean | robust accuracy in %)", loc="left")
            _log_ticks(axes.xaxis)
            axes.tick_params(axis="x", pad=26, length=0)
            if axes.lines:
                axes.legend(loc="upper left", ncols=2, fontsize=8, frameon=False)
            else:
                _missing(axes)


def accuracies(report: Report, file: Path) -> None:
    """Robust against clean accuracy, here above and as the paper printed them below: plain, and a line a method."""
    with drawing(file, (12, 6.4)) as figure:
        panels = figure.subplots(2, len(MODELS))
        for (above, below), model in zip(panels.T, MODELS, strict=True):
            above.set_title(MODELS[model], loc="left")
            guessing, diverged = 0, 0  # the points of the first would be far from all others
            for method, settings in _by_method(report).items():
                ours, theirs = {}, {}  # by place: of the strongest strength 0, then 1, 2, 3
                for place, setting in enumerate(settings):
                    found = report.seeds(model, *setting)
                    rows = [row for row in found if not report.at_chance(row)]
                    guessing += len(found) - len(rows)
                    diverged += len(report.lost(model, *setting))
                    if rows:
                        ours[place] = [100 * np.mean([accuracy(row, of) for row in rows]) for of in ("clean", "robust")]
                        _cross(above, ours[place], rows)
                    if None not in (printed := TABLE2[(model, *setting)]):
                        theirs[place] = printed
                _path(above, method, ours)
                _path(below, method, theirs)
            below.set_xlabel("clean accuracy in %")
            if not above.collections:
                _missing(above)
            hidden = {"may be guessing": guessing, "diverged": diverged}
            if any(hidden.values()):
                text = "not shown: " + ", ".join(f"{count} that {what}" for what, count in hidden.items() if count)
                above.annotate(text, (1, 1.02), xycoords="axes fraction", ha="right", fontsize=8, color="0.4")
        panels[0, 0].set_ylabel("here: robust accuracy in %")
        panels[1, 0].set_ylabel("the paper: robust accuracy in %")
        _legend(figure, report, "; the larger and darker, the stronger")


def histories(report: Report, norms: Sequence[str], file: Path) -> None:
    """Geometric mean of the layers' norms after each epoch: a row of panels for each norm, a column for each model."""
    with drawing(file, (12, 2.4 * len(norms) + 0.8)) as figure:
        rows = figure.subplots(len(norms), len(MODELS), sharex=True, sharey="row", squeeze=False)
        for norm, line in zip(norms, rows, strict=True):
            line[0].set_ylabel(f"{NORM[norm]}\n(geometric mean)")
            for axes, model in zip(line, MODELS, strict=True):
                axes.set_yscale("log")
                _log_ticks(axes.yaxis)
                for method, settings in _by_method(report).items():
                    for place, (_, strength) in enumerate(settings):
                        for row in report.ended(model, method, strength):
                            if not row["history"]:  # it diverged in the first epoch
                                continue
                            epochs = [entry["epoch"] for entry in row["history"]]
                            means = [geometric_mean(middles(entry[norm])) for entry in row["history"]]
                            axes.plot(epochs, means, color=_shade(method, place), lw=1.2, zorder=10 - place,
                                      marker="." * (len(epochs) < 10))  # fmt: skip
                if not axes.lines:
                    _missing(axes)
        for axes, model in zip(rows[0], MODELS, strict=True):
            axes.set_title(MODELS[model], loc="left")
        for axes in rows[-1]:
            axes.set_xlabel("epoch")
            axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, report, "; the darker, the stronger")


def layers(report: Report, model: str, norms: Sequence[str], file: Path) -> None:
    """The norm of each layer of one model, by method: its strongest strength, and as a line the plain network's."""
    settings = strongest(report.protocol.experiment)
    plain = report.seeds(model, "plain", None)
    with drawing(file, (10, 1.7 * len(settings) + 0.6)) as figure:
        grid = figure.subplots(len(settings), len(norms), sharex=True, sharey="col", squeeze=False)
        for (method, strength), line in zip(settings, grid, strict=True):
            rows = report.seeds(model, method, strength)
            for norm, axes in zip(norms, line, strict=True):
                axes.set_ylabel(NORM[norm])
                if rows:
                    values = _over_seeds(rows, norm)
                    axes.bar(range(1, len(values) + 1), values, 0.8, color=COLOURS[method])
                else:
                    _missing(axes, report.absent(model, method, strength))
                if plain:
                    values = _over_seeds(plain, norm)
                    axes.stairs(values, np.arange(len(values) + 1) + 0.5, color=COLOURS["plain"], lw=1, baseline=None)
            at = "" if strength is None or report.protocol.experiment != "table2" else f" {strength:g}"
            line[0].set_title(f"{METHODS[method]}{at}; line: plain", loc="left")
        for axes in grid[-1]:
            axes.set_xlabel("layer, in the order of use")
            axes.xaxis.get_major_locator().set_params(integer=True)


@contextmanager
def drawing(file: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure, saved as ``file`` with .png and .svg in the end, the same bytes for the same rows."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the figures need matplotlib: pip install "convnorm[train]"') from error
    style = {
        "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "0.92", "axes.axisbelow": True, "svg.hashsalt": "convnorm", "svg.fonttype": "none",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file.with_suffix(".png"), dpi=150)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})


def _legend(figure: Any, report: Report, shades: str) -> None:
    from matplotlib.lines import Line2D

    methods = _by_method(report)
    handles = [Line2D([], [], color=COLOURS[method], lw=2, label=METHODS[method]) for method in methods]
    several = shades if any(len(settings) > 1 for settings in methods.values()) else ""
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) + 1, frameon=False,
                  title="method" + several, title_fontsize=9)  # fmt: skip


def _missing(axes: Any, word: str = "missing") -> None:
    axes.text(0.5, 0.5, word, transform=axes.transAxes, ha="center", color="0.5")


def _log_ticks(axis: Any) -> None:
    """1, 2, 5, 10, ... as they are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _by_method(report: Report) -> dict[str, list[Setting]]:
    methods: dict[str, list[Setting]] = {}
    for method, strength in report.settings:
        methods.setdefault(method, []).append((method, strength))
    return methods


def _shade(method: str, place: int) -> tuple[float, ...]:
    """The method's colour for its strongest strength, at place 0, and paler for the next ones."""
    from matplotlib.colors import to_rgb

    paler = 0.22 * place
    return tuple(paler + (1 - paler) * channel for channel in to_rgb(COLOURS[method]))


def _path(axes: Any, method: str, points: Mapping[int, Sequence[float]]) -> None:
    """A line through the points of a method, by place of their strength; plain is a star."""
    if not points:
        return
    xs, ys = zip(*points.values(), strict=True)
    if method == "plain":
        axes.scatter(xs, ys, 130, color=COLOURS[method], marker="*", zorder=4)
        return
    axes.plot(xs, ys, color=COLOURS[method], lw=0.8, alpha=0.5, zorder=2)
    sizes, shades = [60 - 12 * place for place in points], [_shade(method, place) for place in points]
    axes.scatter(xs, ys, sizes, color=shades, edgecolors=COLOURS[method], lw=0.6, zorder=3)


def _cross(axes: Any, point: Sequence[float], rows: Sequence[Row]) -> None:
    """The deviation over seeds; of one seed, the intervals over images."""
    spans = []
    for of, centre in zip(("clean", "robust"), point, strict=True):
        if len(rows) > 1:
            deviation = 100 * np.std([accuracy(row, of) for row in rows], ddof=1)
            spans.append([[deviation], [deviation]])
        else:
            low, high = rows[0][of]["interval"]
            spans.append([[max(0, centre - 100 * low)], [max(0, 100 * high - centre)]])
    axes.errorbar(
        *([value] for value in point), xerr=spans[0], yerr=spans[1], color="0.86", lw=0.7, fmt="none", zorder=1
    )


def _percent(rows: Sequence[Row], of: str) -> str:
    return f"{100 * np.mean([accuracy(row, of) for row in rows]):.1f}"


def _over_seeds(rows: Sequence[Row], norm: str) -> np.ndarray:
    """Of each layer, the mean over seeds."""
    return np.mean([norms_of(row, norm) for row in rows], axis=0)
