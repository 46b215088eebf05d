"""The methods that the paper's Table 1 times, as their authors released them: for comparison only.

*VS*: Virmaux and Scaman (2018), power iteration whose products with the transposed matrix are autograd's:
``v <- grad of ||conv(v)||^2``, normalised. *SGL*: Sedghi, Gupta and Long (2019), a Fourier transform of the kernel on
the input's own grid and all singular values of a matrix for each of its frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from convnorm.geometry import GeometryError
from convnorm.layers import Layer, as_layer


def virmaux_scaman(layer: Layer, iterations: int = 100) -> Tensor:
    """As published: ||conv(v)|| for the last v, a lower bound.

    >>> from convnorm.layers import as_layer
    >>> _ = torch.manual_seed(0)
    >>> virmaux_scaman(as_layer(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1))  # 2 cos(pi / 7)
    tensor(1.8019)
    """
    return _power_iteration(layer, iterations, clear=True)


def virmaux_scaman_as_released(layer: Layer, iterations: int = 500) -> Tensor:
    """As the paper's authors ran it, **broken**: ``v.grad`` is never cleared, each step takes the sum of all gradients
    so far, and converges too slowly for what it costs. Their loop makes two iterations more than it is asked for.
    """
    return _power_iteration(layer, iterations + 2, clear=False)


def _power_iteration(layer: Layer, iterations: int, clear: bool) -> Tensor:
    v = torch.randn(1, layer.in_channels, *layer.in_shape, dtype=layer.weight.dtype, device=layer.weight.device)
    v /= v.norm()
    gradient = torch.zeros_like(v)
    for _ in range(iterations):
        v.requires_grad_()
        (latest,) = torch.autograd.grad(layer(v).norm() ** 2, v)
        gradient = latest if clear else gradient.add_(latest)
        v = gradient / gradient.norm()
    return layer(v).norm()


def sedghi_gupta_long(layer: Layer) -> Tensor:
    """As published, in single precision: the largest of all singular values under circular padding, stride 1. It is a
    bound of neither kind under zero padding: here, 1.732 for a norm of 1.802.

    >>> from convnorm.layers import as_layer
    >>> sedghi_gupta_long(as_layer(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1))
    tensor(1.7321)
    """
    _refuse_strides_and_groups(layer)
    axes = tuple(range(2, layer.weight.dim()))
    transform = torch.fft.fftn(layer.weight, layer.in_shape, axes)
    return torch.linalg.svdvals(transform.flatten(2).permute(2, 0, 1)).max()


def one_row_of_frequencies(layer: Layer) -> Tensor:
    """The same for those frequencies whose first is 0: those of the kernel summed over its first axis."""
    _refuse_strides_and_groups(layer)
    summed = as_layer(layer.weight.sum(2), layer.in_shape[1:], padding=layer.padding[1:])
    return sedghi_gupta_long(summed)


def _refuse_strides_and_groups(layer: Layer) -> None:
    if layer.transposed or layer.groups > 1 or {*layer.stride, *layer.dilation} != {1}:
        raise GeometryError("convnorm: layer is none of stride 1 without groups and dilation, as this method needs")
