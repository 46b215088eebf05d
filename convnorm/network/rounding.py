"""Arithmetic on bounds: every result is at least the exact one, by less than a unit in the last place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from torch import Tensor

from ..spectral.outward import EPS, norms_from_above


def upward(exact: Fraction) -> float:
    """The smallest float64 that is at least a number.

    >>> upward(Fraction(1, 2)), upward(Fraction(1, 10)) >= Fraction(1, 10)
    (0.5, True)
    """
    try:
        rounded = float(exact)
    except OverflowError:
        return math.inf
    return rounded if rounded >= exact else math.nextafter(rounded, math.inf)


def times(*factors: float) -> float:
    """0 where a factor is 0: an infinite one stands for a number too large for float64.

    >>> times(0.1, 3.0) >= Fraction(0.1) * 3
    True
    """
    if 0 in factors:
        return 0.0
    return math.inf if math.inf in factors else upward(math.prod(map(Fraction, factors)))


def plus(*terms: float) -> float:
    return math.inf if math.inf in terms else upward(sum(map(Fraction, terms), Fraction()))


def root(square: float) -> float:
    """
    >>> root(2.0) ** 2 >= 2
    True
    """
    if not 0 < square < math.inf:
        return square
    rounded = math.sqrt(square)
    return rounded if Fraction(rounded) ** 2 >= Fraction(square) else math.nextafter(rounded, math.inf)


def joined(norms: Iterable[float], ord: float) -> float:
    """The l_ord norm of a vector of parts that have these norms.

    >>> [joined([3.0, 4.0], ord) for ord in (1, 2, math.inf)]
    [7.0, 5.0, 4.0]
    """
    parts = list(norms)
    if ord == 2:
        return root(plus(*(times(part, part) for part in parts)))
    return plus(*parts) if ord == 1 else max(parts, default=0.0)


def matrix_norm(matrix: Tensor, ord: float) -> float:
    """At least the l_ord operator norm of ``matrix[rows, columns]`` in float64.

    >>> import torch
    >>> matrix_norm(torch.eye(3, dtype=torch.float64), 1) - 1 < 1e-14
    True
    """
    if not matrix.numel():
        return 0.0
    if not matrix.isfinite().all():
        return math.inf
    if ord == 2:  # largest entry near 1, lest squares overflow
        size = float(matrix.abs().max())
        scale = 2.0 ** math.frexp(size)[1] if 0 < size < math.inf else 1.0
        return times(float(norms_from_above(matrix / scale)), scale)
    sums = matrix.abs().sum(0 if ord == 1 else 1)
    return times(float(sums.max()), 1 + (max(matrix.shape) + 2) * EPS)
