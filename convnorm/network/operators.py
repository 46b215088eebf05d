"""The linear maps between the nonlinear operations of a network, with certified norms.

An operator maps one sample. What it is made of is measured as it is: layers, maps that act on each axis by itself
(``separable.py``), rearrangements; and what composes them (``merge.py`` first makes one layer of two where it can):

    |B A| <= |B| |A|        |A + B| <= |A| + |B|        |[A; B]|_1 <= |A|_1 + |B|_1,  likewise for l2 and linf

Where the matrix is small its columns are computed, the images of the unit vectors, and its own norm is taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..layers import Layer
from ..spectral import l2
from ..spectral.admit import admitted
from ..spectral.bounds import measured
from ..spectral.outward import EPS
from ..spectral.outward import upward as scaled_upward
from .rounding import joined, matrix_norm, plus, root, times

MOST_ENTRIES = 1 << 22  # of a matrix whose columns are computed, and of the identity that it is computed from
MOST_WORK = 1 << 27  # multiplications to compute them
MOST_COLUMNS = 1 << 10  # rows or columns, the fewer of them, of one whose l2 norm is taken

Shape = tuple[int, ...]


class Operator(ABC):
    """A linear map of tensors ``[*in_shape]`` to ``[*out_shape]``.

    ``terms`` is the number of products that one output sums up, at most; ``work`` that of all multiplications;
    ``count`` that of the single operators that it applies.
    """

    in_shape: Shape
    out_shape: Shape
    terms: int = 1
    work: int = 0
    count: int = 1
    composite = False

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """``x[count, *in_shape]`` in float64 on a CPU."""

    @abstractmethod
    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        """A certified upper bound of the l_ord norm, and what shows it."""

    def absolute(self, ord: float) -> float:
        """At least the l1 or linf norm of the matrix of absolute values that ``__call__`` adds up."""
        return self.measure(ord, 1.0)[0]

    @cached_property
    def _found(self) -> dict[tuple[float, float], tuple[float, str]]:
        return {}

    def norm(self, ord: float, rtol: float = 1e-2) -> tuple[float, str]:
        key = (ord, rtol if ord == 2 else 0.0)
        if key not in self._found:
            found = self.measure(ord, rtol)
            if self.composite and self.is_small(ord):
                found = min(found, (explicit_norm(self, ord), "explicit matrix"))
            self._found[key] = found
        return self._found[key]

    def is_small(self, ord: float) -> bool:
        inputs, outputs = math.prod(self.in_shape), math.prod(self.out_shape)
        small = inputs * max(inputs, outputs) <= MOST_ENTRIES and inputs * self.work <= MOST_WORK
        return small and (ord != 2 or min(inputs, outputs) <= MOST_COLUMNS)


def explicit_norm(operator: Operator, ord: float) -> float:
    """The norm of the computed matrix, and of what rounding may have cost: (1 + EPS)^terms - 1 of absolute values."""
    inputs = math.prod(operator.in_shape)
    basis = torch.eye(inputs, dtype=torch.float64).view(inputs, *operator.in_shape)
    matrix = operator(basis).reshape(inputs, -1).T
    slack = 1.01 * (operator.terms + 8) * EPS
    off = {side: times(slack, operator.absolute(side)) for side in (1, math.inf)}
    return plus(matrix_norm(matrix, ord), root(times(off[1], off[math.inf])) if ord == 2 else off[ord])


@dataclass(frozen=True, eq=False)
class Scalar(Operator):
    """Multiplication by a number; 1 is the identity."""

    in_shape: Shape
    factor: float = 1.0
    terms = 2

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factor

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return abs(self.factor), "exact"


@dataclass(frozen=True, eq=False)
class Rearranged(Operator):
    """Every output is an input, and no two are the same one: permutations, reshapes, slices."""

    in_shape: Shape
    out_shape: Shape
    move: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        return self.move(x)

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return 1.0, "exact"


@dataclass(frozen=True, eq=False)
class Diagonal(Operator):
    """Every input times its own factor."""

    factors: Tensor  # float64 [*in_shape]

    @property
    def in_shape(self) -> Shape:
        return tuple(self.factors.shape)

    @property
    def out_shape(self) -> Shape:
        return tuple(self.factors.shape)

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.factors

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return float(self.factors.abs().max()) if self.factors.numel() else 0.0, "exact"


@dataclass(frozen=True, eq=False)
class Scale(Operator):
    """A factor for each place along one axis, ``factors[channels]`` in float64; ``error`` is how far the factors may be
    from those meant. Axes count the batch as 0.
    """

    factors: Tensor
    in_shape: Shape
    channel: int
    error: float = 0.0
    terms = 9  # roundings of the factors

    @property
    def out_shape(self) -> Shape:
        return self.in_shape

    def __call__(self, x: Tensor) -> Tensor:
        return (x.movedim(self.channel, -1) * self.factors.cpu()).movedim(-1, self.channel)

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return plus(float(self.factors.abs().max()), self.error), "exact"


@dataclass(frozen=True, eq=False)
class LayerOperator(Operator):
    """A layer along a channel axis and spatial axes of a tensor, the same at each place of the other axes.

    Axes count the batch as 0. ``error`` is how far the weights may be from those meant, in the l1 and the linf norm of
    the layer: those that are computed, as from a batch norm or from other layers, are rounded.
    """

    layer: Layer
    in_shape: Shape
    channel: int
    spatial: Shape
    error: tuple[float, float] = (0.0, 0.0)

    @cached_property
    def out_shape(self) -> Shape:
        sizes = {self.channel: self.layer.out_channels, **self._sizes(self.layer.geometry.out_shape)}
        return tuple(sizes.get(axis, n) for axis, n in enumerate(self.in_shape, 1))

    @property
    def _detached(self) -> Layer:
        """Bounds have no gradients."""
        return replace(self.layer, weight=self.layer.weight.detach())

    def _sizes(self, sizes: Sequence[int]) -> dict[int, int]:
        return dict(zip(self.spatial, sizes, strict=True))

    @property
    def terms(self) -> int:
        weight, merged = self.layer.weight, 1
        for axis in self.layer.plan.axes:
            merged *= max(axis.merged_taps, *map(len, axis.inputs), *map(len, axis.outputs))
        return max(weight.shape[:2]) * max(merged, math.prod(weight.shape[2:])) + 8  # roundings of the weights

    @property
    def work(self) -> int:
        reads = self.layer.in_shape if self.layer.transposed else self.layer.geometry.out_shape
        elsewhere = math.prod(self.in_shape) // max(1, self.layer.in_channels * math.prod(self.layer.in_shape))
        return self.layer.weight.numel() * math.prod(reads) * elsewhere

    def __call__(self, x: Tensor) -> Tensor:
        first = (self.channel, *self.spatial)
        others = [axis for axis in range(x.dim()) if axis not in first]
        order = [*others, *first]
        moved = x.permute(order)
        layer = replace(self.layer, weight=self._detached.weight.to("cpu", torch.float64))
        y = layer(moved.flatten(0, len(others) - 1))
        y = y.unflatten(0, moved.shape[: len(others)])
        return y.permute([order.index(axis) for axis in range(x.dim())])

    @cached_property
    def sums(self) -> dict[float, tuple[float, float]]:
        """By ord, the norm and that of the absolute weights."""
        norms, absolute, slack, scale = measured(admitted(self._detached, (), {}))
        found = {}
        for ord, error in zip((1, math.inf), self.error, strict=True):
            exact, large = (norms.l1, absolute.l1) if ord == 1 else (norms.linf, absolute.linf)
            bounds = (exact + slack * large, large + slack * large)
            found[ord] = tuple(plus(float(scaled_upward(bound, scale)), error) for bound in bounds)
        return found

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        if ord != 2:
            return self.sums[ord][0], "exact"
        bracket = l2(self._detached, rtol=rtol)
        return plus(float(bracket.upper), root(times(*self.error))), bracket.certificate

    def absolute(self, ord: float) -> float:
        return self.sums[ord][1]


@dataclass(frozen=True, eq=False)
class Product(Operator):
    """``first``, then ``second``."""

    second: Operator
    first: Operator
    composite = True

    @property
    def in_shape(self) -> Shape:
        return self.first.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.second.out_shape

    @property
    def terms(self) -> int:
        return self.first.terms + self.second.terms

    @property
    def work(self) -> int:
        return self.first.work + self.second.work

    @cached_property
    def count(self) -> int:
        return self.first.count + self.second.count

    def __call__(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return times(self.second.norm(ord, rtol)[0], self.first.norm(ord, rtol)[0]), "product"

    def absolute(self, ord: float) -> float:
        return times(self.second.absolute(ord), self.first.absolute(ord))


@dataclass(frozen=True, eq=False)
class Merged(Operator):
    """Several operators, ``parts``, that one layer does the work of."""

    parts: Operator
    layer: LayerOperator
    composite = True

    @property
    def in_shape(self) -> Shape:
        return self.parts.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.parts.out_shape

    @property
    def terms(self) -> int:
        return self.parts.terms

    @property
    def work(self) -> int:
        return self.parts.work

    @property
    def count(self) -> int:
        return self.parts.count

    def __call__(self, x: Tensor) -> Tensor:
        return self.parts(x)  # of stored weights, not of computed ones

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return min(self.layer.norm(ord, rtol), self.parts.measure(ord, rtol))

    def absolute(self, ord: float) -> float:
        return self.parts.absolute(ord)


@dataclass(frozen=True, eq=False)
class Total(Operator):
    """The sum of two."""

    one: Operator
    other: Operator
    composite = True

    @property
    def in_shape(self) -> Shape:
        return self.one.in_shape

    @property
    def out_shape(self) -> Shape:
        return self.one.out_shape

    @property
    def terms(self) -> int:
        return max(self.one.terms, self.other.terms) + 1

    @property
    def work(self) -> int:
        return self.one.work + self.other.work

    @cached_property
    def count(self) -> int:
        return self.one.count + self.other.count

    def __call__(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return plus(self.one.norm(ord, rtol)[0], self.other.norm(ord, rtol)[0]), "sum"

    def absolute(self, ord: float) -> float:
        return plus(self.one.absolute(ord), self.other.absolute(ord))


@dataclass(frozen=True, eq=False)
class Stack(Operator):
    """The outputs of several, one after another along an axis."""

    parts: tuple[Operator, ...]
    axis: int
    composite = True

    @property
    def in_shape(self) -> Shape:
        return self.parts[0].in_shape

    @property
    def out_shape(self) -> Shape:
        size = sum(part.out_shape[self.axis - 1] for part in self.parts)
        return (*self.parts[0].out_shape[: self.axis - 1], size, *self.parts[0].out_shape[self.axis :])

    @property
    def terms(self) -> int:
        return max(part.terms for part in self.parts)

    @property
    def work(self) -> int:
        return sum(part.work for part in self.parts)

    @cached_property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], self.axis)

    def measure(self, ord: float, rtol: float) -> tuple[float, str]:
        return joined((part.norm(ord, rtol)[0] for part in self.parts), ord), "stack"

    def absolute(self, ord: float) -> float:
        return joined((part.absolute(ord) for part in self.parts), ord)
