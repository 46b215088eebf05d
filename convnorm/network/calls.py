"""One node of an exported graph as the rules see it, and the table of rules: what an operation of PyTorch is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .operators import Shape
from .steps import Step

RULES: dict[str, Callable[[Call], Step | tuple[Step | None, ...]]] = {}  # by the name in aten, without trailing _


class Refused(Exception):
    """Why an operation has no bound; ``trace`` says which node it is."""


def rule(*operations: str) -> Callable:
    """Registers what makes a step, or a tuple of them, of a call of these operations."""

    def register(function: Callable[[Call], Any]) -> Callable[[Call], Any]:
        RULES.update(dict.fromkeys(operations, function))
        return function

    return register


@dataclass(frozen=True)
class Call:
    """``arguments`` by their names in the schema: steps where they depend on the network's input, else values.

    ``meta`` is the output, or the outputs, as fake tensors.
    """

    operation: str
    target: torch._ops.OpOverload
    arguments: dict[str, Any]
    meta: Any

    @property
    def first(self) -> Tensor:
        """The output, or the first of several."""
        return self.meta[0] if isinstance(self.meta, (tuple, list)) else self.meta

    @property
    def shape(self) -> Shape:
        """Of one sample of the output."""
        return tuple(self.first.shape[1:])

    def depends(self, name: str) -> bool:
        return isinstance(self.arguments.get(name), Step)

    def source(self, name: str = "") -> Step:
        """The input, the first argument if not named; every other tensor must be constant."""
        name = name or next(iter(self.arguments))
        others = [key for key in self.arguments if key != name and self.depends(key)]
        if others or not self.depends(name):
            raise Refused(f"has {' and '.join(others or [name])} that depends on the network's input"
                          if others else f"has an {name} that does not depend on the network's input")  # fmt: skip
        return self.arguments[name]

    def constant(self, name: str) -> Tensor:
        """An argument that does not depend on the input; bounds have no gradients."""
        value = self.arguments[name]
        if isinstance(value, Step):
            raise Refused(f"has a {name} that depends on the network's input: it is not globally Lipschitz")
        return value.detach()

    def axis(self, dim: int, rank: int | None = None) -> int:
        """An axis of the input counted from its front, which must not be the batch's."""
        rank = rank if rank is not None else len(self.source().shape) + 1
        axis = dim % rank
        if axis == 0:
            raise Refused("acts along the batch axis")
        return axis

    def axes(self, dims: int | Sequence[int]) -> list[int]:
        """One axis of the input, or several, likewise."""
        return [self.axis(dim) for dim in (dims if isinstance(dims, Sequence) else [dims])]

    def per_axis(self, name: str, count: int) -> list[int]:
        """One entry for each of so many axes, of an argument that may have one for all."""
        value = self.arguments[name]
        values = list(value) if isinstance(value, Sequence) else [value]
        return values * count if len(values) == 1 else values


def arguments_of(target: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    schema = target._schema.arguments
    given = dict(zip((a.name for a in schema), args, strict=False)) | kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema if a.name in given or a.has_default_value()}


def is_random(target: torch._ops.OpOverload, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call draws numbers, which some operations do in training only."""
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    given = arguments_of(target, args, kwargs)
    return given.get("train", given.get("training", True))
