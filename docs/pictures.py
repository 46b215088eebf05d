"""Draws the pictures of these pages from ``convnorm.geometry``: ``python docs/pictures.py``."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from convnorm.geometry import Axis, axis_windows, fold, out_size

FOLDER = Path(__file__).parent
CELL = 26
INK, GREY, LINE = "#222222", "#767676", "#c4c4c4"
COLOURS = {"a": "#8fd0f5", "b": "#f7c767", "c": "#7fd3b4"}  # of the taps
MERGED, WINS = "#e3b3cf", "#ffd9a8"
MINUS = "\N{MINUS SIGN}"

PANELS = [  # title, and the arguments of an axis with three taps a, b, c
    ("stride 1, padding 1", {"n": 6, "before": 1, "after": 1}),
    ("stride 2, padding 1", {"n": 6, "before": 1, "after": 1, "stride": 2}),
    ("dilation 2, padding 2", {"n": 6, "before": 2, "after": 2, "dilation": 2}),
    ("input of 2, padding 1", {"n": 2, "before": 1, "after": 1}),
    ("reflect, padding 1", {"n": 6, "before": 1, "after": 1, "mode": "reflect"}),
    ("transposed, stride 2, padding 1", {"n": 6, "before": 1, "after": 1, "stride": 2, "transposed": True}),
]


class Drawing:
    """An SVG file, on white: it is shown on pages of any colour."""

    def __init__(self, width: float, height: float, says: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
            f'height="{height:g}" role="img" font-family="sans-serif">',
            f"<title>{escape(says)}</title>",
            f'<rect width="{width:g}" height="{height:g}" rx="6" fill="#ffffff"/>',
        ]

    def box(
        self, x: float, y: float, width: float, height: float, fill: str = "none", line: str = LINE, pen: float = 1
    ) -> None:
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'stroke="{line}" stroke-width="{pen:g}"/>'
        )

    def text(
        self, x: float, y: float, text: str, size: int = 13, anchor: str = "middle", ink: str = INK, bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{ink}"{weight}>'
            f"{escape(text)}</text>"
        )

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])


def letters(
    axis: Axis, n: int, before: int = 0, after: int = 0, stride: int = 1, dilation: int = 1, mode: str = "zeros"
) -> list[list[str]]:
    """[outputs][inputs]: the taps through which the output reads the input. Those of an ``axis_windows`` call."""
    positions = np.add.outer(np.arange(axis.size) * stride - before, np.arange(axis.taps) * dilation)
    cells = [[""] * n for _ in range(axis.size)]
    for o, row in enumerate(fold(positions, n, mode).tolist()):
        for tap, x in zip("abc", row, strict=True):
            if x >= 0:
                cells[o][x] += f"+{tap}" if cells[o][x] else tap
    return cells


def windows() -> Drawing:
    """One axis of six layers: the taps in its matrix, and which columns are windows."""
    drawing = Drawing(530, 740, "The matrices of six one-dimensional convolutions, and the windows among their columns")
    for i, (title, options) in enumerate(PANELS):
        given = dict(options)
        transposed = given.pop("transposed", False)
        axis = axis_windows(taps=3, **given)
        cells = letters(axis=axis, **given)
        seen = axis.outputs if transposed else axis.inputs
        if transposed:
            cells = [list(column) for column in zip(*cells, strict=True)]
        rows, columns = len(cells), len(cells[0])
        left = 130 + 270 * (i % 2) - columns * CELL / 2
        top = 50 + 245 * (i // 2)
        drawing.text(130 + 270 * (i % 2), top - 18, title, 14, bold=True)
        for o, x in np.ndindex(rows, columns):
            cell = cells[o][x]
            fill = COLOURS.get(cell, MERGED) if cell else "#ffffff"
            drawing.box(left + x * CELL, top + o * CELL, CELL, CELL, fill)
            if cell:
                drawing.text(left + (x + 0.5) * CELL, top + (o + 0.68) * CELL, cell, 13 if len(cell) == 1 else 10)
        for window in seen:
            drawing.box(left + window.position % columns * CELL, top, CELL, rows * CELL, line=INK, pen=2.5)
        said = [" ".join("+".join("abc"[tap] for tap in axis.merged[a]) for a in window.repeated) for window in seen]
        what = "window" if len(said) == 1 else "windows"
        drawing.text(130 + 270 * (i % 2), top + rows * CELL + 22, f"{what}: {',  '.join(said)}", 13, ink=GREY)
    return drawing


def matrix() -> Drawing:
    """The matrix of one small layer, with its absolute column and row sums."""
    kernel, n, stride, before = (2, -1, 3), 7, 2, 1
    outputs = out_size(n, 3, stride, before, before, 1)
    entries = np.zeros((outputs, n), int)
    for o in range(outputs):
        for tap, value in enumerate(kernel):
            if 0 <= o * stride + tap - before < n:
                entries[o, o * stride + tap - before] += value
    columns, rows = abs(entries).sum(0), abs(entries).sum(1)
    size, left, top = 44, 175, 64
    drawing = Drawing(640, 340, "A convolution is a matrix: its l1 norm is the largest absolute column sum")
    drawing.text(20, 34, f"kernel 2, {MINUS}1, 3, stride 2, padding 1, on an input of 7, as a matrix", 16, "start")
    for o, x in np.ndindex(outputs, n):
        value = entries[o, x]
        fill = COLOURS["abc"[kernel.index(value)]] if value else "#ffffff"
        drawing.box(left + x * size, top + o * size, size, size, fill)
        if value:
            drawing.text(left + (x + 0.5) * size, top + (o + 0.62) * size, str(value).replace("-", MINUS), 16)
    below, beside = top + outputs * size + 12, left + n * size + 12
    for x, value in enumerate(columns):
        drawing.box(left + x * size, below, size, size * 0.8, WINS if value == columns.max() else "#ffffff")
        drawing.text(left + (x + 0.5) * size, below + 0.55 * size, str(value), 16, bold=value == columns.max())
    for o, value in enumerate(rows):
        drawing.box(beside, top + o * size, size * 0.8, size, WINS if value == rows.max() else "#ffffff")
        drawing.text(beside + 0.4 * size, top + (o + 0.62) * size, str(value), 16, bold=value == rows.max())
    drawing.text(left - 14, below + 0.55 * size, "absolute column sums", 14, "end", GREY)
    drawing.text(left, below + size * 0.8 + 26, f"l1 norm = {columns.max()}, the largest column sum", 16, "start")
    drawing.text(beside, top - 12, "row sums", 14, "start", GREY)
    drawing.text(beside + size * 0.8 + 12, top + 1.5 * size, f"linf = {rows.max()}", 16, "start")
    return drawing


PICTURES = {"windows.svg": windows, "matrix.svg": matrix}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(str(draw()))
