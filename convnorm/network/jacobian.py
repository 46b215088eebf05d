"""A network's Lipschitz constant from below: the norms of its Jacobian where data lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..geometry import GeometryError
from ..layers import as_stored
from .calls import is_random
from .nonlinear import default_eps

MOST_EXACT = 2048  # rows or columns that are computed one by one
STEPS = 30  # of power iteration
DETACHING = (Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, Tensor.data.__get__)
SHORT = 1 - 1e-9  # what a quotient in float64 may be too large by


def jacobian_norm(model: nn.Module, x: Tensor, *, ord: float = 2, steps: int = STEPS) -> Tensor:
    """[batch] in float64: for each sample, a lower bound of the l_ord norm of the Jacobian there, and so of the
    Lipschitz constant of a network that is differentiable there. In evaluation mode, in float64, whatever it casts to.

        l1: the largest column, |J e_j|_1        linf: the largest row, |J^T e_i|_1        l2: |J v|_2 / |v|_2

    l1 by all columns, linf by all rows, and exact, where there are at most 2,048 of them; else, and for l2, by
    ``steps`` of the power method, v <- J^T J v, or its counterpart for l1 (Higham, 1992).

    Networks that mix the samples of a batch, or draw random numbers, are refused.

    >>> model = nn.Linear(3, 2, bias=False)
    >>> torch.allclose(jacobian_norm(model, torch.zeros(1, 3), ord=1), model.weight.abs().sum(0).max().double())
    True
    """
    if ord not in (1, 2, math.inf):
        raise GeometryError(f"convnorm: ord {ord!r} must be 1, 2 or inf")
    if steps < 1:
        raise GeometryError(f"convnorm: steps {steps} must be at least 1")
    jacobian = Jacobian(model, x)
    if ord == 2:
        found = power_iteration(jacobian, steps)
    else:
        size, image, pull = ((jacobian.inputs, jacobian.push, jacobian.pull) if ord == 1 else
                             (jacobian.outputs, jacobian.pull, jacobian.push))  # fmt: skip
        found = largest_column(size, image) if size[1:].numel() <= MOST_EXACT else climbed(size, image, pull, steps)
    return found * SHORT


class AsFunction(TorchFunctionMode):
    """The network as a function of its input, whatever part of it is not to be trained: what is detached, or computed
    without gradients. Functions that leave eps to PyTorch have that of the network's own precision, not of float64.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        self._eps = eps

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:  # of torch.no_grad() and the like
            return None
        if func in DETACHING:
            return args[0].view_as(args[0])
        if func in (F.rms_norm, torch.rms_norm) and (args[3] if len(args) > 3 else kwargs.get("eps")) is None:
            args, kwargs = args[:3], kwargs | {"eps": self._eps}
        return func(*args, **kwargs)


class InDouble(TorchDispatchMode):
    """What is cast to another precision stays in float64."""

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_random(func, args, kwargs):
            raise GeometryError(f"convnorm: the network draws random numbers, by {func}, also in evaluation mode")
        if getattr(kwargs.get("dtype"), "is_floating_point", False):
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)


class Jacobian:
    """That of each sample of a batch, [batch, ...] to [batch, outputs]; vectors are on the CPU."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        exact = as_stored(model).requires_grad_(False)
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype)
        exact, as_function = exact.double(), AsFunction(default_eps(own))

        def network(x: Tensor) -> Tensor:
            with as_function, InDouble(), sdpa_kernel(SDPBackend.MATH):  # others have no derivatives forward
                y = exact(x.clone())  # a network may write into its input
            parts = [part for part in torch.utils._pytree.tree_leaves(y) if isinstance(part, Tensor)]
            for part in parts:
                if part.shape[:1] != x.shape[:1]:
                    shape = list(part.shape)
                    raise GeometryError(f"convnorm: output of {shape} has no batch axis in front, of {len(x)} samples")
            return torch.cat([part.reshape(len(part), -1) for part in parts], 1)

        self.network, self.x = network, x.detach().double()
        y, self._pull = vjp(network, self.x)
        self.inputs, self.outputs = self.x.shape, y.shape
        self._refuse_mixed()

    def _refuse_mixed(self) -> None:
        """Networks by which the output of one sample, the first one here, depends on others."""
        u = torch.zeros(self.outputs, dtype=torch.float64)
        u[:1] = torch.randn(u[:1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        others = self.pull(u)[1:]
        if others.nan_to_num(0.0).any():  # 0 times NaN is NaN
            raise GeometryError("convnorm: the network mixes the samples of a batch: none has a Jacobian of its own")

    def push(self, v: Tensor) -> Tensor:
        return jvp(self.network, (self.x,), (v.to(self.x.device),))[1].detach().cpu()

    def pull(self, u: Tensor) -> Tensor:
        return self._pull(u.to(self.x.device))[0].detach().cpu()


def power_iteration(jacobian: Jacobian, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(jacobian.inputs, generator=generator, dtype=torch.float64)
    best = torch.zeros(len(v), dtype=torch.float64)
    for _ in range(steps):
        v = v / lengths(v).clamp_min(torch.finfo(v.dtype).tiny)
        u = jacobian.push(v)
        best = best.maximum(lengths(u).flatten())
        v = jacobian.pull(u)
    return best


def lengths(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v.flatten(1), dim=1).view(-1, *[1] * (v.dim() - 1))


def largest_column(size: torch.Size, image: Callable[[Tensor], Tensor]) -> Tensor:
    """The largest l1 norm of the images of unit vectors, all of them."""
    best = None
    for place in range(size[1:].numel()):
        unit = torch.zeros(size, dtype=torch.float64).flatten(1)
        unit[:, place] = 1
        sums = image(unit.view(size)).abs().flatten(1).sum(1)
        best = sums if best is None else best.maximum(sums)
    return best


def climbed(
    size: torch.Size, image: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """The same of unit vectors that lead to larger ones: e_j with the largest entry of J^T sign(J v). Where a climb
    ends, another begins.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.full(size, 1 / size[1:].numel(), dtype=torch.float64)
    best = last = torch.zeros(len(v), dtype=torch.float64)
    for _ in range(steps):
        y = image(v)
        sums = y.abs().flatten(1).sum(1)
        best = best.maximum(sums)
        climbs = sums > last
        j = pull(torch.where(y < 0, -1.0, 1.0).to(y.dtype)).flatten(1).abs().argmax(1)
        random = (torch.randint(2, size, generator=generator).double() * 2 - 1) / size[1:].numel()
        v = torch.where(climbs[:, None], F.one_hot(j, size[1:].numel()).double(), random.flatten(1)).view(size)
        last = sums.where(climbs, 0.0)
    return best
