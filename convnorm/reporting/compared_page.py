"""Several reports as one HTML page: a line for each, pictures by depth, and a table of each norm, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .axis import drawable
from .document import body, cell, document, embedded, table
from .lines import lines, swatch
from .text import number, power_of_ten, ratio_of, ratio_text, shortened

if TYPE_CHECKING:
    from ..comparison import Comparison

LONGEST = 14  # of titles above columns
LEAST_TILT = math.log(2)  # ratios that are all nearly 1 do not fill their bars


def compared_page(comparison: Comparison) -> str:
    """The whole page."""
    titles = ", ".join(one.title for one in comparison.reports)
    return document(f"{titles}: norms side by side", _content(comparison))


def compared_fragment(comparison: Comparison) -> str:
    """For notebooks."""
    return embedded(_content(comparison))


def _content(comparison: Comparison) -> str:
    titles = [one.title for one in comparison.reports]
    parts = [f"<h1>{len(titles)} models side by side</h1>"]
    parts += [f"<p>{escape(line)}</p>" for line in _summary(comparison)]
    parts.append(_totals(comparison))
    by_norm = {name: comparison.layers(ord) for name, ord in comparison.ords.items()}
    if comparison.names:
        named = "".join(f"<span>{swatch(i)}{escape(title)}</span>" for i, title in enumerate(titles))
        charts = [_chart(name, rows, titles) for name, rows in by_norm.items()]
        parts.append(f'<div class="legend">{named}</div>\n<div class="charts">{"".join(charts)}</div>')
        parts += [_layers(name, rows, titles, i == 0) for i, (name, rows) in enumerate(by_norm.items())]
    return "\n".join(parts)


def _summary(comparison: Comparison) -> list[str]:
    """What is compared, and what is not."""
    shared = comparison.names
    count = f"{len(shared)} layer{'' if len(shared) == 1 else 's'}" if shared else "no layer"
    left = [(one.title, len({row.name for row in one.rows} - set(shared))) for one in comparison.reports]
    others = ", ".join(f"{more} of {title}" for title, more in left if more)
    return [
        f"{count} that all have, by name{f'; left out: {others}' if others else ''}",
        "norms with the batch norms that follow, where they were measured; "
        "of a layer used at several sizes, the largest" + ("; of l2, upper bounds" if "l2" in comparison.ords else ""),
    ]


def _totals(comparison: Comparison) -> str:
    """A line for each report."""
    spread = ("median", "max", "product")
    heads = ["model", "layers", "parameters", *(f"{name} {what}" for name in comparison.ords for what in spread)]
    bodies = []
    for i, one in enumerate(comparison.totals()):
        cells = [cell(i, swatch(i) + escape(one["title"]))]
        cells += [cell(one[what], f"{one[what]:,}") for what in ("layers", "parameters")]
        for name in comparison.ords:
            cells += [cell(one[f"{name}_{what}"], number(one[f"{name}_{what}"])) for what in ("median", "max")]
            product = one[f"{name}_log10_product"]
            cells.append(cell(product, power_of_ten(product)))
        bodies.append(body(f"<tr>{''.join(cells)}</tr>"))
    return table(heads, bodies)


def _chart(name: str, rows: Sequence[dict], titles: Sequence[str]) -> str:
    each = list(zip(*(row["norms"] for row in rows), strict=True))
    picture = lines([_called(row["layer"]) for row in rows], titles, each, f"{name} by depth")
    return f"<figure><h2>{_head(name)}</h2>\n{picture}</figure>"


def _layers(name: str, rows: Sequence[dict], titles: Sequence[str], shown: bool) -> str:
    """A line for each layer: the norm in each, and below a bar for its ratio to the first."""
    named = [
        f'<span title="{escape(title)}">{swatch(i)}{escape(shortened(short, LONGEST))}</span>'
        for i, (title, short) in enumerate(zip(titles, _differing(titles), strict=True))
    ]
    heads = ["layer", named[0], *(head for one in named[1:] for head in (one, "ratio"))]
    ratios = [[ratio_of(row["norms"][0], other) for other in row["norms"][1:]] for row in rows]
    widest = max([abs(math.log(ratio)) for own in ratios for ratio in own if drawable(ratio)] + [LEAST_TILT])
    bodies = []
    for i, (row, own) in enumerate(zip(rows, ratios, strict=True)):
        first, *others = row["norms"]
        cells = [cell(i, escape(_called(row["layer"]))), cell(first, number(first))]
        for other, ratio in zip(others, own, strict=True):
            cells += [cell(other, number(other)), cell(ratio, ratio_text(ratio) + _tilt(ratio, widest))]
        bodies.append(body(f"<tr>{''.join(cells)}</tr>"))
    says = f"<summary><h2>{_head(name)}, layer by layer</h2></summary>"
    note = f"<p>ratio: to {escape(titles[0])}; the logarithmic bar goes left where it is below 1, right above</p>"
    return f"<details{' open' if shown else ''}>{says}\n{note}\n{table(heads, bodies)}</details>"


def _differing(titles: Sequence[str]) -> list[str]:
    """Without the folders and the file name that all of them share.

    >>> _differing(["runs/a/last.pt", "runs/b/last.pt"]), _differing(["runs/a", "runs/a"]), _differing(["b", "b/a"])
    (['a', 'b'], ['a', 'a'], ['b', 'b/a'])
    """
    parts = [title.split("/") for title in titles]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({own[end] for own in parts}) == 1:
            parts = [own[:-1] if end else own[1:] for own in parts]
    return ["/".join(own) for own in parts]


def _head(name: str) -> str:
    return "l2, upper bounds" if name == "l2" else name


def _called(layer: str) -> str:
    return layer or "(the model)"


def _tilt(ratio: float | None, widest: float) -> str:
    """A bar from the middle, which is 1: to the left for what is smaller, to the right for what is larger.

    >>> _tilt(2.0, math.log(4))
    '<span class="tilt"><i style="margin-left:50.0%;width:25.0%;background:var(--bar2)"></i></span>'
    """
    if ratio is None or math.isnan(ratio):
        return ""
    log = math.log(ratio) if drawable(ratio) else math.copysign(widest, ratio - 1)
    long = 50 * abs(log) / widest
    begin, colour = (50, "--bar2") if log > 0 else (50 - long, "--bar")
    place = f"margin-left:{begin:.1f}%;width:{long:.1f}%"
    return f'<span class="tilt"><i style="{place};background:var({colour})"></i></span>'
