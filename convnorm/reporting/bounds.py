"""What is known of the Lipschitz constant of a network as a whole, for its report."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import network
from ..geometry import GeometryError
from .row import ords_of

if TYPE_CHECKING:
    from torch.export import ExportedProgram

ROUGH = 0.1  # how near each l2 norm in a bound is sought: the bound of a deep network is loose by far more


@dataclass(frozen=True)
class LipschitzBound:
    """Certified; ``product`` without composing linear operations, both inf where float64 ends, which their logarithms
    do not. All None where ``refused`` says why.
    """

    upper: float | None = None
    product: float | None = None
    log10_upper: float | None = None
    log10_product: float | None = None
    refused: str = ""

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> LipschitzBound:
        """Of its fields by name, also by way of JSON, where inf is a string."""
        numbers = {name: value and float(value) for name, value in values.items() if name != "refused"}
        return LipschitzBound(**numbers, refused=values["refused"])


def lipschitz_bounds(
    model: nn.Module | ExportedProgram, inputs: Sequence[Any], l2: bool, rtol: float
) -> dict[str, LipschitzBound]:
    """By norm; one node that has no known constant leaves all of them unknown."""
    try:
        traced = network.trace(model, *inputs)
        found = {name: network.lipschitz(traced, ord=ord, rtol=max(rtol, ROUGH)) for name, ord in ords_of(l2).items()}
    except GeometryError as error:
        return dict.fromkeys(ords_of(l2), LipschitzBound(refused=str(error).removeprefix("convnorm: ")))
    finally:
        gc.collect()  # an exported program refers to itself, and so would keep the weights
    return {
        name: LipschitzBound(bound.upper, bound.product, bound.log10_upper, bound.log10_product)
        for name, bound in found.items()
    }
