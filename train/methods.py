"""The methods: what the loss of a training step is, and what is done to gradients and weights.

    plain         CE(f(x), y)
    weight-decay  the same; the optimizer adds β w to the gradient of every parameter
    l1-decay      the same; norm decay adds (β / N) h to the gradient of every layer's weight
    linf-decay
    clip          the same; singular values of the convolutions are clipped to β every so many steps
    pgd-at        CE(f(x'), y)                                        Madry et al., 2018
    alp           CE(f(x), y) / 2 + CE(f(x'), y) / 2 + β MSE(f(x), f(x'))   Kannan et al., 2018
    trades        CE(f(x), y) + β KL(f(x) || f(x'))                   Zhang et al., 2019

with x' = what PGD finds against CE(f(x'), y), for TRADES against KL(f(x) || f(x')), the network in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convnorm
from convnorm.released import takes_part
from convnorm.spectral import clip_singular_values
from convnorm.uses import Use

from .attacks import pgd
from .cell import Cell, Protocol

ADVERSARIAL = ("pgd-at", "alp", "trades")


def divergence(logits: Tensor, of: Tensor) -> Tensor:
    """KL of the distributions ``of`` these logits to those of ``logits``, the mean over the batch.

    >>> uniform, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[200.0, 0.0]])
    >>> divergence(uniform, of=sure)
    tensor(0.6931)
    """
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(of, 1), reduction="batchmean", log_target=True)


class Objective(nn.Module):
    """The network and the loss in one module, for DistributedDataParallel and torch.compile to have one call a step.

    Returns the loss, and the logits that the training accuracy is counted with.
    """

    def __init__(self, network: nn.Module, cell: Cell) -> None:
        super().__init__()
        self.network = network
        self.method = cell.method
        self.strength = cell.strength

    def forward(self, x: Tensor, attacked: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """``attacked`` is x where the method does not attack."""
        if self.method not in ADVERSARIAL:
            logits = self.network(x)
            return F.cross_entropy(logits, labels), logits
        if self.method == "pgd-at":
            logits = self.network(attacked)
            return F.cross_entropy(logits, labels), logits
        logits, attacked_logits = self.network(x), self.network(attacked)
        loss = F.cross_entropy(logits, labels)
        if self.method == "alp":
            loss = (loss + F.cross_entropy(attacked_logits, labels)) / 2
            return loss + self.strength * F.mse_loss(attacked_logits, logits), logits
        return loss + self.strength * divergence(attacked_logits, of=logits), logits


def attacked(
    network: nn.Module, x: Tensor, labels: Tensor, cell: Cell, protocol: Protocol, by: torch.Generator
) -> Tensor:
    """The batch that the method trains on beside ``x``; x itself where it does not attack."""
    if cell.method not in ADVERSARIAL:
        return x
    network.eval()
    if cell.method == "trades":
        with torch.no_grad():
            clean = network(x).clone()  # compiled, its next call may write over what this one returns
        loss: Callable[[Tensor], Tensor] = partial(divergence, of=clean)
    else:
        loss = partial(F.cross_entropy, target=labels)
    size = {"eps": protocol.train_eps, "step": protocol.train_step, "steps": protocol.train_steps}
    result = pgd(network, x, loss, **size, noise=protocol.train_noise, generator=by)
    network.train()
    return result


class Regulariser:
    """What a method does around ``optimizer.step()``."""

    def __init__(self, network: nn.Module, uses: Sequence[Use], cell: Cell, protocol: Protocol) -> None:
        self.optimizer = torch.optim.SGD(
            network.parameters(),
            protocol.learning_rate,
            protocol.momentum,
            weight_decay=cell.strength if cell.method == "weight-decay" else 0,
            fused=True,
        )
        self.decay = None
        if cell.method in ("l1-decay", "linf-decay"):
            ord = 1 if cell.method == "l1-decay" else math.inf
            sizes = {use.name: use.in_shape for use in uses if protocol.variant == "paper" or takes_part(use)}
            self.decay = convnorm.NormDecay(
                network, sizes, ord=ord, beta=cell.strength, include=sizes, variant=protocol.variant
            )
            self.decay.attach(self.optimizer)
        self.clipped = [use for use in uses if is_clipped(use, protocol.variant)] if cell.method == "clip" else []
        self.bound, self.every, self.variant, self.steps = cell.strength, protocol.clip_every, protocol.variant, 0

    def step(self) -> None:
        """Between ``loss.backward()`` and the next forward pass."""
        try:
            self.optimizer.step()
        except RuntimeError:  # norm decay's, on a CPU, of weights that have diverged: the loss says so too
            if self.decay is None or all(norm.isfinite() for norm in self.decay.norms.values()):
                raise
        self.steps += 1
        if self.steps % self.every == 0:
            for use in self.clipped:
                clip(use, self.bound, self.variant)

    def state_dict(self) -> dict[str, Any]:
        state = {"optimizer": self.optimizer.state_dict(), "steps": self.steps}
        return state | ({"decay": self.decay.state_dict()} if self.decay else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]
        if self.decay:
            self.decay.load_state_dict(state["decay"])


def is_clipped(use: Use, variant: str) -> bool:
    """The authors' release leaves out layers with inputs smaller than the kernel."""
    if not isinstance(use.module, nn.Conv2d):
        return False
    return variant == "paper" or all(k <= n for k, n in zip(use.module.kernel_size, use.in_shape, strict=True))


@torch.no_grad()
def clip(use: Use, bound: float, variant: str) -> None:
    """Sedghi et al.: singular values of the kernel on a circle of the input's size, whatever the stride and padding.

    The release takes the weight of a grouped convolution for that of a plain one.
    """
    weight, kernel = use.module.weight, use.module.kernel_size
    if not weight.isfinite().all():  # it has diverged, and has no singular values
        return
    sizes = [max(k, n) for k, n in zip(kernel, use.in_shape, strict=True)]
    padding = [part for k in kernel for part in ((k - 1) // 2, k // 2)]
    groups = use.module.groups if variant == "paper" else 1
    circular = {"padding": padding, "padding_mode": "circular", "groups": groups}
    weight.copy_(clip_singular_values(weight, sizes, bound, cut=True, **circular))
