"""Lipschitz constants of functions of one number: the largest absolute slope.

A function of every element has this constant in the l1, l2 and linf norms alike. Those that are irrational are rounded
up in their last digit:

    gelu            x Phi(x)                        at x = sqrt 2       1/2 + erf(1)/2 + exp(-1)/sqrt(pi)
    gelu, tanh      x/2 (1 + tanh u(x))             at x = 1.4185..
    silu            x sigmoid(x)                    at x = 2.3994..
    mish            x tanh(log(1 + exp x))          at x = 1.4906..
    hardswish       x relu6(x + 3) / 6              below x = 3         3/2
    selu            alpha scale (exp x - 1)         below x = 0         alpha scale
    erf                                             at x = 0            2/sqrt(pi)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .calls import Call, Refused, rule
from .rounding import plus, times
from .steps import Nonlinear

SLOPES: dict[str, float] = {
    "relu": 1.0,
    "relu6": 1.0,
    "tanh": 1.0,
    "sigmoid": 0.25,
    "log_sigmoid": 1.0,
    "silu": 1.0998393202,
    "mish": 1.0884981613,
    "hardswish": 1.5,
    "hardsigmoid": math.nextafter(1 / 6, 1),
    "selu": 1.7580993409,
    "softshrink": 1.0,
    "hardtanh": 1.0,
    "clamp_min": 1.0,
    "clamp_max": 1.0,
    "abs": 1.0,
    "sin": 1.0,
    "cos": 1.0,
    "atan": 1.0,
    "erf": 1.1283791671,
}


@rule(*SLOPES)
def fixed(call: Call) -> Nonlinear:
    return scalar_function(call, SLOPES[call.operation])


def _leaky_relu(negative_slope: float, **_: Any) -> float:
    return max(1.0, abs(negative_slope))


def _rrelu(lower: float, upper: float, training: bool, **_: Any) -> float:
    """In evaluation the slope is the middle."""
    if training:
        raise Refused("draws random slopes")
    return max(1.0, plus(abs(lower), abs(upper)) / 2)


def _elu(alpha: float, scale: float, input_scale: float, **_: Any) -> float:
    """scale x, and scale alpha (exp(input_scale x) - 1) below 0."""
    if input_scale < 0:
        raise Refused(f"with input_scale {input_scale} grows exponentially")
    return max(abs(scale), times(abs(scale), abs(alpha), input_scale))


def _celu(alpha: float, **_: Any) -> float:
    """x, and alpha (exp(x / alpha) - 1) below 0."""
    if alpha < 0:
        raise Refused(f"with alpha {alpha} grows exponentially")
    return 1.0


def _gelu(approximate: str, **_: Any) -> float:
    return 1.1289930687 if approximate == "tanh" else 1.1289041452


def _softplus(beta: float, threshold: float, **_: Any) -> float:
    """log(1 + exp(beta x)) / beta. PyTorch returns x where beta x is above the threshold: a jump, which at 20 is below
    the rounding errors of float32.
    """
    if threshold < 20 or beta <= 0:
        raise Refused(f"with beta {beta} and threshold {threshold} jumps")
    return 1.0


SLOPES_OF: dict[str, Callable[..., float]] = {
    "leaky_relu": _leaky_relu,
    "rrelu": _rrelu,
    "elu": _elu,
    "celu": _celu,
    "gelu": _gelu,
    "softplus": _softplus,
}


@rule(*SLOPES_OF)
def by_arguments(call: Call) -> Nonlinear:
    if any(isinstance(value, float) and math.isnan(value) for value in call.arguments.values()):
        raise Refused("has an argument of nan")
    return scalar_function(call, SLOPES_OF[call.operation](**call.arguments))


@rule("prelu")
def prelu(call: Call) -> Nonlinear:
    slopes = call.constant("weight").abs()
    return scalar_function(call, float(slopes.max().clamp_min(1)))  # NaN stays NaN


@rule("clamp")
def clamp(call: Call) -> Nonlinear:
    for name in ("min", "max"):
        if call.depends(name):
            raise Refused("between limits that depend on the input")
    return scalar_function(call, 1.0)


def scalar_function(call: Call, slope: float) -> Nonlinear:
    if call.shape != call.source().shape:
        raise Refused("broadcasts its input")
    if not math.isfinite(slope):
        raise Refused(f"has a slope of {slope}")
    return Nonlinear(call.shape, (call.source(),), constants=lambda ord: slope)
