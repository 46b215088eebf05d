"""What the pages share: a style, tables, the few lines of script that sort them; nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

# Everything is inside .convnorm, so that it stands in a notebook without touching it.
STYLE = """
.convnorm { --text: #1c2430; --soft: #667085; --line: #e3e7ec; --page: #fff; --bar: #2f6fb0; --bar2: #b3541e;
  --c0: #2f6fb0; --c1: #b3541e; --c2: #1f7a5c; --c3: #8455b8; --c4: #b03a76; --c5: #75701f;
  color: var(--text); background: var(--page); font: 15px/1.45 system-ui, sans-serif; }
@media (prefers-color-scheme: dark) {
  .convnorm { --text: #e6e9ee; --soft: #98a2b3; --line: #333b47; --page: #14181f; --bar: #6aa9e9; --bar2: #e0935f;
    --c0: #6aa9e9; --c1: #e0935f; --c2: #5cc79e; --c3: #b795e6; --c4: #e982b4; --c5: #c9c163; } }
.convnorm h1 { font-size: 1.5em; margin: 0 0 .3em; overflow-wrap: anywhere; }
.convnorm h2 { font-size: 1.05em; margin: 1.6em 0 .2em; }
.convnorm p { margin: .2em 0; color: var(--soft); overflow-wrap: anywhere; }
.convnorm .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30em), 1fr)); gap: 0 2em; }
.convnorm svg { width: 100%; height: auto; display: block; font-size: 11px; }
.convnorm svg text { fill: var(--soft); }
.convnorm svg.swatch { width: 1.4em; display: inline-block; margin-right: .35em; vertical-align: middle;
  font-size: inherit; }
.convnorm .legend { display: flex; flex-wrap: wrap; gap: 0 1.4em; margin-top: 1.6em; overflow-wrap: anywhere; }
.convnorm details { margin-top: 1.6em; }
.convnorm summary { cursor: pointer; }
.convnorm summary h2 { display: inline; }
.convnorm .frame { overflow-x: auto; margin-top: 1em; }
.convnorm table { border-collapse: separate; border-spacing: 0; min-width: min(100%, 60em);
  font-variant-numeric: tabular-nums; color: inherit; }
.convnorm th, .convnorm td { padding: .3em .6em 0; text-align: right; white-space: nowrap; vertical-align: top;
  background: none; }
.convnorm tr:last-child > * { padding-bottom: .3em; border-bottom: 1px solid var(--line); }
.convnorm .folded td { color: var(--soft); padding-top: 0; font-size: .87em; }
.convnorm th:first-child, .convnorm td:first-child { position: sticky; left: 0; background: var(--page);
  text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
.convnorm th { color: var(--soft); font-weight: 600; }
.convnorm th button { all: unset; cursor: pointer; }
.convnorm th button:focus-visible { outline: 2px solid var(--bar); }
.convnorm th[aria-sort=descending] button::after { content: " ↓"; }
.convnorm th[aria-sort=ascending] button::after { content: " ↑"; }
.convnorm figure { margin: 0; }
.convnorm small { display: block; color: var(--soft); font-size: .82em; }
.convnorm .tilt { display: block; width: 5em; height: 5px; margin-left: auto;
  background: linear-gradient(var(--soft), var(--soft)) 50%/1px 100% no-repeat, var(--line); }
.convnorm .tilt i { display: block; height: 100%; }
@media (max-width: 600px) { .convnorm { font-size: 13px; } .convnorm svg { font-size: 19px; }
  .convnorm .tilt { width: 4em; }
  .convnorm th, .convnorm td { padding-left: .4em; padding-right: .4em; }
  .convnorm th:first-child, .convnorm td:first-child { max-width: 11em; padding-left: 0; } }
"""
SORT = """
document.querySelectorAll(".convnorm th button").forEach(button => button.addEventListener("click", () => {
  const head = button.closest("th"), table = head.closest("table");
  const sign = head.getAttribute("aria-sort") == "descending" ? 1 : -1;
  const key = body => +body.rows[0].cells[head.cellIndex].dataset.sort;
  table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  [...table.tBodies].sort((a, b) => sign * (key(a) - key(b))).forEach(body => table.append(body));
}));
"""


def document(title: str, content: str) -> str:
    """A page of its own."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    style = f"body {{ margin: 0; }} .convnorm {{ padding: 1.2em max(1em, 4vw) 3em; min-height: 100vh; }}{STYLE}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}<title>{escape(title)}</title>\n'
        f'<style>{style}</style></head>\n<body>\n<div class="convnorm">\n{content}\n</div>\n'
        f"<script>{SORT}</script>\n</body>\n</html>\n"
    )


def embedded(content: str) -> str:
    """For notebooks: without a page around it, and without script."""
    return f'<style>{STYLE}</style>\n<div class="convnorm">\n{content}\n</div>'


def table(heads: Iterable[str], bodies: Iterable[str]) -> str:
    """Each body is sorted as one, by the first of its lines."""
    titles = "".join(f'<th scope="col"><button type="button">{head}</button></th>' for head in heads)
    return f'<div class="frame"><table>\n<thead><tr>{titles}</tr></thead>\n{"".join(bodies)}</table></div>'


def body(*lines: str) -> str:
    """A line or several that stay together."""
    return f"<tbody>{''.join(lines)}</tbody>\n"


def cell(key: float | None, text: str) -> str:
    """``key`` is what the column is sorted by, below all numbers where it is not known.

    >>> cell(2.5, "2.50"), cell(None, "")
    ('<td data-sort="2.5">2.50</td>', '<td data-sort="-Infinity"></td>')
    """
    known = -math.inf if key is None or math.isnan(key) else key
    return f'<td data-sort="{str(known).replace("inf", "Infinity")}">{text}</td>'
