"""A picture of several reports: a line by depth for each, told apart by colour and by the shape of its marks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .axis import BOTTOM, HEIGHT, LEFT, TOP, WIDTH, Axis, drawable, first_and_last, svg
from .text import number

COLOURS = 6  # --c0 ... --c5 of the style; five shapes beside six colours make thirty models different
SHAPES = (
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",  # a circle, a square, a triangle, a diamond, a triangle upside down
    "M-.9-.9h1.8v1.8h-1.8z",
    "M0-1.2 1.2 .9H-1.2z",
    "M0-1.4 1.4 0 0 1.4-1.4 0z",
    "M0 1.2 1.2-.9H-1.2z",
)


def lines(names: Sequence[str], titles: Sequence[str], values: Sequence[Sequence[float | None]], label: str) -> str:
    """``values`` of each title, over the layers with these names. What cannot be drawn interrupts its line.

    >>> picture = lines(["0", "2"], ["before", "after"], [[2.0, 3.0], [1.0, None]], "l1")
    >>> "<title>2\\nbefore: 3.000\\nafter: not known</title>" in picture
    True
    """
    axis = Axis.of([value for own in values for value in own])
    step = (WIDTH - LEFT) / len(names)
    size = min(3.5, max(1.0, 0.35 * step))
    points = [[(LEFT + (j + 0.5) * step, axis.y(v)) if drawable(v) else None for j, v in enumerate(own)]
              for own in values]  # fmt: skip
    parts = [axis.grid()]
    parts += [f'<path d="{_path(own)}" fill="none" stroke="{_colour(i)}"/>' for i, own in enumerate(points)]
    for j, name in enumerate(names):  # whoever points anywhere above a layer reads all of it
        said = [f"{title}: {number(own[j]) or 'not known'}" for title, own in zip(titles, values, strict=True)]
        marks = [_mark(i, *own[j], size) for i, own in enumerate(points) if own[j]]
        parts.append(
            f"<g><title>{escape(chr(10).join([name, *said]))}</title>"
            f'<rect x="{LEFT + j * step:.1f}" y="{TOP}" width="{step:.1f}" height="{HEIGHT - BOTTOM - TOP}" '
            f'fill="transparent"/>{"".join(marks)}</g>'
        )
    return svg([*parts, first_and_last(names)], label)


def swatch(i: int) -> str:
    """A bit of line with its mark, for the places that name the model."""
    line = f'<path d="M0 6H22" stroke="{_colour(i)}"/>'
    return f'<svg class="swatch" viewBox="0 0 22 12" aria-hidden="true">{line}{_mark(i, 11, 6, 4)}</svg>'


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    commands, pen = [], "M"
    for point in points:
        if point:
            commands.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L" if point else "M"
    return "".join(commands)


def _mark(i: int, x: float, y: float, size: float) -> str:
    place = f"translate({x:.1f} {y:.1f}) scale({size:.2g})"
    return f'<path d="{SHAPES[i % len(SHAPES)]}" transform="{place}" fill="{_colour(i)}"/>'


def _colour(i: int) -> str:
    return f"var(--c{i % COLOURS})"
