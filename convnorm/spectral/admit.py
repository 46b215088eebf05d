"""What every method refuses before it computes: weights without values, and settings that ask for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..geometry import GeometryError
from ..layers import Layer, as_layer
from ..library import DTYPES
from ..norms import scaled


def admitted(
    layer: nn.Module | Tensor | Layer, in_shape: Sequence[int], options: dict[str, Any], scale: Tensor | None = None
) -> Layer:
    """A layer whose weights are all there and finite, and so they are times ``scale``: in float64, where the product
    of two float32 numbers is exact.

    >>> import torch
    >>> admitted(torch.tensor([[1.0, torch.nan]]), (), {})
    Traceback (most recent call last):
    convnorm.geometry.GeometryError: convnorm: weight holds NaN or inf, which has no l2 norm
    """
    one = as_layer(layer, in_shape, **options)
    _ = one.plan  # refuses what is no layer
    if one.weight.dtype not in DTYPES:
        raise GeometryError(
            f"convnorm: weight of {one.weight.dtype} must be of float64, float32, float16 or bfloat16"
        )  # what it holds would be cut to real numbers
    if one.weight.is_meta:
        raise GeometryError("convnorm: weight on device meta has no values to measure")
    if not one.weight.isfinite().all():
        raise GeometryError("convnorm: weight holds NaN or inf, which has no l2 norm")
    if scale is None:
        return one
    product = scaled(replace(one, weight=one.weight.double()), scale)
    if not product.weight.isfinite().all():
        raise GeometryError("convnorm: scale holds NaN or inf, or makes it of the weight, which has no l2 norm")
    return product


def admitted_start(start: Tensor | None, layer: Layer) -> Tensor | None:
    """An input of the layer that a search begins from."""
    wanted = [1, layer.in_channels, *layer.in_shape]
    if start is not None and list(start.shape) != wanted:
        raise GeometryError(f"convnorm: start of shape {list(start.shape)} must have the shape {wanted}")
    if start is not None and not (start.isfinite().all() and start.any()):
        raise GeometryError("convnorm: start holds NaN or inf, or nothing but zeros: it leads nowhere")
    return start


def at_least_one(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise GeometryError(f"convnorm: {name} {value} must be at least 1")
