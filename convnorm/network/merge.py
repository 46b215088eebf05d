"""One layer for two: a layer after a layer, and the sum of two layers.

Position ``o`` of the second layer's output reads the first one's output at ``o s2 + t2 d2 - p2``, and through it the
input at

    o s1 s2 + (t2 d2 s1 + t1 d1) - (p1 + p2 s1)

So both are one convolution, whose kernel holds the products of their taps, as long as the second one's padding is what
the first one makes of a padded input. It is where there is none, and where the first has one tap and no padding but
zeros: what it reads beyond its input are zeros. Its stride is ``s1 s2``, its padding ``p1 + p2 s1``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor

from ..layers import Layer
from ..norms import scaled
from ..spectral.outward import EPS
from .operators import LayerOperator, Merged, Operator, Product, Scalar, Scale, Total
from .rounding import plus, times
from .separable import Separable

MOST_WEIGHTS = 1 << 24  # of a layer that is made
MOST_PRODUCTS = 1 << 31  # multiplications to make it


def compose(second: Operator, first: Operator) -> Operator:
    """``second(first(x))``, with what can be one layer merged.

    >>> halve, double = Scalar((3,), 0.5), Scalar((3,), 2.0)
    >>> compose(halve, double).norm(1)
    (1.0, 'exact')
    """
    if is_identity(second):
        return first
    if is_identity(first):
        return second
    whole = Product(second, first)
    if isinstance(first, Scalar) and isinstance(second, Scalar):
        factor = first.factor * second.factor
        exact = math.isfinite(factor) and Fraction(first.factor) * Fraction(second.factor) == factor
        return Scalar(first.in_shape, factor) if exact else whole
    if isinstance(first, Product):  # ((c b) a): c may merge with b, and b not with a
        joint = compose(second, first.second)
        return whole if isinstance(joint, Product) else compose(joint, first.first)
    return _either(whole, _merged(second, first))


def is_identity(operator: Operator) -> bool:
    return isinstance(operator, Scalar) and operator.factor == 1


def _merged(second: Operator, first: Operator) -> LayerOperator | None:
    far, near = as_layer_operator(second), as_layer_operator(first)
    if far and near:
        return merged_layers(far, near)
    if near and (scale := as_factors(second, near)):
        layer = scaled(near.layer, scale.factors.to(near.layer.weight.device))
        return _with_error(layer, near, scale)
    if far and (scale := as_factors(first, far)):
        return _with_error(scaled_input(far.layer, scale.factors.to(far.layer.weight.device)), far, scale)
    return None


def _with_error(layer: Layer, one: LayerOperator, scale: Scale) -> LayerOperator:
    """The rounding of each product, and what was off before."""
    largest = scale.norm(1)[0]
    error = tuple(
        plus(times(2 * EPS, largest, one.absolute(ord)), times(largest, own), times(scale.error, one.absolute(ord)))
        for ord, own in zip((1, math.inf), one.error, strict=True)
    )
    return replace(one, layer=layer, error=error)


def add(one: Operator, other: Operator) -> Operator:
    """``one(x) + other(x)``.

    >>> add(Scalar((3,), 2.0), Scalar((3,), -1.0)).norm(1)
    (1.0, 'exact')
    """
    whole = Total(one, other)
    if isinstance(one, Scalar) and isinstance(other, Scalar):
        total = one.factor + other.factor
        exact = math.fsum([one.factor, other.factor, -total]) == 0
        return Scalar(one.in_shape, total) if exact else whole
    left, right = as_layer_operator(one), as_layer_operator(other)
    if left and not right and (scale := as_factors(other, left)):
        right = as_depthwise(scale, left.spatial)
    elif right and not left and (scale := as_factors(one, right)):
        left = as_depthwise(scale, right.spatial)
    return _either(whole, summed_layers(left, right) if left and right else None)


def _either(parts: Operator, layer: LayerOperator | None) -> Operator:
    """Weights that outgrow float64 make no layer."""
    return Merged(parts, layer) if layer and layer.layer.weight.isfinite().all() else parts


def as_layer_operator(operator: Operator) -> LayerOperator | None:
    """What of an operator is a layer."""
    if isinstance(operator, LayerOperator):
        return operator
    return operator.layer if isinstance(operator, (Merged, Separable)) else None


def as_factors(operator: Operator, beside: LayerOperator) -> Scale | None:
    """What of an operator multiplies the channels of a layer beside it."""
    if isinstance(operator, Scalar):
        channels = operator.in_shape[beside.channel - 1]
        factors = torch.full((channels,), operator.factor, dtype=torch.float64)
        return Scale(factors, operator.in_shape, beside.channel)
    return operator if isinstance(operator, Scale) and operator.channel == beside.channel else None


def scale_of(factors: Tensor, in_shape: tuple[int, ...], channel: int, roundings: int = 0) -> Scale:
    """A factor for each channel, computed with so many roundings."""
    return Scale(factors.double(), in_shape, channel, times(roundings * EPS, float(factors.abs().max())))


def as_depthwise(scale: Scale, spatial: tuple[int, ...]) -> LayerOperator:
    """The same as a layer with these spatial axes."""
    sizes, axes = tuple(scale.in_shape[axis - 1] for axis in spatial), len(spatial)
    weight = scale.factors.view(-1, 1, *[1] * axes) if axes else scale.factors.diag()
    one, zero = (1,) * axes, (0,) * axes
    layer = Layer(weight, one, zero, sizes, one, len(weight) if axes else 1, "zeros", False, zero)
    return LayerOperator(layer, scale.in_shape, scale.channel, spatial, (scale.error, scale.error))


def aligned(one: LayerOperator, other: LayerOperator) -> tuple[LayerOperator, LayerOperator] | None:
    """Both along the spatial axes of either, and on the first one's device; None where their channels are not."""
    if one.channel != other.channel:
        return None
    spatial = tuple(sorted({*one.spatial, *other.spatial}))
    one, other = lifted(one, spatial), lifted(other, spatial)
    return one, replace(other, layer=replace(other.layer, weight=other.layer.weight.to(one.layer.weight.device)))


def merged_layers(second: LayerOperator, first: LayerOperator) -> LayerOperator | None:
    """The layer that does both, or None."""
    if not (both := aligned(first, second)):
        return None
    near, far = both
    layer = convolved(far.layer, near.layer)
    if layer is None or layer.geometry.out_shape != far.layer.geometry.out_shape:
        return None
    taps = math.prod(near.layer.weight.shape[2:]) * math.prod(far.layer.weight.shape[2:])
    slack = (near.layer.out_channels // layer.groups * taps + 4) * EPS
    error = tuple(
        plus(
            times(slack, second.absolute(ord), first.absolute(ord)),
            times(second.absolute(ord), near_error),
            times(far_error, first.absolute(ord)),
        )
        for ord, near_error, far_error in zip((1, math.inf), near.error, far.error, strict=True)
    )
    return replace(near, layer=layer, error=error)


def summed_layers(one: LayerOperator, other: LayerOperator) -> LayerOperator | None:
    """The layer that does the sum of both, or None: their strides must be the same, their padding zeros."""
    if not (both := aligned(one, other)):
        return None
    a, b = layers = [operator.layer for operator in both]
    if any(layer.transposed or padding_mode(layer) != "zeros" for layer in layers):
        return None
    if a.geometry.stride != b.geometry.stride:
        return None
    groups = math.gcd(a.groups, b.groups)
    before = [max(p, q) for (p, _), (q, _) in zip(a.geometry.padding, b.geometry.padding, strict=True)]
    places = [
        tuple(
            slice(most - own, most - own + (k - 1) * d + 1, d)
            for most, (own, _), k, d in zip(
                before, layer.geometry.padding, layer.weight.shape[2:], layer.geometry.dilation, strict=True
            )
        )
        for layer in layers
    ]
    size = [max(p.stop, q.stop) for p, q in zip(*places, strict=True)]
    channels = (a.out_channels, a.in_channels // groups)
    if math.prod(channels) * math.prod(size) > MOST_WEIGHTS:
        return None
    weight = torch.zeros(*channels, *size, dtype=torch.float64, device=a.weight.device)
    for layer, taps in zip(layers, places, strict=True):
        weight[(slice(None), slice(None), *taps)] += _regrouped(layer.weight, layer.groups, groups)
    layer = _layer(weight, a, before, [1] * len(size), a.geometry.stride, groups, "zeros", a.geometry.out_shape)
    if layer is None:
        return None
    error = tuple(
        plus(own, theirs, times(2 * EPS, plus(one.absolute(ord), other.absolute(ord))))
        for ord, own, theirs in zip((1, math.inf), one.error, other.error, strict=True)
    )
    return replace(both[0], layer=layer, error=error)


def padding_mode(layer: Layer) -> str:
    return layer.padding_mode if any(map(any, layer.geometry.padding)) else "zeros"


def lifted(operator: LayerOperator, spatial: tuple[int, ...]) -> LayerOperator:
    """The same along more spatial axes, with one tap on each that is new."""
    if operator.spatial == spatial:
        return operator
    layer, geometry = operator.layer, operator.layer.geometry
    weight, own = layer.weight, dict(zip(operator.spatial, range(len(spatial)), strict=False))
    for i, axis in enumerate(spatial):
        weight = weight if axis in own else weight.unsqueeze(2 + i)

    def along(values: tuple, new: object) -> tuple:
        return tuple(values[own[axis]] if axis in own else new for axis in spatial)

    padding = along(geometry.padding, (0, 0))
    layer = replace(
        layer,
        weight=weight,
        stride=along(geometry.stride, 1),
        padding=tuple(p for pair in padding for p in pair),
        dilation=along(geometry.dilation, 1),
        output_padding=along(layer.output_padding, 0),
        in_shape=tuple(operator.in_shape[axis - 1] for axis in spatial),
    )
    return replace(operator, layer=layer, spatial=spatial)


def scaled_input(layer: Layer, factors: Tensor) -> Layer:
    """The layer after a multiplication of each input channel."""
    weight = layer.weight
    if layer.transposed:
        return replace(layer, weight=weight * factors.view(-1, *[1] * (weight.dim() - 1)))
    per_group = factors.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
    return replace(layer, weight=(weight.unflatten(0, (layer.groups, -1)) * per_group).flatten(0, 1))


def convolved(second: Layer, first: Layer) -> Layer | None:
    """The convolution that is ``first``, then ``second``, where there is one that is not too large."""
    if first.transposed or second.transposed:
        return None
    a, b = first.geometry, second.geometry
    pointwise = all(k == 1 for k in first.weight.shape[2:])
    mode = padding_mode(first)
    if padding_mode(second) != "zeros":
        if not pointwise or max(a.stride) > 1 or any(map(any, a.padding)):
            return None
        mode = padding_mode(second)
    if mode != "zeros" and mode == padding_mode(first) and any(map(any, b.padding)):
        return None
    places, sizes, before, dilation = [], [], [], []
    for k1, k2, s, d1, d2, p1, p2 in zip(
        first.weight.shape[2:], second.weight.shape[2:], a.stride, a.dilation, b.dilation, a.padding, b.padding,
        strict=True,
    ):  # fmt: skip
        if any(p2) and k1 > 1:
            return None
        spread = d1 if k2 == 1 else d2 * s if k1 == 1 else 1
        places.append((d2 * s // spread, d1 // spread) if spread > 1 else (d2 * s, d1))
        sizes.append((k2 - 1) * places[-1][0] + (k1 - 1) * places[-1][1] + 1)
        before.append(p1[0] + p2[0] * s)
        dilation.append(spread)
    groups = _common_groups(second, first)
    out, inputs = second.out_channels, first.in_channels // groups
    products = math.prod(first.weight.shape[2:]) * math.prod(second.weight.shape[2:]) * out * inputs
    products *= 1 if _is_depthwise(first) or _is_depthwise(second) else first.out_channels // groups
    if out * inputs * math.prod(sizes) > MOST_WEIGHTS or products > MOST_PRODUCTS:
        return None
    one, other = first.weight.double(), second.weight.double()
    kernel = torch.zeros(out, inputs, *sizes, dtype=torch.float64, device=one.device)
    for t2 in product(*map(range, other.shape[2:])):
        for t1 in product(*map(range, one.shape[2:])):
            at = tuple(i * far + j * near for i, j, (far, near) in zip(t2, t1, places, strict=True))
            taps = other[(..., *t2)], one[(..., *t1)]
            kernel[(slice(None), slice(None), *at)] += _matrix_product(*taps, second, first, groups)
    stride = [s * t for s, t in zip(a.stride, b.stride, strict=True)]
    return _layer(kernel, first, before, dilation, stride, groups, mode, b.out_shape)


def _layer(
    weight: Tensor, like: Layer, before: list[int], dilation: list[int], stride: list[int] | tuple[int, ...],
    groups: int, mode: str, out_shape: tuple[int, ...],
) -> Layer | None:  # fmt: skip
    """A convolution of given output size, with as much padding behind as that takes."""
    after = [
        max(0, (m - 1) * s + d * (k - 1) + 1 - n - p)
        for m, s, d, k, n, p in zip(out_shape, stride, dilation, weight.shape[2:], like.in_shape, before, strict=True)
    ]
    padding = tuple(p for both in zip(before, after, strict=True) for p in both)
    layer = replace(
        like, weight=weight, stride=tuple(stride), padding=padding, dilation=tuple(dilation), groups=groups,
        padding_mode=mode,
    )  # fmt: skip
    return layer if layer.geometry.out_shape == out_shape else None


def _is_depthwise(layer: Layer) -> bool:
    return layer.groups == layer.in_channels == layer.out_channels


def _common_groups(second: Layer, first: Layer) -> int:
    if _is_depthwise(first):
        return second.groups
    return first.groups if _is_depthwise(second) else math.gcd(second.groups, first.groups)


def _matrix_product(two: Tensor, one: Tensor, second: Layer, first: Layer, groups: int) -> Tensor:
    """``two[out, middle / groups] one[middle, in / groups]``, for each of the common groups, [out, in / groups]."""
    if _is_depthwise(second):
        return two * one
    if _is_depthwise(first):
        return (two.unflatten(0, (groups, -1)) * one.view(groups, 1, -1)).flatten(0, 1)
    two, one = _regrouped(two, second.groups, groups), _regrouped(one, first.groups, groups)
    return (two.unflatten(0, (groups, -1)) @ one.unflatten(0, (groups, -1))).flatten(0, 1)


def _regrouped(weight: Tensor, groups: int, fewer: int) -> Tensor:
    """A weight [out, in / groups, ...] with the zeros that it has in fewer groups, [out, in / fewer, ...]."""
    if groups == fewer:
        return weight
    each = groups // fewer
    own = weight.unflatten(0, (fewer, each, -1))  # [fewer, each, rows, columns, ...]
    dense = own.new_zeros(fewer, each, own.shape[2], each, *own.shape[3:])
    index = torch.arange(each)
    dense[:, index, :, index] = own.movedim(1, 0)
    return dense.flatten(0, 2).flatten(1, 2)
