"""Theorem 2 for a smooth activation: softplus, log(1 + exp(beta t)) / beta, exceeds relu(t) by at most log(2) / beta.

The error that a layer hands on is at most its linf norm times the one that it receives, plus log(2) / beta: with the
norms known exactly, beta follows from the error that one allows. Any error below 1/2 leaves robust accuracy 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn

import convnorm
from convnorm.uses import observe


def smoothed(network: nn.Module, shape: Sequence[int], error: float) -> nn.Module:
    """A copy, with softplus for every ReLU, of output no further than ``error`` from the network's on any input.

    The network is a chain of layers, each but the last with a ReLU behind it, for inputs of ``shape``.
    """
    if not 0 < error < math.inf:
        raise ValueError(f"error is {error:g} and must be positive and finite")
    total = 0.0  # the error, in units of log(2) / beta
    with torch.no_grad():
        *layers, last = observe(network, shape)
        for use in layers:
            total = convnorm.norms(use.module, use.in_shape).linf.item() * total + 1
        total *= convnorm.norms(last.module, last.in_shape).linf.item()
    made = copy.deepcopy(network)
    _replace(made, beta=math.log(2) * total / error)
    return made


def _replace(module: nn.Module, beta: float) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus(beta, threshold=40))  # from there on exp(-beta t) is lost in float64
        else:
            _replace(child, beta)
