"""A module, or a raw weight with its arguments, as what the operators take; and the convolution that it is."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .geometry import Geometry, GeometryError, geometry
from .plan import LayerPlan, layer_plan

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight and the arguments of its convolution.

    ``torch.ops.convnorm.norms(layer.weight, *layer.sizes, **layer.options)``
    """

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    in_shape: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    transposed: bool
    output_padding: tuple[int, ...]

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return self.stride, self.padding, self.in_shape

    @property
    def options(self) -> dict[str, Any]:
        names = ("dilation", "groups", "padding_mode", "transposed", "output_padding")
        return {name: getattr(self, name) for name in names}

    @cached_property
    def geometry(self) -> Geometry:
        return geometry(tuple(self.weight.shape), *self.sizes, **self.options)

    @cached_property
    def plan(self) -> LayerPlan:
        return layer_plan(self.geometry)

    @property
    def in_channels(self) -> int:
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """The linear map itself, [batch, channels, *in_shape] -> [batch, channels, *out_shape], by PyTorch.

        >>> import torch
        >>> layer = as_layer(nn.Conv1d(2, 3, 3, padding="same"), in_shape=[8])
        >>> layer(torch.ones(1, 2, 8)).shape
        torch.Size([1, 3, 8])
        """
        shape, n_axes = self.geometry, len(self.in_shape)
        if n_axes == 0:
            return x @ (self.weight if self.transposed else self.weight.T)
        if self.transposed:
            convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n_axes - 1]
            full = convolve(x, self.weight, None, shape.stride, 0, 0, self.groups, shape.dilation)
            # padding crops; beyond the last output, output padding adds zeros
            ends = [(before, before + size) for (before, _), size in zip(shape.padding, shape.out_shape, strict=True)]
            missing = [(0, max(0, end - n)) for (_, end), n in zip(ends, full.shape[2:], strict=True)]
            full = F.pad(full, _last_axis_first(missing)) if any(map(any, missing)) else full
            return full[(..., *(slice(*both) for both in ends))]
        if ends := self._same_ends:
            return _convolved(x, self.weight, shape.stride, ends, shape.dilation, self.groups)
        return _convolved(self._pad(x), self.weight, shape.stride, 0, shape.dilation, self.groups)

    def adjoint(self, y: Tensor) -> Tensor:
        """The transpose of the layer's matrix, [batch, channels, *out_shape] -> [batch, channels, *in_shape].

        >>> import torch
        >>> layer = as_layer(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), in_shape=[8])
        >>> x, y = torch.randn(1, 2, 8), torch.randn(1, 3, 10)
        >>> torch.allclose((layer(x) * y).sum(), (x * layer.adjoint(y)).sum(), atol=1e-5)
        True
        """
        shape, n_axes = self.geometry, len(self.in_shape)
        if n_axes == 0:
            return y @ (self.weight.T if self.transposed else self.weight)
        if self.transposed:
            y = F.pad(y, _last_axis_first(shape.padding))
            x = _convolved(y, self.weight, shape.stride, 0, shape.dilation, self.groups)
            return x[(..., *(slice(n) for n in self.in_shape))]  # more of them where output padding reaches a stride
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n_axes - 1]
        sizes = [before + n + after for (before, after), n in zip(shape.padding, self.in_shape, strict=True)]
        if ends := self._same_ends:
            steps = zip(sizes, self.weight.shape[2:], shape.stride, shape.dilation, strict=True)
            unread = [(size - d * (k - 1) - 1) % s for size, k, s, d in steps]
            return convolve(y, self.weight, None, shape.stride, ends, unread, self.groups, shape.dilation)
        padded = convolve(y, self.weight, None, shape.stride, 0, 0, self.groups, shape.dilation)
        unread = [(0, size - read) for size, read in zip(sizes, padded.shape[2:], strict=True)]
        if any(map(any, unread)):
            padded = F.pad(padded, _last_axis_first(unread))
        if self.padding_mode == "zeros":
            inside = zip(shape.padding, self.in_shape, strict=True)
            return padded[(..., *(slice(before, before + n) for (before, _), n in inside))]
        with torch.inference_mode(False), torch.enable_grad():
            x = y.new_zeros(len(y), self.in_channels, *self.in_shape, requires_grad=True)
            (x,) = torch.autograd.grad(self._pad(x), x, padded)
        return x

    @property
    def _same_ends(self) -> tuple[int, ...]:
        """The padding, where PyTorch's convolutions take it themselves: as many zeros after an axis as before it."""
        ends = self.geometry.padding
        same = self.padding_mode == "zeros" and all(before == after for before, after in ends)
        return tuple(before for before, _ in ends) if same else ()

    def _pad(self, x: Tensor) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, _last_axis_first(self.geometry.padding), mode)


def _convolved(x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """Of one channel, where strides that say "channels last" mean nothing, PyTorch 2.13 reads beyond a float32 input on
    a CPU: such strides are made plain.
    """
    if x.shape[1] == 1:
        x, weight = (tensor.flatten().view(tensor.shape) for tensor in (x, weight))
    return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3](x, weight, None, *geometry)


def _last_axis_first(ends: Sequence[tuple[int, int]]) -> list[int]:
    return [p for both in reversed(ends) for p in both]


def as_layer(layer: nn.Module | Tensor | Layer, in_shape: Sequence[int] = (), **options: Any) -> Layer:
    """A module of PyTorch at one input size, or a raw weight with the options of its operator.

    >>> as_layer(nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1), in_shape=[5, 5]).geometry.out_shape
    (12, 12)
    """
    if isinstance(layer, Layer):
        return layer
    if isinstance(layer, Tensor):
        weight = layer
    elif isinstance(layer, LAYERS):
        if options:
            raise GeometryError(f"convnorm: {', '.join(options)}: a module brings its own, they are for raw weights")
        weight, options = current_weight(layer), _options_of(layer)
    else:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise TypeError(f"convnorm: layer of type {type(layer).__name__} must be a tensor or one of {kinds}")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise GeometryError("convnorm: weight is not initialised yet: run the layer once")
    n_axes = max(weight.dim() - 2, 0)
    given = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0} | options
    unknown = set(given) - {"stride", "padding", "dilation", "output_padding", "groups", "padding_mode", "transposed"}
    if unknown:
        raise TypeError(f"convnorm: unknown option {', '.join(sorted(unknown))}")
    given |= {name: plain for name, plain in (("dilation", 1), ("output_padding", 0)) if given[name] is None}
    sizes = {name: _tuple(name, given[name], n_axes) for name in ("stride", "padding", "dilation", "output_padding")}
    return Layer(
        weight,
        in_shape=_tuple("in_shape", in_shape, n_axes),
        groups=given.get("groups", 1),
        padding_mode=given.get("padding_mode", "zeros"),
        transposed=given.get("transposed", False),
        **sizes,
    )


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """In evaluation mode: a parametrized weight may change in training whenever it is read."""
    training = [module for one in modules for module in one.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def current_weight(module: nn.Module) -> Tensor:
    """The weight that a module has in evaluation. Where a hook computes it before each run (``weight_norm``,
    ``spectral_norm`` and ``prune`` of ``torch.nn.utils``), the module holds that of the last run only.
    """
    if is_parametrized(module, "weight"):
        with evaluating(module.parametrizations.weight):
            return module.weight
    if "weight" not in module._parameters:
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, BasePruningMethod) and hook._tensor_name == "weight":
                return hook.apply_mask(module)
            if isinstance(hook, WeightNorm) and hook.name == "weight":
                return hook.compute_weight(module)
            if isinstance(hook, SpectralNorm) and hook.name == "weight":
                return hook.compute_weight(module, do_power_iteration=False)
    return module.weight


class Stored(nn.Module):
    """In a parametrization's place: what it made."""

    def __init__(self, made: Tensor) -> None:
        super().__init__()
        self.register_buffer("made", made)

    def forward(self) -> Tensor:
        return self.made


@torch.no_grad()
def as_stored(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, to be cast: parametrized weights stay those of the model's own precision, not others
    that the same parametrization makes in another one.
    """
    made = {id(x): x.detach().clone() for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor)}
    copied = copy.deepcopy(model, made).eval()
    for module in list(copied.modules()):
        for name, parametrization in list(module.parametrizations.items()) if is_parametrized(module) else ():
            module.parametrizations[name] = Stored(parametrization().detach().clone())
    return copied


def _tuple(name: str, value: int | Sequence[int], n_axes: int) -> tuple[int, ...]:
    if isinstance(value, (int, torch.SymInt)):
        return (value,) * n_axes
    try:
        if getattr(value, "shape", None) == ():  # one number of NumPy's, or in a tensor
            return (operator.index(value),) * n_axes
        return tuple(n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in value)
    except TypeError:
        raise GeometryError(f"convnorm: {name} {value!r} must be whole numbers") from None


def _options_of(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, nn.Linear):
        return {}
    options = {name: getattr(module, name) for name in ("stride", "dilation", "groups", "padding_mode")}
    if isinstance(module, TRANSPOSED):
        return options | {"padding": module.padding, "output_padding": module.output_padding, "transposed": True}
    return options | {"padding": in_numbers(module.padding, module.kernel_size, module.dilation)}


def in_numbers(padding: str | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> Sequence[int]:
    """(before, after) for each axis where the padding is ``"same"``, which puts the odd one behind."""
    if padding == "valid":
        return (0,) * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(p for total in totals for p in (total // 2, total - total // 2))
    return padding
