"""A singular value from a vector: whatever the vector, ``|M x| / |x|`` is at most the largest."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..geometry import GeometryError
from ..layers import Layer
from ..norms import Norms
from .circle import power_of_two
from .definite import unit_roundoff


@dataclass(frozen=True)
class Singular:
    """A singular value of a layer from below, and its vectors: ``layer(right) = value * left``.

    ``value`` is certified: 0-dim, float64, rounded down, differentiable in the layer's weight. ``residual`` is
    ``|M^T left - value right| / value``: near it, relative to the value, lies a singular value, if not always the largest.
    ``left`` and ``right`` have a batch of one; either starts another search.
    """

    value: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor


def rayleigh(layer: Layer, x: Tensor) -> Singular:
    """The Rayleigh quotient of ``x[1, channels, *in_shape]``, which has the layer's scale taken out."""
    x = x.detach().double()
    x = x / torch.linalg.vector_norm(x).clamp_min(torch.finfo(x.dtype).tiny)
    scale = power_of_two(layer.weight)
    exact = replace(layer, weight=layer.weight.double() / scale)
    y = exact(x)
    quotient = torch.linalg.vector_norm(y)
    with torch.no_grad():
        unit = replace(exact, weight=exact.weight.detach())
        left = y / quotient if quotient > 0 else torch.zeros_like(y)
        off = unit.adjoint(left) - quotient * x
        residual = torch.linalg.vector_norm(off) / quotient if quotient > 0 else quotient
        error = rounding_error(unit, y)
    value = ((quotient - error).clamp_min(0) * scale).clamp_max(torch.finfo(torch.float64).max)
    return Singular(value, residual, left.detach(), x)


def rounding_error(layer: Layer, y: Tensor) -> Tensor:
    """Of ``|layer(x)|`` for unit ``x``: each output is a sum of so many products, and |M| has at most ``l2_bound``."""
    terms = layer.weight[0].numel() * (layer.groups if layer.transposed else 1)
    return (16 * terms + y.numel()) * unit_roundoff(torch.float64) * Norms(layer).l2_bound


def check_values(layer: Layer) -> Layer:
    """The layer, unless its weights hold what has no norm."""
    if layer.weight.is_meta:
        raise GeometryError("convnorm: weight on device meta has no values to measure")
    layer.plan  # refuses what is no layer
    if not layer.weight.isfinite().all():
        raise GeometryError("convnorm: weight holds NaN or inf, which has no l2 norm")
    return layer
