"""A call of one of PyTorch's linear functions, as the layer that it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..layers import Layer, as_layer, in_numbers


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A batch norm in evaluation: ``scale[channels]``, in float64, is what it multiplies its input by."""

    name: str
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """A layer of a model at one input size, how often it is called, and the batch norm that directly follows it."""

    name: str
    kind: str
    layer: Layer
    calls: int
    batch_norm: BatchNorm | None


def called_layer(weight: Tensor, x_shape: Sequence[int], arguments: Mapping[str, Any], transposed: bool) -> Layer:
    """The layer of ``F.conv2d(x, weight, **arguments)`` and the like; of ``F.linear``, whose weight has no taps.

    >>> import torch
    >>> called_layer(torch.ones(4, 3, 4), [1, 3, 8], {"padding": "same", "stride": 1}, False).padding
    (1, 2)
    """
    n_axes = weight.dim() - 2
    if n_axes == 0:
        return as_layer(weight)
    names = ("stride", "padding", "dilation", "groups", *(["output_padding"] if transposed else []))
    options = {name: arguments[name] for name in names if name in arguments}
    if isinstance(options.get("padding"), str):
        dilation = options.get("dilation", 1)
        spread = [dilation] if isinstance(dilation, int) else list(dilation)
        spread = spread * n_axes if len(spread) == 1 else spread
        options["padding"] = in_numbers(options["padding"], weight.shape[2:], spread)
    return as_layer(weight, x_shape[len(x_shape) - n_axes :], transposed=transposed, **options)


def multiplier(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """weight / sqrt(running_var + eps)

    >>> import torch
    >>> multiplier(torch.tensor([3.0]), torch.tensor([4.0]), 1.0)
    tensor([2.], dtype=torch.float64)
    """
    scale = (running_var.detach().double() + eps).rsqrt()
    return scale if weight is None else weight.detach().double() * scale


def is_vector(parameter: Tensor) -> bool:
    """Whether it has one axis at most, or others only of length 1: biases, scales of channels."""
    return sum(size > 1 for size in parameter.shape) <= 1
