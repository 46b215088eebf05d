"""A layer's windows as a line of integers, the form in which they cross the boundary of an operator.

A string is one argument, whose parsing costs less than that of many integers, and layers one after another are a sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from .geometry import Geometry

Lists = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class AxisPlan:
    """``merged`` lists the taps of each merged tap, and is empty where the merged taps are the taps. A window lists
    its merged taps, each as often as it counts.
    """

    taps: int
    merged: Lists
    inputs: Lists
    outputs: Lists

    @property
    def merged_taps(self) -> int:
        return len(self.merged) or self.taps

    @property
    def all_once(self) -> Lists:
        return (tuple(range(self.merged_taps)),)


@dataclass(frozen=True)
class LayerPlan:
    groups: int
    transposed: bool
    axes: tuple[AxisPlan, ...]

    def over_columns(self, linf: bool) -> bool:
        """Whether the l1, or linf, norm is one over the columns of the weight as a matrix, or over its rows."""
        return linf == self.transposed

    def sees_all(self, column: bool) -> bool:
        """Whether there is one window only, which counts every tap once."""
        return all((axis.inputs if column else axis.outputs) == axis.all_once for axis in self.axes)

    @cached_property
    def text(self) -> str:
        """groups, transposed, number of axes, then for each axis: taps, merged taps, input windows, output windows.

        No lists of windows stand for the usual one, which counts every merged tap once. Ends with its line.
        """
        plan = [self.groups, int(self.transposed), len(self.axes)]
        for axis in self.axes:
            plan.append(axis.taps)
            windows = [() if side == axis.all_once else side for side in (axis.inputs, axis.outputs)]
            for lists in (axis.merged, *windows):
                plan += [len(lists), *(i for one in lists for i in (len(one), *one))]
        return " ".join(map(str, plan)) + "\n"


def layer_plan(geometry: Geometry) -> LayerPlan:
    axes = []
    for axis in geometry.axes:
        inputs, outputs = (tuple(window.repeated for window in side) for side in (axis.inputs, axis.outputs))
        axes.append(AxisPlan(axis.taps, axis.merged if axis.merges else (), inputs, outputs))
    return LayerPlan(geometry.groups, geometry.transposed, tuple(axes))


@lru_cache(maxsize=1024)
def read_plan(plan: str) -> tuple[LayerPlan, ...]:
    """The plans of one layer after another."""
    numbers = map(int, plan.split())

    def lists() -> Lists:
        return tuple(tuple(next(numbers) for _ in range(next(numbers))) for _ in range(next(numbers)))

    def axis() -> AxisPlan:
        taps, merged = next(numbers), lists()
        all_once = AxisPlan(taps, merged, (), ()).all_once
        return AxisPlan(taps, merged, lists() or all_once, lists() or all_once)

    layers = []
    for groups in numbers:
        transposed, n_axes = bool(next(numbers)), next(numbers)
        layers.append(LayerPlan(groups, transposed, tuple(axis() for _ in range(n_axes))))
    return tuple(layers)
