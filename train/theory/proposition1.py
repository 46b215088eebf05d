"""Proposition 1: all layer norms as large as asked, and a network whose Lipschitz constant is 0.

    f(x) = relu(W_L relu(W_(L-1) ... relu(W_1 x)))

with any W_1 to W_(L-1), here random, and any W_L without a positive entry: it reads what a ReLU left, which is nowhere
negative, so all that it computes is at most 0, and the last ReLU makes it 0. No weight is 0, no layer has a bias, and
every layer alone, the last one too, stretches some input by its norm. It is the coupling of two layers that annuls
them: the directions that the last one stretches most are cut off by the ReLU in front of it or by the one behind it.
The sum of numbers of one sign has that sign whatever the rounding: the output is 0 exactly, in floating point too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

import convnorm
from convnorm.uses import observe


def fully_connected(
    norm: float, depth: int, *, inputs: int = 2, width: int = 8, generator: torch.Generator
) -> nn.Sequential:
    """``depth`` layers, each of l1, l2 and linf norm at least ``norm``; for inputs [batch, inputs].

    >>> network = fully_connected(1e3, 3, generator=torch.Generator().manual_seed(0))
    >>> [convnorm.norms(network[at]).linf.item() >= 1e3 for at in (0, 2, 4)]
    [True, True, True]
    >>> network(torch.ones(1, 2, dtype=torch.float64)).tolist()
    [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    sizes = [inputs] + [width] * _checked(norm, depth)
    layers = [nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in pairwise(sizes)]
    return _coupled(layers, [1, inputs], norm, generator)


def convolutional(
    norm: float,
    depth: int,
    *,
    image: Sequence[int] = (3, 8, 8),
    channels: int = 8,
    generator: torch.Generator,
) -> nn.Sequential:
    """``depth`` 3x3 convolutions, each of l1, l2 and linf norm at least ``norm``; for inputs [batch, *image]."""
    sizes = [image[0]] + [channels] * _checked(norm, depth)
    layers = [nn.Conv2d(a, b, 3, padding=1, bias=False, dtype=torch.float64) for a, b in pairwise(sizes)]
    return _coupled(layers, [1, *image], norm, generator)


def _checked(norm: float, depth: int) -> int:
    if not 0 < norm < math.inf:
        raise ValueError(f"norm is {norm:g} and must be positive and finite")
    if depth < 2:
        raise ValueError(f"depth is {depth} and must be at least 2: a single layer stretches by its norm")
    if depth * abs(math.log10(norm)) > 150:
        raise ValueError(f"norm {norm:g} in each of {depth} layers: what they compute would leave float64's range")
    return depth


def _coupled(
    layers: Sequence[nn.Module], shape: Sequence[int], norm: float, generator: torch.Generator
) -> nn.Sequential:
    with torch.no_grad():
        for one in layers:
            one.weight.normal_(generator=generator)
        last = layers[-1].weight
        last.copy_(-last.abs())
        network = nn.Sequential(*(module for one in layers for module in (one, nn.ReLU())))
        for one, norms in zip(layers, layer_norms(network, shape), strict=True):
            one.weight.mul_(norm / min(norms) * (1 + 2**-20))  # a little more, for rounding
    return network


def layer_norms(network: nn.Module, shape: Sequence[int]) -> list[tuple[float, float, float]]:
    """l1, l2 (proved from below) and linf norm of each layer, for inputs of this shape."""
    found = []
    with torch.no_grad():
        for use in observe(network, shape):
            norms, bracket = convnorm.norms(use.module, use.in_shape), convnorm.l2(use.module, use.in_shape)
            found.append((norms.l1.item(), bracket.lower.item(), norms.linf.item()))
    return found


def annuls(network: nn.Sequential) -> bool:
    """The proof, read off the network: a ReLU, a layer of no positive weight and no bias, a ReLU, and nothing more."""
    *_, before, last, after = network
    coupled = isinstance(before, nn.ReLU) and isinstance(after, nn.ReLU) and last.bias is None
    return coupled and bool((last.weight <= 0).all())


def stretches(network: nn.Sequential, x: Tensor, other: Tensor) -> list[float]:
    """By how much each layer's output, after its ReLU, has moved further apart than ``x`` and ``other``: the most."""
    apart, found = (x - other).flatten(1).abs().amax(1), []
    with torch.no_grad():
        for module in network:
            x, other = module(x), module(other)
            if isinstance(module, nn.ReLU):
                found.append(((x - other).flatten(1).abs().amax(1) / apart).max().item())
    return found


def highest(network: nn.Sequential, x: Tensor, *, climbs: int = 50) -> float:
    """The most that any of the last layer computes, before its ReLU, on the way uphill from ``x``.

    The gradient of the output is 0 everywhere and leads an attack nowhere; that of the last layer does.
    """
    step, found = x.abs().flatten(1).amax(1).view(-1, *[1] * (x.dim() - 1)) / 10, -math.inf
    for _ in range(climbs):
        x = x.detach().requires_grad_()
        best = network[:-1](x).flatten(1).amax(1)
        found = max(found, best.max().item())
        (uphill,) = torch.autograd.grad(best.sum(), x)
        x = x + step * uphill.sign()
    return found
