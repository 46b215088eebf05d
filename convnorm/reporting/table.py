"""Reports as tables for a terminal, by rich."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from .optional import optional
from .row import ords_of, sizes_text
from .text import beside, geometry, l2_text, number, percent, power_of_ten, shortened

if TYPE_CHECKING:
    from rich.table import Table

    from ..report import Report

SHORT = {"ConvTranspose1d": "ConvT1d", "ConvTranspose2d": "ConvT2d", "ConvTranspose3d": "ConvT3d"}
LEAST_NAME = 12


def table(report: Report, width: int) -> Table:
    """A line for each layer, and a dim one below it for the layer with its batch norm."""
    heads = ["kind", "weight", "", "input", "l1", "linf"]
    heads += [] if report.rtol is None else ["l2", "re-\nshaped"]
    cells: list[tuple[str, list[str], str]] = []
    for row, share in zip(report.rows, report.shares(report.ord), strict=True):
        about = [SHORT.get(row.kind, row.kind), sizes_text(row.weight), geometry(row), sizes_text(row.in_shape)]
        values = [number(row.norms.l1), number(row.norms.linf)]
        values += [] if report.rtol is None else [l2_text(row.norms), number(row.reshaped)]
        cells.append((row.name, [*about, *values, percent(share)], ""))
        if row.folded:
            values = [number(row.folded.l1), number(row.folded.linf)]
            values += [] if report.rtol is None else [l2_text(row.folded), ""]
            cells.append((f" + {beside(row.name, row.batch_norm)}", ["", "", "", "", *values, ""], "dim"))
    return fitted([*heads, "share"], cells, width, report.title, "\n".join(summary(report)), texts=4)


def summary(report: Report) -> list[str]:
    """What is said of the network as a whole."""
    inputs = ", ".join(sizes_text(shape) for shape in report.inputs)
    norms = ords_of(l2=report.rtol is not None)
    products = ", ".join(f"{name} {power_of_ten(report.log10_product(ord))}" for name, ord in norms.items())
    lines = [
        f"{len(report.rows)} layers, {report.parameters:,} parameters{f', input {inputs}' if inputs else ''}",
        f"product of norms, batch norms included: {products}",
        f"share: of that product's logarithm, {'linf' if report.rtol is None else 'l2'}",
    ]
    lines += lipschitz(report)
    stopped = {norms.l2_stopped for row in report.rows for norms in (row.norms, row.whole) if norms.l2_stopped}
    lines += [f"* wider than asked: {reason}" for reason in sorted(stopped)]
    if report.unmeasured:
        few = [*report.unmeasured[:3], *(["..."] if len(report.unmeasured) > 3 else [])]
        lines.append(f"not measured, {len(report.unmeasured)} parameters: {', '.join(few)}")
    return lines


def lipschitz(report: Report) -> list[str]:
    """The certified bounds of the network as a whole."""
    known = {name: bound for name, bound in report.lipschitz.items() if not bound.refused}
    if known:
        texts = [
            f"{name} {power_of_ten(bound.log10_upper)} (not composed {power_of_ten(bound.log10_product)})"
            for name, bound in known.items()
        ]
        return [f"Lipschitz constant at most: {', '.join(texts)}"]
    return [f"no Lipschitz bound: {bound.refused}" for bound in list(report.lipschitz.values())[:1]]


def fitted(
    heads: list[str],
    cells: list[tuple[str, list[str], str]],
    width: int,
    title: str,
    caption: str,
    texts: int = 0,
    name: str = "layer",
) -> Table:
    """Lines of a name, values and a style in so many columns: names give way. The first ``texts`` values are words."""
    rich = optional("rich", "rich.table")
    text = optional("rich", "rich.text").Text
    lines = [head.split("\n") for head in heads]
    sizes = [
        max([*map(len, lines[i]), *(len(values[i]) for _, values, _ in cells)], default=0) for i in range(len(heads))
    ]
    room = max(LEAST_NAME, width - sum(size + 1 for size in sizes))
    found = rich.Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=text(shortened(title, width)) if title else None,
        caption=text(caption),
        title_justify="left",
        caption_justify="left",
        header_style="bold",
    )
    found.add_column(name, no_wrap=True)
    for i, head in enumerate(heads):
        found.add_column(text(head), justify="left" if i < texts else "right", overflow="fold", vertical="top")
    for first, values, style in cells:
        found.add_row(*(text(cell) for cell in (shortened(first, room), *values)), style=style or None)
    return found


def as_text(table: Table, width: int = 100) -> str:
    """Without colours."""
    console = optional("rich", "rich.console").Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())
