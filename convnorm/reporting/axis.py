"""A logarithmic axis, and what surrounds a picture on the pages: SVG written by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .text import shortened

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 196, 60, 24, 8  # room for letters of a phone, which are large here
LONGEST = 24  # of names below a picture, where two stand side by side


@dataclass(frozen=True)
class Axis:
    """From one exponent of ten to another.

    >>> axis = Axis.of([0.5, 30.0, None])
    >>> [power(exponent) for exponent in axis.ticks()]
    ['0.5', '1', '2', '5', '10', '20']
    >>> 0 < axis.part(math.log10(0.5)) < axis.part(math.log10(30.0)) < 1
    True
    """

    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float | None]) -> Axis:
        """With room for all that can be drawn."""
        logs = [math.log10(value) for value in values if drawable(value)] or [0.0]
        low, high = min(logs), max(logs)
        room = max(0.15, 0.1 * (high - low))
        return Axis(low - room, high + room)

    def part(self, exponent: float) -> float:
        """How far along it is, from 0 to 1."""
        return (exponent - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        """How far down in the picture."""
        return self._y(math.log10(value))

    def _y(self, exponent: float) -> float:
        return TOP + (1 - self.part(exponent)) * (HEIGHT - BOTTOM - TOP)

    def ticks(self) -> list[float]:
        """Powers of ten, and multiples of them where few of those are in sight."""
        sight = self.high - self.low
        factors = (1,) if sight > 2.5 else (1, 2, 5) if sight > 1 else (1, 1.5, 2, 3, 5, 7)
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        exponents = [power + math.log10(factor) for power in powers for factor in factors]
        seen = [exponent for exponent in exponents if self.low <= exponent <= self.high]
        return seen[:: math.ceil(len(seen) / 8)]

    def grid(self) -> str:
        """Lines across the picture, and what they stand for."""
        lines = []
        for exponent in self.ticks():
            y = self._y(exponent)
            lines.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
            lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{power(exponent)}</text>')
        return "".join(lines)


def drawable(value: float | None) -> bool:
    """Whether it has a place on a logarithmic axis."""
    return value is not None and 0 < value < math.inf


def power(exponent: float) -> str:
    """
    >>> power(2.0), power(math.log10(0.15)), power(-5.0), power(320.0)
    ('100', '0.15', '1e-5', '1e320')
    """
    if -2 <= exponent < 4:
        return f"{10**exponent:.4g}"
    whole = math.floor(exponent + 1e-9)
    return f"{10 ** (exponent - whole):.2g}e{whole}"


def first_and_last(names: Sequence[str]) -> str:
    """Below the ends of a picture by depth."""
    ends = [f'<text x="{LEFT}" y="{HEIGHT - 4}">{escape(shortened(names[0], LONGEST))}</text>']
    if len(names) > 1:
        last = escape(shortened(names[-1], LONGEST))
        ends.append(f'<text x="{WIDTH}" y="{HEIGHT - 4}" text-anchor="end">{last}</text>')
    return "".join(ends)


def svg(parts: Sequence[str], label: str) -> str:
    """The picture; ``label`` says what it shows to those who do not see it."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
