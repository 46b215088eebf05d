"""The cheap bounds: two upper bounds that the l1 side's kernels compute in passing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..layers import Layer
from ..norms import Norms
from .admit import admitted
from .circle import power_of_two, with_read_taps
from .outward import EPS, upward
from .rayleigh import without_scale


def frobenius(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Tensor:
    """The Frobenius norm of the layer's matrix, an upper bound of its l2 norm: sqrt(sum of its squared entries).

    Eq. (3) of Liang & Huang, sqrt(outputs sum K^2), is what it would be if no tap read padding:
    ``convnorm.norms(layer, in_shape).frobenius_bound``.

    >>> import torch
    >>> frobenius(torch.ones(1, 1, 3), [4], padding=1)  # 2 + 3 + 3 + 2 entries are 1, Eq. (3) has 12
    tensor(3.1623, dtype=torch.float64)
    """
    norms, absolute, slack, scale = measured(admitted(layer, in_shape, options))
    found = norms.frobenius
    return upward(found + slack * (found if absolute is norms else absolute.frobenius).detach(), scale)


def sqrt_l1_linf(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Tensor:
    """sqrt(l1 linf), an upper bound of the l2 norm: free beside l1 and linf, and loose.

    >>> import torch
    >>> sqrt_l1_linf(torch.tensor([[[1.0, 0.0, -1.0]]]), [6], padding=1)  # 1.802
    tensor(2.0000, dtype=torch.float64)
    """
    norms, absolute, slack, scale = measured(admitted(layer, in_shape, options))
    l1, linf = norms.l1 + slack * absolute.l1.detach(), norms.linf + slack * absolute.linf.detach()
    zero = l1 == 0  # where sqrt has no gradient
    return upward((l1.masked_fill(zero, 1).sqrt() * linf.masked_fill(zero, 1).sqrt()).masked_fill(zero, 0), scale)


def measured(layer: Layer) -> tuple[Norms, Norms, float, float]:
    """The norms in float64 with the scale taken out, those of absolute weights, and by how much of the latter the
    former may be off: sums of at most so many terms. The two differ where padding merges taps, which may cancel.
    """
    layer = with_read_taps(layer)
    exact = without_scale(layer)
    norms = Norms(exact)
    merging = any(axis.merged for axis in layer.plan.axes)
    absolute = Norms(replace(exact, weight=exact.weight.detach().abs())) if merging else norms
    terms = math.prod(layer.weight.shape[:2])
    for axis in layer.plan.axes:  # a window that reads a merged tap many times adds it as many times
        terms *= max(axis.merged_taps, *map(len, axis.inputs), *map(len, axis.outputs))
    return norms, absolute, (terms + 8) * EPS, power_of_two(layer.weight)
