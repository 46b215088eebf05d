"""How far an input may move before a classifier can change its mind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry import GeometryError
from ..spectral.outward import EPS
from .bound import Bound


def certified_radius(logits: Tensor, bound: Bound) -> Tensor:
    """[...] in float64: within this l_ord distance of an input, no other has another largest logit.

        margin / (c upper),    c = 1 for l1, sqrt 2 for l2, 2 for linf;    margin: the largest logit less the second

    Proof. Let y and y' be the logits of inputs at a distance r, and d = y' - y, so that |d| <= upper r. The class i is
    still ahead of j where (y_i - y_j) + (d_i - d_j) > 0, which holds where |d_i - d_j| < margin. And |d_i - d_j| is at
    most |d_i| + |d_j| <= |d|_1; at most sqrt 2 |d|_2 by Cauchy and Schwarz; at most 2 |d|_inf. For logits[..., classes]
    as given: what rounding did to them is not in the bound.

    >>> import torch
    >>> from torch import nn
    >>> from convnorm import lipschitz
    >>> bound = lipschitz(nn.Upsample(scale_factor=2), [1, 3, 1, 1])
    >>> certified_radius(torch.tensor([[1.0, 5.0, 2.0], [1.0, 1.0, 0.0]]), bound)
    tensor([1.0607, 0.0000], dtype=torch.float64)
    """
    if not logits.dim() or logits.shape[-1] < 2:
        raise GeometryError(f"convnorm: logits of shape {list(logits.shape)} must have two classes or more")
    if not logits.isfinite().all():
        raise GeometryError("convnorm: logits hold NaN or inf, which have no margin")
    first, second = logits.detach().double().topk(2).values.unbind(-1)
    factor = {1: 1.0, 2: math.sqrt(2), math.inf: 2.0}[bound.ord]
    margin = (first - second).clamp_max(torch.finfo(torch.float64).max)
    return (margin * (1 - 4 * EPS) / (factor * bound.upper)).nan_to_num(0.0, posinf=math.inf)  # 0 / 0: of a tie
