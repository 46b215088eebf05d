"""The Lipschitz bound of a network: what its steps multiply and add up to, linear ones composed before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..geometry import GeometryError
from .rounding import Number, as_float, joined, log10, plus, times
from .steps import Step
from .trace import Traced, trace

NOTED = Fraction(1, 10**9)  # by how much composing must lower a bound to be worth a word


@dataclass(frozen=True)
class Node:
    """One operation: its Lipschitz constant by itself (None for a sum), what shows it, and bounds from the network's
    input to its output, ``upper`` with linear operations composed and ``product`` without; inf where float64 ends,
    which their logarithms do not.
    """

    name: str
    module: str
    operation: str
    constant: float | None
    how: str
    upper: float
    product: float
    log10_upper: float
    log10_product: float


@dataclass(frozen=True)
class Bound:
    """``|network(x) - network(y)| <= upper |x - y|`` for single samples, in the l_ord norm of all their numbers.

    ``product`` is the bound without composing linear operations, never below ``upper``; both are inf where float64
    ends, which their logarithms do not. ``nodes`` are the operations in their order; ``assumed`` names those whose
    constants were given and not proved.
    """

    ord: float
    upper: float
    product: float
    log10_upper: float
    log10_product: float
    nodes: tuple[Node, ...]
    assumed: tuple[str, ...]

    def __float__(self) -> float:
        return self.upper

    def __repr__(self) -> str:
        name = {1: "l1", 2: "l2", math.inf: "linf"}[self.ord]
        assumed = f", assumed={list(self.assumed)}" if self.assumed else ""
        upper, product = _shown(self.upper, self.log10_upper, 6), _shown(self.product, self.log10_product, 6)
        return f"Bound({name} <= {upper}, uncomposed {product}, {len(self.nodes)} nodes{assumed})"

    def __str__(self) -> str:
        """The nodes as a table, and the bound."""
        rows = [("node", "operation", "constant", "bound", "uncomposed", "how")]
        for node in self.nodes:
            constant = "" if node.constant is None else f"{node.constant:.4g}"
            name = node.module or node.name
            upper, product = _shown(node.upper, node.log10_upper, 4), _shown(node.product, node.log10_product, 4)
            rows.append((name, node.operation, constant, upper, product, node.how))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = ["<", "<", ">", ">", ">", "<"]
        lines = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, repr(self)])


def lipschitz(
    model: nn.Module | torch.export.ExportedProgram | Traced,
    *inputs: Tensor | Sequence[int],
    ord: float = 2,
    assume: Mapping[str, float] | None = None,
    rtol: float = 1e-2,
) -> Bound:
    """A certified upper bound of a network's Lipschitz constant, in evaluation mode, for inputs or their shapes.

        |f(x) - f(y)|_ord <= upper |x - y|_ord    for any two samples x, y

    The norms are of all numbers of one sample; several inputs, or outputs, count as parts of one. Of the network in
    exact arithmetic, with its weights as stored, or as it computes them from what is stored. Linear operations that
    follow each other are composed before their norm is taken. ``rtol`` is how near l2 brackets of layers are sought. An
    operation without a known constant is an error that names the node; ``assume={name: constant}`` gives it one, or a
    whole module: as a function of the tensors that it reads, of which one that it reads twice counts once.
    ``trace(model, ...)`` in place of the model spares tracing it for each norm.

    >>> model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())
    >>> with torch.no_grad():
    ...     _ = model[0].weight.fill_(0.5)
    >>> lipschitz(model, [1, 1, 8, 8], ord=1)
    Bound(l1 <= 4.49998, uncomposed 4.49998, 4 nodes)
    """
    if ord not in (1, 2, math.inf):
        raise GeometryError(f"convnorm: ord {ord!r} must be 1, 2 or inf")
    if isinstance(model, Traced) and (inputs or assume):
        raise GeometryError("convnorm: model is traced: inputs and assume are for tracing")
    traced = model if isinstance(model, Traced) else trace(model, *inputs, assume=assume)
    uppers: dict[Step, Number] = {}
    products: dict[Step, Number] = {}
    nodes = []
    with torch.no_grad():
        for step in traced.steps:
            constant, how = constant_of(step, ord, rtol)
            products[step] = step.pass_on([products[source] for source in step.inputs], ord, rtol)
            uppers[step], composed = least(step, uppers, ord, rtol)
            numbers = _numbers(uppers[step], products[step])
            nodes.append(Node(step.name, step.module, step.operation, constant, how + composed, *numbers))
    upper, product = (joined((bounds[step] for step in traced.outputs), ord) for bounds in (uppers, products))
    return Bound(ord, *_numbers(upper, product), tuple(nodes), traced.assumed)


def constant_of(step: Step, ord: float, rtol: float) -> tuple[float | None, str]:
    try:
        return step.constant(ord, rtol)
    except GeometryError as error:
        why = str(error).removeprefix("convnorm: ")
        raise GeometryError(f"convnorm: node {step.name!r} in module {step.module!r}: {why}") from error


def least(step: Step, uppers: dict[Step, Number], ord: float, rtol: float) -> tuple[Number, str]:
    """The least bound of a step's output, and a word if composing has lowered it."""
    local = step.pass_on([uppers[source] for source in step.inputs], ord, rtol)
    if any(anchor is step for anchor, _ in step.terms):
        return local, ""
    composed = plus(*(times(op.norm(ord, rtol)[0], uppers[anchor]) for anchor, op in step.terms))
    return min(local, composed), ", composed" if composed < (1 - NOTED) * local else ""


def _numbers(upper: Number, product: Number) -> tuple[float, float, float, float]:
    return as_float(upper), as_float(product), log10(upper), log10(product)


def _shown(value: float, log10: float, digits: int) -> str:
    return f"10^{log10:.2f}" if value == math.inf > log10 else f"{value:.{digits}g}"
