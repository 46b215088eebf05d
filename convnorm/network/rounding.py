"""Arithmetic on bounds: every result is at least the exact one, by less than a unit in the last place.

Of floats it is a float. With a Fraction among them it is a Fraction of about as many digits, whose exponent has no
limits: bounds of deep networks outgrow float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

from torch import Tensor

from ..spectral.outward import EPS, norms_from_above

BITS = 53  # of float64

Number = float | Fraction


def as_float(exact: Number) -> float:
    """The smallest float64 that is at least a number.

    >>> as_float(Fraction(1, 2)), as_float(Fraction(1, 10)) >= Fraction(1, 10), as_float(Fraction(10) ** 400)
    (0.5, True, inf)
    """
    try:
        rounded = float(exact)
    except OverflowError:
        return math.inf
    return rounded if rounded >= exact else math.nextafter(rounded, math.inf)


def log10(exact: Number) -> float:
    """
    >>> log10(Fraction(10) ** 400) - 400 < 1e-12, log10(0.0)
    (True, -inf)
    """
    if not 0 < exact < math.inf:
        return exact if exact else -math.inf
    above, below = (math.log10(part) for part in Fraction(exact).as_integer_ratio())
    return above - below + 4 * EPS * (above + below)


def _upward(exact: Fraction, numbers: Iterable[Number]) -> Number:
    if not any(isinstance(number, Fraction) for number in numbers):
        return as_float(exact)
    unit = Fraction(2) ** (exact.numerator.bit_length() - exact.denominator.bit_length() - BITS)
    return math.ceil(exact / unit) * unit


def times(*factors: Number) -> Number:
    """0 where a factor is 0: an infinite one stands for a number too large for float64.

    >>> times(0.1, 3.0) >= Fraction(0.1) * 3
    True
    """
    if 0 in factors:
        return 0.0
    return math.inf if math.inf in factors else _upward(math.prod(map(Fraction, factors)), factors)


def plus(*terms: Number) -> Number:
    return math.inf if math.inf in terms else _upward(sum(map(Fraction, terms), Fraction()), terms)


def root(square: Number) -> Number:
    """
    >>> root(2.0) ** 2 >= 2, root(Fraction(4) ** 800) == Fraction(2) ** 800
    (True, True)
    """
    if not 0 < square < math.inf:
        return square
    exact = Fraction(square)
    unit = Fraction(2) ** ((exact.numerator.bit_length() - exact.denominator.bit_length()) // 2 - BITS - 8)
    return _upward((math.isqrt(math.ceil(exact / unit**2) - 1) + 1) * unit, [square])


def joined(norms: Iterable[Number], ord: float) -> Number:
    """The l_ord norm of a vector of parts that have these norms.

    >>> [joined([3.0, 4.0], ord) for ord in (1, 2, math.inf)]
    [7.0, 5.0, 4.0]
    """
    parts = list(norms)
    if ord == 2:
        return root(plus(*(times(part, part) for part in parts)))
    return plus(*parts) if ord == 1 else max(parts, default=0.0)


def matrix_norm(matrix: Tensor, ord: float) -> float:
    """At least the l_ord operator norm of ``matrix[rows, columns]`` in float64, which may be sparse but for l2.

    >>> import torch
    >>> matrix_norm(torch.eye(3, dtype=torch.float64), 1) - 1 < 1e-14
    True
    """
    if not matrix.numel():
        return 0.0
    if not (matrix.values() if matrix.is_sparse else matrix).isfinite().all():
        return math.inf
    if ord == 2:  # largest entry near 1, lest squares overflow
        size = float(matrix.abs().max())
        scale = 2.0 ** (math.frexp(size)[1] - 1) if 0 < size < math.inf else 1.0  # 2 ** 1024 is none
        return times(float(norms_from_above(matrix / scale)), scale)
    sums = matrix.abs().sum(0 if ord == 1 else 1).to_dense()
    return times(float(sums.max()), 1 + (max(matrix.shape) + 2) * EPS)
