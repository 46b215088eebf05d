"""A report as one HTML page: style, pictures and a few lines of script within it, nothing fetched."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from .bars import bars, histogram
from .row import Measured, Row, sizes_text
from .table import summary
from .text import beside, geometry_in_words, l2_text, number, percent

if TYPE_CHECKING:
    from ..report import Report

# Everything is inside .convnorm, so that it stands in a notebook without touching it.
STYLE = """
.convnorm { --text: #1c2430; --soft: #667085; --line: #e3e7ec; --page: #fff; --bar: #2f6fb0; --bar2: #b3541e;
  color: var(--text); background: var(--page); font: 15px/1.45 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  .convnorm { --text: #e6e9ee; --soft: #98a2b3; --line: #333b47; --page: #14181f; --bar: #6aa9e9; --bar2: #e0935f; } }
.convnorm h1 { font-size: 1.5em; margin: 0 0 .3em; overflow-wrap: anywhere; }
.convnorm h2 { font-size: 1.05em; margin: 1.6em 0 .2em; }
.convnorm p { margin: .2em 0; color: var(--soft); overflow-wrap: anywhere; }
.convnorm .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30em), 1fr)); gap: 0 2em; }
.convnorm svg { width: 100%; height: auto; display: block; font-size: 11px; }
.convnorm svg text { fill: var(--soft); }
.convnorm .frame { overflow-x: auto; margin-top: 1em; }
.convnorm table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
.convnorm th, .convnorm td { padding: .3em .6em 0; text-align: right; white-space: nowrap; vertical-align: top;
  background: none; }
.convnorm tr:last-child > * { padding-bottom: .3em; border-bottom: 1px solid var(--line); }
.convnorm .folded td { color: var(--soft); padding-top: 0; font-size: .87em; }
.convnorm th:first-child, .convnorm td:first-child { position: sticky; left: 0; background: var(--page);
  text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
.convnorm th { color: var(--soft); font-weight: 600; }
.convnorm th button { all: unset; cursor: pointer; }
.convnorm th button:focus-visible { outline: 2px solid var(--bar); }
.convnorm figure { margin: 0; }
.convnorm small { display: block; color: var(--soft); font-size: .82em; }
@media (max-width: 600px) { .convnorm { font-size: 13px; } .convnorm svg { font-size: 19px; }
  .convnorm th, .convnorm td { padding-left: .4em; padding-right: .4em; }
  .convnorm th:first-child, .convnorm td:first-child { max-width: 11em; padding-left: 0; } }
"""
SORT = """
document.querySelectorAll(".convnorm th button").forEach((button, column) => button.addEventListener("click", () => {
  const table = button.closest("table"), sign = button.dataset.sign = -(button.dataset.sign || 1);
  const key = body => +body.rows[0].cells[column].dataset.sort;
  [...table.tBodies].sort((a, b) => sign * (key(a) - key(b))).forEach(body => table.append(body));
}));
"""


def page(report: Report) -> str:
    """The whole page."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    style = f"body {{ margin: 0; }} .convnorm {{ padding: 1.2em max(1em, 4vw) 3em; min-height: 100vh; }}{STYLE}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>{escape(report.title)}: norms of its layers</title>\n'
        f"<style>{style}</style></head>\n<body>\n{_content(report)}\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def fragment(report: Report) -> str:
    """For notebooks: without a page around it, and without script."""
    return f"<style>{STYLE}</style>\n{_content(report)}"


def _content(report: Report) -> str:
    lines = "\n".join(f"<p>{escape(line)}</p>" for line in summary(report))
    return (
        f'<div class="convnorm">\n<h1>{escape(report.title)}</h1>\n{lines}\n{_charts(report)}\n{_table(report)}\n</div>'
    )


def _charts(report: Report) -> str:
    names = [row.name for row in report.rows]
    norms = {"l1": 1, "linf": math.inf} | ({} if report.rtol is None else {"l2": 2})
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
    titles = "".join(f'<th scope="col"><button type="button">{head}</button></th>' for head in heads)
    shares = report.shares(report.ord)
    rows = [_row(i, row, shares[i], with_l2) for i, row in enumerate(report.rows)]
    return f'<div class="frame"><table>\n<thead><tr>{titles}</tr></thead>\n{"".join(rows)}</table></div>'


def _row(i: int, row: Row, share: float | None, with_l2: bool) -> str:
    """A body of its own, of one line or of two, which stay together when the table is sorted."""
    size = f"input {sizes_text(row.in_shape)}" if row.in_shape else ""
    about = ", ".join(filter(None, [f"{row.kind} {sizes_text(row.weight)}", geometry_in_words(row), size]))
    cells = [_cell(i, f"{escape(row.name) or '(the model)'}<small>{escape(about)}</small>")]
    cells += _norms(row.norms, with_l2)
    cells += [_cell(row.reshaped, number(row.reshaped))] if with_l2 else []
    lines = f"<tr>{''.join(cells)}{_cell(share, percent(share))}</tr>"
    if row.folded:
        cells = [
            _cell(i, f"with {escape(beside(row.name, row.batch_norm))}"),
            *_norms(row.folded, with_l2),
            "<td></td>",
        ]
        lines += f'<tr class="folded">{"".join(cells)}{"<td></td>" if with_l2 else ""}</tr>'
    return f"<tbody>{lines}</tbody>\n"


def _norms(norms: Measured, with_l2: bool) -> list[str]:
    cells = [_cell(norm, number(norm)) for norm in (norms.l1, norms.linf)]
    return [*cells, _cell(norms.l2_upper, _bracket(norms))] if with_l2 else cells


def _bracket(norms: Measured) -> str:
    why = "; ".join(filter(None, [norms.l2_certificate and f"proved by {norms.l2_certificate}", norms.l2_stopped]))
    return f'<span title="{escape(why)}">{l2_text(norms)}</span>'


def _cell(key: float | None, text: str) -> str:
    return f'<td data-sort="{-1 if key is None or math.isnan(key) else key}">{text}</td>'
