"""The layers of a model in forward order, and the batch norm that directly follows each.

Modules whose ``forward`` is PyTorch's own are taken by what they are, padding included. Everywhere else the functions
are watched, ``F.conv2d(x, weight)`` and the like: where ``weight`` is a parameter or buffer of the model, or computed
from them alone, the call is a layer. So are the modules that other libraries derive, which pad, cast or standardise in
a ``forward`` of their own. A weight that depends on the input makes no layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from ..layers import LAYERS, Layer, evaluating
from ..unwritten import ASSIGN
from ..uses import Use, naming, observe, plain_name, unwrapped
from .calls import BatchNorm, Found, called_layer, is_vector, multiplier
from .computed import Computations, Computed, Drawn

PLAIN = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
FUNCTIONS = {
    F.linear: PLAIN[:3],
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), PLAIN),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED),
}
BATCH_NORM = inspect.signature(F.batch_norm)


def find(model: nn.Module, *inputs: Tensor | Sequence[int]) -> tuple[list[Found], list[str]]:
    """The layers, and the names of the other parameters that are no mere vectors.

    Runs the model in evaluation mode on fake tensors: nothing is computed, no statistics change.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    >>> found, others = find(model, [1, 3, 8, 8])
    >>> [(one.name, one.kind, one.batch_norm and one.batch_norm.name) for one in found], others
    ([('0', 'Conv2d', '1'), ('3', 'Linear', None)], [])
    """
    model = unwrapped(model)
    seen = Seen(model)
    try:
        observe(model, *inputs, within=seen)
    finally:
        seen.close()
    return seen.found(), seen.others()


@dataclass
class Output:
    """What a layer returned (kept, so that its id stays its own), and the calls that took it."""

    tensor: Tensor
    consumers: list[tuple[Callable, Sequence[Any], dict[str, Any]] | None] = field(default_factory=list)


@dataclass
class Place:
    """A layer at one input size, and all that it returned."""

    name: str
    kind: str
    layer: Callable[[], Layer]  # to be called when nothing is fake any more
    held: list[Tensor]  # parameters and buffers that it is made of
    outputs: list[Output] = field(default_factory=list)


class Seen(TorchFunctionMode):
    """What runs in a forward pass: layers, and who takes what they return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._names.setdefault(id(tensor), plain_name(name))
        self._owners = {
            id(module._parameters.get("weight")): module for module in model.modules() if isinstance(module, LAYERS)
        }
        self._computed = Computations((*model.parameters(), *model.buffers()))
        self._places: dict[Any, Place] = {}
        self._outputs: dict[int, Output] = {}
        self._inside = 0  # so many modules that are taken as a whole: a parametrization may be one within one
        self._covered: set[int] = set()  # parameters of layers
        self._hooks = [model.register_forward_pre_hook(lambda model, args: self._computed.forget())]  # of its inputs
        for name, module in model.named_modules():
            if isinstance(module, LAYERS) and _runs_as_pytorch(module):
                self._hooks.append(module.register_forward_pre_hook(self._enter))
                leave = partial(self._leave, plain_name(name))
                # before other hooks: what they make of the output takes it
                self._hooks.append(module.register_forward_hook(leave, prepend=True, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(lambda model, args, result: self._consumed(result)))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def found(self) -> list[Found]:
        found = []
        with torch.no_grad(), evaluating(self._model):  # once: it goes through all modules
            for place in self._places.values():
                with naming(place.name):
                    try:
                        layer = place.layer()
                    except Drawn:
                        continue
                    _ = layer.geometry  # refuses what is no layer
                self._covered.update(map(id, place.held))
                found.append(Found(place.name, place.kind, layer, len(place.outputs), self._batch_norm(place, layer)))
        return found

    def others(self) -> list[str]:
        named = self._model.named_parameters()
        return [plain_name(name) for name, p in named if not is_vector(p) and id(p) not in self._covered]

    # --- while the model runs ----------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._inside += 1

    def _leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
        self._inside -= 1
        use = Use.of_call(name, module, args, kwargs, y)
        kind = next(kind.__name__ for kind in LAYERS if isinstance(module, kind))
        weight = vars(module).get("weight")  # by a hook, which keeps that of the last true run (weight_norm)
        weight = weight if isinstance(weight, FakeTensor) else module._parameters.get("weight")
        source = None if weight is None else self._computed.of(weight)
        if weight is not None and source is None:
            return

        def layer() -> Layer:  # of what it ran with, which its own weight may have given way to
            return use.layer if source is None else replace(use.layer, weight=_value(source))

        held = list(module.parameters()) if source is None else _held(source)
        self._returned((use, id(source)), Place(name, kind, layer, held), y)

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # as flex_attention does: it would trace what is below
            return func(*args, **kwargs)
        if func == ASSIGN:
            self._computed.assign(*args)
        result = func(*args, **kwargs)
        if next(_tensors([result]), None) is None:  # sizes and the like were asked for
            return result
        self._consumed((args, kwargs), (func, args, kwargs))
        self._computed.note(func, args, kwargs, result)
        if func in FUNCTIONS and not self._inside:
            self._call(func, dict(zip(FUNCTIONS[func], args, strict=False)) | kwargs, result)
        return result

    def _consumed(self, values: Any, call: tuple | None = None) -> None:
        """By a call, or as what the model itself returns."""
        for x in _tensors([values]):
            if output := self._outputs.get(id(x)):
                output.consumers.append(call)

    def _call(self, func: Callable, arguments: dict[str, Any], y: Tensor) -> None:
        """Of a function of its own, not within a module of PyTorch."""
        x, weight = arguments["input"], arguments["weight"]
        source = self._computed.of(weight)
        if source is None or weight.dim() < 2 or self._computed.of(x) is not None:  # what is computed may be a weight
            return
        held = _held(source)
        if not held:  # the same in every model
            return
        name, kind = self._described(held)
        called = called_layer(weight, tuple(x.shape), arguments, FUNCTIONS[func] is TRANSPOSED)

        def layer() -> Layer:
            return replace(called, weight=_value(source))

        key = (id(source), *called.sizes, *called.options.values())
        self._returned(key, Place(name, kind or func.__name__, layer, held), y)

    def _described(self, held: Sequence[Tensor]) -> tuple[str, str]:
        """A name, which several parameters have in common, and the type of module that they are weights of, if one."""
        held = [x for x in held if not is_vector(x)] or held
        names = [self._names[id(x)] for x in held]
        shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".") for name in names), strict=False))
        name = ".".join(parts[0] for parts in shared) or names[0]
        owners = {type(owner).__name__ for x in held if (owner := self._owners.get(id(x)))}
        return name.removesuffix(".weight"), owners.pop() if len(owners) == 1 else ""

    def _returned(self, key: tuple, place: Place, y: Tensor) -> None:
        output = Output(y)
        self._places.setdefault(key, place).outputs.append(output)
        self._outputs[id(y)] = output

    # --- afterwards --------------------------------------------------------------------------------------------------

    def _batch_norm(self, place: Place, layer: Layer) -> BatchNorm | None:
        """The one that takes everything that the layer returns, and takes it alone."""
        found = {}
        for output in place.outputs:
            match output.consumers:
                case [(F.batch_norm, args, kwargs)]:
                    pass
                case _:
                    return None
            bound = BATCH_NORM.bind(*args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments
            channels_second = output.tensor.dim() == len(layer.in_shape) + 2  # else it counts something else
            if given["training"] or id(given["running_var"]) not in self._names or not channels_second:
                return None
            found[id(given["running_var"])] = given
        if len(found) != 1:
            return None
        (given,) = found.values()
        weight = given["weight"]
        if isinstance(weight, FakeTensor):
            source = self._computed.of(weight)
            if not isinstance(source, Computed):  # it depends on the input
                return None
            try:
                weight = source.value()
            except Drawn:
                return None
        name = self._names[id(given["running_var"])].rpartition(".")[0]
        return BatchNorm(name, multiplier(given["running_var"], weight, given["eps"]))


def _runs_as_pytorch(module: nn.Module) -> bool:
    """Whether its ``forward`` is PyTorch's own, so that stride and padding say what it does."""
    kind = next(kind for kind in LAYERS if isinstance(module, kind))
    same = [getattr(type(module), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward")]
    return all(same) and "forward" not in vars(module)


def _value(source: Tensor | Computed) -> Tensor:
    return source.value() if isinstance(source, Computed) else source


def _held(source: Tensor | Computed) -> list[Tensor]:
    return source.held() if isinstance(source, Computed) else [source]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """All of them, also in lists and dictionaries."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            yield from _tensors(value.values() if isinstance(value, dict) else value)
