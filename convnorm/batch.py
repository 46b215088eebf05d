"""Layers whose norms are measured together in each step of norm decay, and their weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import library
from .momentum import no_momentum, slice_counts, slice_lengths
from .plan import LayerPlan
from .uses import Use, naming


def plan_of(use: Use) -> LayerPlan:
    with naming(use.name):
        return use.layer.plan


def weight_of(use: Use) -> nn.Parameter:
    """The parameter whose gradient norm decay adds to."""
    weight = use.module._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            f"convnorm: the weight of layer {use.name!r} is computed from other parameters (by a parametrization): "
            "add penalty() to the loss instead of step(), or exclude it"
        )
    if weight.is_meta:
        raise RuntimeError(f"convnorm: the weight of layer {use.name!r} is on device meta: give it values first")
    with naming(use.name):
        library.device_of([weight])  # refuses what no backend reads
    return weight


class Batch:
    """Layers on one device, each with a weight of its own; the paper's algorithm."""

    def __init__(self, uses: Sequence[Use], members: Sequence[int], linf: bool, momentum: float) -> None:
        self._hold(uses, members, linf, momentum)
        self._remember(self.weights, [plan_of(use) for use in uses])

    def _hold(self, uses: Sequence[Use], members: Sequence[int], linf: bool, momentum: float) -> None:
        self.uses, self.members, self.linf, self.momentum = uses, members, linf, momentum
        self.weights = [weight_of(use) for use in uses]
        self._owners = [use.module._parameters for use in uses]
        self._dtype = self.weights[0].dtype
        self._ahead: list[int] | None = None  # the versions of what the newest terms, if they are, were written from

    def _remember(self, weights: Sequence[Tensor], layers: Sequence[LayerPlan]) -> None:
        self.plan = "".join(layer.text for layer in layers)
        self.state = no_momentum(weights, self.plan, self.linf, self.momentum)
        self.rates = torch.zeros(len(weights), dtype=torch.float64, device=weights[0].device)
        self._lengths = slice_lengths(weights, layers, self.linf)
        self.counts = slice_counts(weights, layers, self.linf)
        self._no_grad = weights[0].detach().new_empty(0)

    @property
    def norms(self) -> Tensor:
        return self.state.norms

    @property
    def clock(self) -> Tensor:
        """[1], the steps so far."""
        return self.state.clock

    def step(self, rates: Tensor) -> None:
        """grads += rates * h"""
        self._ahead = None
        grads = [weight.grad if weight.requires_grad else None for weight in self.weights]
        grads = [self._no_grad if grad is None else grad for grad in grads]
        try:
            library.decay(self.weights, grads, self.state, rates, self.momentum, self.plan, self.linf)
        except (RuntimeError, NotImplementedError):
            self._refuse(grads)
            raise

    def is_written_ahead(self) -> bool:
        """Whether the newest terms are those of the weights as they are, written by an optimizer that made these."""
        return self._ahead == self._versions()

    def mark_written_ahead(self) -> None:
        self._ahead = self._versions()

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose weights count their versions anew."""
        return self.__dict__ | {"_ahead": None}

    def _versions(self) -> list[int]:
        """Of what is written from, and of the winners: a state that is loaded brings others."""
        return [tensor._version for tensor in (*self.weights, self.state.winners)]

    def scaled_rates(self, scale: float | Tensor, maximized: Collection[Tensor]) -> Tensor:
        """[layers], of the other sign for weights that an optimizer's step takes up their gradients."""
        rates = self.rates
        if isinstance(scale, Tensor):
            rates = rates * scale.to(rates.device)
        elif scale != 1:
            rates = rates * scale
        if maximized:
            signs = torch.ones_like(rates)
            for i, weight in enumerate(self.weights):
                if weight in maximized:
                    signs[i].fill_(-1)  # to assign a number is to copy a tensor of the host, and to wait
            rates = rates * signs
        return rates

    def _refuse(self, grads: Sequence[Tensor]) -> None:
        for use, grad in zip(self.uses, grads, strict=True):
            if grad.layout is not torch.strided:
                raise RuntimeError(f"convnorm: the gradient of layer {use.name!r} is {grad.layout}, it must be strided")
            if any(size > 1 and step == 0 for size, step in zip(grad.shape, grad.stride(), strict=True)):
                raise RuntimeError(
                    f"convnorm: the gradient of layer {use.name!r} is expanded, its elements share memory: clone() it"
                )

    def is_finite(self) -> bool:
        """Whether all norms are, of a batch on the CPU. By way of Python's numbers: its functions are in the cache."""
        return all(map(math.isfinite, self.norms.tolist()))

    def replaced(self) -> list[int]:
        """Which layers have another weight by now."""
        return [i for i, owner in enumerate(self._owners) if owner.get("weight") is not self.weights[i]]

    def is_current(self) -> bool:
        first = self.weights[0]  # a model is moved and cast as a whole
        return first.device == self.rates.device and first.dtype == self._dtype and not self.replaced()

    def rows(self, i: int) -> list[int]:
        """Which rows of the weight of layer i are remembered here: from, to, of how many."""
        return [0, self.weights[i].shape[0], self.weights[i].shape[0]]

    def remembered(self, i: int) -> dict[str, Tensor]:
        """What is remembered of layer i, as views."""
        signs = self.state.signs.split(self._lengths, 1)[i]
        return {
            "norm": self.state.norms[i],
            "winner": self.state.winners[i],
            "channels": self.state.channels[:, i],
            "signs": signs,
        }

    def fits(self, i: int, other: Mapping[str, Tensor]) -> bool:
        """Whether the other can take the place of what is remembered of layer i."""
        if {name: t.shape for name, t in self.remembered(i).items()} != {name: t.shape for name, t in other.items()}:
            return False
        return "channels" not in other or bool((other["channels"] < self.counts[i]).all())
