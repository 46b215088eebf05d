"""Who computes the norms: convnorm by one of its backends, or the formula that one would write in PyTorch.

A contender takes the weights of all layers and returns (l1, linf), 0-dim for one layer and [layers] for a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product

import torch
from torch import Tensor

import convnorm
from convnorm.backends import BACKENDS
from convnorm.layers import Layer

Contender = Callable[[list[Tensor]], tuple[Tensor, Tensor]]
CONTENDERS = (*BACKENDS, "eager", "compiled")


def contender(name: str, layers: Sequence[Layer]) -> Contender:
    if name in BACKENDS:
        return operators(layers)
    if name == "eager":
        return formula(layers)
    torch.compiler.reset()  # every shape is compiled for itself, however many there were before
    return torch.compile(formula(layers), dynamic=False, fullgraph=True)


def serving(name: str) -> convnorm.use_backend | nullcontext:
    """The context in which a contender runs."""
    return convnorm.use_backend(name) if name in BACKENDS else nullcontext()


def operators(layers: Sequence[Layer]) -> Contender:
    if len(layers) == 1:
        sizes = layers[0].sizes
        return lambda weights: torch.ops.convnorm.norms(weights[0], *sizes)
    columns = [list(column) for column in zip(*(layer.sizes for layer in layers), strict=True)]
    return lambda weights: torch.ops.convnorm.norms_many(weights, *columns)


def formula(layers: Sequence[Layer]) -> Contender:
    """The paper's Theorem 1 layer by layer: for kernels not larger than their input, under zero padding."""
    strides = [layer.stride for layer in layers]

    def norms(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        values = [theorem1(weight, stride) for weight, stride in zip(weights, strides, strict=True)]
        if len(values) == 1:
            return values[0]
        l1, linf = zip(*values, strict=True)
        return torch.stack(l1), torch.stack(linf)

    return norms


def theorem1(weight: Tensor, stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """l1: the taps that read one input are those of one residue class of the stride on each axis. linf: all taps."""
    magnitude, taps = weight.abs(), range(2, weight.dim())
    linf = magnitude.sum((1, *taps)).max()
    if all(s == 1 for s in stride):  # as the authors' code has it
        return magnitude.sum((0, *taps)).max(), linf
    columns = magnitude.sum(0)
    classes = product(*(range(min(s, k)) for s, k in zip(stride, weight.shape[2:], strict=True)))
    steps = [tuple(slice(first, None, s) for first, s in zip(firsts, stride, strict=True)) for firsts in classes]
    sums = [columns[(slice(None), *step)].flatten(1).sum(1).max() for step in steps]
    return torch.stack(sums).max(), linf


def bare_read(weights: list[Tensor]) -> Callable[[], object]:
    """What everything is compared with: the sum of each weight, which does the least that reads it."""
    weights = [weight.detach() for weight in weights]
    if len(weights) == 1:
        return weights[0].sum
    return lambda: [weight.sum() for weight in weights]


def forward(norms: Contender, weights: list[Tensor]) -> Callable[[], object]:
    return lambda: norms(weights)


def backward(norms: Contender, weights: list[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Forward, and the gradient of the sum of all norms."""
    ones = [torch.ones_like(values) for values in norms(weights)]
    return lambda: torch.autograd.grad(norms(weights), weights, ones)
