"""The tensor norm of Grishina, Gorbunov & Rakhuba (*Tight and Efficient Upper Bound on Spectral Norm of Convolutional
Layers*, ECCV 2024), as published.

The largest ``|k(u, v, x, y)|`` over complex unit vectors ``u`` of rows, ``v`` of columns, ``x`` and ``y`` of taps is
the spectral norm of the kernel as a tensor. A wave over ``a x b`` taps is such an ``x`` and ``y``, times sqrt(a b), so

    |K(f)| <= sqrt(a b) max |k(u, v, x, y)|

is an upper bound, at least as tight as every reshaping. But that maximum is NP-hard to find. The paper's power method
improves one vector after the other, and what it has reached is at most the maximum: the result is **an estimate of an
upper bound**, which may lie below the norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer
from .admit import admitted, at_least_one
from .circle import circle_of
from .outward import once


def tensor_norm_estimate(
    layer: nn.Module | Tensor | Layer,
    in_shape: Sequence[int] = (),
    *,
    iterations: int = 100,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """sqrt(taps) times the tensor norm of the kernel, as far as the power method finds it from a random start.

    Mostly above the layer's norm, but **not certified**: for that, see ``four_reshapings``. Differentiable.

    >>> tensor_norm_estimate(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1)  # the norm is 1.802
    tensor(2.4495, dtype=torch.float64)
    """
    at_least_one(iterations=iterations)
    one = admitted(layer, in_shape, options)
    circle = circle_of(one)
    kernel = once(circle.kernel)
    working = kernel.detach().to(torch.promote_types(one.weight.dtype, torch.float32))
    left, right, *waves = (_unit(own.to(torch.complex128)) for own in _power_method(working, iterations, generator))
    image = _matrix(kernel, waves) * left.unsqueeze(2) * right.unsqueeze(1)
    largest = torch.view_as_real(image.sum((1, 2))).norm(dim=-1).max()
    return circle.factor * math.sqrt(math.prod(kernel.shape[3:])) * largest * circle.scale


def _power_method(kernel: Tensor, iterations: int, generator: torch.Generator | None) -> list[Tensor]:
    """Unit vectors[groups, size] of rows, columns and each axis of taps: in turn the best, the others given."""
    groups, *sizes = kernel.shape
    left, right, *waves = [
        _unit(torch.randn(groups, size, dtype=kernel.dtype.to_complex(), device=kernel.device, generator=generator))
        for size in sizes
    ]
    for _ in range(iterations):
        matrix = _matrix(kernel, waves)
        left = _unit((matrix @ right.unsqueeze(2)).squeeze(2).conj())
        right = _unit((left.unsqueeze(1) @ matrix).squeeze(1).conj())
        taps = _taps(kernel, left, right)
        for axis in range(len(waves)):
            rest = taps
            for other in reversed(range(len(waves))):
                if other != axis:
                    along = waves[other].view(groups, *(-1 if dim == other else 1 for dim in range(rest.dim() - 1)))
                    rest = (rest * along).sum(other + 1, keepdim=True)
            waves[axis] = _unit(rest.flatten(1).conj())
    return [left, right, *waves]


def _matrix(kernel: Tensor, waves: list[Tensor]) -> Tensor:
    """[groups, rows, columns]: the real kernel summed over taps, each times its entry of the waves."""
    groups, rows, columns = kernel.shape[:3]
    wave = torch.ones(groups, 1, dtype=kernel.dtype.to_complex(), device=kernel.device)
    for own in waves:
        wave = (wave.unsqueeze(2) * own.unsqueeze(1)).flatten(1)
    parts = kernel.reshape(groups, rows * columns, -1) @ torch.view_as_real(wave)
    return torch.view_as_complex(parts).view(groups, rows, columns)


def _taps(kernel: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[groups, *taps]: the real kernel summed over rows and columns."""
    outer = torch.view_as_real((left.unsqueeze(2) * right.unsqueeze(1)).flatten(1))
    parts = kernel.flatten(3).flatten(1, 2) if kernel.dim() > 3 else kernel.flatten(1).unsqueeze(2)
    return torch.view_as_complex((parts.mT @ outer).contiguous()).view(len(kernel), *kernel.shape[3:])


def _unit(vectors: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths.where(lengths > 0, 1)
