"""What ``evaluate`` measured of one network, as a Markdown page with figures. All of it is read from its numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .cell import Cell
from .measures import STEPS
from .plots import drawing
from .published import METHODS, MODELS
from .report import image, table, write
from .statistics import normal

CLEAN, ATTACKED = "#0072B2", "#D55E00"  # after Okabe & Ito: told apart by colour-blind readers
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Found = dict[str, Any]


def render(found: Found, out: Path) -> Path:
    """Writes ``out/evaluation.md`` and the figures that it shows."""
    figures = out / "figures"
    distributions(found, figures / "distributions")
    spectra(found, figures / "spectra")
    norms(found, figures / "norms")
    return write(out / "evaluation.md", _sections(found))


def _sections(found: Found) -> list[str]:
    cell, made = Cell(**found["cell"]), found["made"]
    protocol = found["protocol"]
    epochs, done = protocol["epochs"], found.get("epochs", protocol["epochs"])
    strength = "" if cell.strength is None else f" {cell.strength:g}"
    against = f"{', '.join(found['attacks'])} ({found['iterations']} iterations)"
    return [
        f"# {MODELS[cell.model]}, {METHODS[cell.method]}{strength}, seed {cell.seed}",
        f"- **network**: width x {protocol['width']:g}, "
        f"{epochs if done == epochs else f'{done} of {epochs}'} epochs of "
        f"{protocol['training_images']:,} images of {protocol['dataset']}, variant `{protocol['variant']}`\n"
        f"- **attacks**: {against}, linf, eps {255 * found['eps']:.3g}/255, "
        f"on the first {found['right']['images']:,} test images\n"
        f"- **made by**: commit {made['commit']}, torch {made['torch']}, Python {made['python']}, on {made['device']}, "
        f"{made['date']}, in {found['seconds']:.0f} seconds",
        "## Accuracy and stability",
        accuracies(found),
        "*Stable*: no attack changes what the network predicts, right or wrong (Wu et al., 2021). *Robust*: right "
        "and stable. Intervals are Wilson's over images.",
        "## Around the images",
        quantiles(found),
        "*Margin*: the logit of the right class minus the largest other one. *Confidence*: the probability of the "
        "predicted class. *Local Lipschitz constant*: the largest |f(x) - f(x')|<sub>1</sub> / "
        f"|x - x'|<sub>inf</sub> of logits that was found within eps. Attacked images are those that {STEPS} steps of "
        "PGD found, towards a large loss.",
        image("figures/distributions", "Margins and confidences of clean and attacked images"),
        "## In the layers",
        image("figures/norms", "Norms of the layers"),
        image("figures/spectra", "Singular values of the layers"),
        layers(found),
        "Each layer at its own input size, without batch norm. *c*: singular values of the layer with circular padding "
        "instead, where its own matrix is too large to decompose; the norms are always its own.",
        "## As the network applies them",
        "The same norms of each layer and the batch norm that directly follows it, where one does, as one map.",
        folded(found),
    ]


def accuracies(found: Found) -> str:
    names = {"all": "right, all test images", "right": "right", "stable": "stable", "robust": "robust"}
    lines = []
    for key, name in names.items():
        part = found[key]
        low, high = (100 * end for end in part["interval"])
        share = 100 * part["right"] / part["images"]
        lines.append([name, f"{part['right']:,} of {part['images']:,}", f"{share:.1f}", f"{low:.1f} to {high:.1f}"])
    return table(["", "images", "%", "95 % interval"], lines)


def quantiles(found: Found) -> str:
    measured = {
        "margin, clean": found["margin"]["clean"],
        "margin, attacked": found["margin"]["attacked"],
        "confidence, clean": found["confidence"]["clean"],
        "confidence, attacked": found["confidence"]["attacked"],
        "local Lipschitz constant": found["local_lipschitz"],
    }
    lines = []
    for name, values in measured.items():
        low, high = normal(float(np.mean(values)), float(np.std(values)) / math.sqrt(len(values)))
        mean = f"{np.mean(values):.3g} ± {(high - low) / 2:.2g}"
        lines.append([name, mean, *(f"{value:.3g}" for value in np.quantile(values, QUANTILES))])
    return table(["", "mean ± 95 %", *(f"{100 * share:g} %" for share in QUANTILES)], lines)


def layers(found: Found) -> str:
    lines = _norms(found, "norms")
    for line, values in zip(lines, found["spectra"], strict=True):
        if values["values"]:
            smallest, middle = values["ranks"][-1], values["ranks"][len(values["ranks"]) // 2]
            line += [f"{values['values']:,}" + (" c" if values["circular"] else ""), f"{values['mean']:.3g}"]
            line += [f"{values['deviation']:.3g}", f"{middle:.3g}", f"{smallest:.2g}"]
        else:
            line += ["none"] + ["-"] * 4
    head = ["layer", "l1", "linf", "l2", "singular values", "mean", "deviation", "median", "smallest"]
    return table(head, lines)


def folded(found: Found) -> str:
    return table(["layer", "l1", "linf", "l2"], _norms(found, "folded"))


def _norms(found: Found, part: str) -> list[list[str]]:
    """Each layer's name and norms."""
    columns = (found[part][name] for name in ("l1", "linf", "l2"))
    return [
        [f"`{name}`", f"{l1:.4g}", f"{linf:.4g}", f"{low:.4g} to {high:.4g}"]
        for name, l1, linf, (low, high) in zip(found["layers"], *columns, strict=True)
    ]


def distributions(found: Found, file: Path) -> None:
    """Histograms of margins and confidences, clean and attacked."""
    with drawing(file, (9, 3.2)) as figure:
        left, right = figure.subplots(1, 2)
        for axes, name, limits in ((left, "margin", None), (right, "confidence", (0, 1))):
            both = np.concatenate([found[name]["clean"], found[name]["attacked"]])
            edges = np.linspace(*(limits or np.quantile(both, (0.002, 0.998))), 41)
            for which, colour in (("clean", CLEAN), ("attacked", ATTACKED)):
                values = np.clip(found[name][which], edges[0], edges[-1])  # the few beyond, at the ends
                axes.hist(values, edges, color=colour, alpha=0.25)
                axes.hist(values, edges, color=colour, histtype="step", lw=1.4, label=which)
            axes.set_ylabel("images")
            axes.grid(axis="x", visible=False)
        left.axvline(0, color="0.3", lw=0.9, ls="--")
        left.set_xlabel("margin in logits (right of the line: right)")
        right.set_xlabel("confidence: probability of the predicted class")
        left.legend(frameon=False, loc="upper left")


def spectra(found: Found, file: Path) -> None:
    """Every layer's singular values by rank, darker from the input on; and their mean and deviation, layer by layer."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    with drawing(file, (10, 3.8)) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        count = len(found["spectra"])
        colours = ScalarMappable(Normalize(1, count), colormaps["viridis_r"])
        for number, values in enumerate(found["spectra"], 1):
            if not values["values"]:
                continue
            colour, style = colours.to_rgba(number), "--" if values["circular"] else "-"
            left.plot(np.linspace(0, 1, len(values["ranks"])), values["ranks"], color=colour, ls=style, lw=1.1)
            face = "white" if values["circular"] else colour
            right.errorbar(number, values["mean"], values["deviation"], color=colour, fmt="o", ms=4.5, mfc=face, lw=1.4)
        largest = max((values["ranks"][0] for values in found["spectra"] if values["values"]), default=1.0) or 1.0
        left.set(xlabel="rank, from the largest (0) to the smallest (1)", ylabel="singular value", xlim=(0, 1))
        left.set(yscale="log", ylim=(largest / 1000, 1.3 * largest))
        right.set(xlabel="layer, in the order of use", ylabel="mean ± deviation of singular values", ylim=(0, None))
        right.xaxis.get_major_locator().set_params(integer=True)
        handles = [
            Line2D([], [], color="0.3", ls="-", marker="o", ms=4.5, label="the layer's own"),
            Line2D([], [], color="0.3", ls="--", marker="o", ms=4.5, mfc="white", label="with circular padding"),
        ]
        right.legend(handles=handles, frameon=False)
        figure.colorbar(colours, ax=left, label="layer", pad=0.02).locator.set_params(integer=True)


def norms(found: Found, file: Path) -> None:
    """A bar for each layer and norm; of l2 the lower bound, with the upper one as a line beyond."""
    count = len(found["layers"])
    with drawing(file, (10, 0.19 * count + 1)) as figure:
        places = np.arange(count)
        for axes, name in zip(figure.subplots(1, 3, sharey=True), ("l1", "linf", "l2"), strict=True):
            values = np.asarray(found["norms"][name], dtype=float).reshape(count, -1)
            axes.barh(places, values[:, 0], 0.75, color=CLEAN)
            axes.hlines(places, values[:, 0], values[:, -1], color="black", lw=1)
            axes.set(xlabel=f"{name} norm" + (", and how much more it may be" if name == "l2" else ""))
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
        axes.set_yticks(places, found["layers"], fontsize=7)
        axes.set_ylim(count - 0.4, -0.6)
