"""An optimizer that reads the weights once for its step and for norm decay.

A step of norm decay needs the norms of the weights as they are, a step of gradient descent makes new ones. So the norms
of each block of new weights are taken while it is in the cache, for the next step: what is left of norm decay is to add
a few slices to the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd
from torch.utils._pytree import tree_leaves

from .backends import backend_for
from .batch import Batch
from .decay import NormDecay, maximized_by, scale_of
from .sharded import is_dtensor


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

    def __init__(self, params: Any, *args: Any, norm_decay: NormDecay, **kwargs: Any) -> None:
        params = list(params)
        tensors = [leaf for leaf in tree_leaves(params) if isinstance(leaf, Tensor)]
        unfused = any(is_dtensor(t) or not t.is_floating_point() for t in tensors)  # PyTorch has no operator for these
        unfused = unfused or bool(kwargs.get("foreach"))
        super().__init__(params, *args, **{"fused": None if unfused else True} | kwargs)
        self.norm_decay = norm_decay
        norm_decay.warn_of_missing(self)
        self._measured: dict[Batch, list[int]] = {}  # batches whose norms are known, and the versions that they are of

    def __getstate__(self) -> dict[str, Any]:
        """For copies: those of PyTorch's optimizers hold nothing of their own."""
        return super().__getstate__() | {"norm_decay": self.norm_decay}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._measured = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Norm decay and the optimizer's step. What ``closure`` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {weight: group for group in self.param_groups for weight in group["params"]}
        at_once = [batch for batch in self.norm_decay.batches() if self._fits(batch, groups)]
        if len(at_once) > 1:  # layers that share a weight
            at_once = []
        known = [batch for batch in at_once if self._measured.get(batch) == _versions_of(batch)]
        self.norm_decay.step(scale_of(self), known, maximized_by(self))
        self._measured = {}  # PyTorch's fused operators write weights without a new version
        for batch in at_once:
            self._step_and_measure(batch, groups)
        self._step_others({weight for batch in at_once for weight in batch.weights})
        return loss

    def _fits(self, batch: Batch, groups: dict[Tensor, dict[str, Any]]) -> bool:
        if type(batch) is not Batch or batch.rates.device.type != "cpu" or getattr(self, "found_inf", None) is not None:
            return False
        return backend_for(batch.rates.device) == "native" and all(
            weight in groups
            and not groups[weight]["differentiable"]
            and weight.grad is not None
            and weight.grad.dtype == weight.dtype in (torch.float32, torch.float64)
            and weight.is_contiguous()
            and weight.grad.is_contiguous()
            for weight in batch.weights
        )

    def _step_and_measure(self, batch: Batch, groups: dict[Tensor, dict[str, Any]]) -> None:
        buffers, rates, flags = [], [], []
        for weight in batch.weights:
            group, state = groups[weight], self.state[weight]
            first = group["momentum"] != 0 and state.get("momentum_buffer") is None
            if first:
                state["momentum_buffer"] = torch.empty_like(weight.grad)
            elif group["momentum"] != 0:
                state["momentum_buffer"] = _laid_out(state["momentum_buffer"], weight)
            buffers.append(state["momentum_buffer"] if group["momentum"] != 0 else weight.new_empty(0))
            rates += [float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")]
            flags.append(group["nesterov"] + 2 * group["maximize"] + 4 * first)
        grads = [weight.grad for weight in batch.weights]
        torch.ops.convnorm.sgd_native(
            batch.weights, grads, buffers, batch.state.norms, batch.state.winners, rates, flags, batch.plan, batch.linf
        )
        torch.autograd.graph.increment_version([*batch.weights, *buffers])
        self._measured[batch] = _versions_of(batch)

    def _step_others(self, done: set[Tensor]) -> None:
        for group in self.param_groups:
            params, grads, buffers = [], [], []
            others = group | {"params": [parameter for parameter in group["params"] if parameter not in done]}
            sparse = self._init_group(others, params, grads, buffers)
            names = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
            options = {"has_sparse_grad": sparse} | {name: group[name] for name in names}
            scale, found_inf = (getattr(self, name, None) for name in ("grad_scale", "found_inf"))
            # PyTorch has no fused operator for sparse gradients, as an embedding's may be; of half precision, on a CPU,
            # its own leaves most weights as they were
            if sparse or any(weight.is_cpu and weight.dtype.itemsize < 4 for weight in params):
                options["fused"] = False
            if options["fused"]:
                options |= {"grad_scale": scale, "found_inf": found_inf}
                grads = [_laid_out(grad, weight) for grad, weight in zip(grads, params, strict=True)]
            elif found_inf:
                continue
            elif scale is not None:
                grads = [grad / scale for grad in grads]
            if group["momentum"] == 0:
                sgd(params, grads, [], **options)
                continue
            # PyTorch's fused operator does not take some new buffers among old ones, nor see how a buffer is laid out,
            # and where a first step overflows it leaves new buffers as they were found in memory
            missing = any(buffer is None for buffer in buffers)
            skipped = missing and bool(found_inf)
            for new in (True, False) if missing and not skipped else (False,):
                own = [i for i, buffer in enumerate(buffers) if (buffer is None) == new]
                weights = [params[i] for i in own]
                kept = [buffers[i] if new or not options["fused"] else _laid_out(buffers[i], params[i]) for i in own]
                sgd(weights, [grads[i] for i in own], kept, **options)
                for weight, buffer in zip(weights, kept, strict=True):
                    self.state[weight]["momentum_buffer"] = buffer


def _laid_out(tensor: Tensor, weight: Tensor) -> Tensor:
    """As its weight is, which may have been given other strides, or another precision, since."""
    alike = tensor.dtype == weight.dtype and tensor.stride() == weight.stride()
    return tensor if alike or is_dtensor(weight) else torch.empty_like(weight).copy_(tensor)


def _versions_of(batch: Batch) -> list[int]:
    """Of its weights, and of the winners: a state that is loaded brings others."""
    return [tensor._version for tensor in (*batch.weights, batch.state.winners)]
