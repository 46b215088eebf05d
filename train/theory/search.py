"""What looks for an input within eps of a point that a classifier of real numbers gets wrong.

A robust classifier is constant around its points, and where the gradient is 0 the gradient attacks of AutoAttack stand
still: that they find nothing proves little. So they also attack the differences that the steps are taken of, which have
a gradient everywhere; and without gradients there are the corners of the balls, and the places in them that are nearest
to the other points: there A_c - B_c is as small as a ball allows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attacks import STANDARD, autoattack, pgd
from .theorem2 import NearestClass


class Logits(nn.Module):
    """-|g(x) - c| for the classes c = 1..C: the largest is that of the nearest label."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("names", torch.arange(1, classes + 1))

    def forward(self, x: Tensor) -> Tensor:
        return -(self.network(x)[:, None] - self.names).abs().float()


class Margins(nn.Module):
    """min(t_(y-1), -t_y) for y = 1..C, where t_c = A_c - B_c falls with c: positive for the nearest class."""

    def __init__(self, network: NearestClass) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        t = self.network.differences(x)
        middle = torch.minimum(t[:, :-1], -t[:, 1:])
        return torch.cat([-t[:, :1], middle, t[:, -1:]], 1).float()


def survivors(logits: nn.Module, points: Tensor, labels: Tensor, eps: float, *, iterations: int = 100) -> int:
    """How many points standard AutoAttack leaves right: points in [0, 1], of at least four classes."""
    images = points.float()[..., None, None]  # each coordinate a channel: Square then moves each by its own sign
    how = {"attacks": STANDARD, "iterations": iterations, "batch": len(points), "seed": 0}
    return int(autoattack(logits, images, labels - 1, eps=eps, **how).sum())


def least_margin(
    network: NearestClass, points: Tensor, labels: Tensor, eps: float, *, generator: torch.Generator
) -> float:
    """The least margin of a label that PGD finds within eps, of ten starts."""
    images, of_label, margins = points.float().repeat(10, 1), (labels - 1).repeat(10)[:, None], Margins(network)
    found = pgd(
        margins,
        images,
        lambda logits: -logits.gather(1, of_label).sum(),
        eps=eps,
        step=eps / 10,
        steps=40,
        noise=eps / 2,
        generator=generator,
    )
    with torch.no_grad():
        return margins(found).gather(1, of_label).min().item()


def worst(network: nn.Module, points: Tensor, labels: Tensor, eps: float, *, generator: torch.Generator) -> float:
    """The largest |g - label| found without gradients: corners, edges and insides, and next to the other points."""
    found = 0.0
    for point, label in zip(points.double(), labels, strict=True):
        drawn = torch.rand(200, len(point), dtype=torch.float64, generator=generator)
        if len(point) == 2:
            side = torch.linspace(-1, 1, 21, dtype=torch.float64)
            moves = torch.cartesian_prod(side, side)
        else:
            moves = torch.cat([(drawn > 0.5) * 2 - 1, drawn * 2 - 1])
        others = (points[labels != label].double() - point).clamp(-eps, eps)
        with torch.no_grad():
            off = network(point + torch.cat([eps * moves, others])) - label
        found = max(found, off.abs().max().item())
    return found
