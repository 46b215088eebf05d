"""A singular value from a vector: whatever the vector, ``|M x| / |x|`` is at most the largest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers import Layer
from ..norms import Norms
from .circle import groups_of, power_of_two, with_read_taps
from .definite import unit_roundoff
from .outward import LEAST, once


@dataclass(frozen=True)
class Singular:
    """A singular value of a layer from below, and its vectors: ``layer(right) = value * left``.

    ``value`` is certified: 0-dim, float64, rounded down, differentiable once, in the layer's weight. ``residual`` is
    ``|M^T left - value right| / value``: so near to it, relatively, lies a singular value, if not always the largest.
    ``left`` and ``right`` have a batch of one; ``right`` can start another search.
    """

    value: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor


def rayleigh(layer: Layer, x: Tensor) -> Singular:
    """What ``x[1, channels, *in_shape]`` shows of the singular values; the residual in the precision of ``x``."""
    layer = with_read_taps(layer)
    exact, right = _exact(layer), unit(x)
    y = exact(right)
    with torch.no_grad():
        left, size = unit(y), torch.linalg.vector_norm(y)
        off = replace(exact, weight=exact.weight.to(x.dtype)).adjoint(left.to(x.dtype)) - size * right
        residual = torch.linalg.vector_norm(off) / size.where(size > 0, 1)
    return Singular(downward(_length(exact, y), power_of_two(layer.weight)), residual, left, right)


def attained(layer: Layer, right: Tensor) -> Tensor:
    """|layer(right)| / scale for a unit vector, rounded down, where the scale is a power of two that cannot overflow,
    ``power_of_two`` of the layer's weight. Differentiable once, in that.
    """
    exact = _exact(layer)
    parts = by_group(right, layer.groups)[0]
    reached = parts.any(1).nonzero().flatten()
    if 0 < len(reached) < layer.groups:
        exact, right = groups_of(exact, reached), parts[reached].view(1, -1, *right.shape[2:])
    return _length(exact, exact(right)).clamp_min(0)


def in_best_group(layer: Layer, x: Tensor) -> Tensor:
    """What of ``x[1, channels, *in_shape]`` lies in the group where its image is longest for its length: there it is
    no shorter than that of all of ``x``.
    """
    if layer.groups == 1:
        return x
    images, parts = by_group(layer(x.to(layer.weight)), layer.groups), by_group(x, layer.groups)
    lengths, images = torch.linalg.vector_norm(parts, dim=2), torch.linalg.vector_norm(images, dim=2)
    best = (images / lengths.where(lengths > 0, 1)).argmax()
    own = torch.arange(layer.groups, device=x.device) == best
    return (parts * own[:, None]).view_as(x)


def by_group(vectors: Tensor, groups: int) -> Tensor:
    """[batch, groups, entries], a view."""
    return vectors.unflatten(1, (groups, -1)).flatten(2)


def _exact(layer: Layer) -> Layer:
    exact = without_scale(layer)
    return replace(exact, weight=once(exact.weight))


def _length(layer: Layer, y: Tensor) -> Tensor:
    """|y|, where ``y`` is the image of a unit vector, rounded down."""
    with torch.no_grad():
        error = rounding_error(layer)
    return once(torch.linalg.vector_norm(y)) - error


def downward(bound: Tensor, scale: float) -> Tensor:
    """At most ``bound * scale`` for a power of two, which may make it denormal, or inf."""
    return (bound * scale - LEAST).clamp(0, torch.finfo(bound.dtype).max)


def unit(x: Tensor) -> Tensor:
    x = x.detach().double()
    return x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)


def without_scale(layer: Layer) -> Layer:
    """In float64, where nothing can overflow."""
    return replace(layer, weight=layer.weight.double() / power_of_two(layer.weight))


def rounding_error(layer: Layer) -> Tensor:
    """Of ``|layer(x)|`` for unit ``x``: each output is a sum of so many products, |M| has at most ``l2_bound``, and
    the lengths of input and output are sums themselves.
    """
    terms = layer.weight.numel() // layer.out_channels
    inputs = layer.in_channels * math.prod(layer.in_shape)
    outputs = layer.out_channels * math.prod(layer.geometry.out_shape)
    magnitude = replace(layer, weight=layer.weight.detach().abs())  # where merged taps cancel, their rounding does not
    return (16 * terms + inputs + outputs) * unit_roundoff(torch.float64) * Norms(magnitude).l2_bound
