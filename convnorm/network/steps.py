"""The operations of a network, one after another, and how a bound passes through each.

A step knows its inputs, bounds what it makes of them, and says which linear maps of which earlier steps it is: those
are composed before their norm is taken.

    |x_step|  <=  min( constant * |inputs|,  sum over the anchors a  |A_a| |x_a| )
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from .merge import add, compose
from .operators import Operator, Scalar, Shape, Stack
from .rounding import Number, joined, plus, times

MOST_COMPOSED = 128  # operators: the matrix of each is computed through all before it


@dataclass(eq=False)
class Step:
    """What a node of the graph makes of steps before it: ``shape`` is that of one sample.

    ``terms`` are the linear maps, each with the step, its anchor, whose output it maps; they sum to this step's output.
    """

    shape: Shape
    inputs: tuple[Step, ...] = ()
    name: str = ""
    module: str = ""
    operation: str = ""

    def constant(self, ord: float, rtol: float) -> tuple[float | None, str]:
        """The Lipschitz constant of the operation by itself, where it has one input, and what shows it."""
        return None, ""

    def pass_on(self, bounds: list[Number], ord: float, rtol: float) -> Number:
        """A bound of the output, from those of the inputs."""
        constant, _ = self.constant(ord, rtol)
        assert constant is not None
        return times(constant, *bounds)

    @cached_property
    def terms(self) -> list[tuple[Step, Operator]]:
        return [(self, Scalar(self.shape))]


class Input(Step):
    """One of the network's inputs, as a part of all of them."""

    def pass_on(self, bounds: list[Number], ord: float, rtol: float) -> Number:
        return Fraction(1)


@dataclass(eq=False)
class Linear(Step):
    operator: Operator | None = None

    def constant(self, ord: float, rtol: float) -> tuple[float, str]:
        return self.operator.norm(ord, rtol)

    @cached_property
    def terms(self) -> list[tuple[Step, Operator]]:
        (source,) = self.inputs
        if _is_long(source):
            return super().terms
        return [(anchor, compose(self.operator, before)) for anchor, before in source.terms]


@dataclass(eq=False)
class Nonlinear(Step):
    """``constants`` gives the Lipschitz constant for an ord."""

    constants: Callable[[float], float] = lambda ord: math.nan
    how: str = "exact"

    def constant(self, ord: float, rtol: float) -> tuple[float, str]:
        return self.constants(ord), self.how


@dataclass(eq=False)
class Joint(Step):
    """A map with a Lipschitz constant from all its inputs, as parts of one."""

    factor: float = 1.0
    how: str = "exact"

    def constant(self, ord: float, rtol: float) -> tuple[float, str]:
        return self.factor, self.how

    def pass_on(self, bounds: list[Number], ord: float, rtol: float) -> Number:
        return times(self.factor, joined(bounds, ord))


@dataclass(eq=False)
class Concatenation(Joint):
    axis: int = 1

    @cached_property
    def terms(self) -> list[tuple[Step, Operator]]:
        anchors = {anchor for source in self.inputs for anchor, _ in source.terms}
        if len(anchors) > 1 or any(len(source.terms) > 1 for source in self.inputs):
            return super().terms
        return [(*anchors, Stack(tuple(source.terms[0][1] for source in self.inputs), self.axis))]


@dataclass(eq=False)
class Sum(Step):
    """Of two inputs of its own shape."""

    def pass_on(self, bounds: list[Number], ord: float, rtol: float) -> Number:
        return plus(*bounds)

    @cached_property
    def terms(self) -> list[tuple[Step, Operator]]:
        # a sum of sums stands on these, lest every step of a residual network had terms from all blocks before it
        alone = [len(source.terms) == 1 and not _is_long(source) for source in self.inputs]
        parts = [s.terms[0] if one else (s, Scalar(s.shape)) for s, one in zip(self.inputs, alone, strict=True)]
        (anchor, one), (other_anchor, other) = parts
        return [(anchor, add(one, other))] if anchor is other_anchor else parts


def _is_long(step: Step) -> bool:
    return any(operator.count >= MOST_COMPOSED for _, operator in step.terms)
