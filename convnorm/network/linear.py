"""Linear operations that multiply: layers, normalisation by stored statistics, scaling, sums, averages, padding."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..geometry import fold
from ..layers import Layer, in_numbers
from ..spectral.outward import EPS
from .calls import Call, Refused, rule
from .merge import compose, is_identity, scale_of
from .operators import Diagonal, LayerOperator, Operator, Rearranged, Scalar, Scale, Shape
from .separable import Separable, adaptive_windows, average, ranges, selection
from .steps import Linear, Step, Sum

PAD_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def linear(source: Step, operator: Operator) -> Linear:
    return Linear(operator.out_shape, (source,), operator=operator)


# Layers


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution")
def convolution(call: Call) -> Linear:
    source, weight, given = call.source("input"), call.constant("weight"), call.arguments
    axes = weight.dim() - 2
    if len(source.shape) != axes + 1:
        raise Refused("has an input without a batch axis")
    dilation = call.per_axis("dilation", axes)
    transposed = given.get("transposed", "transpose" in call.operation)
    layer = Layer(
        weight,
        stride=tuple(call.per_axis("stride", axes)),
        padding=tuple(in_numbers(given["padding"], weight.shape[2:], dilation)),
        in_shape=tuple(source.shape[1:]),
        dilation=tuple(dilation),
        groups=given["groups"],
        padding_mode="zeros",
        transposed=transposed,
        output_padding=tuple(call.per_axis("output_padding", axes)) if transposed else (0,) * axes,
    )
    return linear(source, LayerOperator(layer, source.shape, 1, tuple(range(2, 2 + axes))))


def along(weight: Tensor, in_shape: Shape, channel: int) -> LayerOperator:
    """A matrix [outputs, inputs] along one axis."""
    return LayerOperator(Layer(weight, (), (), (), (), 1, "zeros", False, ()), in_shape, channel, ())


@rule("linear")
def fully_connected(call: Call) -> Linear:
    source, weight = call.source("input"), call.constant("weight")
    if weight.dim() != 2:
        raise Refused("has no matrix")
    if not source.shape:
        raise Refused("has an input without a batch axis")
    return linear(source, along(weight, source.shape, len(source.shape)))


@rule("mm", "matmul", "addmm")
def matrix_product(call: Call) -> Linear:
    left, right = ("mat1", "mat2") if call.operation == "addmm" else tuple(call.arguments)[:2]
    if call.depends(left) and call.depends(right):
        raise Refused("multiplies what depends on the network's input: it is not globally Lipschitz")
    if call.operation == "addmm" and (call.depends("self") or call.arguments["alpha"] != 1):
        raise Refused("adds up more than a product and a constant")
    name, matrix = (left, call.constant(right)) if call.depends(left) else (right, call.constant(left))
    source = call.arguments[name]
    rank = len(source.shape) + 1
    if name == left and matrix.dim() == 1 and rank > 1:
        operator = along(matrix[None], source.shape, rank - 1)
        return linear(source, compose(reshaped(operator.out_shape, call.shape), operator))
    if matrix.dim() != 2 or rank < (2 if name == left else 3):
        raise Refused("is no product with one matrix within each sample")
    if name == left:
        return linear(source, along(matrix.T, source.shape, rank - 1))
    return linear(source, along(matrix, source.shape, rank - 2))


# Scaling


@rule("batch_norm", "_native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Linear | tuple[Linear, None, None]:
    given = call.arguments
    if given.get("training") or given["running_var"] is None:
        raise Refused("normalises by statistics of the batch, which mix its samples")
    step = linear(call.source("input"), by_statistics(call))
    return step if call.operation == "batch_norm" else (step, None, None)


def by_statistics(call: Call) -> Scale:
    """weight / sqrt(running_var + eps), for each channel."""
    factors = (call.constant("running_var").double() + call.arguments["eps"]).rsqrt()
    if call.arguments["weight"] is not None:
        factors = factors * call.constant("weight")
    if not factors.isfinite().all():
        raise Refused("has a variance or a weight that is no number")
    return scale_of(factors, call.source("input").shape, 1, roundings=8)


@rule("mul", "multiply", "div", "divide", "true_divide")
def scaling(call: Call) -> Linear:
    one, other = tuple(call.arguments)[:2]
    divides = "div" in call.operation
    if call.depends(other) and (divides or call.depends(one)):
        raise Refused("divides by what depends on the network's input" if divides else
                      "multiplies what depends on the network's input: it is not globally Lipschitz")  # fmt: skip
    if call.arguments.get("rounding_mode") is not None:
        raise Refused("rounds, which is not continuous")
    name, constant = (one, other) if call.depends(one) else (other, one)
    factor = call.arguments[constant]
    if isinstance(factor, complex):
        raise Refused("has a factor that is no real number")
    factor = factor.detach().double() if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
    if not factor.isfinite().all() or (divides and not factor.reciprocal().isfinite().all()):
        raise Refused("has a factor that is no finite number")
    source, spread = broadcast(call, name, constant)
    return linear(source, compose(_factors(call, factor, divides, spread.out_shape), spread))


def _factors(call: Call, factor: Tensor, divides: bool, shape: Shape) -> Operator:
    if factor.numel() == 1:
        return Scalar(shape, _outward_quotient(float(factor)) if divides else float(factor))
    if factor.dim() == len(shape) + 1:
        if not factor.equal(factor[:1].expand_as(factor)):
            raise Refused("has another factor for each sample of the batch")
        factor = factor[0]
    factor = factor.reciprocal() if divides else factor
    factor = factor[(None,) * (len(shape) - factor.dim())]
    axes = [axis for axis, n in enumerate(factor.shape, 1) if n > 1]
    if len(axes) == 1:
        return scale_of(factor.flatten(), shape, axes[0], roundings=int(divides))
    factor = factor.expand(shape)
    return Diagonal(factor * (1 + 2 * EPS) if divides else factor)


def _outward_quotient(divisor: float) -> float:
    """1 / divisor, away from 0 where it is rounded."""
    quotient = 1 / divisor
    exact = Fraction(1) / Fraction(divisor)
    short = abs(Fraction(quotient)) < abs(exact)
    return math.nextafter(quotient, math.copysign(math.inf, divisor)) if short else quotient


@rule("neg", "negative")
def negation(call: Call) -> Linear:
    return linear(call.source(), Scalar(call.shape, -1.0))


# Sums


@rule("add", "sub", "subtract", "rsub")
def addition(call: Call) -> Step:
    one, other = tuple(call.arguments)[:2]
    alpha = call.arguments.get("alpha", 1)
    if isinstance(alpha, complex) or not math.isfinite(alpha):
        raise Refused("has an alpha that is no finite number")
    alpha = float(alpha)
    factors = {"add": (1.0, alpha), "rsub": (-alpha, 1.0)}.get(call.operation, (1.0, -alpha))  # rsub: other - alpha one
    parts = []
    for name, beside, factor in zip((one, other), (other, one), factors, strict=True):
        if call.depends(name):
            source, spread = broadcast(call, name, beside)
            parts.append((source, compose(Scalar(call.shape, factor), spread)))
    if len(parts) == 1:
        return linear(*parts[0])
    return Sum(call.shape, tuple(part[0] if is_identity(part[1]) else linear(*part) for part in parts))


def broadcast(call: Call, name: str, beside: str) -> tuple[Step, Operator]:
    """An argument, and the repetition that brings it to the shape of the output, which it has with another one."""
    source, other = call.arguments[name], call.arguments[beside]
    adds_axes = isinstance(other, Tensor) and other.dim() > len(source.shape) + 1
    if adds_axes or len(source.shape) != len(call.shape):
        raise Refused("broadcasts the batch axis")
    return source, repetition(source.shape, call.shape)


def repetition(in_shape: Shape, out_shape: Shape) -> Operator:
    """Axes of size 1 to other sizes."""
    sizes = enumerate(zip(in_shape, out_shape, strict=True), 1)
    matrices = {axis: torch.ones(m, 1, dtype=torch.float64) for axis, (n, m) in sizes if n != m}
    return Separable(in_shape, matrices) if matrices else Scalar(in_shape)


@rule("expand")
def expansion(call: Call) -> Linear:
    source = call.source()
    if len(call.shape) != len(source.shape):
        raise Refused("adds an axis in front of the batch's")
    return linear(source, repetition(source.shape, call.shape))


@rule("repeat")
def tiling(call: Call) -> Linear:
    source, (batch, *times) = call.source(), call.arguments["repeats"]
    if batch != 1 or len(times) != len(source.shape):
        raise Refused("repeats the batch axis")
    counts = {axis: (n, t) for axis, (n, t) in enumerate(zip(source.shape, times, strict=True), 1) if t != 1}
    matrices = {axis: selection(torch.arange(n).repeat(t), n) for axis, (n, t) in counts.items()}
    return linear(source, Separable(source.shape, matrices))


@rule("sum", "mean")
def reduction(call: Call) -> Linear:
    source, dims = call.source(), call.arguments.get("dim")
    if not dims:
        raise Refused("adds up the batch")
    matrices = {}
    for axis in sorted(call.axes(dims)):
        n = source.shape[axis - 1]
        matrices[axis] = torch.full((1, n), 1 / n if call.operation == "mean" else 1.0, dtype=torch.float64)
    operator = Separable(source.shape, matrices)
    return linear(source, compose(reshaped(operator.out_shape, call.shape), operator))


def reshaped(in_shape: Shape, out_shape: Shape) -> Operator:
    if in_shape == out_shape:
        return Scalar(in_shape)
    return Rearranged(in_shape, out_shape, lambda x: x.reshape(len(x), *out_shape))


# Along each axis


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def average_pooling(call: Call) -> Linear:
    source, given = call.source(), call.arguments
    axes = int(call.operation[-2])
    if len(source.shape) != axes + 1:
        raise Refused("has an input without a batch axis")
    kernel, padding = call.per_axis("kernel_size", axes), call.per_axis("padding", axes)
    stride = call.per_axis("stride", axes) if given["stride"] else kernel
    sizes = list(zip(source.shape[1:], call.shape[1:], kernel, stride, padding, strict=True))
    divisor = given.get("divisor_override")
    if divisor:
        matrices = [ranges(n, [o * s - p for o in range(m)], [min(o * s - p + k, n) for o in range(m)], [1] * m)
                    for n, m, k, s, p in sizes]  # fmt: skip
        matrices[0] = matrices[0] / divisor
    else:
        matrices = [average(*size, given["count_include_pad"]) for size in sizes]
    operator = Separable(source.shape, dict(enumerate(matrices, 2)))
    whole = all((m - 1) * s + k <= n + 2 * p for n, m, k, s, p in sizes)
    if whole and not divisor and (given["count_include_pad"] or not any(padding)):
        weight = torch.full((source.shape[0], 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
        operator = replace(operator, layer=_each_channel(weight, source.shape, stride, padding, "zeros", EPS))
    return linear(source, operator)


def _each_channel(
    weight: Tensor, in_shape: Shape, stride: list[int], padding: list[int], mode: str, error: float
) -> LayerOperator:
    axes = weight.dim() - 2
    one = (1,) * axes
    layer = Layer(weight, tuple(stride), tuple(padding), in_shape[-axes:], one, len(weight), mode, False, (0,) * axes)
    spatial = tuple(range(len(in_shape) - axes + 1, len(in_shape) + 1))
    return LayerOperator(layer, in_shape, 1, spatial, (error, error))


@rule(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"
)
def adaptive_average_pooling(call: Call) -> Linear:
    source, axes = call.source(), int(call.operation[-2])
    if len(source.shape) != axes + 1:
        raise Refused("has an input without a batch axis")
    matrices = {}
    for axis in range(2, 2 + axes):
        n, m = source.shape[axis - 1], call.shape[axis - 1]
        starts, ends = adaptive_windows(n, m)
        matrices[axis] = ranges(n, starts, ends, [b - a for a, b in zip(starts, ends, strict=True)])
    return linear(source, Separable(source.shape, matrices))


@rule("pad", "constant_pad_nd")
def padding(call: Call) -> Linear:
    source, mode = call.source(), PAD_MODES[call.arguments.get("mode", "constant")]
    given = call.arguments["pad"]
    rank = len(source.shape) + 1
    pairs = {rank - 1 - i: (given[2 * i], given[2 * i + 1]) for i in range(len(given) // 2)}
    if any(pairs.pop(0, ())):
        raise Refused("pads the batch axis")
    matrices = {}
    for axis, (before, after) in sorted(pairs.items()):
        n = source.shape[axis - 1]
        matrices[axis] = selection(torch.from_numpy(_padded(n, before, after, mode)), n)
    operator = Separable(source.shape, matrices)
    padded = [axis for axis, pair in pairs.items() if any(pair)]
    if padded and min(padded) >= 2 and rank <= 5 and min(map(min, pairs.values())) >= 0:
        axes = rank - 2
        weight = torch.ones(source.shape[0], *[1] * (1 + axes), dtype=torch.float64)
        ends = [p for axis in range(2, rank) for p in pairs.get(axis, (0, 0))]
        operator = replace(operator, layer=_each_channel(weight, source.shape, [1] * axes, ends, mode, 0.0))
    return linear(source, operator)


def _padded(n: int, before: int, after: int, mode: str) -> np.ndarray:
    """The input at each place; -1 for none. Circular padding that also cuts repeats what is left.

    >>> _padded(4, -1, 1, "circular").tolist(), _padded(4, -1, 1, "reflect").tolist()
    ([1, 2, 3, 1], [1, 2, 3, 2])
    """
    if mode != "circular":
        return fold(np.arange(-before, n + after), n, mode)
    cut, left = max(-before, 0), n + min(before, 0) + min(after, 0)
    if max(before, after) > left:
        raise Refused(f"repeats {max(before, after)} of {left} that it leaves, which PyTorch does not define")
    return cut + fold(np.arange(-max(before, 0), left + max(after, 0)), left, mode)


@rule(*(f"{kind}{axes}d" for axes in (1, 2, 3) for kind in ("upsample_nearest", "_upsample_nearest_exact")),
      "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d",
      "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def upsampling(call: Call) -> Linear:
    """By what PyTorch does along each axis to images that have one place along the others.

    Antialiased ones have all: PyTorch 2.13 returns something else for images of one column.
    """
    source, (first, *_) = call.source(), call.arguments
    sizes, matrices = source.shape[1:], {}
    for axis, n in enumerate(sizes):
        basis = torch.eye(n, dtype=torch.float64).view(n, 1, *[n if i == axis else 1 for i in range(len(sizes))])
        arguments = call.arguments
        if call.operation.endswith("aa"):
            basis = basis.expand(n, 1, *sizes).contiguous()
        else:
            arguments = {name: _along(axis, len(sizes), name, value) for name, value in arguments.items()}
        images = call.target(**arguments | {first: basis})
        matrices[2 + axis] = images.movedim(2 + axis, -1).reshape(n, -1, call.shape[1 + axis])[:, 0].T
    return linear(source, Separable(source.shape, matrices))


def _along(axis: int, axes: int, name: str, value: Any) -> Any:
    """An argument of an interpolation along one axis, where the others keep their one place."""
    if value is None or not name.startswith(("output_size", "scale")):
        return value
    if name in ("output_size", "scale_factors"):
        return [value[i] if i == axis else type(value[i])(1) for i in range(axes)]
    return value if name == ("scales" if axes == 1 else ("scales_d", "scales_h", "scales_w")[axis - axes]) else None
