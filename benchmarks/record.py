"""What was measured, as a table and as files: benchmarks/results/<date>-<device>.json and .md."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.made import commit, cpu_model

HERE = Path(__file__).parent
LEGEND = """\
`us` and `ratio` are medians, in brackets the 10th and 90th percentile. `ratio` is to what `to` says, taken by turns
in blocks of equal length: `read`, a bare read of the same weights, `weight.sum()` or a loop of it; `SGD`, a step of
`torch.optim.SGD(fused=True)`; `without`, the same training step without norm decay. `forward` is both norms,
`backward` also their gradients; `decay step` one step of norm decay, for the l1 or the linf norm. `scattered`: at
worst, when no two of its terms are of one channel. The weights stay where they are from call to call: what fits into
a cache is read from it. Only the norms of networks on a GPU go through sets of weights in rotation, more than its
cache holds. `graph`: many calls replayed as one CUDA graph, and so is the bare read. `copy` is the ratio to reading
the same bytes at the GPU's copy bandwidth. Budgets are what convnorm aims at for its compiled backends. `eager` and
`compiled` (by `torch.compile`) are the paper's formula in PyTorch, which finds no winners; `dense` is the paper's
Algorithm 1 with whole tensors."""


@dataclass(frozen=True)
class Quantiles:
    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Quantiles:
        return cls(*(float(f"{value:.4g}") for value in np.quantile(samples, (0.5, 0.1, 0.9))))

    def __str__(self) -> str:
        return f"{short(self.median)} ({short(self.p10)}-{short(self.p90)})"


@dataclass(frozen=True)
class Row:
    """One measurement; ``budget`` maps the fields that have one to what they may be at most."""

    name: str
    direction: str  # "forward", or "backward" for both
    backend: str
    device: str
    threads: int | None
    graph: bool
    us: Quantiles | None = None
    ratio: Quantiles | None = None
    copy_ratio: Quantiles | None = None
    launches: int | None = None
    budget: dict[str, float] = field(default_factory=dict)
    against: str = "read"  # what the ratio is to

    @property
    def verdict(self) -> str:
        return ", ".join(self._verdict(name, limit) for name, limit in self.budget.items())

    def _verdict(self, name: str, limit: float) -> str:
        value = getattr(self, name)
        if value is None:
            return f"{name} {limit:g}: not measured"
        value = value.median if isinstance(value, Quantiles) else value
        by = f" by {abs(value / limit - 1):.0%}" if value != limit else ""
        return f"{name} {limit:g}: {'met' if value <= limit else 'MISSED'}{by}"

    def cells(self) -> dict[str, str]:
        return {
            "what": self.name,
            "direction": self.direction,
            "backend": self.backend + (", graph" if self.graph else ""),
            "device": self.device,
            "threads": str(self.threads or ""),
            "us": str(self.us or ""),
            "ratio": str(self.ratio or ""),
            "to": self.against if self.ratio else "",
            "copy": str(self.copy_ratio or ""),
            "launches": str(self.launches or ""),
            "budget": self.verdict,
        }


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    return aligned([row.cells() for row in rows])


def aligned(cells: Sequence[dict[str, str]]) -> str:
    """As Markdown that lines up, without columns that are empty throughout."""
    if not cells:
        return ""
    columns = {name: [name, *(row[name] for row in cells)] for name in cells[0] if any(row[name] for row in cells)}
    for column in columns.values():
        column.insert(1, "-" * max(map(len, column)))
    lines = zip(*([cell.ljust(len(column[1])) for cell in column] for column in columns.values()), strict=True)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(rows: Sequence[Row], failed: Sequence[str], command: str) -> Path:
    """Both files; returns the Markdown one."""
    return save("Benchmarks", f"{LEGEND}\n\n{table(rows)}", rows, failed, command)


def save(
    title: str, text: str, rows: Sequence[Any], failed: Sequence[str], command: str, suffix: str = "", **more: Any
) -> Path:
    """Markdown of ``text`` and where it was measured, and JSON of ``rows``, dataclasses, and ``more``."""
    setting = where_and_when(command)
    name = f"{setting['date']}-{re.sub('[^a-z0-9]+', '-', (setting['gpu'] or setting['cpu']).lower()).strip('-')}"
    markdown = HERE / "results" / f"{name}{suffix}.md"
    markdown.parent.mkdir(exist_ok=True)
    rows_as_json = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    head = json.dumps(setting | more | {"failed": list(failed)}, indent=1)[:-2]
    markdown.with_suffix(".json").write_text(f'{head},\n "rows": [\n{rows_as_json}\n ]\n}}\n')
    facts = [f"- {key}: {value}" for key, value in (setting | {"failed": ", ".join(failed)}).items() if value]
    markdown.write_text("\n".join([f"# {title}", "", *facts, "", text, ""]))
    return markdown


def where_and_when(command: str) -> dict[str, str | int | None]:
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "cpu": cpu_model(),
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "convnorm": source_version(),
    }


def machine() -> str:
    """What serves the benchmarks that run on the best that there is."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{cpu_model()}, {count} thread{'s' if count > 1 else ''}"


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def source_version() -> str:
    """Of the source beside the benchmarks, which is what they measure, installed or not."""
    return re.findall(r'^version = "(.+)"', (HERE.parent / "pyproject.toml").read_text(), re.MULTILINE)[0]
