"""Several models, or checkpoints of one, side by side."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .report import Report, finite, report, written
from .reporting.row import ORDS, ords_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch.export import ExportedProgram


def compare(
    models: Sequence[Report | nn.Module | ExportedProgram] | Mapping[str, Report | nn.Module | ExportedProgram],
    example: Tensor | Sequence[Any] | None = None,
    **options: Any,
) -> Comparison:
    """Reports side by side. Models among them are reported on first, with ``example`` and the other ``options``.

    A mapping gives titles.

    >>> plain, wide = (nn.Sequential(nn.Conv1d(1, width, 3)) for width in (1, 2))
    >>> compare({"plain": plain, "wide": wide}, [1, 1, 8], l2=False)
    Comparison('plain', 'wide')
    """
    named = models if isinstance(models, Mapping) else dict(enumerate(models))
    if len(named) < 2:
        raise ValueError(f"convnorm: models {list(named)} must be at least two, to be compared")
    reports = []
    for title, model in named.items():
        if isinstance(model, Report):
            found = model
        else:  # an exported program brings its own sizes
            found = report(model, example if isinstance(model, nn.Module) else None, **options)
        reports.append(replace(found, title=title) if isinstance(title, str) else found)
    return Comparison(tuple(reports))


@dataclass(frozen=True)
class Comparison:
    """Of norms with the batch norms that follow, where they were measured."""

    reports: tuple[Report, ...]

    def __repr__(self) -> str:
        return f"Comparison({', '.join(repr(one.title) for one in self.reports)})"

    @property
    def names(self) -> list[str]:
        """Of layers that all of them have, in the order of the first."""
        others = [{row.name for row in one.rows} for one in self.reports[1:]]
        return list(dict.fromkeys(row.name for row in self.reports[0].rows if all(row.name in own for own in others)))

    @property
    def ords(self) -> dict[str, float]:
        """Of norms that all of them have: l2 only where none left it out."""
        return ords_of(l2=all(one.rtol is not None for one in self.reports))

    def totals(self) -> list[dict[str, Any]]:
        """For each report: layers, parameters, and of l1, linf and l2 the median, the largest and log10 of the product.

        NaN is left out of the first two; no product is known then.
        """
        return [
            {"title": one.title, "layers": len(one.rows), "parameters": one.parameters}
            | {f"{name}_{what}": value for name, ord in ORDS.items() for what, value in _spread(one, ord).items()}
            for one in self.reports
        ]

    def layers(self, ord: float) -> list[dict[str, Any]]:
        """A row for each layer that all have, and its norm in each: the largest, if it is used at several sizes."""
        each = [_by_name(one, ord) for one in self.reports]
        return [{"layer": name, "norms": [_largest(own[name]) for own in each]} for name in self.names]

    def to_json(self, path: str | Path | None = None) -> str:
        """Totals, and the layers that all have with their norms in each. NaN and inf are strings."""
        content = {"totals": self.totals()} | {name: self.layers(ord) for name, ord in ORDS.items()}
        return written(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """A line for each layer, norm and report."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["layer", "norm", "title", "value"])
        for name, ord in ORDS.items():
            for row in self.layers(ord):
                for one, value in zip(self.reports, row["norms"], strict=True):
                    if value is not None:
                        writer.writerow([row["layer"], name, one.title, value])
        return written(stream.getvalue(), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """A page that needs nothing but itself."""
        from .reporting.compared_page import compared_page

        return written(compared_page(self), path)

    def table(self, width: int = 100) -> Table:
        """What they are as wholes. For a terminal, by rich."""
        from .reporting.compared import totals_table

        return totals_table(self, width)

    def layer_table(self, ord: float = 1, width: int = 100) -> Table:
        """Layer by layer, each norm beside its ratio to the first report's."""
        from .reporting.compared import layer_table

        return layer_table(self, ord, width)

    def plot(self, path: str | Path | None = None) -> Figure:
        """A line for each, by depth, and their distributions."""
        from .reporting.plot import plot_reports

        return plot_reports(self.reports, path)

    def __str__(self) -> str:
        from .reporting.table import as_text

        return as_text(self.table())

    def _repr_html_(self) -> str:
        from .reporting.compared_page import compared_fragment

        return compared_fragment(self)


def _spread(one: Report, ord: float) -> dict[str, float | None]:
    norms = [row.whole.norm(ord) for row in one.rows]
    known = [norm for norm in norms if norm is not None and not math.isnan(norm)]
    return {
        "median": median(known) if known else None,
        "max": max(known) if known else None,
        "log10_product": one.log10_product(ord),
    }


def _by_name(one: Report, ord: float) -> dict[str, list[float | None]]:
    """The norms of each layer, at all sizes that it is used at."""
    found: dict[str, list[float | None]] = {}
    for row in one.rows:
        found.setdefault(row.name, []).append(row.whole.norm(ord))
    return found


def _largest(norms: list[float | None]) -> float | None:
    """None where one is not known, NaN where one is NaN: either could be the largest."""
    if None in norms:
        return None
    return math.nan if any(map(math.isnan, norms)) else max(norms)
