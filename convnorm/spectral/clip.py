"""Singular value clipping, as published: of a convolution on a circle, one frequency at a time.

On a circle a convolution is block diagonal (``circle.py``), and the nearest one of norm at most ``c`` is had block by
block (Sedghi, Gupta and Long, *The Singular Values of Convolutional Layers*, 2019):

    K(f) = U S V^*    ->    U min(S, c) V^*

Its kernel reaches all round the circle. Cut to the taps that the layer has, as in their experiments, it exceeds the
bound again: the nearest kernel *of these taps* is a problem of its own (``nearest.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import GeometryError
from ..layers import Layer
from ..winners import as_matrix
from .admit import admitted
from .circle import power_of_two
from .excess import Excess


def clip_singular_values(
    layer: nn.Module | Tensor, in_shape: Sequence[int], bound: float, *, cut: bool = False, **options: Any
) -> Tensor:
    """The nearest kernel to the layer's that has singular values of at most ``bound``: [out, in / groups, *in_shape].

    As published: for stride 1 and circular padding that keeps the size of the input. The kernel is as large as that,
    its taps go on from the layer's own. ``cut`` leaves but the layer's own, as Sedghi et al. train with: the norm may
    then exceed the bound. ``convnorm.project(..., ord=2, method="clip")`` gives the nearest kernel of these taps, for
    any layer.

    >>> from convnorm.layers import as_layer
    >>> conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
    >>> kernel = clip_singular_values(conv, [8, 8], bound=0.25)
    >>> kernel.shape
    torch.Size([4, 3, 8, 8])
    >>> clipped = as_layer(kernel, [8, 8], padding=[1, 6, 1, 6], padding_mode="circular")
    >>> x = torch.randn(1, 3, 8, 8)
    >>> bool(torch.linalg.vector_norm(clipped(x)) <= 0.25001 * torch.linalg.vector_norm(x))
    True
    """
    one = admitted(layer, in_shape, options)
    _check_published(one)
    if not bound >= 0:
        raise GeometryError(f"convnorm: bound {bound} must be at least 0")
    weight, sizes = one.weight.detach(), one.in_shape
    scale = power_of_two(weight)
    kernel = as_matrix(weight, one.plan).double() / scale
    axes = tuple(range(3, kernel.dim()))
    if axes:
        kernel = torch.fft.rfftn(kernel, sizes, axes)
    blocks = kernel.movedim((1, 2), (-2, -1))
    flat = blocks.flatten(0, -3)[:, None]
    over = Excess(flat, bound / scale)
    blocks = flat.index_add(0, over.at, over.blocks, alpha=-1).view(blocks.shape)
    kernel = blocks.movedim((-2, -1), (1, 2))
    if axes:
        kernel = torch.fft.irfftn(kernel, sizes, axes)
    full = (kernel * scale).flatten(0, 1).to(weight.dtype)
    return full[tuple(map(slice, weight.shape))] if cut else full


def _check_published(layer: Layer) -> None:
    what = "is not what singular value clipping is published for:"
    if layer.transposed:
        raise GeometryError(f"convnorm: transposed {layer.transposed} {what} a convolution")
    for name in ("stride", "dilation"):
        if set(getattr(layer, name)) - {1}:
            raise GeometryError(f"convnorm: {name} {list(getattr(layer, name))} {what} 1 on each axis")
    taps = layer.weight.shape[2:]
    if layer.padding_mode != "circular" and max(taps, default=1) > 1:
        raise GeometryError(f"convnorm: padding_mode {layer.padding_mode!r} {what} 'circular'")
    if layer.geometry.out_shape != layer.in_shape:
        raise GeometryError(f"convnorm: padding {list(layer.padding)} {what} as many outputs as inputs")
    if any(k > n for k, n in zip(taps, layer.in_shape, strict=True)):
        raise GeometryError(f"convnorm: in_shape {list(layer.in_shape)} {what} not smaller than the kernel")
