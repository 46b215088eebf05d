"""The operators: their schemas, their gradients, and how they reach a backend.

``torch.ops.convnorm.l1 | linf | norms | norms_many`` find a layer's windows and hand them, with the weight as it is, to
one of three opaque operators that do the reading (``backends.py`` says which):

    measure_native      the compiled extension: C++ on CPU, CUDA on a GPU
    measure_triton      Triton
    measure_reference   plain PyTorch, on every device

All three have the schema ``MEASURE``. They return, for N weights one after another:

    l1[N], linf[N]      the norms
    winners[N, 2, 2]    for the l1, then the linf norm: the channel that won, and which of its windows

and likewise one of three for a step of norm decay, ``decay_native`` ..., of the schema ``DECAY``. It measures one norm
of every layer into ``norms[N]`` and ``winners[N, 2]`` (or takes it from there, if it is ``measured``), writes the
subgradients down as the newest term of their moving averages h, and adds to each gradient

    grads[l] += rates[l] h_l

but for the gradients that have no elements, of layers that got none. ``momentum.Momentum`` says what the state is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_fake, register_vmap

from .backends import BACKENDS, backend_for, load_native
from .geometry import GeometryError, geometry
from .gradients import Attained, differentiable, transformed
from .kernels.triton_decay import decay_triton
from .kernels.triton_measure import measure_triton
from .momentum import Momentum, decay_reference
from .plan import layer_plan, read_plan
from .reference import measure_reference, result_dtype
from .uncompiled import run_as_it_is
from .winners import window_counts

LAYER = (
    "int[1] stride, int[1] padding, SymInt[] in_shape, *, int[1]? dilation=None, int groups=1, "
    "str padding_mode='zeros', bool transposed=False, int[1]? output_padding=None"
)
LAYERS = (
    "int[][] stride, int[][] padding, SymInt[][] in_shape, *, int[][]? dilation=None, int[]? groups=None, "
    "str[]? padding_mode=None, bool[]? transposed=None, int[][]? output_padding=None"
)
MEASURE = "(Tensor[] weights, str plan) -> (Tensor l1, Tensor linf, Tensor winners)"
DECAY = (
    "(Tensor[] weights, Tensor(a!)[] grads, Tensor(b!) norms, Tensor(c!) winners, Tensor(d!) signs, "
    "Tensor(e!) channels, Tensor(f!) clock, Tensor rates, float momentum, str plan, bool linf, bool measured) -> ()"
)
SGD = (
    "(Tensor(a!)[] weights, Tensor(b!)[] grads, Tensor(c!)[] buffers, bool[] first, int[] groups, float[] group_rates, "
    "Tensor(d!) norms, Tensor(e!) winners, Tensor(f!) signs, Tensor(g!) channels, Tensor(h!) clock, Tensor rates, "
    "float momentum, str plan, bool linf, bool known) -> ()"
)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

lib = Library("convnorm", "DEF")
lib.define(f"l1(Tensor weight, {LAYER}) -> Tensor")
lib.define(f"linf(Tensor weight, {LAYER}) -> Tensor")
lib.define(f"norms(Tensor weight, {LAYER}) -> (Tensor l1, Tensor linf)")
lib.define(f"norms_many(Tensor[] weights, {LAYERS}) -> (Tensor l1s, Tensor linfs)")
lib.define("window_counts(Tensor winner, str plan, bool column) -> Tensor")
lib.define("norms_native(Tensor weight, str plan) -> (Tensor l1, Tensor linf)")  # see direct.py
lib.define("sgd_native" + SGD)  # see optim.py
for name in BACKENDS:
    lib.define(f"measure_{name}" + MEASURE)
    lib.define(f"decay_{name}" + DECAY)

L1, LINF = 0, 1  # in the order of MEASURE


def l1(weight: Tensor, *layer: Any, **options: Any) -> Tensor:
    return _norms([weight], plan_of(weight, *layer, **options), wanted=(L1,))[0].squeeze(0)


def linf(weight: Tensor, *layer: Any, **options: Any) -> Tensor:
    return _norms([weight], plan_of(weight, *layer, **options), wanted=(LINF,))[0].squeeze(0)


def norms(weight: Tensor, *layer: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple([norm.squeeze(0) for norm in _norms([weight], plan_of(weight, *layer, **options))])


def norms_many(weights: list[Tensor], *sizes: list, **options: list) -> tuple[Tensor, ...]:
    if not weights:
        raise GeometryError("convnorm: weights [] is empty")
    return _norms(weights, network_plan_of(weights, *sizes, **options))


run_as_it_is(geometry)  # NumPy, which compilers follow with difficulty; others than operators call it too

# Composite: autograd, vmap and tracing see the operators that these are made of, not these.
for public in (l1, linf, norms, norms_many):
    for key in ("CompositeImplicitAutograd", "FuncTorchBatched"):
        lib.impl(public.__name__, run_as_it_is(public), key)


def plan_of(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    in_shape: Sequence[int],
    *,
    dilation: Sequence[int] | None = None,
    groups: int = 1,
    padding_mode: str = "zeros",
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
) -> str:
    """A layer's plan; refuses what is no layer."""
    spread = None if dilation is None else tuple(dilation)
    extra = None if output_padding is None else tuple(output_padding)
    layer = (tuple(stride), tuple(padding), tuple(in_shape), spread, groups, padding_mode, transposed, extra)
    return _hashed(_layer_plan, weight.shape, *layer)


def network_plan_of(weights: Sequence[Tensor], stride: list, padding: list, in_shape: list, **options: list) -> str:
    """The plan of layers one after another; refuses what is no layer."""
    columns = {"stride": stride, "padding": padding, "in_shape": in_shape, **options}
    frozen = tuple([(name, _frozen(column)) for name, column in columns.items() if column is not None])
    return _hashed(_network_plan, tuple([weight.shape for weight in weights]), frozen)


def _frozen(column: list) -> tuple:
    return tuple([tuple(one) if isinstance(one, list) else one for one in column])


@lru_cache(maxsize=4096)
def _layer_plan(*layer: Any) -> str:
    return layer_plan(geometry(*layer)).text


@lru_cache(maxsize=256)
def _network_plan(shapes: tuple, columns: tuple[tuple[str, tuple], ...]) -> str:
    for name, column in columns:
        if len(column) != len(shapes):
            raise GeometryError(f"convnorm: {name} has {len(column)} entries for {len(shapes)} weights")
    layers = [{name: column[i] for name, column in columns} for i in range(len(shapes))]
    return "".join(layer_plan(geometry(shape, **layer)).text for shape, layer in zip(shapes, layers, strict=True))


def _hashed(plan: Callable[..., str], *layers: Any) -> str:
    try:
        return plan(*layers)
    except TypeError:  # symbolic sizes have no hash
        return plan.__wrapped__(*layers)


_MEASURE, _DECAY = (
    {name: getattr(torch.ops.convnorm, f"{what}_{name}").default for name in BACKENDS} for what in ("measure", "decay")
)


def read(weights: Sequence[Tensor], plan: str) -> tuple[Tensor, Tensor, Tensor]:
    """Read the weights once: their norms and the winners, by the backend that serves their device. No gradients."""
    return _MEASURE[backend_for(device_of(weights))](weights, plan)


def decay(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    state: Momentum,
    rates: Tensor,
    momentum: float,
    plan: str,
    linf: bool,
    measured: bool = False,
) -> None:
    """One step of norm decay, by the backend that serves the weights' device."""
    serve = _DECAY[backend_for(state.norms.device)]
    serve(weights, grads, *state.tensors(), rates, momentum, plan, linf, measured)


def device_of(weights: Sequence[Tensor]) -> torch.device:
    """Of all of them; refuses what no backend reads."""
    device = weights[0].device
    for weight in weights:
        if weight.dtype not in DTYPES or weight.layout is not torch.strided:
            what = weight.dtype if weight.layout is torch.strided else weight.layout
            raise GeometryError(f"convnorm: weight of {what} must be strided, of float64, float32, float16 or bfloat16")
        if weight.device != device:
            raise GeometryError(f"convnorm: weights on {device} and {weight.device} must be on one device")
    return device


def norms_of(weights: list[Tensor], plan: str, linf: bool) -> Tensor:
    """[N], the norms of so many layers, differentiable."""
    return _norms(weights, plan, wanted=(LINF if linf else L1,))[0]


def _norms(weights: list[Tensor], plan: str, wanted: Sequence[int] = (L1, LINF)) -> tuple[Tensor, ...]:
    """[N] each."""
    *values, winners = read(weights, plan)
    values = [values[i] for i in wanted]
    if not (transformed() or (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights))):
        return tuple(values)
    places = [
        Attained(number, layer, winner, layer.over_columns(i == LINF))
        for i in wanted
        for number, (layer, winner) in enumerate(zip(read_plan(plan), winners[:, i].unbind(), strict=True))
    ]
    return differentiable(values, weights, places)


for kernel in (measure_reference, measure_triton, decay_reference, decay_triton, window_counts):
    lib.impl(kernel.__name__, torch.no_grad()(run_as_it_is(kernel)), "CompositeExplicitAutograd")
load_native()
OPAQUE = (
    "window_counts",
    "norms_native",
    "sgd_native",
    *(f"{what}_{name}" for what in ("measure", "decay") for name in BACKENDS),
)
for opaque in OPAQUE:  # not differentiable: pass autograd by
    lib.impl(opaque, torch.library.fallthrough_kernel, "Autograd")


def _fake_measure(weights: list[Tensor], plan: str) -> tuple[Tensor, Tensor, Tensor]:
    value = weights[0].new_empty(len(weights), dtype=result_dtype(weights))
    return value, torch.empty_like(value), value.new_empty(len(weights), 2, 2, dtype=torch.int64)


def _vmap_measure(name: str) -> None:
    @register_vmap(f"convnorm::{name}", lib=lib)
    def batched(info: Any, in_dims: tuple, weights: list[Tensor], plan: str) -> tuple:
        """A batch of networks is one network of all their layers."""
        batch = range(info.batch_size)
        members = [
            w if dim is None else w.select(dim, i) for i in batch for w, dim in zip(weights, in_dims[0], strict=True)
        ]
        results = getattr(torch.ops.convnorm, name)(members, plan * len(batch))
        return tuple(result.unflatten(0, (len(batch), len(weights))) for result in results), (0, 0, 0)


for name in BACKENDS:
    register_fake(f"convnorm::measure_{name}", _fake_measure, lib=lib)
    register_fake(f"convnorm::decay_{name}", lambda *arguments: None, lib=lib)
    _vmap_measure(f"measure_{name}")


register_fake("convnorm::sgd_native", lambda *arguments: None, lib=lib)


@register_fake("convnorm::window_counts", lib=lib)
def _fake_window_counts(winner: Tensor, plan: str, column: bool) -> Tensor:
    (layer,) = read_plan(plan)
    return winner.new_empty([axis.merged_taps for axis in layer.axes], dtype=torch.float32)


@register_vmap("convnorm::window_counts", lib=lib)
def _vmap_window_counts(info: Any, in_dims: tuple, winner: Tensor, plan: str, column: bool) -> tuple[Tensor, int]:
    each = [torch.ops.convnorm.window_counts(one, plan, column) for one in winner.unbind(in_dims[0])]
    return torch.stack(each), 0
