"""The one table of layers that tests and benchmarks share, and the random layers and weights of the fuzz."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convnorm.geometry import Geometry, geometry
from convnorm.plan import layer_plan

MODES = ("zeros", "circular", "replicate", "reflect")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """A layer as a call of ``torch.ops.convnorm.l1(weight, *case.args, **case.options)`` describes it."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = (1,)
    padding: tuple[int, ...] = (0,)
    in_shape: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)  # those of the operator that are not at their default

    @property
    def args(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.in_shape)

    @property
    def keywords(self) -> dict[str, Any]:
        """For ``convnorm.norms(weight, case.in_shape, **case.keywords)``, and all that is called as it is."""
        return {"stride": self.stride, "padding": self.padding, **self.options}

    @property
    def plan(self) -> str:
        return layer_plan(self.geometry).text

    @property
    def geometry(self) -> Geometry:
        hashable = {name: tuple(v) if isinstance(v, list) else v for name, v in self.options.items()}
        return geometry(self.weight_shape, self.stride, self.padding, self.in_shape, **hashable)

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def mode(self) -> str:
        return self.options.get("padding_mode", "zeros")

    @property
    def transposed(self) -> bool:
        return self.options.get("transposed", False)


def _case(weight_shape, in_shape=(), stride=(1,), padding=(0,), **options) -> Case:
    return Case(weight_shape, stride, padding, in_shape, options)


TABLE = {
    "linear": _case((5, 7)),
    "conv1d": _case((4, 3, 3), (10,), padding=(1,)),
    "conv1d_same": _case((4, 3, 4), (10,), padding=(1, 2)),
    "conv2d": _case((4, 3, 3, 3), (8, 8), padding=(1, 1)),
    "pointwise": _case((6, 5, 1, 1), (4, 4)),
    "stride_2": _case((4, 3, 3, 3), (8, 8), (2, 2), (1, 1)),
    "stride_past_kernel": _case((3, 2, 2, 1), (9, 9), (4, 3)),
    "small_input": _case((4, 3, 3, 3), (1, 2), padding=(1, 1)),
    "rectangular": _case((2, 3, 2, 5), (4, 9), (1, 3), (0, 2), dilation=[2, 1]),
    "dilated": _case((2, 2, 3, 3), (7, 7), padding=(2, 2), dilation=[2, 2]),
    "depthwise": _case((6, 1, 3, 3), (6, 6), padding=(1, 1), groups=6),
    "grouped": _case((6, 2, 3, 3), (5, 5), (2, 2), (1, 1), groups=3),
    "asymmetric": _case((2, 3, 3, 3), (5, 4), padding=(2, 0, 0, 1)),
    "circular": _case((3, 2, 3, 3), (3, 4), padding=(2, 2), padding_mode="circular"),
    "replicate": _case((3, 2, 3, 3), (2, 4), padding=(3, 1), padding_mode="replicate"),
    "reflect": _case((3, 2, 4, 3), (4, 3), (2, 1), (3, 2), padding_mode="reflect"),
    "conv3d": _case((2, 2, 3, 2, 3), (4, 3, 3), (2, 1, 1), (1, 0, 1)),
    "conv3d_circular": _case((2, 1, 2, 2, 3), (2, 3, 3), padding=(1, 1, 2), padding_mode="circular"),
    "nothing_but_padding": _case((2, 3, 1), (1,), (2,), (1,)),
    "transposed": _case((3, 4, 3, 3), (4, 4), (2, 2), (1, 1), transposed=True, output_padding=[1, 1]),
    "transposed_grouped": _case((4, 3, 3), (5,), (3,), (1, 0), transposed=True, groups=2, output_padding=[2]),
    "transposed_dilated": _case((2, 3, 3), (4,), padding=(1,), transposed=True, dilation=[3], output_padding=[2]),
}


def random_case(rng: np.random.Generator, merging: bool | None = None) -> Case:
    """A layer that PyTorch has; ``merging`` asks for padding that does, or does not, merge taps."""
    while True:
        axes = int(rng.choice(4, p=[0.04, 0.3, 0.46, 0.2]))
        if not axes:
            return _case(tuple(map(int, rng.integers(1, 8, 2))))
        modes = {None: MODES, True: MODES[1:], False: MODES[:1]}[merging]
        mode = str(rng.choice(modes)) if merging is not None or rng.random() < 0.6 else "zeros"
        transposed = mode == "zeros" and rng.random() < 0.35
        groups = int(rng.choice([1, 1, 1, 2, 3]))
        biggest = {1: 6, 2: 4, 3: 2}[axes] // (2 if groups > 1 else 1)
        first, second = (int(c) for c in rng.integers(1, biggest + 1, 2))
        drawn = [_random_axis(rng, axes, mode, transposed) for _ in range(axes)]
        size = (first * groups if transposed else second * groups) * np.prod([axis["n"] for axis in drawn])
        if size > 500:
            continue
        return _assemble((first * groups, second), drawn, mode, transposed, groups)


def _assemble(channels: tuple[int, int], drawn: list[dict[str, Any]], mode: str, transposed: bool, groups: int) -> Case:
    pairs = [axis["pair"] for axis in drawn]
    same = all(before == after for before, after in pairs)
    return _case(
        (*channels, *(axis["k"] for axis in drawn)),
        tuple(axis["n"] for axis in drawn),
        tuple(axis["stride"] for axis in drawn),
        tuple(before for before, _ in pairs) if same else tuple(p for pair in pairs for p in pair),
        dilation=[axis["dilation"] for axis in drawn],
        groups=groups,
        padding_mode=mode,
        transposed=transposed,
        output_padding=[axis["extra"] for axis in drawn],
    )


def random_large_case(rng: np.random.Generator, elements: int = 1 << 20) -> Case:
    """A layer of up to so many weights: too large for a matrix, large enough for every way to cut it into blocks."""
    axes = int(rng.choice(4, p=[0.1, 0.2, 0.5, 0.2]))
    mode = str(rng.choice(MODES)) if rng.random() < 0.4 else "zeros"
    transposed = mode == "zeros" and rng.random() < 0.3
    drawn = [_random_axis(rng, axes, mode, transposed) for _ in range(axes)]
    taps = int(np.prod([axis["k"] for axis in drawn]))
    kind = rng.choice(["plain", "depthwise", "grouped"], p=[0.6, 0.15, 0.25]) if axes else "plain"
    groups = {"plain": 1, "depthwise": _log_uniform(rng, 5000)}.get(kind) or _log_uniform(rng, 200)
    rows = 1 if kind == "depthwise" else _log_uniform(rng, max(1, elements // (taps * groups)))
    columns = 1 if kind == "depthwise" else _log_uniform(rng, max(1, elements // (taps * groups * rows)))
    return _assemble((rows * groups, columns), drawn, mode, transposed, groups)


def _log_uniform(rng: np.random.Generator, most: int) -> int:
    return int(np.exp(rng.uniform(0, np.log(most + 1))))


def _random_axis(rng, axes, mode, transposed) -> dict[str, Any]:
    while True:
        k, stride, dilation = int(rng.integers(1, 6 if axes < 3 else 4)), int(rng.integers(1, 5)), _few(rng, 1, 3)
        n = int(rng.integers(1, {1: 12, 2: 10, 3: 6}[axes]))
        before = _few(rng, 0, 4)
        after = before if rng.random() < 0.7 else _few(rng, 0, 4)
        extra = int(rng.integers(0, max(stride, dilation))) if transposed and rng.random() < 0.5 else 0
        reach = dilation * (k - 1) + 1
        if transposed:
            valid = (n - 1) * stride - before - after + reach + extra >= 1
        else:
            valid = n + before + after >= reach
            valid &= max(before, after) <= {"circular": n, "reflect": n - 1}.get(mode, 4)
        if valid:
            return {"k": k, "n": n, "stride": stride, "dilation": dilation, "pair": (before, after), "extra": extra}


def _few(rng, low, high) -> int:
    """Mostly the least of them."""
    return int(rng.integers(low, high + 1)) if rng.random() < 0.6 else low


def columns(layers: Sequence[Case]) -> tuple[tuple[list, list, list], dict[str, list]]:
    """The arguments of ``norms_many`` for these layers, and its options."""
    defaults = {"dilation": [1], "groups": 1, "padding_mode": "zeros", "transposed": False, "output_padding": [0]}
    options = {name: [case.options.get(name, value) for case in layers] for name, value in defaults.items()}
    return tuple(map(list, zip(*(case.args for case in layers), strict=True))), options


def windows(case: Case, ord: float) -> list[tuple[int, ...]]:
    """Where each window of the layer stands: the positions of its input (l1) or of its output (linf)."""
    layer = case.geometry
    sizes = layer.in_shape if ord == 1 else layer.out_shape
    sides = [axis.inputs if (ord == 1) != layer.transposed else axis.outputs for axis in layer.axes]
    places = [[window.position % n for window in side] for side, n in zip(sides, sizes, strict=True)]
    return list(itertools.product(*places))


def window_sums(case: Case, matrix: Tensor, ord: float) -> np.ndarray:
    """sums[channels, windows] of the explicit matrix's columns (l1) or rows (linf), where the windows stand."""
    layer = case.geometry
    sizes = layer.in_shape if ord == 1 else layer.out_shape
    sums = matrix.abs().sum(0 if ord == 1 else 1).reshape(-1, *sizes).numpy()
    return np.stack([sums[(slice(None), *place)] for place in windows(case, ord)], 1)


VALUES = ("normal", "normal", "integers", "zeros", "constant", "sparse", "huge", "tiny", "negative", "uneven")
LAYOUTS = ("contiguous", "channels_last", "reversed", "sliced", "unaligned", "expanded")


def random_weight(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    values: str | None = None,
    layout: str | None = None,
    device: str = "cpu",
) -> Tensor:
    weight = random_values(rng, shape, dtype, values or str(rng.choice(VALUES))).to(device)
    return lay_out(weight, layout or str(rng.choice(LAYOUTS)))


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype, values: str) -> Tensor:
    normal = rng.standard_normal(shape)
    info = torch.finfo(dtype)
    weight = {
        "normal": lambda: normal,
        "integers": lambda: rng.integers(-2, 3, shape).astype(float),
        "zeros": lambda: np.zeros(shape),
        "constant": lambda: np.full(shape, rng.choice([-1.0, 0.5, 3.0])),
        "sparse": lambda: np.where(rng.random(shape) < 0.8, 0.0, normal),
        "huge": lambda: (normal / 8) * info.max**0.8,
        "tiny": lambda: normal * info.tiny,  # about half of them denormal
        "negative": lambda: -abs(normal),
        "uneven": lambda: normal * 10.0 ** rng.integers(-4, 4, shape),
    }[values]()
    return torch.from_numpy(weight).to(dtype)


def lay_out(weight: Tensor, layout: str) -> Tensor:
    """The same values (but for ``expanded``) in another place in memory, with NaN wherever nobody should read."""
    nan = float("nan")
    if layout == "channels_last":
        return weight.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "reversed":
        dims = tuple(reversed(range(weight.dim())))
        return weight.permute(dims).contiguous().permute(dims)
    if layout == "sliced":
        roomy = weight.new_full([2 * size + 1 for size in weight.shape], nan)
        return roomy[tuple(slice(1, None, 2) for _ in weight.shape)].copy_(weight)
    if layout == "unaligned":
        roomy = weight.new_full([weight.numel() + 2], nan)
        return roomy[1:-1].view(weight.shape).copy_(weight)
    if layout == "expanded":
        return weight[:1].expand_as(weight)
    return weight


def fuzz(seed: int, number: int, device: str = "cpu") -> tuple[Case, Tensor]:
    """Random case ``number``, on its own: any one of them can be had again."""
    rng = np.random.default_rng((seed, number))
    dtype = DTYPES[int(rng.choice(4, p=[0.55, 0.25, 0.1, 0.1]))]
    case = random_case(rng)
    return case, random_weight(rng, case.weight_shape, dtype, device=device)


def replay(seed: int, number: int, case: Case) -> str:
    return f"Again: --seed {seed}, number {number}, {case}"


def careless_case(rng: np.random.Generator) -> Case:
    """A layer that PyTorch may or may not have."""
    axes = int(rng.integers(1, 4))

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(value) for value in rng.integers(low, high, axes))

    transposed = bool(rng.random() < 0.3)
    mode = "zeros" if transposed else str(rng.choice(MODES))
    shape = (int(rng.integers(1, 5)), int(rng.integers(1, 3)), *draw(1, 4))
    options = {"dilation": list(draw(1, 4)), "groups": int(rng.integers(1, 4)), "padding_mode": mode}
    options |= {"transposed": transposed, "output_padding": list(draw(0, 4)) if transposed else [0]}
    return _case(shape, draw(1, 6), draw(1, 4), draw(0, 5), **options)
