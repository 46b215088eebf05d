"""Theorem 2: data whose classes are more than 2 eps apart have a ReLU network of robust accuracy 1.

The paper proves it by universal approximation. This is the network itself, exact, for the largest-difference metric d:
nearest neighbours. Let A_c(x) be the distance from x to the points of classes 1..c, B_c(x) to those of c+1..C, and

    g(x) = 1 + sum of step(A_c(x) - B_c(x)) over c = 1..C-1,    step(t) = clamp(t / (2 margin) + 1/2, 0, 1).

Let the classes be at least 2 eps + margin apart, and x within eps of a point of class y. For c >= y that point is among
those of A_c, and all those of B_c are at least eps + margin away: A_c - B_c <= -margin, a step of 0. For c < y it is
>= margin, a step of 1. So g(x) = y, exactly and on the whole ball: robust accuracy 1, and a local Lipschitz constant of
0. Everywhere A_c - B_c is 2-Lipschitz, so that g is (C-1)/margin-Lipschitz.

ReLU layers compute this exactly: |t| = relu(t) + relu(-t), max(a, b) = a + relu(b - a), min(a, b) = b - relu(b - a);
and what is never negative, as distances are, passes a ReLU unchanged. A maximum over coordinates is a tree of strided
convolutions, each window a pair. The layers stay small: 100 images of CIFAR-10 take 1.7 million parameters. Distances
in l2 are not piecewise linear: no ReLU network computes them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .separation import room


class NearestClass(nn.Module):
    """g(x), [batch], of inputs [batch, ...] of n numbers each. All of it is float64, so that steep steps stay exact."""

    def __init__(self, points: Tensor, labels: Tensor, margin: float) -> None:
        super().__init__()
        self.margin, self.classes = margin, int(labels.max())
        groups = [side for c in range(1, self.classes) for side in (labels <= c, labels > c)]  # A_1, B_1, A_2, B_2 ...
        self.distances = distances(points.double())
        self.minima = minima([group.nonzero().flatten().tolist() for group in groups], len(points))
        self.steps = steps(margin, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps(self.minima(self.distances(x.double())))

    def differences(self, x: Tensor) -> Tensor:
        """A_c(x) - B_c(x), [batch, C - 1]: what the steps are taken of."""
        rising = self.steps[0](self.minima(self.distances(x.double())))[:, 0]
        return 2 * self.margin * (rising - 0.5)

    def of_differences(self, t: Tensor) -> Tensor:
        """g, of A_c - B_c."""
        return 1 + (t / (2 * self.margin) + 0.5).clamp(0, 1).sum(1)


def robust_classifier(points: Tensor, labels: Tensor, eps: float) -> NearestClass:
    """Of ``points[N, n]`` with ``labels[N]`` from 1 to C, of which each has a point.

    >>> network = robust_classifier(torch.tensor([[0.0, 0.0], [1.0, 0.5]]), torch.tensor([1, 2]), eps=0.4)
    >>> network(torch.tensor([[0.4, -0.4], [0.5, 0.25], [0.6, 0.1]])).tolist()
    [1.0, 1.5, 2.0]
    """
    return NearestClass(points, labels, room(points, labels, eps))


def certified(network: NearestClass, points: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Bounds [N] of g over the whole ball of each point: A_c - B_c moves by at most 2 eps, and g grows with it."""
    with torch.no_grad():
        t = network.differences(points.double())
        return network.of_differences(t - 2 * eps), network.of_differences(t + 2 * eps)


def distances(points: Tensor) -> nn.Sequential:
    """x -> [batch, 2, 1, N], whose two channels add up to the distance from x to each of N points.

    All coordinates of all points are an image of one channel, [n, 2N]: a row for each coordinate, and in it, for each
    point, relu(x - p) and relu(p - x) side by side.
    """
    count, n = points.shape
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    layers: list[nn.Module] = [
        nn.Flatten(),
        nn.Unflatten(1, (n, 1)),
        layer(nn.Conv1d, signs.repeat(n * count)[:, None, None], -(points.T[..., None] * signs).flatten(), groups=n),
        nn.ReLU(),
        nn.Unflatten(1, (1, n, 2 * count)),
        nn.Flatten(3),
    ]
    both = pairs([1], keep=0)[..., None].expand(-1, -1, -1, 2)  # |t| is the sum of two columns
    layers += [layer(nn.Conv2d, both, stride=2, padding=(n % 2, 0)), nn.ReLU()]
    rows = (n + 1) // 2
    while rows > 1:
        larger = pairs([1, 1], keep=0)[..., None]
        layers += [layer(nn.Conv2d, larger, stride=(2, 1), padding=(rows % 2, 0)), nn.ReLU()]
        rows = (rows + 1) // 2
    return nn.Sequential(*layers)


def minima(groups: Sequence[Sequence[int]], count: int) -> nn.Sequential:
    """[batch, 2, 1, N] -> [batch, 2, groups]: the second channel less the first is the least of each group.

    A linear layer lays the groups out one after another, each repeated to the same power of two; it already compares
    the first pairs.
    """
    places = 2 ** max(1, math.ceil(math.log2(max(map(len, groups)))))
    laid_out = [group[place % len(group)] for group in groups for place in range(places)]
    chosen = torch.eye(count, dtype=torch.float64)[laid_out]
    first, second = chosen[0::2], chosen[1::2]
    compared = torch.cat([second - first, second])
    layers = [nn.Flatten(), layer(nn.Linear, torch.cat([compared, compared], 1)), nn.ReLU(), nn.Unflatten(1, (2, -1))]
    for _ in range(int(math.log2(places)) - 1):
        layers += [layer(nn.Conv1d, pairs([-1, 1], keep=1), stride=2), nn.ReLU()]
    return nn.Sequential(*layers)


def steps(margin: float, classes: int) -> nn.Sequential:
    """[batch, 2, A_1 B_1 A_2 B_2 ...] -> [batch]: step(t) = relu(t / (2 margin) + 1/2) - relu(t / (2 margin) - 1/2)."""
    rise = -pairs([-1, 1], keep=0)[:1] / (2 * margin)  # A - B
    half = torch.tensor([0.5, -0.5], dtype=torch.float64)
    together = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(1, 2, classes - 1)
    one = torch.ones(1, dtype=torch.float64)
    return nn.Sequential(
        layer(nn.Conv1d, rise.expand(2, -1, -1), half, stride=2),
        nn.ReLU(),
        layer(nn.Conv1d, together, one),
        nn.Flatten(0),
    )


def pairs(reads: Sequence[int], keep: int) -> Tensor:
    """The weight of a convolution over windows of two values, a and b: its channels are b - a, and a or b (0 or 1).

    A value is its input channels, each times one of ``reads``, added up.
    """
    read = torch.tensor(reads, dtype=torch.float64)
    weight = torch.zeros(2, len(reads), 2, dtype=torch.float64)
    weight[0, :, 0], weight[0, :, 1] = -read, read
    weight[1, :, keep] = read
    return weight


def layer(kind: type[nn.Module], weight: Tensor, bias: Tensor | None = None, **options: object) -> nn.Module:
    """A layer of this weight."""
    outputs, inputs, *kernel = weight.shape
    if kernel:
        inputs, options = inputs * int(options.get("groups", 1)), options | {"kernel_size": tuple(kernel)}
    made = nn.utils.skip_init(kind, inputs, outputs, bias=bias is not None, dtype=weight.dtype, **options)
    made.weight.data = weight.contiguous()
    if bias is not None:
        made.bias.data = bias
    return made
