"""Several reports as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .table import fitted
from .text import NAMES, number, power_of_ten, ratio_of, ratio_text, shortened

if TYPE_CHECKING:
    from rich.table import Table

    from ..comparison import Comparison

LONGEST = 14  # of titles above columns


def totals_table(comparison: Comparison, width: int) -> Table:
    """A line for each report."""
    norms = list(comparison.ords)
    heads = ["layers", "param-\neters", *(f"{name}\n{what}" for name in norms for what in ("median", "max", "product"))]
    lines = []
    for one in comparison.totals():
        values = [str(one["layers"]), _short(one["parameters"])]
        for name in norms:
            values += [number(one[f"{name}_median"]), number(one[f"{name}_max"])]
            values += [power_of_ten(one[f"{name}_log10_product"])]
        lines.append((one["title"], values, ""))
    caption = "norms of layers, with the batch norms that follow where they were measured"
    return fitted(heads, lines, width, "", caption, name="model")


def layer_table(comparison: Comparison, ord: float, width: int) -> Table:
    """A line for each layer that they share."""
    titles = [shortened(one.title, LONGEST) for one in comparison.reports]
    heads = [titles[0], *(head for title in titles[1:] for head in (title, "ratio"))]
    lines = []
    for row in comparison.layers(ord):
        first, *others = row["norms"]
        values = [number(first)]
        for other in others:
            values += [number(other), ratio_text(ratio_of(first, other))]
        lines.append((row["layer"], values, ""))
    return fitted(heads, lines, width, NAMES[ord], f"{len(lines)} layers that all have, by name")


def _short(count: int) -> str:
    """25.6M"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
