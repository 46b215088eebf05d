"""Pictures for the page, as SVG written by hand, on logarithmic axes: bars by depth, and a distribution.

Bars begin at 1: upward or downward, they are as long as what the layer adds to the logarithm of a product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .text import number

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 190, 46, 18, 8
BINS = 24


def bars(names: Sequence[str], values: Sequence[float | None], marks: Sequence[float | None]) -> str:
    """A bar for each value, in order; a mark where there is a second one."""
    low, high = _range([1.0, *values, *marks])
    one = _y(1.0, low, high)
    step = (WIDTH - LEFT) / len(values)
    parts = [_grid(low, high, one)]
    for i, (name, value, mark) in enumerate(zip(names, values, marks, strict=True)):
        x = LEFT + i * step
        both = f", with batch norm {number(mark)}" if mark is not None else ""
        parts.append(f"<g><title>{escape(name)}: {number(value)}{both}</title>")
        if _drawable(value):
            y = _y(value, low, high)
            parts.append(
                f'<rect x="{x + step * 0.1:.1f}" y="{min(y, one):.1f}" width="{step * 0.8:.1f}" '
                f'height="{abs(one - y):.1f}" fill="var(--bar)"/>'
            )
        if _drawable(mark):
            y = _y(mark, low, high)
            parts.append(
                f'<line x1="{x:.1f}" x2="{x + step:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--bar2)" '
                'stroke-width="2"/>'
            )
        parts.append("</g>")
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">{escape(names[0])}</text>')
    if len(names) > 1:
        parts.append(f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{escape(names[-1])}</text>')
    return _svg(parts, "norms by depth")


def histogram(values: Mapping[str, Sequence[float | None]]) -> str:
    """How many layers have which norm: a row of bars for each kind of norm, on one axis."""
    low, high = _range([value for own in values.values() for value in own])
    height = (HEIGHT - BOTTOM) / len(values)
    parts = []
    for exponent in _ticks(low, high):
        x = LEFT + (exponent - low) / (high - low) * (WIDTH - LEFT)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>')
        anchor = "end" if x > WIDTH - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{_power(exponent)}</text>')
    for row, (name, own) in enumerate(values.items()):
        counts = [0] * BINS
        for value in own:
            if _drawable(value):
                counts[min(BINS - 1, int((math.log10(value) - low) / (high - low) * BINS))] += 1
        base, step = (row + 1) * height, (WIDTH - LEFT) / BINS
        parts.append(f'<text x="{LEFT - 8}" y="{base - 4:.1f}" text-anchor="end">{escape(name)}</text>')
        for i, count in enumerate(counts):
            tall = (height - 8) * count / max(1, *counts)
            if count:
                parts.append(
                    f'<rect x="{LEFT + i * step + 1:.1f}" y="{base - tall:.1f}" width="{step - 2:.1f}" '
                    f'height="{tall:.1f}" fill="var(--bar)"><title>{count} layers</title></rect>'
                )
    return _svg(parts, "distribution of norms")


def _svg(parts: Sequence[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _drawable(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def _range(values: Sequence[float | None]) -> tuple[float, float]:
    """Exponents of ten that the axis begins and ends at."""
    logs = [math.log10(value) for value in values if _drawable(value)] or [0.0]
    low, high = min(logs), max(logs)
    room = max(0.15, 0.1 * (high - low))
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 times them where few of those are in sight."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    factors = (1,) if high - low > 2.5 else (1, 2, 5)
    exponents = [power + math.log10(factor) for power in powers for factor in factors]
    seen = [exponent for exponent in exponents if low <= exponent <= high]
    return seen[:: math.ceil(len(seen) / 8)] if seen else []


def _power(exponent: float) -> str:
    return (
        f"{10**exponent:.0e}".replace("e+0", "e").replace("e-0", "e-") if abs(exponent) > 4 else f"{10**exponent:.4g}"
    )


def _y(value: float, low: float, high: float) -> float:
    return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - BOTTOM - TOP)


def _grid(low: float, high: float, one: float) -> str:
    lines = [f'<line x1="{LEFT}" x2="{WIDTH}" y1="{one:.1f}" y2="{one:.1f}" stroke="var(--soft)"/>']
    for exponent in _ticks(low, high):
        y = _y(10**exponent, low, high)
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_power(exponent)}</text>')
    return "".join(lines)
