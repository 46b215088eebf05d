"""An optimizer that reads the weights once for its step and for norm decay.

A step of norm decay needs the norms of the weights as they are, a step of gradient descent makes new ones. So the norms
of each block of new weights are taken while it is in the cache, for the next step: what is left of norm decay is to add
a few slices to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .backends import backend_for
from .batch import Batch
from .decay import NormDecay, maximized_by, scale_of
from .gradients import PLAIN

WIDE = (torch.float32, torch.float64)
RATES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
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

    def __getstate__(self) -> dict[str, Any]:
        """For copies: those of PyTorch's optimizers hold nothing of their own."""
        return super().__getstate__() | {"norm_decay": self.norm_decay}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Norm decay and the optimizer's step. What ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        fitting = {
            id(weight): (weight, number)
            for number, group in enumerate(self.param_groups)
            if not group["differentiable"]
            for weight in group["params"]
            if _fits(weight)
        }
        due = dict(self.norm_decay.begin_step(scale_of(self), maximized_by(self)))
        together = self._together(due, fitting)
        for batch, rates in due.items():
            if batch is not together:
                batch.step(rates)
        if together is None:
            fitting = {}
        else:
            self._step_together(together, due[together], fitting)
        self.norm_decay.end_step()
        if len(fitting) < sum(len(group["params"]) for group in self.param_groups):
            self._step_others(fitting)
        return loss

    def _together(self, due: Iterable[Batch], fitting: Collection[int]) -> Batch | None:
        """The layers that are stepped and measured in one read, if they all can be."""
        if getattr(self, "found_inf", None) is not None:
            return None
        whole = [
            batch
            for batch in due
            if type(batch) is Batch and all(id(weight) in fitting and weight.requires_grad for weight in batch.weights)
        ]
        alone = len(whole) == 1  # there are more where layers share a weight
        return whole[0] if alone and backend_for(torch.device("cpu")) == "native" else None

    def _step_together(self, batch: Batch, decays: Tensor, fitting: Mapping[int, tuple[Tensor, int]]) -> None:
        """All these weights, those of the layers first."""
        others = dict(fitting)
        stepped = [others.pop(id(weight)) for weight in batch.weights] + [*others.values()]
        rates = [float(group[name]) for group in self.param_groups for name in RATES]
        with_momentum = [group["momentum"] != 0 for group in self.param_groups]
        weights, numbers = map(list, zip(*stepped, strict=True))
        buffers, first, made, no_buffer = [], [], {}, torch.empty(0)
        for weight, number in stepped:
            buffer, new = no_buffer, False
            if with_momentum[number]:
                buffer = self.state[weight].get("momentum_buffer")
                new = buffer is None
                if new or not (buffer.is_contiguous() and buffer.dtype == weight.dtype):  # as the weight has been
                    empty = torch.empty_like(weight)
                    buffer = made[weight] = empty if new else empty.copy_(buffer)
            buffers.append(buffer)
            first.append(new)
        grads = [weight.grad for weight in weights]
        torch.ops.convnorm.sgd_native(
            weights, grads, buffers, first, numbers, rates,
            *batch.state.tensors(), decays, batch.momentum, batch.plan, batch.linf, batch.is_written_ahead(),
        )  # fmt: skip
        for weight, buffer in made.items():
            self.state[weight]["momentum_buffer"] = buffer
        torch.autograd.graph.increment_version(weights)
        batch.mark_written_ahead()

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
