"""What a report says of one layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .calls import Found

ORDS = {"l1": 1, "linf": math.inf, "l2": 2}  # in the order of tables


def ords_of(l2: bool) -> dict[str, float]:
    """Of all norms, or of those that are left without l2."""
    return {name: ord for name, ord in ORDS.items() if l2 or ord != 2}


@dataclass(frozen=True)
class Measured:
    """Norms of one linear map: l1 and linf, the bracket of l2, what proves it and why it is wider than asked."""

    l1: float
    linf: float
    l2_lower: float | None = None
    l2_upper: float | None = None
    l2_certificate: str = ""
    l2_stopped: str = ""

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Measured:
        """Of its fields by name, also by way of JSON."""
        numbers = ("l1", "linf", "l2_lower", "l2_upper")  # NaN and inf are strings in JSON
        return Measured(**values | {name: values[name] and float(values[name]) for name in numbers})

    def norm(self, ord: float) -> float | None:
        """The norm, of l2 its upper bound, if it was asked for."""
        return {1: self.l1, 2: self.l2_upper, math.inf: self.linf}[ord]


@dataclass(frozen=True)
class Row:
    """A layer at one input size. ``padding`` holds (before, after) of each axis; ``calls`` how often it runs in a
    forward pass; ``reshaped`` the norm of the reshaped weight, no bound; ``folded`` the norms of the layer and the
    ``batch_norm`` that directly follows it, as one map.
    """

    name: str
    kind: str
    weight: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    output_padding: tuple[int, ...]
    calls: int
    norms: Measured
    reshaped: float | None
    batch_norm: str
    folded: Measured | None

    @property
    def whole(self) -> Measured:
        """With the batch norm, where there is one."""
        return self.folded or self.norms

    def to_dict(self) -> dict[str, Any]:
        """As ``to_json`` of the report writes it."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Row:
        """Of what ``to_dict`` gave, also by way of JSON."""
        given = {name: _tuples(value) for name, value in values.items()}
        given["reshaped"] = given["reshaped"] and float(given["reshaped"])  # inf is a string in JSON
        given["norms"] = Measured.from_dict(given["norms"])
        given["folded"] = given["folded"] and Measured.from_dict(given["folded"])
        return Row(**given)

    def to_flat(self) -> dict[str, Any]:
        """One value a column, sizes as 2x2, padding as 1x1, or 0-1x0-1 where the sides differ."""
        flat = self.to_dict()
        norms, folded = flat.pop("norms"), flat.pop("folded") or dict.fromkeys(asdict(self.norms))
        flat |= {name: sizes_text(getattr(self, name)) for name in SIZES} | {"padding": padding_text(self.padding)}
        return flat | norms | {f"folded_{name}": value for name, value in folded.items()}


SIZES = ("weight", "in_shape", "out_shape", "stride", "dilation", "output_padding")


def row_of(found: Found, norms: Measured, reshaped: float | None, folded: Measured | None) -> Row:
    layer, shape = found.layer, found.layer.geometry
    n_axes = len(layer.in_shape)
    output_padding = layer.output_padding * n_axes if len(layer.output_padding) == 1 else layer.output_padding
    return Row(
        name=found.name,
        kind=found.kind,
        weight=tuple(layer.weight.shape),
        in_shape=layer.in_shape,
        out_shape=shape.out_shape,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=layer.groups,
        padding_mode=layer.padding_mode,
        output_padding=tuple(output_padding),
        calls=found.calls,
        norms=norms,
        reshaped=reshaped,
        batch_norm=found.batch_norm.name if found.batch_norm else "",
        folded=folded,
    )


def sizes_text(sizes: tuple[int, ...]) -> str:
    """2x3"""
    return "x".join(map(str, sizes))


def padding_text(padding: tuple[tuple[int, int], ...]) -> str:
    """1x2, or 0-1x2-2 where the two sides of an axis differ."""
    same = all(before == after for before, after in padding)
    return "x".join(str(before) if same else f"{before}-{after}" for before, after in padding)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
