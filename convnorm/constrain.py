"""Layers of bounded norm: project a weight, a model after each step of an optimiser, or reparametrise a layer.

The projection is the exact Euclidean one, of all offending channels at once (``ball.py``). The bound holds for
the weights as they are stored, in each precision: their norm, added up in float64, is at most ``bound``. One number
bounds the operator norm; one for each input channel (``ord=1``) or output channel (``ord=inf``) bounds the absolute sum
of the matrix's columns or rows in that channel, as an accumulator's width does. A channel within its bound stays as it
is, to the bit; so does a tap that reads nothing but padding.

``ord=2`` bounds the l2 norm of each layer, as one number: by ``method="rescale"`` the weight is multiplied by
min(1, bound / upper), where ``upper`` is a proved bound of the layer's true norm (``spectral/rescale.py``); by
``method="clip"`` its singular values are clipped on the layer's circle, to the nearest kernel of the same taps
(``spectral/nearest.py``). Again the bound holds for the weights as they are stored, and a weight that is proved to be
within it stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from . import library
from .ball import ball_of, below, toward_zero
from .geometry import GeometryError
from .layers import Layer, as_layer
from .project import (
    Constraint,
    bound_of_norm,
    bounds_of,
    changes_of,
    check_weight,
    constraint_of,
    matrix_of,
    method_of,
    project_weight,
)
from .sharded import refuse_sharded
from .spectral.rescale import Proved, project_norm, rescale
from .uses import Held, Use, named_layers, naming, observe, unwrapped

WHOLE = "a projection takes whole weights, not those of fully_shard"
READ_ERROR = 1e-5  # relative, of a norm read in float32: nearer to its bound, a layer is added up in float64


class Projection:
    """Keeps a model's layers within a bound: ``step()`` projects, in place, those whose norm exceeds it.

    ``inputs`` are what the model takes, or their shapes: they say at which sizes each layer is used, as
    ``observe`` finds out, once. ``bound`` is one number for all layers, or a mapping from the names of the
    layers to be bounded to their bounds: a number, or one for each input (``ord=1``) or output channel (``ord=inf``).
    A weight used at several input sizes, or shared by several layers, is bounded in each of them at once.

    A step reads the weights once; only layers that exceed their bound cost more. With ``ord=2`` so do layers near it:
    what was proved of a weight v bounds the norm of w, |w| <= |v| + |w - v|, until it has moved too far. ``method`` is
    that of ``convnorm.project``.

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
        method: str | None = None,
    ) -> None:
        method = method_of(ord, method)
        refuse_sharded(model := unwrapped(model), WHOLE)
        uses = observe(model, *inputs)
        bounds = _named_bounds(model, uses, bound)
        self._uses = [use for use in uses if use.name in bounds]
        self._bounds = {name: b.detach().clone() if isinstance(b, Tensor) else b for name, b in bounds.items()}
        self._ord, self._method, self._model, self._held = ord, method, model, Held(model, self._uses)
        self._bind()

    def _weights(self) -> list[Tensor | None]:
        return [use.module._parameters.get("weight") for use in self._uses]

    def _bind(self) -> None:
        self._known = self._weights()
        by_weight: dict[int, list[Use]] = {}
        for use, weight in zip(self._uses, self._known, strict=True):
            name = use.name
            if weight is None:
                raise GeometryError(f"convnorm: weight of layer {name!r} is computed from others: nothing to write to")
            by_weight.setdefault(id(weight), []).append(use)
        self._kept: list[_KeptChannels] | list[_KeptNorm]
        if self._ord == 2:
            self._kept = [_KeptNorm.of(shared, self._method, self._bounds) for shared in by_weight.values()]
        else:
            self._kept = [_KeptChannels.of(shared, self._ord, self._bounds) for shared in by_weight.values()]

    @torch.no_grad()
    def step(self) -> None:
        """Project the layers that exceed their bounds."""
        self._held.warn_of_gone("Projection")
        if any(now is not then for now, then in zip(self._weights(), self._known, strict=True)):  # replaced, or sharded
            refuse_sharded(self._model, WHOLE)
            self._bind()
        by_device: dict[torch.device, list[_KeptChannels | _KeptNorm]] = {}
        for one in self._kept:
            by_device.setdefault(one.module.weight.device, []).append(one)
        for bounded in by_device.values():
            weights = [weight for one in bounded for weight in [one.moved()] * one.uses]
            plan = "".join(one.plan for one in bounded)
            l1s, linfs, _ = library.read(weights, plan)
            read = {1: l1s, 2: l1s.sqrt() * linfs.sqrt(), math.inf: linfs}[self._ord]
            values = read.tolist()
            for one in bounded:
                norm = max(values.pop(0) for _ in range(one.uses))
                if not norm <= one.allowed * (1 - READ_ERROR):  # NaN is not
                    one.project()

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Project after each step of an optimiser, until the handle's ``remove()``."""
        return optimizer.register_step_post_hook(lambda *_: self.step())


@dataclass(eq=False)
class _KeptChannels:
    """A weight of a model, and what bounds it."""

    name: str
    module: nn.Module
    uses: int
    constraint: Constraint
    bounds: Tensor
    allowed: float  # a larger norm takes a projection

    @property
    def plan(self) -> str:
        return self.constraint.plan

    def moved(self) -> Tensor:
        return self.module.weight

    @classmethod
    def of(cls, uses: Sequence[Use], ord: float, bounds: Mapping[str, float | Tensor]) -> _KeptChannels:
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


@dataclass(eq=False)
class _KeptNorm:
    """A weight of a model, the l2 norm that it may have, and what is proved already: that of ``at``, at first of 0."""

    name: str
    module: nn.Module
    layers: list[Layer]
    method: str
    bound: float
    proved: Proved
    at: Tensor | None = None

    @classmethod
    def of(cls, uses: Sequence[Use], method: str, bounds: Mapping[str, float | Tensor]) -> _KeptNorm:
        first, own = uses[0], []
        for use in uses:
            with naming(use.name):
                check_weight(use.module.weight)
                own.append(bound_of_norm(bounds[use.name], torch.device("cpu")).item())
            if own[-1] != own[0]:
                what = f"convnorm: layers {first.name!r} and {use.name!r} share a weight"
                raise GeometryError(f"{what}, but bounds {bounds[first.name]} and {bounds[use.name]} differ")
        layers = [use.layer for use in uses]
        return cls(first.name, first.module, layers, method, own[0], Proved(0.0, [None] * len(layers)))

    @property
    def uses(self) -> int:
        return len(self.layers)

    @property
    def plan(self) -> str:
        return "".join(layer.plan.text for layer in self.layers)

    @property
    def allowed(self) -> float:
        """How far the weight may have moved, so that it is within the bound without another proof."""
        return self.bound - self.proved.upper

    def moved(self) -> Tensor:
        weight = self.module.weight.detach()
        if self.at is None or self.at.shape != weight.shape:
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(wide) - self.at.to(weight.device, wide)

    def project(self) -> None:
        weight = self.module.weight.detach()
        layers = [replace(layer, weight=weight) for layer in self.layers]
        with naming(self.name):
            projected, self.proved = project_norm(layers, self.bound, self.method, self.proved.rights)
        if projected is not weight:
            weight.copy_(projected)
        self.at = weight.clone()


def _named_bounds(
    model: nn.Module, uses: Sequence[Use], bound: float | Mapping[str, float | Tensor]
) -> Mapping[str, float | Tensor]:
    """A bound for each layer that shall have one, all of which the model runs."""
    layers = named_layers(model)
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
    return bounds


def project_(
    model: nn.Module,
    *inputs: Tensor | Sequence[int],
    ord: float = 1,
    bound: float | Mapping[str, float | Tensor],
    method: str | None = None,
) -> nn.Module:
    """Project a model's layers, in place, onto norms of at most ``bound``: a ``Projection`` of one step.

    >>> model = project_(nn.Sequential(nn.Conv2d(3, 8, 3)), [1, 3, 9, 9], ord=1, bound=0.5)
    >>> bool(model[0].weight.abs().sum((0, 2, 3)).amax() <= 0.50001)
    True
    """
    Projection(model, *inputs, ord=ord, bound=bound, method=method).step()
    return model


class Bounded(nn.Module):
    """The parametrization that ``constrain`` registers."""

    bounds: Tensor

    def __init__(self, bounds: Tensor, ord: float, in_shape: Sequence[int]) -> None:
        super().__init__()
        self.ord, self.in_shape = ord, in_shape
        # no inf: an average of buffers, as AveragedModel makes it, would be NaN
        finite = bounds.detach().clamp(max=torch.finfo(bounds.dtype).max / 2)
        self.register_buffer("bounds", finite, persistent=False)

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


class BoundedChannels(Bounded):
    """l1 or linf."""

    def __init__(self, layer: Layer, ord: float, bound: float | Tensor) -> None:
        constraint = constraint_of([layer], ord)
        super().__init__(bounds_of(bound, constraint.channels, layer.weight.device), ord, layer.in_shape)
        self.constraint = constraint

    def forward(self, weight: Tensor) -> Tensor:
        return project_weight(weight, self.bounds, self.constraint)


class BoundedNorm(Bounded):
    """l2, by rescaling."""

    def __init__(self, layer: Layer, bound: float | Tensor) -> None:
        check_weight(layer.weight)
        super().__init__(bound_of_norm(bound, layer.weight.device), 2, layer.in_shape)
        self.layer = replace(layer, weight=torch.empty(layer.weight.shape, device="meta"))

    def forward(self, weight: Tensor) -> Tensor:
        return rescale(replace(self.layer, weight=weight), self.bounds)


def constrain(
    module: nn.Module,
    in_shape: Sequence[int] = (),
    *,
    ord: float = 1,
    bound: float | Tensor,
    method: str | None = None,
) -> nn.Module:
    """Parametrise a layer such that its l1 (``ord=1``), l2 (``ord=2``) or linf (``ord=math.inf``) norm never exceeds
    ``bound``.

    ``module.weight`` becomes the projection of a parameter of the same shape, which is what is trained. The bound is
    that at inputs of the spatial sizes ``in_shape``. A weight that is assigned is projected when it is read. Being of
    ``torch.nn.utils.parametrize``, it is left by ``remove_parametrizations(module, "weight")``, with the projected
    weight; ``state_dict`` holds the parameter, and no bound. ``torch.compile`` takes it in one graph. With ``ord=2``
    the weight is rescaled, at the price of a proof each time that it is read.

    >>> import math
    >>> conv = constrain(nn.Conv2d(3, 8, 3, padding=1), in_shape=[8, 8], ord=math.inf, bound=1.0)
    >>> bool(conv.weight.abs().sum((1, 2, 3)).amax() <= 1.00001)
    True
    """
    layer = as_layer(module, in_shape)
    if method_of(ord, method) == "clip":
        raise GeometryError("convnorm: method 'clip' has no derivative to train with: 'rescale' does")
    bounded = BoundedNorm(layer, bound) if ord == 2 else BoundedChannels(layer, ord, bound)
    parametrize.register_parametrization(module, "weight", bounded)
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
    refuse_sharded(model, WHOLE)
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise GeometryError(f"convnorm: model {type(model).__name__} has no batch norm")
    for name, module in norms:
        if nn.parameter.is_lazy(module.weight):
            raise GeometryError(f"convnorm: weight of batch norm {name!r} is not initialised yet: run the model once")
        for tensor in ("weight", "running_var"):
            if getattr(module, tensor) is None:
                raise GeometryError(f"convnorm: batch norm {name!r} has no {tensor}: nothing to bound its scale by")
        weight = module._parameters.get("weight")
        if weight is None:
            raise GeometryError(f"convnorm: weight of batch norm {name!r} is computed from others: nothing to write to")
        with naming(name):
            bounds = bounds_of(bound, module.num_features, weight.device)
        limit = below(bounds * (module.running_var.double() + module.eps).sqrt(), 4)
        if not (weight.isfinite() & module.running_var.isfinite() & ~limit.isnan()).all():  # a bound may be inf
            raise GeometryError(f"convnorm: weight or running_var of batch norm {name!r} holds NaN or inf")
        clipped = toward_zero(limit, weight.dtype).copysign(weight)
        weight.copy_(torch.where(weight.double().abs() > limit, clipped, weight))
    return model
