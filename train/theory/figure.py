"""The theorems in two dimensions. Needs matplotlib."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .proposition1 import layer_norms, stretches
from .separation import closest_pair
from .theorem2 import NearestClass

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#3b6fb6", "#e6a23c", "#4f9d69", "#b5486b")  # of the classes, in the order of their labels
NORMS = {"$\\ell_1$": "0.3", "$\\ell_2$": "0.55", "$\\ell_\\infty$": "0.8"}
PIXELS = 300


def draw(
    out: Path,
    annulled: nn.Sequential,
    norm: float,
    robust: NearestClass,
    steep: NearestClass,
    points: Tensor,
    labels: Tensor,
    eps: float,
) -> None:
    """``theory`` with four panels, and each alone, all of them as PNG and SVG."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the figures need matplotlib: pip install "convnorm[train]"') from error
    from matplotlib.figure import Figure

    given = {"points": points, "labels": labels, "eps": eps}
    panels = {
        "proposition1": partial(draw_layers, network=annulled, norm=norm),
        "segment": partial(draw_segment, robust=robust, steep=steep, **given),
        "theorem2": partial(draw_map, output=picture(robust), **given),
        "proposition2": partial(draw_map, output=picture(steep), **given),
    }
    titles = {
        "proposition1": "Proposition 1: large norms, Lipschitz constant 0",
        "segment": "Theorem 2 and Proposition 2 along the black segment",
        "theorem2": "Theorem 2: robust accuracy 1",
        "proposition2": "Proposition 2: the same, as steep as asked",
    }
    with matplotlib.rc_context({"svg.hashsalt": "convnorm", "svg.fonttype": "none", "font.size": 9}):
        figures = {"theory": Figure(figsize=(9.2, 8.6), layout="constrained")}
        for name, shared in zip(panels, figures["theory"].subplots(2, 2).flat, strict=True):
            figures[name] = Figure(figsize=(4.8, 4.5), layout="constrained")
            for axes in (shared, figures[name].subplots()):
                panels[name](axes)
                axes.set_title(titles[name], fontsize=10, loc="left")
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", dpi=150)
            figure.savefig(out / f"{name}.svg", dpi=150, metadata={"Date": None})


def draw_layers(axes: Axes, network: nn.Sequential, norm: float) -> None:
    """Norms of each layer, and by how much the network up to it moves some inputs apart."""
    x, other = torch.randn(2, 1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    *alive, _ = stretches(network, x, other)
    norms = layer_norms(network, [1, 2])
    depth, floor = len(norms), min(norm, *alive) / 100
    for at, ((name, colour), values) in enumerate(zip(NORMS.items(), zip(*norms, strict=True), strict=True)):
        axes.bar([1 + i + 0.25 * (at - 1) for i in range(depth)], values, 0.25, color=colour, label=f"{name} norm")
    axes.axhline(norm, color="black", lw=0.8, ls="--", label=f"asked for: {norm:g}")
    red = COLOURS[3]
    axes.plot(range(1, depth), alive, "o-", color=red, lw=1.5, label="all layers up to it: how far inputs move apart")
    axes.annotate("", (depth, floor), (depth - 1, alive[-1]), arrowprops={"arrowstyle": "->", "color": red, "lw": 1.5})
    axes.text(depth - 0.4, (alive[-1] * floor) ** 0.5, "exactly 0", color=red)
    axes.set(yscale="log", ylim=(floor, max(norm, *alive) * 1e6), xlabel="layer", xticks=range(1, depth + 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def picture(network: NearestClass) -> Tensor:
    """The output on [0, 1]^2, a row of pixels for each second coordinate."""
    middle = (torch.arange(PIXELS, dtype=torch.float64) + 0.5) / PIXELS
    inputs = torch.cartesian_prod(middle, middle).flip(1)
    with torch.no_grad():
        return torch.cat([network(part) for part in inputs.split(4000)]).view(PIXELS, PIXELS)


def draw_map(axes: Axes, output: Tensor, points: Tensor, labels: Tensor, eps: float) -> None:
    """The output as a colour, and each point with its ball of radius eps."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("classes", COLOURS)
    axes.imshow(output.numpy(), shades, vmin=1, vmax=len(COLOURS), alpha=0.45, origin="lower", extent=(0, 1, 0, 1))
    for point, label in zip(points.tolist(), labels.tolist(), strict=True):
        corner, colour = [value - eps for value in point], COLOURS[label - 1]
        axes.add_patch(Rectangle(corner, 2 * eps, 2 * eps, facecolor=colour, edgecolor="white", lw=0.8, alpha=0.45))
    first, second, _ = closest_pair(points, labels)
    axes.plot(*points[[first, second]].T.tolist(), color="black", lw=1.2)
    axes.scatter(
        *points.T.tolist(), s=12, c=[COLOURS[label - 1] for label in labels.tolist()], ec="white", lw=0.6, zorder=3
    )
    for label, colour in enumerate(COLOURS, 1):
        axes.plot([], [], "s", color=colour, label=f"class {label}")
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0)}
    axes.legend(**below, ncols=4, frameon=False, fontsize=8, handletextpad=0.1, columnspacing=1.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(), yticks=(), aspect="equal")


def draw_segment(
    axes: Axes, robust: NearestClass, steep: NearestClass, points: Tensor, labels: Tensor, eps: float
) -> None:
    """Both networks between the closest points of different classes, which are in grey balls."""
    first, second, distance = closest_pair(points, labels)
    along = torch.linspace(-eps, distance + eps, 3001, dtype=torch.float64)[:, None]
    segment = points[first] + along / distance * (points[second] - points[first])
    climb = abs(int(labels[first] - labels[second]))
    for at in (0, distance):
        axes.axvspan(at - eps, at + eps, color="0.93", lw=0)
    with torch.no_grad():
        for name, network, colour in (("Theorem 2", robust, COLOURS[0]), ("Proposition 2", steep, COLOURS[3])):
            label = f"{name}: slope {climb / network.margin:,.0f}"
            axes.plot(along.flatten().tolist(), network(segment).tolist(), color=colour, lw=1.8, label=label)
    axes.set(xlabel="distance from its first end (grey: within eps of one of its ends)", ylabel="output")
    axes.set(yticks=range(1, robust.classes + 1), ylim=(0.8, robust.classes + 0.8), xlim=(-eps, distance + eps))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
