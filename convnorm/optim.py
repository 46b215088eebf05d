"""An optimizer that reads the weights once for its step and for norm decay.

A step of norm decay needs the norms of the weights as they are, a step of gradient descent makes new ones. So the norms
of each block of new weights are taken while it is in the cache, for the next step: what is left of norm decay is to add
a few slices to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .backends import backend_for
from .batch import Batch
from .decay import NormDecay, maximized_by, scale_of
from .gradients import PLAIN

WIDE = (torch.float32, torch.float64)
OPTIONS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` with norm decay: the same results as ``norm_decay.attach(torch.optim.SGD(...))``, faster.

    What is read once: float32 and float64 weights on the CPU that are contiguous, as their gradients are, if all layers
    have gradients and none share a weight. For others norm decay steps first and ``torch.optim.SGD`` after it. Changing
    weights through ``.data`` goes unnoticed by PyTorch, and here for one step. ``norm_decay.norms`` are those of the
    weights after the step.

    >>> import torch, convnorm
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    >>> decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=1e-3)
    >>> optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, norm_decay=decay)
    >>> model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(self, *args: Any, norm_decay: NormDecay, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_decay = norm_decay
        norm_decay.warn_of_missing(self)
        self._measured: tuple[Batch, list[int]] | None = None  # layers whose norms are known, of weights of a version

    def __getstate__(self) -> dict[str, Any]:
        """For copies: those of PyTorch's optimizers hold nothing of their own."""
        return super().__getstate__() | {"norm_decay": self.norm_decay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._measured = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Norm decay and the optimizer's step. What ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fitting = [
            (weight, group)
            for group in self.param_groups
            if not group["differentiable"]
            for weight in group["params"]
            if _fits(weight)
        ]
        batch = self._read_once({id(weight) for weight, _ in fitting})
        known = [] if batch is None or self._measured != (batch, _versions_of(batch)) else [batch]
        self.norm_decay.step(scale_of(self), known, maximized_by(self))
        self._measured = None
        if batch is None:
            fitting = []
        else:
            self._step_and_measure(batch, fitting)
        if len(fitting) < sum(len(group["params"]) for group in self.param_groups):
            self._step_others({id(weight) for weight, _ in fitting})
        return loss

    def _read_once(self, fitting: Collection[int]) -> Batch | None:
        """The layers that are stepped and measured in one read, if they all can be."""
        if getattr(self, "found_inf", None) is not None:
            return None
        whole = [
            batch
            for batch in self.norm_decay.batches()
            if type(batch) is Batch and all(id(weight) in fitting for weight in batch.weights)
        ]
        alone = len(whole) == 1  # there are more where layers share a weight
        return whole[0] if alone and backend_for(torch.device("cpu")) == "native" else None

    def _step_and_measure(self, batch: Batch, fitting: Sequence[tuple[Tensor, Mapping[str, Any]]]) -> None:
        """All these weights, those of the layers first."""
        places = {id(weight): i for i, (weight, _) in enumerate(fitting)}
        layers = [places.pop(id(weight)) for weight in batch.weights]
        rates_of, flags_of = {}, {}
        for group in self.param_groups:
            rates_of[id(group)] = [float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")]
            flags_of[id(group)] = group["nesterov"] + 2 * group["maximize"]
        weights, buffers, rates, flags, no_buffer = [], [], [], [], torch.empty(0)
        for weight, group in [fitting[i] for i in (*layers, *places.values())]:
            buffer, first = no_buffer, False
            if group["momentum"] != 0:
                state = self.state[weight]
                buffer = state.get("momentum_buffer")
                first = buffer is None
                if first or not (buffer.is_contiguous() and buffer.dtype == weight.dtype):  # as the weight has been
                    new = torch.empty_like(weight)
                    buffer = state["momentum_buffer"] = new if first else new.copy_(buffer)
            weights.append(weight)
            buffers.append(buffer)
            rates += rates_of[id(group)]
            flags.append(flags_of[id(group)] + 4 * first)
        grads = [weight.grad for weight in weights]
        torch.ops.convnorm.sgd_native(
            weights, grads, buffers, batch.state.norms, batch.state.winners, rates, flags, batch.plan, batch.linf
        )
        torch.autograd.graph.increment_version([*weights, *buffers])
        self._measured = batch, _versions_of(batch)

    def _step_others(self, done: Collection[int]) -> None:
        for group in self.param_groups:
            params, grads, buffers = [], [], []
            others = group | {"params": [weight for weight in group["params"] if id(weight) not in done]}
            sparse = self._init_group(others, params, grads, buffers)
            options = {name: group[name] for name in OPTIONS}
            options |= {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
            sgd(params, grads, buffers, has_sparse_grad=sparse, **options)
            if group["momentum"] != 0:
                for weight, buffer in zip(params, buffers, strict=True):
                    self.state[weight]["momentum_buffer"] = buffer


def _fits(weight: Tensor) -> bool:
    """Whether the extension can step this weight."""
    grad = weight.grad
    return (
        type(grad) is Tensor
        and type(weight) in PLAIN
        and grad.layout is torch.strided
        and grad.is_cpu
        and grad.dtype == weight.dtype in WIDE
        and weight.is_contiguous()
        and grad.is_contiguous()
    )


def _versions_of(batch: Batch) -> list[int]:
    """Of its weights, and of the winners: a state that is loaded brings others."""
    return [tensor._version for tensor in (*batch.weights, batch.state.winners)]
