"""Numbers and shapes as tables show them."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from .row import Measured, Row, padding_text, sizes_text

NAMES = {1: "l1", 2: "l2, upper bound", math.inf: "linf"}  # of norms, by ord


def number(value: float | None) -> str:
    """Four digits.

    >>> number(3.14159), number(0.000123456), number(98765.4), number(1.5e9), number(None)
    ('3.142', '0.0001235', '98765', '1.500e+09', '')
    """
    if value is None:
        return ""
    return f"{value:.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:#.4g}".removesuffix(".")


def bracket(lower: float | None, upper: float | None) -> str:
    """Both bounds, rounded outward to the digit in which they differ: at least two, at most six digits.

    >>> bracket(3.2141, 3.2462), bracket(0.74851, 0.75601), bracket(2.0, 2.0), bracket(1234.56, 1246.9), bracket(0, 0)
    ('3.21-3.25', '0.748-0.757', '2.00000', '1230-1250', '0')
    >>> bracket(1.002e-9, 1.011e-9), bracket(1.0, math.inf), bracket(None, None)
    ('1.002-1.011e-09', '1-inf', '')
    """
    if lower is None or upper is None:
        return ""
    if not math.isfinite(upper) or upper == 0:
        return f"{lower:g}-{upper:g}" if upper else "0"
    low, high = Decimal(lower), Decimal(upper)
    leading = high.adjusted()
    width = (high - low).adjusted() if high > low else leading - 5
    unit = min(max(width, leading - 5), leading - 1)
    shift = 0 if -4 <= leading < 6 else leading
    step = Decimal((0, (1,), unit - shift))
    ends = [
        f"{bound.scaleb(-shift).quantize(step, rounding):f}"
        for bound, rounding in ((low, ROUND_FLOOR), (high, ROUND_CEILING))
    ]
    return "-".join(dict.fromkeys(ends)) + (f"e{shift:+03d}" if shift else "")


def l2_text(norms: Measured) -> str:
    return bracket(norms.l2_lower, norms.l2_upper) + ("*" if norms.l2_stopped else "")


def percent(share: float | None) -> str:
    """
    >>> percent(0.123), percent(-0.0004), percent(None)
    ('12.3%', '-0.0%', '')
    """
    return "" if share is None else f"{100 * share:.1f}%"


def ratio_of(first: float | None, other: float | None) -> float | None:
    """None where it has no meaning: to 0, or of what is not known."""
    return other / first if first and other is not None else None


def ratio_text(ratio: float | None) -> str:
    """
    >>> ratio_text(0.5), ratio_text(0.00123), ratio_text(12345.0), ratio_text(0.0), ratio_text(None)
    ('0.50', '0.0012', '1.2e+04', '0.00', '')
    """
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if not ratio or 0.1 <= ratio < 1000 else f"{ratio:.2g}"


def geometry(row: Row) -> str:
    """Stride, padding, dilation and groups where they are not the default: s2 p1 g32."""
    return " ".join(f"{letter}{value}" for _, letter, value in _options(row))


def geometry_in_words(row: Row) -> str:
    """stride 2, padding 1, groups 32"""
    return ", ".join(f"{word} {value}" for word, _, value in _options(row))


def _options(row: Row) -> list[tuple[str, str, str]]:
    """Those that are not the default: as a word, as a letter, and the value."""
    sizes = [
        ("stride", "s", row.stride, 1),
        ("padding", "p", row.padding, (0, 0)),
        ("dilation", "d", row.dilation, 1),
        ("output padding", "o", row.output_padding, 0),
    ]
    options = [(word, letter, _once(value)) for word, letter, value, default in sizes if set(value) - {default}]
    if row.groups > 1:
        options.append(("groups", "g", str(row.groups)))
    if row.padding_mode != "zeros":
        options.append(("padding mode", "", row.padding_mode))
    if row.calls > 1:
        options.append(("calls", "calls=", str(row.calls)))
    return options


def _once(values: tuple) -> str:
    """One for all axes where they are the same."""
    values = values[:1] if len(set(values)) == 1 else values
    return padding_text(values) if isinstance(values[0], tuple) else sizes_text(values)


def power_of_ten(log10: float | None) -> str:
    """
    >>> power_of_ten(3.14159), power_of_ten(None)
    ('10^3.14', '-')
    """
    return "-" if log10 is None else f"10^{log10:.2f}"


def shortened(name: str, width: int) -> str:
    """Without its middle, where it is too long.

    >>> shortened("trunk_output.block4.block4-0.f.a.0", 20)
    'trunk_out…k4-0.f.a.0'
    """
    if len(name) <= width:
        return name
    tail = width // 2
    return f"{name[: width - tail - 1]}…{name[-tail:]}"


def beside(name: str, other: str) -> str:
    """``other`` without the modules that the two have in common, but with what a mere number counts.

    >>> beside("layer1.0.downsample.0", "layer1.0.downsample.1"), beside("layer1.0.conv1", "layer1.0.bn1")
    ('downsample.1', 'bn1')
    """
    first, second = name.split("."), other.split(".")
    common = 0
    while common < min(len(first), len(second)) - 1 and first[common] == second[common]:
        common += 1
    if common and second[common].isdigit():
        common -= 1
    return ".".join(second[common:])
