"""The nearest weight of bounded norm, for one layer: the operator ``convnorm::project`` and what is built on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library, register_fake

from . import library
from .ball import Ball, Face, ball_of, nearest, on_face, settle, tables_of
from .geometry import GeometryError
from .gradients import static, transformed
from .layers import Layer, as_layer
from .plan import read_plan
from .spectral.rescale import clip, rescale
from .uncompiled import run_as_it_is

IN_CACHE, IN_MEMORY = 1 << 16, 1 << 22  # weights, in float64, in a few tables as large, or at worst taps times as large

lib = Library("convnorm", "FRAGMENT")
lib.define(
    "project(Tensor weight, Tensor bound, str plan, bool column) "
    "-> (Tensor projected, Tensor signs, Tensor active, Tensor counts, Tensor merged)"
)


@dataclass(frozen=True)
class Constraint:
    """What is bounded: the columns or the rows of a layer's matrix, in each of the uses that ``plan`` lists."""

    plan: str
    column: bool
    groups: int
    channels: int
    merges: bool
    disjoint: bool


METHODS = ("rescale", "clip")


def constraint_of(layers: Sequence[Layer], ord: float) -> Constraint:
    """Of uses of one weight that bound the same of it."""
    weight = layers[0].weight
    check_weight(weight)
    plan = "".join(layer.plan.text for layer in layers)
    column = layers[0].plan.over_columns(ord == math.inf)
    tables = tables_of(plan, column)
    channels = layers[0].in_channels if ord == 1 else layers[0].out_channels
    return Constraint(plan, column, layers[0].groups, channels, tables.merged is not None, tables.disjoint is not None)


def method_of(ord: float, method: str | None) -> str:
    """How a norm is bounded, of those ways that it has."""
    if ord not in (1, 2, math.inf):
        raise ValueError(f"convnorm: ord {ord!r} must be 1, 2 or inf")
    if ord == 2:
        if method not in (None, *METHODS):
            raise ValueError(f"convnorm: method {method!r} must be one of {', '.join(map(repr, METHODS))}")
        return method or METHODS[0]
    if method is not None:
        raise ValueError(f"convnorm: method {method!r} is for ord 2, not {ord!r}: there the projection is exact")
    return "nearest"


def check_weight(weight: Tensor) -> None:
    if weight.is_meta:
        raise GeometryError("convnorm: weight on device meta has no values to project")
    library.device_of([weight])  # refuses what no backend reads


def bounds_of(bound: float | Tensor, channels: int, device: torch.device) -> Tensor:
    """[channels], in float64; differentiable."""
    bounds = torch.as_tensor(bound, dtype=torch.float64, device=device)
    if bounds.shape not in ((), (channels,)):
        raise GeometryError(
            f"convnorm: bound of shape {list(bounds.shape)} must be one number, or one for each of {channels} channels"
        )
    check_bounds(bounds)
    return bounds.expand(channels)


def bound_of_norm(bound: float | Tensor, device: torch.device) -> Tensor:
    """0-dim, in float64; differentiable."""
    one = torch.as_tensor(bound, dtype=torch.float64, device=device)
    if one.dim():
        raise GeometryError(f"convnorm: bound of shape {list(one.shape)} must be one number for ord 2")
    check_bounds(one)
    return one


def check_bounds(bounds: Tensor) -> None:
    bad = bounds.detach()[~(bounds.detach() >= 0)]
    if bad.numel():
        raise GeometryError(f"convnorm: bound {bad[0].item()} must be at least 0")


def project(
    layer: nn.Module | Tensor,
    in_shape: Sequence[int] = (),
    *,
    ord: float = 1,
    bound: float | Tensor,
    method: str | None = None,
    **options: Any,
) -> Tensor:
    """The weight nearest to a layer's whose l1 (``ord=1``) or linf (``ord=math.inf``) norm is at most ``bound``.

        argmin ||w - weight||^2  such that  norm(w) <= bound

    of the weight's shape and precision. The arguments are those of ``convnorm.norms``; ``bound`` is one number, or one
    for each input channel (``ord=1``) or output channel (``ord=inf``). Differentiable in the weight and in the bound:
    the derivative is that on the face of the ball where the projection lies, which is defined almost everywhere.

    For the l2 norm (``ord=2``) ``bound`` is one number. ``method="rescale"``, the default, multiplies the weight by
    min(1, bound / upper), where ``upper`` is a proved bound of the layer's true norm, some 1 % above it on most inputs
    (``spectral/rescale.py``); it has first derivatives. ``method="clip"`` gives the nearest weight whose singular
    values on the layer's circle are at most ``bound`` (``spectral/nearest.py``), and has none.

    >>> project(torch.tensor([[3.0, -2.0, 0.5], [1.0, 0.0, 0.0]]), ord=math.inf, bound=2.0)
    tensor([[ 1.5000, -0.5000,  0.0000],
            [ 1.0000,  0.0000,  0.0000]])
    """
    one, method = as_layer(layer, in_shape, **options), method_of(ord, method)
    if ord == 2:
        check_weight(one.weight)
        limit = bound_of_norm(bound, one.weight.device)
        return rescale(one, limit) if method == "rescale" else clip(one, limit)
    constraint = constraint_of([one], ord)
    return project_weight(one.weight, bounds_of(bound, constraint.channels, one.weight.device), constraint)


def project_weight(weight: Tensor, bounds: Tensor, constraint: Constraint) -> Tensor:
    projected, signs, active, counts, merged = torch.ops.convnorm.project(
        weight, bounds, constraint.plan, constraint.column
    )
    seen = torch.is_grad_enabled() and (weight.requires_grad or bounds.requires_grad)
    if not seen and not transformed():
        return projected
    with torch.autocast(weight.device.type, enabled=False):  # in which matrix products would be of half precision
        linear = _linear(weight, bounds, Face(signs, active), counts, merged, constraint)
    return projected + (linear - linear.detach()).to(weight.dtype)


def _linear(
    weight: Tensor, bounds: Tensor, face: Face, counts: Tensor, merged: Tensor, constraint: Constraint
) -> Tensor:
    """The same values, now linear functions of weight and bound."""
    # which windows say the same is seen in float64 only
    wide = torch.promote_types(weight.dtype, torch.float32 if constraint.disjoint else torch.float64)
    matrix = matrix_of(weight.to(wide), constraint.groups, constraint.column)
    x0, bounds = _channels(matrix), bounds.to(wide)
    if constraint.merges and not static():  # this case takes large tables
        some = face.active.any(1).nonzero().squeeze(1)
        part = on_face(x0[some], bounds[some], Face(face.signs[some], face.active[some]), counts, merged)
        linear = x0.index_copy(0, some, part)
    else:
        merged = merged if constraint.merges else None
        linear = on_face(x0, bounds, face, counts, merged, disjoint=constraint.disjoint)
    linear = linear.view(matrix.shape)
    return (linear.transpose(1, 2) if constraint.column else linear).reshape(weight.shape)


def matrix_of(weight: Tensor, groups: int, column: bool) -> Tensor:
    """[groups, channels, others, *taps], a view."""
    matrix = weight.unflatten(0, (groups, -1))
    return matrix.transpose(1, 2) if column else matrix


def _channels(matrix: Tensor) -> Tensor:
    """[channels, others, taps]"""
    return matrix.reshape(matrix.shape[0] * matrix.shape[1], matrix.shape[2], -1)


@dataclass(frozen=True, eq=False)
class Change:
    """What the projection changes: ``matrix[index] = values``, with ``channels``, their numbers, and their face."""

    index: tuple[Tensor, Tensor]
    values: Tensor
    channels: Tensor
    face: Face


def changes_of(matrix: Tensor, bounds: Tensor, ball: Ball) -> Iterator[Change]:
    """The channels that exceed their bounds, some at a time: as many as a CPU's cache holds, or a GPU's memory."""
    x = _channels(matrix)
    norm = ball.sums(x).amax(1)
    if not norm.isfinite().all():
        bad = x[~x.isfinite()]
        held = f"holds {bad[0].item()}" if bad.numel() else "is too large for float64 to add up"
        raise GeometryError(f"convnorm: weight {held}: nothing of a bounded norm is nearest to it")
    channels = (norm > bounds).nonzero().squeeze(1)
    at_once = max(1, (IN_CACHE if x.is_cpu else IN_MEMORY) // x[0].numel())
    for some in channels.split(at_once) if len(channels) else ():
        index = some // matrix.shape[1], some % matrix.shape[1]
        old = matrix[index]
        values, face = _nearest(old.reshape(len(some), matrix.shape[2], -1), bounds[some], ball)
        yield Change(index, values.view_as(old), some, face)


def _nearest(x0: Tensor, bounds: Tensor, ball: Ball) -> tuple[Tensor, Face]:
    """As the weights are stored: the projection of channels that exceed their bounds, which may be 0."""
    shape = *x0.shape[:2], ball.counts.shape[1]
    positive = (bounds > 0).nonzero().squeeze(1)
    if len(positive) == len(bounds):
        values, face = nearest(x0.double(), bounds, ball)
    else:
        values = x0.double().masked_fill(ball.counted, 0)
        face = Face(
            torch.zeros(shape, dtype=torch.int8, device=x0.device),
            torch.ones(len(x0), len(ball.counts), dtype=torch.bool, device=x0.device),
        )
        if len(positive):
            some, found = nearest(x0[positive].double(), bounds[positive], ball)
            values[positive], face.signs[positive], face.active[positive] = some, found.signs, found.active
    return settle(values, bounds, ball, x0.dtype), face


@torch.no_grad()
@run_as_it_is
def _project(weight: Tensor, bound: Tensor, plan: str, column: bool) -> tuple[Tensor, ...]:
    """``projected`` and what ``on_face`` takes: signs[channels, others, merged taps], active[channels, windows],
    counts[windows, merged taps] and merged[merged taps, taps], which is empty where nothing merges.
    """
    check_bounds(bound)
    ball = ball_of(plan, column, weight.device)
    outputs = projected, signs, active, counts, merged = _outputs(weight, plan, column)
    projected.copy_(weight)
    signs.zero_()
    active.zero_()
    counts.copy_(ball.counts)
    if ball.merged is not None:
        merged.copy_(ball.merged)
    matrix = matrix_of(projected, read_plan(plan)[0].groups, column)
    for change in changes_of(matrix, bound, ball):
        matrix[change.index] = change.values
        signs[change.channels], active[change.channels] = change.face.signs, change.face.active
    return outputs


@register_fake("convnorm::project", lib=lib)
def _fake_project(weight: Tensor, bound: Tensor, plan: str, column: bool) -> tuple[Tensor, ...]:
    return _outputs(weight, plan, column)


def _outputs(weight: Tensor, plan: str, column: bool) -> tuple[Tensor, ...]:
    tables = tables_of(plan, column)
    windows, merged_taps = tables.counts.shape
    groups, channels, others, *taps = matrix_of(weight, read_plan(plan)[0].groups, column).shape
    return (
        torch.empty_like(weight),
        weight.new_empty(groups * channels, others, merged_taps, dtype=torch.int8),
        weight.new_empty(groups * channels, windows, dtype=torch.bool),
        weight.new_empty(windows, merged_taps, dtype=torch.float64),
        weight.new_empty(0 if tables.merged is None else merged_taps, math.prod(taps), dtype=torch.float64),
    )


lib.impl("project", _project, "CompositeExplicitAutograd")
lib.impl("project", torch.library.fallthrough_kernel, "Autograd")
