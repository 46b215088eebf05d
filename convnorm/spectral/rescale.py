"""A weight made smaller, as a whole, until the layer's true l2 norm is at most a bound.

    w -> w min(1, bound / upper)    where    norm <= upper

``upper`` is proved, and so is the result, as it is stored. For the sake of training loops it is looked for on the
layer's circle alone, to 1 %, or in its explicit matrix where that is small: ``convnorm.l2`` goes on from there, at a
price. The gradient is that of the norm, from its singular vectors, times ``upper / norm``, taken as constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake

from ..ball import toward_zero
from ..geometry import GeometryError
from ..gradients import transformed
from ..layers import Layer
from ..uncompiled import run_as_it_is
from .bounds import sqrt_l1_linf
from .circle import circle_of, groups_of, power_of_two, with_read_taps
from .explicit import explicit_uppers, matrix_sizes
from .lanczos import lanczos
from .nearest import NEAR, nearest
from .on_circle import circle_upper
from .outward import once
from .rayleigh import rayleigh

RTOL = 1e-2  # how far above the norm an upper bound is looked for
SHARP = 1e-6  # the same for the singular vectors of a gradient, which are off by the root of that
EXPLICIT = 512  # rows or columns of a matrix that is decomposed
SLACK = 128  # roundings of an element, which is what a norm may lose to them
MOST_TRIES = 20  # to find half precision weights that are within the bound: 1 or 2 are usual

lib = Library("convnorm", "FRAGMENT")
lib.define(
    "rescale(Tensor weight, Tensor bound, int[] stride, int[] padding, int[] in_shape, *, int[] dilation, int groups, "
    "str padding_mode, bool transposed, int[] output_padding) -> (Tensor rescaled, Tensor upper, Tensor gradient)"
)


@dataclass
class Proved:
    """``upper`` is at least the l2 norm of each of a weight's uses; ``rights`` are inputs to begin the next search."""

    upper: float
    rights: list[Tensor | None] = field(default_factory=list)


def prove(
    layers: Sequence[Layer],
    bound: float,
    starts: Sequence[Tensor | None] = (),
    *,
    rtol: float = RTOL,
    search: float = RTOL / 10,
) -> Proved:
    """An upper bound of the norms of layers, ``rtol`` above the largest of them, or ``bound`` where that is no more.

    ``search`` is how near the norms are sought from below.
    """
    proved = Proved(0.0)
    for i, layer in enumerate(layers):
        upper, right = _upper(layer, bound, starts[i] if starts else None, rtol, search)
        proved.upper = max(proved.upper, upper)
        proved.rights.append(right)
    return proved


def _upper(layer: Layer, bound: float, start: Tensor | None, rtol: float, search: float) -> tuple[float, Tensor | None]:
    layer = with_read_taps(replace(layer, weight=layer.weight.detach()))
    if (upper := sqrt_l1_linf(layer).item()) <= bound:
        return upper, start
    found = lanczos(layer, rtol=search, start=start)
    scale = power_of_two(layer.weight)
    unit = replace(layer, weight=layer.weight.double() / scale)
    lower = found.value.item()
    # to be within the bound is better than to be proved sharply
    level = (bound if lower <= bound <= lower * (1 + rtol) else lower * (1 + rtol)) / scale * (1 - 2.0**-48)
    circle = circle_of(unit)
    uppers, _ = circle_upper(circle, level, rtol)
    if not circle.whole and min(matrix_sizes(unit)) <= EXPLICIT:
        doubtful = (uppers > level * (1 + 2.0**-49)).nonzero().flatten()
        if len(doubtful):
            uppers[doubtful] = explicit_uppers(groups_of(unit, doubtful), level).minimum(uppers[doubtful])
    return uppers.max().item() * (1 + 2.0**-50) * scale, found.right


def rescaled(
    exact: Tensor, layers: Sequence[Layer], bound: float, proved: Proved, dtype: torch.dtype, rtol: float = RTOL
) -> tuple[Tensor, Proved]:
    """The largest multiple of ``exact``, in float64, that is proved to be within the bound as ``dtype`` stores it."""
    if not math.isfinite(proved.upper):
        raise GeometryError("convnorm: weight is too large for float64 to add up: nothing of a bounded norm is near it")
    slack = max(SLACK * torch.finfo(dtype).eps, 2.0**-26) if dtype.itemsize > 2 else 2.0**-20
    share = min(1.0, bound / proved.upper * (1 - slack)) if proved.upper else 1.0
    for tries in range(MOST_TRIES + 1):
        stored = toward_zero(exact * share, dtype)
        lost = stored.double() - exact * share
        moved = max(sqrt_l1_linf(replace(one, weight=lost)).item() for one in layers)
        upper = share * proved.upper * (1 + 2.0**-50) + moved
        if upper <= bound:
            break
        upper = prove([replace(one, weight=stored) for one in layers], bound, proved.rights, rtol=rtol).upper
        if upper <= bound:
            break
        share *= bound / upper * (1 - min(slack * 2**tries, 0.5)) if tries + 1 < MOST_TRIES else 0.0
    return stored, Proved(upper, proved.rights)


@torch.no_grad()
def project_norm(
    layers: Sequence[Layer], bound: float, method: str, starts: Sequence[Tensor | None] = ()
) -> tuple[Tensor, Proved]:
    """The weight that the uses of one weight get, itself where it is within the bound already, and what proves it."""
    weight, rtol = layers[0].weight.detach(), RTOL if method == "rescale" else 4 * NEAR
    proved = prove(layers, bound, starts, rtol=rtol)
    if proved.upper <= bound:
        return weight, proved
    exact = weight.double()
    if method == "clip" and bound > 0:
        exact = nearest(weight, layers, bound)
        layers = [replace(one, weight=exact) for one in layers]
        for over in (2.0**-32, 2 * NEAR):  # on the circle it is at most that
            proved = prove(layers, bound * (1 + over), proved.rights, rtol=rtol)
            if proved.upper <= bound * (1 + over):
                break
    return rescaled(exact, layers, bound, proved, weight.dtype, rtol)


def rescale(layer: Layer, bound: Tensor) -> Tensor:
    """``layer.weight`` rescaled, differentiable once, in it and in ``bound``: d upper = gradient . d weight."""
    weight = layer.weight
    rescaled, upper, gradient = torch.ops.convnorm.rescale(
        weight.detach(), bound.detach(), *layer.sizes, **layer.options
    )
    seen = torch.is_grad_enabled() and (weight.requires_grad or bound.requires_grad)
    if not seen and not transformed():
        return rescaled
    if not torch.compiler.is_compiling():  # which has no second derivatives anyway
        weight, bound = once(weight), once(bound)
    exact, over = weight.double(), upper > bound
    moved = (gradient * exact).sum()
    share = torch.where(over, bound.where(over, 1) / (upper.where(over, 1) + (moved - moved.detach())), 1)
    linear = exact * share
    return rescaled + (linear - linear.detach()).to(weight.dtype)


def clip(layer: Layer, bound: Tensor) -> Tensor:
    """``layer.weight`` with its singular values clipped; an error where its derivative is asked for."""
    return _Clipped.apply(layer.weight, project_norm([layer], bound.item(), "clip")[0])


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise GeometryError("convnorm: method 'clip' has no derivative: 'rescale' does")


@contextmanager
def _autograd() -> Iterator[None]:
    """Within an operator, which a compiled model calls with autograd left behind."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    with ExitStack() as stack:
        for key in keys:
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        yield


@run_as_it_is
def _rescale(weight: Tensor, bound: Tensor, *sizes: Sequence[int], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What ``rescale`` takes; the gradient is that of ``upper``, and zero where the weight is within the bound."""
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    with _autograd():
        layer, limit = Layer(weight.detach().clone(), *map(tuple, sizes), **options), bound.item()
        proved = prove([layer], limit, search=SHARP)
        if proved.upper <= limit:
            return layer.weight, bound.new_tensor(proved.upper), _gradient_like(weight).zero_()
        leaf = layer.weight.double().contiguous().requires_grad_()  # PyTorch's own may refuse others
        norm = rayleigh(replace(layer, weight=leaf), proved.rights[0]).value
        (gradient,) = torch.autograd.grad(norm, leaf)
        with torch.no_grad():
            stored, _ = rescaled(layer.weight.double(), [layer], limit, proved, weight.dtype)
    return stored, bound.new_tensor(proved.upper), gradient * (proved.upper / (norm.item() or 1))


@register_fake("convnorm::rescale", lib=lib)
def _fake_rescale(weight: Tensor, bound: Tensor, *sizes: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(weight), torch.empty_like(bound), _gradient_like(weight)


def _gradient_like(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.float64)


lib.impl("rescale", _rescale, "CompositeExplicitAutograd")
lib.impl("rescale", torch.library.fallthrough_kernel, "Autograd")
