"""Assumption 2: points of different classes are more than 2 eps apart, in the largest-difference norm (linf)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    """The closest two points of different classes, by their numbers."""

    first: int
    second: int
    distance: float


def closest_pair(points: Tensor, labels: Tensor) -> Pair:
    """``points[N, n]`` with ``labels[N]`` from 1 to C, of which each has a point."""
    if points.dim() != 2 or not points.isfinite().all():
        raise ValueError(f"points of shape {list(points.shape)} must be finite numbers [points, dimensions]")
    if labels.shape != points.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"labels of shape {list(labels.shape)} and type {labels.dtype} must be integers, one for each of "
            f"{len(points)} points"
        )
    found = labels.unique().tolist()
    if len(found) < 2 or found != list(range(1, len(found) + 1)):
        raise ValueError(f"labels {found} must be 1 to the number of classes, at least 2, and each have a point")
    distances = torch.cdist(points.double(), points.double(), p=math.inf)
    distances[labels[:, None] == labels] = math.inf
    first, second = divmod(int(distances.argmin()), len(points))
    return Pair(first, second, distances[first, second].item())


def room(points: Tensor, labels: Tensor, eps: float) -> float:
    """How much more than 2 eps the classes are apart; an error where they are not."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps:g} and must be 0 or more, and finite")
    first, second, distance = closest_pair(points, labels)
    if distance <= 2 * eps:
        raise ValueError(
            f"points {first} and {second}, of classes {labels[first]} and {labels[second]}, are {distance:g} apart, "
            f"which must be more than 2 eps = {2 * eps:g}"
        )
    return distance - 2 * eps


def scattered(
    count: int, dimensions: int, classes: int, *, apart: float, inset: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Uniform points in [inset, 1 - inset]^n, of random classes: one after another, those that would be less than
    ``apart`` from another class left out, up to ``count``. Multiples of 2**-20, so that float32 holds them as well.
    """
    drawn = inset + (1 - 2 * inset) * torch.rand(20 * count, dimensions, dtype=torch.float64, generator=generator)
    drawn = (drawn * 2**20).round() / 2**20
    names = torch.randint(1, classes + 1, (len(drawn),), generator=generator)
    names[:classes] = torch.arange(1, classes + 1)  # every class has its chance
    points, labels = drawn[:0], names[:0]
    for point, label in zip(drawn, names, strict=True):
        distances = (points - point).abs().amax(1)
        if len(points) < count and (distances[labels != label] >= apart).all():
            points, labels = torch.cat([points, point[None]]), torch.cat([labels, label[None]])
    if len(labels.unique()) < classes:
        raise ValueError(
            f"{classes} classes, {apart:g} apart and {inset:g} from the border, found no place in [0, 1]^{dimensions}"
        )
    return points, labels
