"""What people ask of one layer: its norms, a subgradient, and an input that attains a norm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import library
from .geometry import Axis, GeometryError
from .layers import Layer, as_layer
from .winners import add_to_slice, as_matrix, merge_taps, slice_index, slice_subgradient


class Norms:
    """Operator norms of one layer as 0-dim tensors on the weight's device; ``norms.l1.item()`` brings one over.

    ``l1`` and ``linf`` are exact: the largest absolute column and row sum of the layer's matrix. The others are at
    least the l2 norm of every layer, and computed when asked for.
    """

    l1: Tensor
    linf: Tensor

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self.l1, self.linf = torch.ops.convnorm.norms(layer.weight, *layer.sizes, **layer.options)

    @property
    def l2_bound(self) -> Tensor:
        """sqrt(l1 linf). Free, and loose: 3-12 x the l2 norm for random layers, growing with the channels."""
        zero = self.l1 == 0  # where sqrt has no gradient
        l1, linf = self.l1.masked_fill(zero, 1), self.linf.masked_fill(zero, 1)
        return (l1.sqrt() * linf.sqrt()).masked_fill(zero, 0)  # the product itself may overflow

    @property
    def frobenius(self) -> Tensor:
        """The Frobenius norm of the layer's matrix: the root of the sum of its squared entries."""
        entries = merge_taps(as_matrix(self._layer.weight, self._layer.plan), self._layer.plan.axes).double()
        for i in range(len(self._layer.in_shape)):
            counts = torch.tensor(self._layer.geometry.entries(i), dtype=entries.dtype, device=entries.device)
            entries = entries.movedim(3, -1) * counts.sqrt()
        return _length(entries).to(self.l1.dtype)

    @property
    def frobenius_bound(self) -> Tensor:
        """sqrt(outputs sum K^2), Eq. (3) of Liang & Huang: the Frobenius norm, were no tap to read padding.

        No bound where padding merges taps, (a + b)^2 > a^2 + b^2: there it is the Frobenius norm itself.
        """
        if any(axis.merged for axis in self._layer.plan.axes):
            return self.frobenius
        outputs = self._layer.in_shape if self._layer.transposed else self._layer.geometry.out_shape
        return math.sqrt(math.prod(outputs)) * _length(self._layer.weight.double()).to(self.l1.dtype)

    def __repr__(self) -> str:
        names = ("l1", "linf", "l2_bound", "frobenius", "frobenius_bound")
        return f"Norms({', '.join(f'{name}={getattr(self, name).item():.6g}' for name in names)})"


def _length(entries: Tensor) -> Tensor:
    """The root of the sum of the squares, which may themselves be no numbers of float64."""
    largest = entries.detach().abs().amax()
    largest = largest.where((largest > 0) & largest.isfinite(), 1)
    return torch.linalg.vector_norm(entries / largest) * largest


def norms(
    layer: nn.Module | Tensor, in_shape: Sequence[int] = (), *, scale: Tensor | None = None, **options: Any
) -> Norms:
    """The norms of a convolutional, transposed or fully connected layer, or of a raw weight, at one input size.

    ``in_shape`` holds the spatial sizes of the input, without channels. A raw weight takes the options of the
    operators: stride, padding, dilation, groups, padding_mode, transposed, output_padding. A module of a derived class
    is taken with the weight and the geometry that it holds; what its own ``forward`` makes of them, as standardised or
    fake-quantised weights, ``convnorm.report`` sees and this does not. ``scale`` multiplies the output channels, as a
    batch norm in evaluation does (``bn.weight / (bn.running_var + bn.eps).sqrt()``): the norms are then those of both
    as one map. Differentiable.

    >>> conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)
    >>> _ = nn.init.ones_(conv.weight)
    >>> norms(conv, in_shape=[8, 8])
    Norms(l1=4, linf=9, l2_bound=6, frobenius=11, frobenius_bound=12)
    """
    one = _with_values(as_layer(layer, in_shape, **options))
    return Norms(one if scale is None else scaled(one, scale))


def subgradient(
    layer: nn.Module | Tensor, in_shape: Sequence[int] = (), *, ord: float = 1, layout: str = "sparse", **options: Any
) -> Tensor:
    """A subgradient of the l1 (``ord=1``) or linf (``ord=math.inf``) norm with respect to the weight.

        sign(K') times the counts of the winning window, in the winning channel; zero elsewhere

    0 and ±1 under zero padding, small integers where padding makes an element count more than once, and 0 where the
    weight is 0. ``layout="sparse"`` gives a coalesced COO tensor, ``"dense"`` one like the weight.

    >>> subgradient(torch.tensor([[[1.0, -2.0, 0.0]]]), [8], padding=1, layout="dense")
    tensor([[[ 1., -1.,  0.]]])
    """
    if layout not in ("sparse", "dense"):
        raise ValueError(f"convnorm: layout {layout!r} must be 'sparse' or 'dense'")
    one = _with_values(as_layer(layer, in_shape, **options))
    winner, column = _winner(one, ord)
    index = slice_index(one.weight, one.plan, winner[:1], column)
    part = as_matrix(one.weight.detach(), one.plan)[index]
    values = slice_subgradient(part, one.plan, winner, column).to(part.dtype)
    if layout == "dense":
        dense = torch.zeros_like(one.weight, requires_grad=False)
        add_to_slice(dense, one.plan, winner, column, values)
        return dense
    first, *others = values.nonzero(as_tuple=True)
    group, row, col = (i.expand(len(values))[first] for i in index)
    rows_per_group = one.weight.shape[0] // one.groups
    places = torch.stack([group * rows_per_group + row, col, *others])
    values = values[(first, *others)]
    sparse = torch.sparse_coo_tensor(places, values, one.weight.shape, device=values.device, check_invariants=False)
    return sparse.coalesce()


def witness(layer: nn.Module | Tensor, in_shape: Sequence[int] = (), *, ord: float = 1, **options: Any) -> Tensor:
    """An input ``x[1, channels, *in_shape]`` that attains the norm: the layer (without bias) maps it to an output of
    l1 norm l1 * ||x||_1, or linf norm linf * ||x||_inf. So every norm can be checked by one pass through the layer.

    l1: the basis input at the winning channel and a position that sees the winning window. linf: the ±1 input whose
    signs follow the winning row of the layer's matrix.

    >>> conv = nn.Conv2d(3, 8, 5, stride=2, padding=2, bias=False)
    >>> x = witness(conv, in_shape=[9, 7], ord=1)
    >>> torch.allclose(conv(x).abs().sum(), norms(conv, [9, 7]).l1)
    True
    """
    one = _with_values(as_layer(layer, in_shape, **options))
    winner, column = _winner(one, ord)
    channel, window = winner.tolist()
    sizes = one.in_shape if ord == 1 else one.geometry.out_shape
    position = _position(one.geometry.axes, window, column, sizes)
    x = torch.zeros(1, one.in_channels, *one.in_shape, dtype=one.weight.dtype, device=one.weight.device)
    if ord == 1:
        x[(0, channel, *position)] = 1
        return x
    with torch.inference_mode(False), torch.enable_grad():
        exact = dataclasses.replace(one, weight=one.weight.detach().clone().double())  # merged taps may cancel
        x64 = torch.zeros_like(x, dtype=torch.float64, requires_grad=True)
        (row,) = torch.autograd.grad(exact(x64)[(0, channel, *position)], x64)
    return torch.where(row < 0, -1.0, 1.0).to(x.dtype)


def _position(axes: Sequence[Axis], window: int, column: bool, sizes: Sequence[int]) -> tuple[int, ...]:
    """Where on each axis the window, the ``window``-th of their products, is seen."""
    position = []
    for axis, size in zip(reversed(axes), reversed(sizes), strict=True):
        windows = axis.inputs if column else axis.outputs
        window, own = divmod(window, len(windows))
        position.append(windows[own].position % size)
    return tuple(reversed(position))


def _winner(layer: Layer, ord: float) -> tuple[Tensor, bool]:
    """Channel and window of the norm, and whether that is of columns of the layer's matrix of taps, or of rows."""
    if ord not in (1, math.inf):
        raise ValueError(f"convnorm: ord {ord!r} must be 1 or inf")
    winners = library.read([layer.weight.detach()], layer.plan.text)[2]
    linf = ord == math.inf
    return winners[0, int(linf)], layer.plan.over_columns(linf)


def _with_values(layer: Layer) -> Layer:
    if layer.weight.is_meta:
        raise GeometryError("convnorm: weight on device meta has no values to measure")
    return layer


def scaled(layer: Layer, scale: Tensor) -> Layer:
    """The layer followed by a multiplication of each output channel."""
    plan = layer.plan  # refuses what is no layer
    if scale.shape != (layer.out_channels,):
        raise GeometryError(
            f"convnorm: scale of shape {list(scale.shape)} must have {layer.out_channels} output channels"
        )
    matrix = as_matrix(layer.weight, plan)
    per_channel = scale.view(layer.groups, 1, -1) if layer.transposed else scale.view(layer.groups, -1, 1)
    exact = torch.promote_types(matrix.dtype, torch.float32)  # of half precision the product is not rounded
    scaled = matrix.to(exact) * per_channel.reshape(*per_channel.shape, *[1] * len(layer.in_shape))
    return dataclasses.replace(layer, weight=scaled.flatten(0, 1))
