"""A network at a glance: ``report(model, example)`` measures every layer, ``Report`` shows what was found."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .geometry import GeometryError
from .reporting.bounds import LipschitzBound, lipschitz_bounds
from .reporting.find import find
from .reporting.measure import Progress, measure
from .reporting.row import ORDS, Row
from .sharded import refuse_sharded
from .uses import inputs_of, shape_of, unwrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from torch.export import ExportedProgram


def report(
    model: nn.Module | ExportedProgram,
    example: Tensor | Sequence[Any] | None = None,
    *,
    l2: bool = True,
    rtol: float = 1e-2,
    batch_norm: bool = True,
    bounds: bool = False,
    title: str = "",
    progress: Progress | None = None,
) -> Report:
    """The norms of every convolutional and fully connected layer of a model, in the order of their use.

    ``example`` is an input of the model or its shape, batch included, or a tuple of them for several inputs; it runs on
    fake tensors, in evaluation mode. An exported program brings its own. ``l2=False`` leaves out what takes time: the
    brackets (to ``rtol``) and the norms of the reshaped weights. ``batch_norm=False`` leaves out the norms of layers
    together with the batch norms that directly follow them. ``bounds=True`` adds certified Lipschitz constants of the
    whole network (``convnorm.lipschitz``), or what has none. ``progress(done, total, layer)`` is called on the way.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    >>> found = report(model, [1, 3, 8, 8])
    >>> found
    Report('Sequential', 2 layers: 0, 3)
    >>> found.rows[0].batch_norm, found.rows[0].norms.l2_upper <= 1.01 * found.rows[0].norms.l2_lower
    ('1', True)
    """
    if isinstance(model, nn.Module):
        if example is None:
            raise GeometryError("convnorm: example is missing: an input of the model, or its shape")
        model = unwrapped(model)
        refuse_sharded(model, "a report takes whole weights, of the model as it was before fully_shard")
        inputs = inputs_of(example)
        found, others = find(model, *inputs)
        parameters = sum(parameter.numel() for parameter in model.parameters())
    else:
        from .reporting.exported import find_exported, parameters_of  # brings much of PyTorch with it

        if example is not None:
            raise GeometryError("convnorm: example: an exported program brings its own input sizes")
        inputs = []
        found, others = find_exported(model)
        parameters = parameters_of(model)
    if not found:
        raise GeometryError(f"convnorm: model {type(model).__name__} uses no convolutional or fully connected layer")
    return Report(
        title=title or type(model).__name__,
        inputs=tuple(tuple(x.shape) if isinstance(x, Tensor) else shape_of(x) for x in inputs),
        parameters=parameters,
        rtol=rtol if l2 else None,
        rows=tuple(measure(found, l2=l2, rtol=rtol, batch_norm=batch_norm, progress=progress)),
        unmeasured=tuple(others),
        lipschitz=lipschitz_bounds(model, inputs, l2, rtol) if bounds else {},
    )


@dataclass(frozen=True)
class Report:
    """The layers of a model and their norms.

    ``rtol`` is None where l2 was left out. ``unmeasured`` names the parameters that belong to no row and are no mere
    vectors: of layers that did not run, of embeddings, of attention that calls no module. ``lipschitz`` has bounds of
    the whole network, by norm, if they were asked for.
    """

    title: str
    inputs: tuple[tuple[int, ...], ...]
    parameters: int
    rtol: float | None
    rows: tuple[Row, ...]
    unmeasured: tuple[str, ...]
    lipschitz: Mapping[str, LipschitzBound] = field(default_factory=dict)

    def __repr__(self) -> str:
        names = [row.name for row in self.rows]
        some = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
        return f"Report({self.title!r}, {len(names)} layers: {', '.join(some)})"

    # --- what the layers multiply up to ------------------------------------------------------------------------------

    def log10_product(self, ord: float) -> float | None:
        """log10 of the product of the norms over all calls of all layers, each with its batch norm where one follows.

        ``ord`` is 1, 2 (of upper bounds) or ``math.inf``. Of a plain chain of these layers and activations that
        contract, this bounds the Lipschitz constant; not where branches are added. None where a norm is not known.
        """
        logs = self._logs(ord)
        return None if logs is None or math.isnan(total := sum(logs)) else total

    def shares(self, ord: float) -> list[float | None]:
        """How much each layer has to do with the product of the norms:

            calls log(norm) / sum over layers of calls |log(norm)|

        Absolute values add up to 1; a negative share makes the product smaller. None where a norm is 0 or not known.
        """
        logs = self._logs(ord)
        if logs is None or not all(map(math.isfinite, logs)):
            return [None] * len(self.rows)
        total = math.fsum(map(abs, logs))
        return [log / total if total else 0.0 for log in logs]

    def _shares(self) -> list[dict[str, float | None]]:
        """Of each layer, by norm."""
        return [dict(zip(ORDS, own, strict=True)) for own in zip(*map(self.shares, ORDS.values()), strict=True)]

    def _logs(self, ord: float) -> list[float] | None:
        norms = [row.whole.norm(ord) for row in self.rows]
        if any(norm is None or math.isnan(norm) for norm in norms):
            return None
        logs = [math.log10(norm) if norm else -math.inf for norm in norms]
        return [row.calls * log for row, log in zip(self.rows, logs, strict=True)]

    @property
    def ord(self) -> float:
        """Of the shares that tables show: 2 if it was measured, else infinity."""
        return math.inf if self.rtol is None else 2

    # --- ways out ----------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """All of it, for ``Report.from_json``; written to ``path`` if there is one. NaN and inf are strings."""
        content = {
            "title": self.title,
            "inputs": self.inputs,
            "parameters": self.parameters,
            "rtol": self.rtol,
            "log10_product": {name: self.log10_product(ord) for name, ord in ORDS.items()},
            "layers": [row.to_dict() | {"share": own} for row, own in zip(self.rows, self._shares(), strict=True)],
            "unmeasured": self.unmeasured,
            "lipschitz": {name: asdict(bound) for name, bound in self.lipschitz.items()},
        }
        return written(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", path)

    @staticmethod
    def from_json(source: str | Path) -> Report:
        """Of a file, or of the text itself."""
        text = (
            source if isinstance(source, str) and source.lstrip().startswith("{") else Path(source).read_text("utf-8")
        )
        try:
            content = json.loads(text)
            layers = [{name: value for name, value in row.items() if name != "share"} for row in content["layers"]]
            return Report(
                title=content["title"],
                inputs=tuple(map(tuple, content["inputs"])),
                parameters=content["parameters"],
                rtol=content["rtol"],
                rows=tuple(map(Row.from_dict, layers)),
                unmeasured=tuple(content["unmeasured"]),
                lipschitz={name: LipschitzBound.from_dict(bound) for name, bound in content["lipschitz"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = "text" if text is source else f"file {str(source)!r}"
            raise ValueError(f"convnorm: {where} is no report: {type(error).__name__}: {error}") from error

    def to_csv(self, path: str | Path | None = None) -> str:
        """A line for each layer."""
        rows = [
            row.to_flat() | {f"share_{name}": share for name, share in own.items()}
            for row, own in zip(self.rows, self._shares(), strict=True)
        ]
        stream = io.StringIO()
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return written(stream.getvalue(), path)

    def to_html(self, path: str | Path | None = None) -> str:
        """A page that needs nothing but itself."""
        from .reporting.page import page

        return written(page(self), path)

    def table(self, width: int = 100) -> Table:
        """For a terminal, by rich."""
        from .reporting.table import table

        return table(self, width)

    def plot(self, path: str | Path | None = None) -> Figure:
        """The norms by depth, and their distribution; PNG, SVG or PDF by the suffix of ``path``."""
        from .reporting.plot import plot_report

        return plot_report(self, path)

    def __str__(self) -> str:
        from .reporting.table import as_text

        return as_text(self.table())

    def _repr_html_(self) -> str:
        from .reporting.page import fragment

        return fragment(self)


def written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")  # as the pages say
    return text


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value
