"""Proposition 2: robust accuracy 1 with a Lipschitz constant of at least any xi.

The network of Theorem 2 with steeper steps. Its steps are taken of differences t that are at least 2 eps less than the
classes' distance away from 0, wherever a point may be moved to; nearer to 0 they may be as steep as one likes.

On the segment between the closest two points x, x' of different classes, of distance s, the distance to the class of x
grows from 0 to s and the other one falls from s to 0: t = A_c - B_c has slope 2, for every c between their labels.
So g climbs by |y - y'| while x moves by ``margin`` in the largest coordinate, in the middle of the segment.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .separation import closest_pair, room
from .theorem2 import NearestClass


def steep_classifier(points: Tensor, labels: Tensor, eps: float, xi: float) -> NearestClass:
    """Its Lipschitz constant is at least ``xi`` in every lp norm: in l1, where the segment is longest, so in all."""
    if not 0 < xi < math.inf:
        raise ValueError(f"xi is {xi:g} and must be positive and finite")
    first, second, distance = closest_pair(points, labels)
    longest = (points[first] - points[second]).double().abs().sum().item() / distance
    climb = abs(int(labels[first] - labels[second]))
    margin = climb / (longest * xi * (1 + 2**-20))  # a little steeper than asked, for rounding
    if margin < 2**-28 * points.abs().max():
        raise ValueError(f"xi is {xi:g}: steps so steep are lost in the rounding of float64")
    return NearestClass(points, labels, min(room(points, labels, eps), margin))


def steepest_inputs(network: NearestClass, points: Tensor, labels: Tensor) -> Tensor:
    """[2, n]: where the steps between the closest two points of different classes begin and end."""
    first, second, distance = closest_pair(points, labels)
    x, other = points[[first, second]].double()
    along = (other - x) / distance
    return torch.stack([(x + other) / 2 + side * network.margin / 2 * along for side in (-1, 1)])
