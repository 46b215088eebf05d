"""A report as one HTML page: what is said of the whole, pictures, and a line for each layer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from .bars import bars, histogram
from .document import body, cell, document, embedded, table
from .row import Measured, Row, ords_of, sizes_text
from .table import summary
from .text import beside, geometry_in_words, l2_text, number, percent

if TYPE_CHECKING:
    from ..report import Report


def page(report: Report) -> str:
    """The whole page."""
    return document(f"{report.title}: norms of its layers", _content(report))


def fragment(report: Report) -> str:
    """For notebooks."""
    return embedded(_content(report))


def _content(report: Report) -> str:
    lines = "\n".join(f"<p>{escape(line)}</p>" for line in summary(report))
    return f"<h1>{escape(report.title)}</h1>\n{lines}\n{_charts(report)}\n{_table(report)}"


def _charts(report: Report) -> str:
    names = [row.name for row in report.rows]
    norms = ords_of(l2=report.rtol is not None)
    found = []
    for name, ord in norms.items():
        plain = [row.norms.norm(ord) for row in report.rows]
        folded = [row.folded.norm(ord) if row.folded else None for row in report.rows]
        head = f"{name}, upper bounds" if ord == 2 else name
        head += ", bars; with batch norm, marks" if any(value is not None for value in folded) else ""
        found.append(f"<figure><h2>{head}</h2>\n{bars(names, plain, folded)}</figure>")
    distributions = {name: [row.norms.norm(ord) for row in report.rows] for name, ord in norms.items()}
    found.append(f"<figure><h2>distribution over layers</h2>\n{histogram(distributions)}</figure>")
    return f'<div class="charts">{"".join(found)}</div>'


def _table(report: Report) -> str:
    with_l2 = report.rtol is not None
    heads = ["layer", "l1", "linf", *(["l2", "reshaped"] if with_l2 else []), "share"]
    shares = report.shares(report.ord)
    return table(heads, [_row(i, row, shares[i], with_l2) for i, row in enumerate(report.rows)])


def _row(i: int, row: Row, share: float | None, with_l2: bool) -> str:
    """A body of its own, of one line or of two, which stay together when the table is sorted."""
    size = f"input {sizes_text(row.in_shape)}" if row.in_shape else ""
    about = ", ".join(filter(None, [f"{row.kind} {sizes_text(row.weight)}", geometry_in_words(row), size]))
    cells = [cell(i, f"{escape(row.name) or '(the model)'}<small>{escape(about)}</small>")]
    cells += _norms(row.norms, with_l2)
    cells += [cell(row.reshaped, number(row.reshaped))] if with_l2 else []
    lines = [f"<tr>{''.join(cells)}{cell(share, percent(share))}</tr>"]
    if row.folded:
        cells = [
            cell(i, f"with {escape(beside(row.name, row.batch_norm))}"),
            *_norms(row.folded, with_l2),
            "<td></td>",
        ]
        lines.append(f'<tr class="folded">{"".join(cells)}{"<td></td>" if with_l2 else ""}</tr>')
    return body(*lines)


def _norms(norms: Measured, with_l2: bool) -> list[str]:
    cells = [cell(norm, number(norm)) for norm in (norms.l1, norms.linf)]
    return [*cells, cell(norms.l2_upper, _bracket(norms))] if with_l2 else cells


def _bracket(norms: Measured) -> str:
    why = "; ".join(filter(None, [norms.l2_certificate and f"proved by {norms.l2_certificate}", norms.l2_stopped]))
    return f'<span title="{escape(why)}">{l2_text(norms)}</span>'
