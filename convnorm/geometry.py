"""The theorem: through which taps one axis of a convolution reads its input.

Output ``o`` of an axis reads, through tap ``t``, position ``o * stride + t * dilation - before``. Padding folds
that position onto an input ``x``: ``zeros`` drops it where it falls outside, ``circular`` wraps, ``replicate``
clamps, ``reflect`` mirrors. Taps of one output that fold onto the same input act as one, a *merged tap*; the matrix
of the convolution then holds the sum of their kernel values.

- An *input window* counts, for one input, how many outputs read it through each merged tap: a column of the matrix.
- An *output window* counts, for one output, the merged taps that it reads through: a row of the matrix.

Only windows that no other dominates entry by entry can carry the largest absolute sum. The axes are independent, so
the windows of a layer are the products of the windows of its axes, and

    l1   = max over input channels  and input windows  u  of  sum_a u[a] sum_rows    |K'[row, column, a]|
    linf = max over output channels and output windows v  of  sum_a v[a] sum_columns |K'[row, column, a]|

with ``K'`` the kernel summed over merged taps. Every backend receives the windows as a flat list of integers
(``plan.py``) and only sums over them: the theory stands nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

MOST_ENTRIES = 1 << 26  # of the table that an axis's windows are found in: some gigabytes
PADDING_MODES = ("zeros", "circular", "replicate", "reflect")


class GeometryError(ValueError, RuntimeError):
    """A layer that no convolution has. A RuntimeError too, as errors of PyTorch's operators are."""


@dataclass(frozen=True)
class Window:
    """Counts of the merged taps, and the first input (or output) that sees them, from the end where negative."""

    counts: tuple[int, ...]
    position: int

    @property
    def repeated(self) -> tuple[int, ...]:
        return tuple(a for a, count in enumerate(self.counts) for _ in range(count))


@dataclass(frozen=True)
class Axis:
    """One spatial axis: its merged taps, each a tuple of taps, its undominated windows, and how many outputs it has.

    ``entries`` counts how often each merged tap stands in the axis's matrix.
    """

    taps: int
    merged: tuple[tuple[int, ...], ...]
    inputs: tuple[Window, ...]
    outputs: tuple[Window, ...]
    entries: tuple[int, ...]
    size: int

    @property
    def merges(self) -> bool:
        return self.merged != tuple((tap,) for tap in range(self.taps))


@dataclass(frozen=True)
class Geometry:
    """A layer's windows, and its arguments with one entry, or one (before, after), for each axis.

    ``transposed`` exchanges the roles of rows and columns, so l1 and linf change places.
    """

    axes: tuple[Axis, ...]
    groups: int
    transposed: bool
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def entries(self, i: int) -> tuple[int, ...]:
        """How often each merged tap of axis ``i`` stands in its matrix, at the axis's full size."""
        axis, outputs = self.axes[i], (self.in_shape if self.transposed else self.out_shape)[i]
        cut = outputs - axis.size  # outputs that the shorter axis lacks: all of them read every tap
        return tuple(n + cut if a < axis.taps else n for a, n in enumerate(axis.entries))


def fold(position: np.ndarray, n: int, mode: str) -> np.ndarray:
    """The input that a padded position shows; -1 where it shows the zero padding.

    >>> fold(np.arange(-2, 6), 4, "reflect").tolist()
    [2, 1, 0, 1, 2, 3, 2, 1]
    """
    if mode == "zeros":
        return np.where((position >= 0) & (position < n), position, -1)
    if mode == "circular":
        return position % n
    if mode == "replicate":
        return position.clip(0, n - 1)
    return (n - 1) - abs((n - 1) - abs(position))  # reflect, with padding < n


@lru_cache(maxsize=4096)
def axis_windows(
    n: int,
    taps: int,
    stride: int = 1,
    before: int = 0,
    after: int = 0,
    dilation: int = 1,
    mode: str = "zeros",
    m: int = -1,
) -> Axis:
    """The windows of one axis of ``n`` inputs; ``m`` cuts it to fewer outputs than it would have.

    >>> axis_windows(n=32, taps=3, before=1, after=1).inputs  # every tap reads some inner input
    (Window(counts=(1, 1, 1), position=1),)
    >>> [w.counts for w in axis_windows(n=32, taps=3, stride=2, before=1, after=1).inputs]  # the two residue classes
    [(0, 1, 0), (1, 0, 1)]
    >>> [w.counts for w in axis_windows(n=2, taps=3, before=1, after=1).outputs]  # smaller than the kernel
    [(0, 1, 1), (1, 1, 0)]
    """
    outputs = m if m >= 0 else out_size(n, taps, stride, before, after, dilation)
    if mode == "zeros":
        return _zero_padded(n, taps, stride, before, dilation, outputs)
    reads = fold(np.add.outer(np.arange(outputs) * stride - before, np.arange(taps) * dilation), n, mode)
    merged, ids = _merge_taps(reads)
    o, t = np.nonzero(ids >= 0)
    seen_by_input = np.zeros((n, len(merged)), np.int64)
    seen_by_output = np.zeros((outputs, len(merged)), np.int64)
    np.add.at(seen_by_input, (reads[o, t], ids[o, t]), 1)
    np.add.at(seen_by_output, (o, ids[o, t]), 1)
    entries = tuple(seen_by_output.sum(0).tolist())
    return Axis(taps, merged, _undominated(seen_by_input), _undominated(seen_by_output), entries, outputs)


def _zero_padded(n: int, taps: int, stride: int, before: int, dilation: int, outputs: int) -> Axis:
    """Without a table, which long kernels make large: nothing merges, and a window is a range of taps.

    Output ``(x + before - t * dilation) / stride`` reads input ``x`` through tap ``t``, where there is such a one.
    """
    tap, step = np.arange(taps) * dilation - before, stride // math.gcd(stride, dilation)
    every, reach = np.arange(outputs) * stride - before, (outputs - 1) * stride
    of_outputs = _ranges(np.arange(outputs), -(every // dilation), (n - 1 - every) // dilation, range(taps))
    of_inputs = []
    for own in range(min(step, taps)):
        x = np.arange(-(before - own * dilation) % stride, n, stride)
        first, last = -((reach - before - x) // dilation), (x + before) // dilation
        of_inputs += _ranges(x, first, last, range(own, taps, step))
    entries = np.minimum((n - 1 - tap) // stride, outputs - 1) - np.maximum(-(tap // stride), 0) + 1
    return Axis(
        taps,
        tuple((t,) for t in range(taps)),
        _in_order(of_inputs or [(0, (0,) * taps)], n),
        _in_order(of_outputs or [(0, (0,) * taps)], outputs),
        tuple(entries.clip(0).tolist()),
        outputs,
    )


def _ranges(places: np.ndarray, low: np.ndarray, high: np.ndarray, taps: range) -> list[tuple[int, tuple[int, ...]]]:
    """Which of ``taps`` from ``low`` to ``high`` each place sees: the first places of those counts that no other has.

    As both ends move one way, only neighbours may dominate.
    """
    first = np.maximum(-((taps.start - low) // taps.step), 0)  # in steps, from the first of the taps
    last = np.minimum((high - taps.start) // taps.step, len(taps) - 1)
    ends = np.stack([places, first, last], 1)[first <= last]
    new = np.ones(len(ends), bool)
    new[1:] = (ends[1:, 1:] != ends[:-1, 1:]).any(1)
    ends = ends[new]
    first, last = ends[:, 1], ends[:, 2]
    kept = np.ones(len(ends), bool)
    kept[1:] &= (first[1:] < first[:-1]) | (last[1:] > last[:-1])
    kept[:-1] &= (first[:-1] < first[1:]) | (last[:-1] > last[1:])
    counts = np.zeros((int(kept.sum()), taps.stop), np.int64)
    for row, (_, one, other) in zip(counts, ends[kept].tolist(), strict=True):
        row[taps.start :: taps.step][one : other + 1] = 1
    return list(zip(ends[kept, 0].tolist(), map(tuple, counts.tolist()), strict=True))


def out_size(n: int, taps: int, stride: int, before: int, after: int, dilation: int) -> int:
    return (n + before + after - dilation * (taps - 1) - 1) // stride + 1


def _merge_taps(reads: np.ndarray) -> tuple[tuple[tuple[int, ...], ...], np.ndarray]:
    """All merged taps, and for ``reads[o, t]`` the id of the merged tap it belongs to; -1 but on its first tap."""
    taps = reads.shape[1]
    known = {(tap,): tap for tap in range(taps)}
    ids = np.where(reads >= 0, np.arange(taps), -1)
    ordered = np.sort(reads, axis=1)
    for o in np.flatnonzero(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)):
        for x in set(reads[o].tolist()) - {-1}:
            together = np.flatnonzero(reads[o] == x)
            ids[o, together] = -1
            ids[o, together[0]] = known.setdefault(tuple(together.tolist()), len(known))
    return tuple(known), ids


def _undominated(rows: np.ndarray) -> tuple[Window, ...]:
    """The distinct rows less those dominated entry by entry by another, in the order of their first place."""
    first: dict[bytes, int] = {}
    for x, row in enumerate(rows):
        first.setdefault(row.tobytes(), x)
    places = list(first.values())
    distinct = rows[places]
    kept: list[int] = []
    for i in np.argsort(-distinct.sum(1), kind="stable"):  # whatever dominates a row has a larger sum
        seen = distinct[i].nonzero()[0]  # few, where many taps merge
        if not (distinct[np.ix_(kept, seen)] >= distinct[i, seen]).all(1).any():
            kept.append(i)
    return _in_order([(places[i], tuple(distinct[i].tolist())) for i in kept], len(rows))


def _in_order(windows: list[tuple[int, tuple[int, ...]]], size: int) -> tuple[Window, ...]:
    """Of the first place and the counts of each, on an axis of so many places."""
    return tuple(Window(counts, x if 2 * x < size else x - size) for x, counts in sorted(windows))


def _shorten(n: int, taps: int, stride: int, before: int, after: int, dilation: int) -> int:
    """A size with the same windows: past what the borders touch, an axis repeats itself every ``stride`` inputs.

    Under ``torch.compile`` ``n`` may be symbolic: then this guards only on "large, with this remainder".
    """
    enough = 2 * (before + after + dilation * (taps - 1) + stride + 1)
    short = int(enough + (n - enough) % stride if n > enough else n)
    outputs = (short + before + after) // stride  # at least as many as there are, but for one
    if outputs > short and outputs * taps > MOST_ENTRIES:
        what = f"needs windows of {outputs} outputs by {taps} taps at in_shape {int(n)}, stride {stride} and dilation"
        _refuse("padding", (before, after), f"{what} {dilation}: too large a table")
    if short * taps > MOST_ENTRIES:
        sizes = f"stride {stride}, padding {(before, after)} and dilation {dilation}"
        _refuse("in_shape", int(n), f"needs windows of {short} inputs by {taps} taps at {sizes}: too large a table")
    return short


def geometry(
    weight_shape: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    in_shape: tuple[int, ...],
    dilation: tuple[int, ...] | None = None,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: tuple[int, ...] | None = None,
) -> Geometry:
    """Check a layer as its user gave it, and find its windows. The one place where bad arguments are refused."""
    if not 2 <= len(weight_shape) <= 5:
        _refuse("weight", f"of shape {list(weight_shape)}", "must have 2 (fully connected) to 5 dimensions")
    for size in weight_shape:
        if size < 1:
            _refuse("weight", f"of shape {list(weight_shape)}", "is empty")
    kernel = tuple(int(k) for k in weight_shape[2:])
    n_axes = len(kernel)
    if padding_mode not in PADDING_MODES:
        _refuse("padding_mode", repr(padding_mode), f"must be one of {', '.join(PADDING_MODES)}")
    if groups < 1:
        _refuse("groups", groups, "must be at least 1")
    if groups != 1 and (not kernel or weight_shape[0] % groups):
        what = "the weight's first dimension" if kernel else "a fully connected layer:"
        _refuse("groups", groups, f"does not divide {what} {weight_shape[0]}")
    if len(in_shape) != n_axes:
        _refuse("in_shape", list(in_shape), f"must have one size for each of the weight's {n_axes} spatial axes")
    strides = _per_axis("stride", stride, n_axes, least=1)
    dilations = _per_axis("dilation", (1,) if dilation is None else dilation, n_axes, least=1)
    extra = _per_axis("output_padding", (0,) if output_padding is None else output_padding, n_axes, least=0)
    paddings = _paddings(padding, n_axes)
    if transposed and padding_mode != "zeros":
        _refuse("padding_mode", repr(padding_mode), "is not defined for a transposed convolution, only 'zeros'")

    axes, out_shape = [], []
    for i, (n, k, s, d, (before, after)) in enumerate(zip(in_shape, kernel, strides, dilations, paddings, strict=True)):
        if n < 1:
            _refuse("in_shape", list(in_shape), "must be positive")
        if transposed:
            if extra[i] >= max(s, d):
                _refuse("output_padding", extra[i], f"must be smaller than stride {s} or dilation {d}")
            size = (n - 1) * s - before - after + d * (k - 1) + extra[i] + 1
            if size < 1:
                _refuse("in_shape", list(in_shape), f"with padding {(before, after)} leaves no output on axis {i}")
            short = _shorten(size, k, s, before, after, d)
            cut = (short + before + after - d * (k - 1) - 1 - extra[i]) // s + 1
            axes.append(axis_windows(short, k, s, before, after, d, m=cut))
        else:
            if extra[i]:
                _refuse("output_padding", extra[i], "is only for a transposed convolution")
            if n + before + after < d * (k - 1) + 1:
                _refuse(
                    "in_shape", list(in_shape),
                    f"with padding {(before, after)} is smaller than the kernel, {k} taps at dilation {d}, on axis {i}",
                )  # fmt: skip
            most = {"reflect": n - 1, "circular": n}.get(padding_mode, before + after)
            if max(before, after) > most:
                _refuse(
                    "padding",
                    list(padding),
                    f"must be at most {most} for {padding_mode!r} at in_shape {list(in_shape)}",
                )
            size = out_size(n, k, s, before, after, d)
            axes.append(axis_windows(_shorten(n, k, s, before, after, d), k, s, before, after, d, padding_mode))
        out_shape.append(size)
    return Geometry(
        tuple(axes), int(groups), bool(transposed), strides, paddings, dilations, tuple(in_shape), tuple(out_shape)
    )


def _per_axis(name: str, values: Sequence[int], n_axes: int, least: int) -> tuple[int, ...]:
    for value in values:
        if value < least:
            _refuse(name, list(values), f"must be at least {least}")
    if len(values) == 1:
        return tuple(values) * n_axes
    if len(values) != n_axes:
        _refuse(name, list(values), f"must have one entry or one for each of the weight's {n_axes} spatial axes")
    return tuple(values)


def _paddings(padding: Sequence[int], n_axes: int) -> tuple[tuple[int, int], ...]:
    """(before, after) for each axis, from one entry in all, one for each axis, or two for each axis."""
    if len(padding) == 2 * n_axes:
        both = _per_axis("padding", padding, 2 * n_axes, least=0)
        return tuple(zip(both[::2], both[1::2], strict=True))
    return tuple((p, p) for p in _per_axis("padding", padding, n_axes, least=0))


def _refuse(name: str, value: object, why: str) -> None:
    raise GeometryError(f"convnorm: {name} {value} {why}")
