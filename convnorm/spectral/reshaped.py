"""Norms of a kernel laid out as a matrix.

The symbol of a kernel with ``a x b`` taps (``circle.py``) is

    K(f, g) = sum_pq k[:, :, p, q] exp(i (p f + q g)) = (x ⊗ I)^T R (y ⊗ I)
    R[(p, row), (q, column)] = k[row, column, p, q]

with ``x`` and ``y`` the waves over ``p`` and ``q``, of length sqrt(a) and sqrt(b): hence ``|K| <= sqrt(a b) |R|`` at
every frequency. The same holds with the axes exchanged, or both on one side: four reshapings in two dimensions,
``2^axes`` in all (Singla & Feizi, *Fantastic Four*, ICLR 2021). Taken of the polyphase kernel they are right for
strides too, and with fewer taps the factor is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer
from .admit import admitted
from .circle import circle_of, power_of_two
from .outward import attained_norm, carried, norms_from_above, upward
from .rayleigh import without_scale


def four_reshapings(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Tensor:
    """sqrt(taps) times the least spectral norm of the reshaped kernels: at least the norm of every layer, whatever the
    input size. The largest over groups. Differentiable.

    >>> four_reshapings(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1)  # sqrt(3) sqrt(2), the norm is 1.802
    tensor(2.4495, dtype=torch.float64)
    """
    circle = circle_of(admitted(layer, in_shape, options))
    factor = circle.factor * math.sqrt(math.prod(circle.kernel.shape[3:]))
    with torch.no_grad():
        each = torch.stack([norms_from_above(matrices) for matrices in reshapings(circle.kernel)])
    least, which = each.min(0)
    group = int(least.argmax())
    matrix = list(reshapings(circle.kernel))[int(which[group])][group]
    return upward(factor * carried(least.max(), attained_norm(matrix)), circle.scale)


def reshapings(kernel: Tensor) -> Iterator[Tensor]:
    """kernel[groups, rows, columns, *taps] as [groups, taps * rows, taps * columns], with each axis of taps on either
    side.
    """
    axes = range(3, kernel.dim())
    for side in product((True, False), repeat=len(axes)):
        first = [axis for axis, with_rows in zip(axes, side, strict=True) if with_rows]
        second = [axis for axis, with_rows in zip(axes, side, strict=True) if not with_rows]
        yield kernel.permute(0, *first, 1, *second, 2).flatten(1 + len(first) + 1).flatten(1, 1 + len(first))


def reshaped_estimate(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Tensor:
    """The spectral norm of ``weight.flatten(1)`` (its transpose's of a transposed layer), to which
    ``torch.nn.utils.parametrizations.spectral_norm`` (Miyato et al., 2018) converges. **No bound** of the layer's norm,
    from either side, but for fully connected layers, whose norm it is: it differs by up to sqrt(taps) either way.

    >>> reshaped_estimate(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1)  # the norm is 1.802
    tensor(1.4142, dtype=torch.float64)
    """
    one = admitted(layer, in_shape, options)
    weight = without_scale(one).weight
    matrix = (weight.transpose(0, 1) if one.transposed else weight).flatten(1)
    return attained_norm(matrix) * power_of_two(one.weight)
