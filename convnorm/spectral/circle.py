"""A layer on a circle: the convolution whose singular values are those of a few small matrices.

On a circle of ``N`` points a convolution of stride 1 is block diagonal in the Fourier basis. Its blocks are its
*symbol* at the frequencies of the circle,

    K(f)[row, column] = sum_taps kernel[row, column, tap] exp(i f . tap)

Every layer is carried over:

- *Stride*: an input of stride ``s`` is ``s`` interleaved inputs of stride 1, the columns of ``K`` become ``s`` times as
  many (the polyphase components).
- *Zero padding*: on a circle of enough points beyond the input, padding is a stretch of circle that holds zeros. The
  layer is then the circle's convolution with inputs and outputs left out, so that its norm is *at most* the circle's.
  On the input's own circle (as FFT methods have it) it can be more.
- *Circular padding* over a whole number of strides: the circle is the input itself, and the norms are equal.
- *Other padding that repeats inputs* is a zero padded layer on a longer input; reading an input ``r`` times
  multiplies the norm by at most ``sqrt(r)``, the ``factor``.
- *Groups* are layers of their own: the norm is the largest of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..geometry import fold
from ..layers import Layer
from ..uncompiled import break_graph
from ..winners import as_matrix


@dataclass(frozen=True)
class Arc:
    """One axis of a layer on its circle.

    ``inputs[phase, point]`` and ``outputs[point]`` say which places of the circle the layer uses; inputs that it does
    not read may share a place with others. The layer's first input is at point ``first // stride``, of phase ``first %
    stride``. ``factor`` is how much the layer's norm may exceed the circle's, by this axis.
    """

    points: int
    stride: int
    spacing: int  # of taps
    inputs: Tensor
    outputs: Tensor
    first: int
    factor: float = 1.0

    @property
    def whole(self) -> bool:
        """Whether the layer uses the circle whole, so that their singular values are the same."""
        return self.factor == 1 and bool(self.inputs.all()) and bool(self.outputs.all())


@dataclass(frozen=True)
class Circle:
    """``kernel[groups, rows, columns, *taps]``, in float64, of stride 1 on the circles of ``arcs``: one for each axis.

    The layer's norm is at most ``scale * factor`` times the norm on the circle, and equal where it is ``whole``. The
    scale is a power of two that brings the largest weight to between 1/2 and 1.
    """

    kernel: Tensor
    arcs: tuple[Arc, ...]
    scale: float

    @property
    def factor(self) -> float:
        return math.prod(arc.factor for arc in self.arcs)

    @property
    def whole(self) -> bool:
        return all(arc.whole for arc in self.arcs)

    @property
    def points(self) -> tuple[int, ...]:
        return tuple(arc.points for arc in self.arcs)


def circle_of(layer: Layer) -> Circle:
    """The layer on a circle. Differentiable in its weight.

    >>> from convnorm.layers import as_layer
    >>> one = circle_of(as_layer(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1))
    >>> one.points
    (7,)
    >>> frequencies = half_grid(one.points)
    >>> torch.linalg.matrix_norm(symbol(one, frequencies), ord=2).max() * one.scale  # the norm itself is 1.802
    tensor(1.9499, dtype=torch.float64)
    """
    layer, shape = with_read_taps(layer), layer.geometry
    scale = power_of_two(layer.weight)
    kernel = as_matrix(layer.weight, layer.plan).double() / scale
    inputs, outputs = (shape.out_shape, shape.in_shape) if layer.transposed else (shape.in_shape, shape.out_shape)
    arcs = []
    for axis, (n, m) in enumerate(zip(inputs, outputs, strict=True)):
        taps, stride, dilation = kernel.shape[3 + axis], shape.stride[axis], shape.dilation[axis]
        before, after = shape.padding[axis]
        if layer.padding_mode == "zeros" or before == after == 0:
            arcs.append(_zero_padded(n, m, taps, stride, dilation, before))
        elif layer.padding_mode == "circular" and n % stride == 0:
            arcs.append(_circular(n, m, stride, dilation, before))
        else:
            reads = np.add.outer(np.arange(m) * stride - before, np.arange(taps) * dilation)
            seen = np.bincount(fold(np.unique(reads), n, layer.padding_mode))
            arc = _zero_padded(n + before + after, m, taps, stride, dilation, 0)
            arcs.append(replace(arc, first=before, factor=math.sqrt(seen.max())))
    for axis, arc in enumerate(arcs):
        if arc.stride > 1:
            kernel = _polyphase(kernel, 3 + axis, arc.stride, shape.dilation[axis])
    return Circle(kernel, tuple(arcs), scale)


def with_read_taps(layer: Layer) -> Layer:
    """The layer with zeros for the taps that see nothing but padding, beside which all others could be negligible.

    >>> from convnorm.layers import as_layer
    >>> with_read_taps(as_layer(torch.tensor([[[1e300, 1.0, 2.0]]]), [1], padding=1)).weight
    tensor([[[0., 1., 0.]]])
    """
    weight = layer.weight
    for axis in range(len(layer.in_shape) if layer.padding_mode == "zeros" else 0):
        read = [entries > 0 for entries in layer.geometry.entries(axis)]
        if not all(read):
            unread = ~torch.tensor(read, device=weight.device)
            weight = weight.masked_fill(unread.view(-1, *[1] * (len(layer.in_shape) - 1 - axis)), 0)
    return layer if weight is layer.weight else replace(layer, weight=weight)


def groups_of(layer: Layer, groups: Tensor) -> Layer:
    """Some groups of a layer, as a layer of their own."""
    own = as_matrix(layer.weight, layer.plan)[groups.to(layer.weight.device)]
    return replace(layer, weight=own.flatten(0, 1), groups=len(groups))


def power_of_two(weight: Tensor) -> float:
    """Such that the largest entry of ``weight`` is between 1/2 and 1 times that; 1 for zeros.

    As near to it as float64 has normal numbers.
    """
    largest = weight.detach().abs().amax().item()
    return math.ldexp(1.0, min(max(math.frexp(largest)[1], -1022), 1023)) if 0 < largest < math.inf else 1.0


def _zero_padded(n: int, m: int, taps: int, stride: int, dilation: int, before: int) -> Arc:
    """The smallest circle that works: no tap of a kept output reads an input that it would not on the line."""
    first = -(-max(0, before - dilation * (taps - 1)) // stride)  # outputs before and after these see only padding
    last = min(m - 1, (n - 1 + before) // stride)
    if last < first:
        first, last = 0, 0
    start = before - first * stride  # so far before the inputs the first output begins
    reach = (last - first) * stride + dilation * (taps - 1) + 1 - start
    outputs = last - first + 1
    if taps == 1:  # no output reads what another does: places that are not read are no part of the circle
        return Arc(
            outputs, 1, 1, torch.ones(1, outputs, dtype=torch.bool), torch.ones(outputs, dtype=torch.bool), start
        )
    points = -(-max(n + start, reach, outputs * stride) // stride)
    place = np.zeros(points * stride, bool)
    place[(np.arange(n) + start) % (points * stride)] = True
    inputs = torch.from_numpy(place.reshape(points, stride).T.copy())
    kept = torch.from_numpy(np.arange(points) < outputs)
    return Arc(points, stride, 1 if stride > 1 else dilation, inputs, kept, start)


def _circular(n: int, m: int, stride: int, dilation: int, before: int) -> Arc:
    points = n // stride
    inputs, outputs = torch.from_numpy(np.ones((stride, points), bool)), torch.from_numpy(np.arange(points) < m)
    factor = math.sqrt(max(1, -(-m // points)))
    return Arc(points, stride, 1 if stride > 1 else dilation, inputs, outputs, before, factor)


def _polyphase(kernel: Tensor, dim: int, stride: int, dilation: int) -> Tensor:
    """[groups, rows, columns, .. taps ..] -> [groups, rows, stride * columns, .. fewer taps ..]."""
    taps = kernel.shape[dim]
    reach = dilation * (taps - 1) + 1
    shape = list(kernel.shape)
    shape[dim] = -(-reach // stride) * stride
    spread = kernel.new_zeros(shape).index_copy(dim, torch.arange(0, reach, dilation, device=kernel.device), kernel)
    return spread.unflatten(dim, (-1, stride)).movedim(dim + 1, 2).flatten(2, 3)


@break_graph  # which takes NumPy for PyTorch, whose quotients of integers are float32
def half_grid(points: Sequence[int]) -> Tensor:
    """frequencies[F, axes] of a circle, one of each two that are negatives of each other: there the symbols of a real
    kernel are conjugates, and their singular values equal.

    >>> (half_grid([4]) / (2 * math.pi)).flatten().tolist()
    [0.0, 0.25, 0.5]
    """
    if not points:
        return torch.zeros(1, 0, dtype=torch.float64, device="cpu")
    place = np.indices(points).reshape(len(points), -1)
    negative = np.ravel_multi_index(tuple(-place % np.array(points)[:, None]), tuple(points))
    half = place[:, negative >= np.arange(place.shape[1])]
    return torch.from_numpy((half / np.array(points)[:, None]).T.copy()) * (2 * math.pi)


def waves(frequencies: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """exp(i f . tap) for all frequencies[F, axes] and taps, the product of ``taps`` of each axis: [F, *taps]."""
    wave = torch.ones(len(frequencies), dtype=torch.complex128, device=frequencies.device)
    for axis, places in enumerate(taps):
        angles = frequencies[:, axis, None] * places.to(frequencies)
        own = torch.polar(torch.ones_like(angles), angles)
        wave = wave.unsqueeze(-1) * own.view(len(own), *[1] * axis, len(places))
    return wave


def symbol(circle: Circle, frequencies: Tensor) -> Tensor:
    """K(f)[groups, F, rows, columns] at frequencies[F, axes]."""
    kernel = circle.kernel
    sizes = zip(kernel.shape[3:], circle.arcs, strict=True)
    places = [torch.arange(taps, device=kernel.device) * arc.spacing for taps, arc in sizes]
    wave = waves(frequencies.to(kernel.device), places).reshape(len(frequencies), -1)
    groups, rows, columns = kernel.shape[:3]
    by_tap = kernel.reshape(groups, rows * columns, -1).mT
    return torch.complex(wave.real @ by_tap, wave.imag @ by_tap).unflatten(2, (rows, columns))
