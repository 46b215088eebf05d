"""Power iteration (Virmaux & Scaman, NeurIPS 2018) on the layer and its adjoint.

    x <- M^T M x / |M^T M x|,    |M x| / |x| <= |M|

They take ``M^T M x`` as half the gradient of ``|M x|^2``; here the adjoint gives it. Groups are layers of their own, so
each has a vector of its own length: all converge side by side, and the largest counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import GeometryError
from ..layers import Layer
from .admit import admitted, at_least_one
from .krylov import in_precision
from .rayleigh import Singular, by_group, rayleigh


@dataclass(frozen=True)
class PowerIteration(Singular):
    """What power iteration found. ``start``, all groups' vectors of all restarts, is where to go on from."""

    start: Tensor


def power_iteration(
    layer: nn.Module | Tensor | Layer,
    in_shape: Sequence[int] = (),
    *,
    iterations: int = 100,
    restarts: int = 1,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> PowerIteration:
    """The largest singular value of any layer from below, and its vectors: the best of ``restarts`` random starts.

    Iterates in the weight's precision, float32 for half precision; ``value`` is the last vector's, in float64, rounded
    down, and differentiable in the weight. After a change of the weights go on from ``start``, that of the last result
    (or any ``[batch, channels, *in_shape]``; where a group's part of it is zero, a random one takes its place).

    >>> kernel = torch.tensor([[[1.0, 0.0, -1.0]]])
    >>> found = power_iteration(kernel, [6], padding=1)
    >>> found.value
    tensor(1.8019, dtype=torch.float64)
    >>> power_iteration(1.01 * kernel, [6], padding=1, iterations=1, start=found.start).value
    tensor(1.8200, dtype=torch.float64)
    """
    at_least_one(iterations=iterations, restarts=restarts)
    one = admitted(layer, in_shape, options)
    working = in_precision(one, torch.promote_types(one.weight.dtype, torch.float32))
    with torch.no_grad():
        x = _unit(_first(working, restarts, start, generator), one.groups)
        for _ in range(iterations):
            y = _unit(working(x), one.groups)
            x = _unit(working.adjoint(y), one.groups)
        lengths = torch.linalg.vector_norm(by_group(working(x), one.groups), dim=2)
        run, group = divmod(int(lengths.argmax()), one.groups)
        best = torch.zeros_like(x[:1])
        by_group(best, one.groups)[0, group] = by_group(x, one.groups)[run, group]
    found = rayleigh(one, best)
    return PowerIteration(found.value, found.residual, found.left, found.right, x)


def _first(layer: Layer, restarts: int, start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    wanted = (layer.in_channels, *layer.in_shape)
    if start is None:
        start = layer.weight.new_empty(0, *wanted)
    if start.dim() != len(wanted) + 1 or start.shape[1:] != wanted:
        raise GeometryError(f"convnorm: start of shape {list(start.shape)} must be [batch, {str(list(wanted))[1:]}")
    if not start.isfinite().all():
        raise GeometryError("convnorm: start holds NaN or inf")
    shape = (max(restarts, len(start)), *wanted)
    x = torch.randn(shape, dtype=layer.weight.dtype, device=layer.weight.device, generator=generator)
    own = by_group(_unit(start.detach().double(), layer.groups).to(x), layer.groups)
    drawn = by_group(x[: len(start)], layer.groups)
    drawn.copy_(own.where((own != 0).any(2, keepdim=True), drawn))
    return x


def _unit(vectors: Tensor, groups: int) -> Tensor:
    """Each group's part of length 1, or 0. Divided by its largest entry first, no square of it underflows."""
    parts = by_group(vectors, groups)
    largest = parts.abs().amax(2, keepdim=True)
    parts = parts / largest.where(largest > 0, 1)
    return (parts / torch.linalg.vector_norm(parts, dim=2, keepdim=True).clamp_min(1)).reshape(vectors.shape)
