"""Gram iteration (Delattre, Barthélemy, Araujo & Allauzen, ICML 2023), an upper bound without any decomposition.

    G_0 = K(f),    G_i+1 = G_i^* G_i,    |K(f)| <= |G_t|_F^(1 / 2^t)

which falls onto the norm faster than linearly in t. The entries of ``G_t`` leave every floating-point range, so each
``G_i`` is divided by a power of two that brings its Frobenius norm below 1; going back from the last to the first,
nothing larger than the bound itself is ever formed:

    b_t = |G_t|_F,    b_i = n_i sqrt(b_i+1 + error)      with n_i >= |G_i|_F, as |G_i / n_i|^2 <= |G_i+1| + error

The error is that of the computed product. It also keeps the gradient finite where a block is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer
from .admit import admitted, at_least_one
from .circle import circle_of
from .fft import over_frequencies
from .outward import EPS, carried, smaller_gram, upward


def gram_iteration(
    layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), *, iterations: int = 6, **options: Any
) -> Tensor:
    """At least the norm of every layer: Gram iteration on its circle (``circle.py``), rounded outward. It exceeds
    ``circle_norm`` at most ``n^(1 / 2^(iterations + 1))`` times, ``n`` the fewer of a symbol's rows and columns.

    Differentiable: its gradient is that of the iteration at the largest frequency, as in the paper.

    >>> [round(gram_iteration(torch.eye(2), iterations=t).item(), 4) for t in (1, 3, 6)]  # the norm is 1
    [1.1892, 1.0443, 1.0054]
    """
    at_least_one(iterations=iterations)
    circle = circle_of(admitted(layer, in_shape, options))
    bound = partial(gram_bounds, iterations=iterations)
    largest, winner = over_frequencies(circle, bound)
    return upward(circle.factor * carried(largest, bound(winner)), circle.scale)


def gram_bounds(matrices: Tensor, iterations: int) -> Tensor:
    """[...]: at least the spectral norm of each of ``matrices[..., rows, columns]``.

    >>> diagonal = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    >>> gram_bounds(diagonal, 2)  # (3^8 + 4^8)^(1 / 8)
    tensor(4.0480, dtype=torch.float64)
    """
    scales = []
    error = 4 * (max(matrices.shape[-2:]) + 2) * EPS  # of a sum of so many products, each at most 1 / 2 EPS off
    product = matrices
    for _ in range(iterations):
        scales.append(_power_of_two(_frobenius(product)))
        product = smaller_gram(product / scales[-1][..., None, None])
    terms = product.shape[-1] ** 2
    bound = _frobenius(product) * (1 + terms * EPS)
    for scale in reversed(scales):
        bound = scale * (bound + error).sqrt()
    return bound * (matrices != 0).any(-1).any(-1)


def _frobenius(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, dim=(-2, -1))


def _power_of_two(sizes: Tensor) -> Tensor:
    """More than each of them, and than what is so small that its squares underflow."""
    exponents = torch.frexp(sizes.detach().clamp_min(2**-480))[1]
    return torch.ldexp(torch.ones_like(sizes), exponents + 1)
