"""Where a model uses its layers, and at which input sizes. Names are those that the user knows."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

from .geometry import GeometryError
from .layers import LAYERS, Layer, as_layer
from .unwritten import Unwritten, held_by, restored, unlogged

COMPILED = "_orig_mod"  # where a module that torch.compile made has the one that it was made of
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # which have it as .module


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and AveragedModel: there layers have the names that the
    user knows.
    """
    while True:
        if COMPILED in model._modules:
            model = model._modules[COMPILED]
        elif isinstance(model, WRAPPERS):
            model = model.module
        else:
            return model


def plain_name(name: str) -> str:
    """Without what torch.compile puts into the names of what is inside a compiled part.

    >>> plain_name("head._orig_mod.0.weight")
    'head.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != COMPILED)


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """A model's layers by the names that the user knows."""
    modules = unwrapped(model).named_modules()
    return {plain_name(name): module for name, module in modules if isinstance(module, LAYERS)}


class Held:
    """Where a model holds its layers, to see when others have taken their places."""

    def __init__(self, model: nn.Module, uses: Sequence[Use]) -> None:
        self._model, self._names = model, {use.module: use.name for use in uses}
        self._bind()

    def _bind(self) -> None:
        # of the parents, not of their dictionaries: Sequential and ModuleList make new ones where a child is deleted
        children = [(parent, key, child) for parent in self._model.modules() for key, child in parent._modules.items()]
        self._places = [
            (parent, key, child)
            for parent, key, child in children
            if child is not None and any(module in self._names for module in child.modules())
        ]

    def warn_of_gone(self, what: str) -> None:
        """Once, of layers that the model does not hold any more."""
        if all(parent._modules.get(key) is module for parent, key, module in self._places):
            return
        present = set(self._model.modules())
        gone = [repr(self._names.pop(module)) for module in list(self._names) if module not in present]
        self._bind()
        if gone:
            warnings.warn(
                f"convnorm: the model does not hold layer {', '.join(gone)} any more, and what took its place is left "
                f"out: make another {what}",
                stacklevel=3,
            )


@dataclass(frozen=True)
class Use:
    """A layer of a model, by name, and one input size that it was used at."""

    name: str
    module: nn.Module
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    @staticmethod
    def of_call(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> Use:
        """Of ``y = module(*args, **kwargs)``."""
        x = args[0] if args else kwargs["input"]
        spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)
        return Use(name, module, tuple(x.shape[x.dim() - spatial :]), tuple(y.shape[y.dim() - spatial :]))

    @property
    def layer(self) -> Layer:
        """Its weight as it is now, and the geometry at this size."""
        layer = as_layer(self.module, self.in_shape)
        if not layer.transposed:
            return layer
        # a call with output_size chooses its own output padding
        least = replace(layer, output_padding=(0,) * len(self.in_shape)).geometry.out_shape
        extra = tuple(size - low for size, low in zip(self.out_shape, least, strict=True))
        return replace(layer, output_padding=extra)


def labels_of(uses: Sequence[Use], *details: Callable[[Use], str]) -> list[str]:
    """A label for each, all different: its name, with as many of the details as that takes."""
    labels = [use.name for use in uses]
    for detail in details:  # the last: one layer, transposed, may make several output sizes of one input size
        labels = [
            label + detail(use) if labels.count(label) > 1 else label for label, use in zip(labels, uses, strict=True)
        ]
    return labels


def shape_of(given: Sequence[int]) -> tuple[int, ...]:
    """Sizes of an input, as whole numbers.

    >>> shape_of([8.0])
    Traceback (most recent call last):
    convnorm.geometry.GeometryError: convnorm: input [8.0] must be a tensor, or its shape in whole numbers of at least 0
    """
    try:
        if not isinstance(given, Mapping) and min(shape := tuple(map(operator.index, given)), default=0) >= 0:
            return shape
    except TypeError:
        pass
    raise GeometryError(f"convnorm: input {given!r} must be a tensor, or its shape in whole numbers of at least 0")


def inputs_of(example: Tensor | Sequence[Any]) -> list[Tensor | Sequence[int]]:
    """One input or its shape, or several of them.

    >>> inputs_of([1, 3, 8, 8]), inputs_of(([1, 3], [1, 5]))
    ([[1, 3, 8, 8]], [[1, 3], [1, 5]])
    """
    several = isinstance(example, (list, tuple)) and any(isinstance(x, (Tensor, Sequence)) for x in example)
    return list(example) if several else [example]


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Errors within say which layer of a model they are of."""
    try:
        yield
    except GeometryError as error:
        raise GeometryError(f"convnorm: layer {layer!r}: {str(error).removeprefix('convnorm: ')}") from error


class Watch:
    """Sees which layers of a model run, at which input sizes, until it is closed.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    >>> watch = Watch(model)
    >>> _ = model(torch.zeros(1, 3, 8, 8))
    >>> [(use.name, use.in_shape) for use in watch.close()]
    [('0', (8, 8)), ('2', ())]
    """

    def __init__(self, model: nn.Module) -> None:
        self.running = ""  # the layer that was entered last
        self._uses: dict[tuple[nn.Module, tuple[int, ...], tuple[int, ...]], Use] = {}
        self._hooks = []
        for name, module in named_layers(model).items():
            self._hooks.append(module.register_forward_pre_hook(partial(self._enter, name)))
            self._hooks.append(module.register_forward_hook(partial(self._see, name), with_kwargs=True))

    def close(self) -> list[Use]:
        """The layers in the order of their use, each once for every input size."""
        for hook in self._hooks:
            hook.remove()
        return list(self._uses.values())

    def _enter(self, name: str, module: nn.Module, args: tuple) -> None:
        self.running = name

    def _see(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], y: Tensor) -> None:
        use = Use.of_call(name, module, args, kwargs, y)
        self._uses.setdefault((module, use.in_shape, use.out_shape), use)


def observe(
    model: nn.Module, *inputs: Tensor | Sequence[int], within: AbstractContextManager | None = None
) -> list[Use]:
    """The layers of a model in the order of their use, each once for every input size, for inputs or their shapes.

    Runs the model in evaluation mode on fake tensors, ``within`` what else is to watch: nothing is computed, and what
    the model holds does not change.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10))
    >>> [(use.name, use.in_shape) for use in observe(model, [1, 3, 8, 8])]
    [('0', (8, 8)), ('2', ())]
    """
    inputs = tuple(x if isinstance(x, Tensor) else shape_of(x) for x in inputs)
    for name, module in model.named_modules():
        own = chain(module.parameters(recurse=False), module.buffers(recurse=False))
        if any(nn.parameter.is_lazy(tensor) for tensor in own):
            raise GeometryError(f"convnorm: weight of layer {name!r} is not initialised yet: run the model once")
    watch = Watch(model)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with (
            restored(model),
            unlogged(),
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),  # compiled code reads memory that fake tensors do not have
            FakeTensorMode(allow_non_fake_inputs=True) as fake,
            Unwritten(x for x in held_by(model) if isinstance(x, Tensor)),
        ):
            model.eval()  # which may write weights, as LoRA does
            shapes_as = {"dtype": like.dtype, "device": like.device}
            fakes = [fake.from_tensor(x) if isinstance(x, Tensor) else torch.empty(*x, **shapes_as) for x in inputs]
            with within or nullcontext():
                model(*fakes)
    except Exception as error:  # whatever the model's own code raises
        shapes = ", ".join(str(list(x.shape if isinstance(x, Tensor) else x)) for x in inputs)
        where = f", in or after layer {watch.running!r}" if watch.running else ""
        what = error if isinstance(error, (RuntimeError, TypeError, ValueError)) else f"{type(error).__name__}: {error}"
        raise GeometryError(f"convnorm: the model does not run on an input of {shapes}{where}: {what}") from error
    finally:
        uses = watch.close()
    return uses
