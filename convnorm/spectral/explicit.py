"""The explicit matrix of a layer, group by group: where it is small, every question has its answer there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..layers import Layer
from ..winners import as_matrix
from .definite import is_below, largest_eigenvalue, unit_roundoff


def matrix_sizes(layer: Layer) -> tuple[int, int]:
    """(outputs, inputs) of the matrix of one group."""
    return (
        layer.out_channels // layer.groups * math.prod(layer.geometry.out_shape),
        layer.in_channels // layer.groups * math.prod(layer.in_shape),
    )


def group_of(layer: Layer, group: int) -> Layer:
    """One group of a layer, as a layer of its own."""
    return replace(layer, weight=as_matrix(layer.weight, layer.plan)[group], groups=1)


def explicit_matrix(layer: Layer) -> Tensor:
    """[outputs, inputs], each a channel and its position flattened, of a layer of one group. Differentiable, but for
    padding that repeats inputs.
    """
    outputs, inputs = matrix_sizes(layer)
    one = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if inputs <= outputs or layer.padding_mode != "zeros":
        basis = torch.eye(inputs, **one).view(inputs, layer.in_channels, *layer.in_shape)
        return layer(basis).flatten(1).T
    basis = torch.eye(outputs, **one).view(outputs, layer.out_channels, *layer.geometry.out_shape)
    return layer.adjoint(basis).flatten(1)


def explicit_upper(layer: Layer, level: float) -> float:
    """``level`` where the norm of a layer of one group, in float64, is proved to be at most that, else the norm itself,
    rounded up.
    """
    matrix = explicit_matrix(layer).detach()
    gram = matrix.mT @ matrix if matrix.shape[1] <= matrix.shape[0] else matrix @ matrix.mT
    rounding = (max(matrix.shape) + 8) * unit_roundoff(gram.dtype) * float(matrix.square().sum())
    # merged taps are sums themselves
    rounding += 2 * len(layer.in_shape) * math.prod(layer.weight.shape[2:]) * unit_roundoff(gram.dtype) * rounding
    if bool(is_below(gram, level**2, rounding)):
        return level
    return math.sqrt(float(largest_eigenvalue(gram, rounding))) * (1 + 4 * unit_roundoff(gram.dtype))
