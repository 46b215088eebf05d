"""Layers of bounded norm: project a weight, a model after each step of an optimiser, or reparametrise a layer.

The projection is the exact Euclidean one, of all offending channels at once (``ball.py``). The bound holds for
the weights as they are stored, in each precision: their norm, added up in float64, is at most ``bound``. One number
bounds the operator norm; one for each input channel (``ord=1``) or output channel (``ord=inf``) bounds the absolute sum
of the matrix's columns or rows in that channel, as an accumulator's width does. A channel within its bound stays as it
is, to the bit; so does a tap that reads nothing but padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from . import library
from .ball import ball_of, below, toward_zero
from .geometry import GeometryError
from .layers import LAYERS, Layer, Use, as_layer, naming, observe
from .project import Constraint, bounds_of, changes_of, constraint_of, matrix_of, project_weight

READ_ERROR = 1e-5  # relative, of a norm read in float32: nearer to its bound, a layer is added up in float64


class Projection:
    """Keeps a model's layers within a bound: ``step()`` projects, in place, those whose norm exceeds it.

    ``inputs`` are what the model takes, or their shapes: they say at which sizes each layer is used, as
    ``layers.observe`` finds out, once. ``bound`` is one number for all layers, or a mapping from the names of the
    layers to be bounded to their bounds: a number, or one for each input (``ord=1``) or output channel (``ord=inf``).
    A weight used at several input sizes, or shared by several layers, is bounded in each of them at once.

    A step reads the weights once; only layers that exceed their bound cost more.

    >>> import math
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> _ = Projection(model, [1, 3, 8, 8], ord=math.inf, bound={"0": 1.0, "3": 4.0}).attach(optimizer)
    >>> model(torch.randn(2, 3, 8, 8)).sum().backward()
    >>> optimizer.step()
    >>> import convnorm
    >>> (convnorm.norms(model[0], [8, 8]).linf <= 1.00001).item()
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *inputs: Tensor | Sequence[int],
        ord: float = 1,
        bound: float | Mapping[str, float | Tensor],
    ) -> None:
        uses = observe(model, *inputs)
        bounds = _named_bounds(model, uses, bound)
        by_weight: dict[int, list[Use]] = {}
        for use in uses:
            if use.name in bounds:
                by_weight.setdefault(id(use.module.weight), []).append(use)
        self._bounded = [_BoundedWeight.of(shared, ord, bounds) for shared in by_weight.values()]
        self._ord = ord

    @torch.no_grad()
    def step(self) -> None:
        """Project the layers that exceed their bounds."""
        by_device: dict[torch.device, list[_BoundedWeight]] = {}
        for one in self._bounded:
            by_device.setdefault(one.module.weight.device, []).append(one)
        for bounded in by_device.values():
            weights = [one.module.weight for one in bounded for _ in range(one.uses)]
            plan = [number for one in bounded for number in one.constraint.plan]
            values = library.read(weights, plan, [len(weights)])[0 if self._ord == 1 else 1].tolist()
            for one in bounded:
                norm = max(values.pop(0) for _ in range(one.uses))
                if not norm <= one.least * (1 - READ_ERROR):  # NaN is not
                    one.project()

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Project after each step of an optimiser, until the handle's ``remove()``."""
        return optimizer.register_step_post_hook(lambda *_: self.step())


@dataclass(eq=False)
class _BoundedWeight:
    """A weight of a model, and what bounds it."""

    name: str
    module: nn.Module
    uses: int
    constraint: Constraint
    bounds: Tensor
    least: float

    @classmethod
    def of(cls, uses: Sequence[Use], ord: float, bounds: Mapping[str, float | Tensor]) -> _BoundedWeight:
        first, *others = uses
        weight = first.module.weight
        with naming(first.name):
            constraint = constraint_of([use.layer for use in uses], ord)
            own = bounds_of(bounds[first.name], constraint.channels, weight.device).detach().clone()
        for use in others:
            with naming(use.name):
                again = bounds_of(bounds[use.name], constraint.channels, weight.device)
            what = f"convnorm: layers {first.name!r} and {use.name!r} share a weight"
            if (use.layer.transposed, use.layer.groups) != (first.layer.transposed, first.layer.groups):
                raise GeometryError(f"{what}, but of other channels: one is transposed, or their groups differ")
            if not torch.equal(own, again):
                raise GeometryError(f"{what}, but bounds {bounds[first.name]} and {bounds[use.name]} differ")
        return cls(first.name, first.module, len(uses), constraint, own, own.min().item())

    def project(self) -> None:
        weight = self.module.weight.detach()
        ball = ball_of(self.constraint.plan, self.constraint.column, weight.device)
        self.bounds = self.bounds.to(weight.device)
        matrix = matrix_of(weight, self.constraint.groups, self.constraint.column)
        with naming(self.name):
            for change in changes_of(matrix, self.bounds, ball):
                matrix[change.index] = change.values


def _named_bounds(
    model: nn.Module, uses: Sequence[Use], bound: float | Mapping[str, float | Tensor]
) -> Mapping[str, float | Tensor]:
    """A bound for each layer that shall have one, all of which the model runs and can write to."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    bounds = bound if isinstance(bound, Mapping) else dict.fromkeys(layers, bound)
    seen = {use.name for use in uses}
    if not bounds:
        raise GeometryError(f"convnorm: bound {bound!r} finds no layer to bound in {type(model).__name__}")
    for name in bounds:
        if name not in layers:
            raise GeometryError(f"convnorm: bound of {name!r} finds no such layer: there are {', '.join(layers)}")
        if name not in seen:
            raise GeometryError(
                f"convnorm: layer {name!r} is never run on these inputs, so that its input size is unknown: "
                "bound others by name, bound={name: bound}"
            )
        if not isinstance(layers[name]._parameters.get("weight"), nn.Parameter):
            raise GeometryError(f"convnorm: weight of layer {name!r} is computed from others: nothing to write to")
    return bounds


def project_(
    model: nn.Module,
    *inputs: Tensor | Sequence[int],
    ord: float = 1,
    bound: float | Mapping[str, float | Tensor],
) -> nn.Module:
    """Project a model's layers, in place, onto norms of at most ``bound``: a ``Projection`` of one step.

    >>> model = project_(nn.Sequential(nn.Conv2d(3, 8, 3)), [1, 3, 9, 9], ord=1, bound=0.5)
    >>> bool(model[0].weight.abs().sum((0, 2, 3)).amax() <= 0.50001)
    True
    """
    Projection(model, *inputs, ord=ord, bound=bound).step()
    return model


class Bounded(nn.Module):
    """The parametrization that ``constrain`` registers."""

    bounds: Tensor

    def __init__(self, layer: Layer, ord: float, bound: float | Tensor) -> None:
        super().__init__()
        self.constraint = constraint_of([layer], ord)
        self.ord, self.in_shape = ord, layer.in_shape
        bounds = bounds_of(bound, self.constraint.channels, layer.weight.device)
        self.register_buffer("bounds", bounds.detach().clone(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return project_weight(weight, self.bounds, self.constraint)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bounded:
        """To another device, but never to another precision: half of it would be another bound."""
        bounds = self.bounds
        super()._apply(fn, recurse)
        self.bounds = bounds.to(self.bounds.device)
        return self

    def extra_repr(self) -> str:
        return f"ord={self.ord}, in_shape={list(self.in_shape)}"


def constrain(module: nn.Module, in_shape: Sequence[int] = (), *, ord: float = 1, bound: float | Tensor) -> nn.Module:
    """Parametrise a layer such that its l1 (``ord=1``) or linf (``ord=math.inf``) norm never exceeds ``bound``.

    ``module.weight`` becomes the projection of a parameter of the same shape, which is what is trained. The bound is
    that at inputs of the spatial sizes ``in_shape``. A weight that is assigned is projected when it is read. Being of
    ``torch.nn.utils.parametrize``, it is left by ``remove_parametrizations(module, "weight")``, with the projected
    weight; ``state_dict`` holds the parameter, and no bound. ``torch.compile`` takes it in one graph, except where
    padding merges taps.

    >>> import math
    >>> conv = constrain(nn.Conv2d(3, 8, 3, padding=1), in_shape=[8, 8], ord=math.inf, bound=1.0)
    >>> bool(conv.weight.abs().sum((1, 2, 3)).amax() <= 1.00001)
    True
    """
    parametrize.register_parametrization(module, "weight", Bounded(as_layer(module, in_shape), ord, bound))
    return module


@torch.no_grad()
def project_batch_norms_(model: nn.Module, *, bound: float | Tensor) -> nn.Module:
    """Clip the scales of a model's batch norms, in place, such that none, in evaluation, multiplies by over ``bound``:

        |weight| / sqrt(running_var + eps) <= bound

    in each channel, the projection onto norms of at most ``bound``: l1, l2 and linf are the same for a diagonal. The
    model may be a batch norm itself; ``bound`` is one number, or one for each channel of each.

    >>> norm = nn.BatchNorm1d(2)
    >>> _ = norm.running_var.copy_(torch.tensor([0.0, 1.0]))
    >>> project_batch_norms_(norm, bound=0.5).weight
    Parameter containing:
    tensor([0.0016, 0.5000], requires_grad=True)
    """
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise GeometryError(f"convnorm: model {type(model).__name__} has no batch norm")
    for name, module in norms:
        if nn.parameter.is_lazy(module.weight):
            raise GeometryError(f"convnorm: weight of batch norm {name!r} is not initialised yet: run the model once")
        for tensor in ("weight", "running_var"):
            if getattr(module, tensor) is None:
                raise GeometryError(f"convnorm: batch norm {name!r} has no {tensor}: nothing to bound its scale by")
        weight = module.weight
        bounds = bounds_of(bound, module.num_features, weight.device)
        limit = below(bounds * (module.running_var.double() + module.eps).sqrt(), 4)
        if not (weight.isfinite() & limit.isfinite()).all():
            raise GeometryError(f"convnorm: weight or running_var of batch norm {name!r} holds NaN or inf")
        clipped = toward_zero(limit, weight.dtype).copysign(weight)
        weight.copy_(torch.where(weight.double().abs() > limit, clipped, weight))
    return model
