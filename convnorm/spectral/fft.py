"""The FFT method: on a circle, a convolution's singular values are those of its symbol at every frequency.

As published (Sedghi, Gupta & Long, *The Singular Values of Convolutional Layers*, ICLR 2019) on the input's own grid,
which is right for circular padding and stride 1 only; and extended to every layer, as an upper bound of its norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import GeometryError
from ..layers import Layer
from .admit import admitted
from .circle import Circle, circle_of, half_grid, power_of_two, symbol
from .outward import EPS, attained_norm, carried, norms_from_above, upward
from .rayleigh import without_scale

ENTRIES = 1 << 22  # of the symbols at a time, 16 bytes each


def fft_singular_values(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Tensor:
    """[*in_shape, min(channels)]: svd(fft(kernel)), the singular values of the layer as if its padding were circular.

    They are the layer's own where its padding is circular and keeps the size. Of a zero padded layer they are no bound
    from either side: of [1, 0, -1] at 6 inputs the largest is 1.732, and the norm 1.802. What the paper's algorithm is
    not for is refused: strides, groups, dilation, transposed layers, other padding, a kernel larger than the input.

    >>> fft_singular_values(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1).flatten()
    tensor([0.0000, 1.7321, 1.7321, 0.0000, 1.7321, 1.7321], dtype=torch.float64)
    """
    one = admitted(layer, in_shape, options)
    _refuse_what_the_paper_lacks(one)
    kernel = without_scale(one).weight.movedim((0, 1), (-2, -1))
    axes = tuple(range(len(one.in_shape)))
    transform = torch.fft.fftn(kernel, s=one.in_shape, dim=axes) if axes else kernel
    return torch.linalg.svdvals(transform) * power_of_two(one.weight)


def _refuse_what_the_paper_lacks(layer: Layer) -> None:
    shape = layer.geometry
    for name, values in (("stride", shape.stride), ("dilation", shape.dilation), ("groups", (shape.groups,))):
        if any(value != 1 for value in values):
            raise GeometryError(
                f"convnorm: {name} {', '.join(map(str, values))} is not for the FFT method: circle_norm is"
            )
    if layer.transposed:
        raise GeometryError("convnorm: transposed True is not for the FFT method: circle_norm is")
    if layer.padding_mode not in ("zeros", "circular"):
        raise GeometryError(f"convnorm: padding_mode {layer.padding_mode!r} is not for the FFT method: circle_norm is")
    if any(taps > n for taps, n in zip(layer.weight.shape[2:], layer.in_shape, strict=True)):
        raise GeometryError(
            f"convnorm: in_shape {list(layer.in_shape)} is smaller than the kernel {list(layer.weight.shape[2:])}, "
            "which the FFT method would cut: circle_norm does not"
        )


def circle_norm(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Tensor:
    """factor max over frequencies and groups of |K(f)|: at least the norm of every layer, on a circle that has room for
    its padding (``circle.py``).

    It is the norm itself, but for rounding outward, where padding is circular over a whole number of strides and where
    there is nothing but one tap. Differentiable.

    >>> circle_norm(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1)  # 1.802
    tensor(1.9499, dtype=torch.float64)
    >>> circle_norm(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1, padding_mode="circular")
    tensor(1.7321, dtype=torch.float64)
    """
    circle = circle_of(admitted(layer, in_shape, options))
    largest, winner = over_frequencies(circle, norms_from_above)
    return upward(circle.factor * carried(largest, attained_norm(winner)), circle.scale)


def over_frequencies(circle: Circle, bound: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The largest ``bound`` of all symbols[..., rows, columns], with what they may be off, and, differentiable, the
    symbol that has it.
    """
    frequencies, kernel = half_grid(circle.points), circle.kernel.detach()
    step = max(1, ENTRIES // math.prod(kernel.shape[:3]))
    with torch.no_grad():
        still = replace(circle, kernel=kernel)
        bounds = torch.cat([bound(symbol(still, part)) for part in frequencies.split(step)], 1)
        largest = bounds.max() + symbol_error(still)
    group, frequency = divmod(int(bounds.argmax()), len(frequencies))
    its_group = replace(circle, kernel=circle.kernel[group : group + 1])
    return largest, symbol(its_group, frequencies[frequency : frequency + 1])[0, 0]


def symbol_error(circle: Circle) -> Tensor:
    """By how much a computed symbol may be off in the spectral norm: a few roundings for each radian of a wave's angle,
    and those of a sum over taps, times sum_taps |k|, of which sqrt(taps) |k|_F is at least the Frobenius norm.
    """
    sizes = circle.kernel.shape[3:]
    taps = math.prod(sizes)
    reach = sum(size * arc.spacing for size, arc in zip(sizes, circle.arcs, strict=True))
    return (20 * reach + 4 * taps + 8) * EPS * math.sqrt(taps) * torch.linalg.vector_norm(circle.kernel)
