"""A shorter way for what most calls of the operators are: values of plain tensors, and no gradient.

Python's calls of an operator begin at its packet, ``torch.ops.convnorm.l1``. To parse the arguments of these operators,
and to hand them to Python and back, PyTorch takes longer than the kernels take for a small layer. So packets go past it
where nothing but values is asked for, of tensors that nothing follows (no tracing, no transformation, no mode): with a
plan that is known of the same arguments, straight to the extension. All other calls, and each that is the first of its
kind, take PyTorch's way, the only one that refuses.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._ops import OpOverloadPacket

from . import backends, library
from .gradients import PLAIN, followed
from .uncompiled import run_as_it_is

MOST_KNOWN = 4096

_norms = torch.ops.convnorm.norms_native.default._op
_measure = torch.ops.convnorm.measure_native.default._op
_plans: dict[Hashable, str] = {}  # by all that a call gives but the values of its weights


class OfLayer(OpOverloadPacket):
    """``l1``, ``linf`` or ``norms``."""

    @run_as_it_is
    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        weight = arguments[0] if arguments else None
        if not _is_plain(weight) or followed():
            return super().__call__(*arguments, **options)
        key = _kind(weight), _typed(arguments[1:], options), backends.chosen()
        plan = _plans.get(key)
        if plan is None:
            values = super().__call__(*arguments, **options)
            _learn(key, [weight], lambda sizes, options: library.plan_of(weight, *sizes, **options))
            return values
        values = _norms(weight, plan)
        return values if self.__name__ == "norms" else values[self.__name__ == "linf"]


class OfNetwork(OpOverloadPacket):
    """``norms_many``"""

    @run_as_it_is
    def __call__(self, /, *arguments: Any, **options: Any) -> Any:
        weights = arguments[0] if arguments else None
        if type(weights) is not list or not all(map(_is_plain, weights)) or followed():
            return super().__call__(*arguments, **options)
        key = tuple(map(_kind, weights)), _typed(arguments[1:], options), backends.chosen()
        plan = _plans.get(key)
        if plan is None:
            values = super().__call__(*arguments, **options)
            _learn(key, weights, lambda columns, options: library.network_plan_of(weights, *columns, **options))
            return values
        return _measure(weights, plan)[:2]


for name in ("l1", "linf", "norms"):
    getattr(torch.ops.convnorm, name).__class__ = OfLayer
torch.ops.convnorm.norms_many.__class__ = OfNetwork


def _is_plain(weight: Any) -> bool:
    return type(weight) in PLAIN and not (weight.requires_grad and is_grad_enabled())


def _kind(weight: Tensor) -> Hashable:
    return weight.shape, weight.dtype, weight.layout, weight.device


def _typed(sizes: Sequence[Any], options: Mapping[str, Any]) -> bytes | None:
    """The arguments with their types: 8.0 and True are no sizes, though they equal some. None: there are others."""
    try:
        return marshal.dumps((sizes, options), 2)
    except ValueError:
        if torch.Size in map(type, sizes):
            return _typed(tuple([tuple(size) if type(size) is torch.Size else size for size in sizes]), options)
        return None


def _learn(key: tuple[Any, ...], weights: Sequence[Tensor], plan: Callable[[Any, Any], str]) -> None:
    """The plan of arguments that were accepted, as the numbers and lists of Python that they are."""
    typed = key[1]
    if typed is None or any(backends.backend_for(weight.device) != "native" for weight in weights):
        return
    sizes, options = marshal.loads(typed)
    if _holds_bytes((sizes, *options.values())):  # arrays and numbers of other libraries
        return
    known = plan([_listed(size) for size in sizes], {name: _spread(name, size) for name, size in options.items()})
    if len(_plans) >= MOST_KNOWN:
        _plans.clear()
    _plans[key] = known


def _holds_bytes(data: Any) -> bool:
    return isinstance(data, bytes) or (isinstance(data, (list, tuple)) and any(map(_holds_bytes, data)))


def _listed(size: Any) -> Any:
    return [size] if isinstance(size, int) else size


def _spread(name: str, size: Any) -> Any:
    return _listed(size) if name in ("stride", "padding", "dilation", "output_padding") else size
