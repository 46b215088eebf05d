"""Pictures of one report: bars by depth, and a distribution.

Bars begin at 1: upward or downward, they are as long as what the layer adds to the logarithm of a product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .axis import BOTTOM, HEIGHT, LEFT, WIDTH, Axis, drawable, first_and_last, power, svg
from .text import number

BINS = 24


def bars(names: Sequence[str], values: Sequence[float | None], marks: Sequence[float | None]) -> str:
    """A bar for each value, in order; a mark where there is a second one.

    >>> picture = bars(["0", "2"], [0.5, 3.0], [None, 2.0])
    >>> picture.count("<rect"), "<title>2: 3.000, with batch norm 2.000</title>" in picture
    (2, True)
    """
    axis = Axis.of([1.0, *values, *marks])
    one = axis.y(1.0)
    step = (WIDTH - LEFT) / len(values)
    parts = [f'<line x1="{LEFT}" x2="{WIDTH}" y1="{one:.1f}" y2="{one:.1f}" stroke="var(--soft)"/>', axis.grid()]
    for i, (name, value, mark) in enumerate(zip(names, values, marks, strict=True)):
        x = LEFT + i * step
        both = f", with batch norm {number(mark)}" if mark is not None else ""
        parts.append(f"<g><title>{escape(name)}: {number(value)}{both}</title>")
        if drawable(value):
            y = axis.y(value)
            parts.append(
                f'<rect x="{x + step * 0.1:.1f}" y="{min(y, one):.1f}" width="{step * 0.8:.1f}" '
                f'height="{abs(one - y):.1f}" fill="var(--bar)"/>'
            )
        if drawable(mark):
            y = axis.y(mark)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x + step:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--bar2)" '
                'stroke-width="2"/>'
            )
        parts.append("</g>")
    return svg([*parts, first_and_last(names)], "norms by depth")


def histogram(values: Mapping[str, Sequence[float | None]]) -> str:
    """How many layers have which norm: a row of bars for each kind of norm, on one axis.

    >>> histogram({"l1": [1.0, 1.0, 10.0], "linf": [2.0, None, 0.0]}).count("<title>")
    3
    """
    axis = Axis.of([value for own in values.values() for value in own])
    height = (HEIGHT - BOTTOM) / len(values)
    parts = []
    for exponent in axis.ticks():
        x = LEFT + axis.part(exponent) * (WIDTH - LEFT)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>')
        anchor = "end" if x > WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{power(exponent)}</text>')
    for row, (name, own) in enumerate(values.items()):
        counts = [0] * BINS
        for value in filter(drawable, own):
            counts[min(BINS - 1, int(axis.part(math.log10(value)) * BINS))] += 1
        base, step = (row + 1) * height, (WIDTH - LEFT) / BINS
        parts.append(f'<text x="{LEFT - 8}" y="{base - 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for i, count in enumerate(counts):
            tall = (height - 8) * count / max(1, *counts)
            if count:
                parts.append(
                    f'<rect x="{LEFT + i * step + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" '
                    f'height="{tall:.1f}" fill="var(--bar)"><title>{count} layers</title></rect>'
                )
    return svg(parts, "distribution of norms")
