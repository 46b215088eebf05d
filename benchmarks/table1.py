"""The paper's Table 1 with what was measured: cells, what they must meet, and how they read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .layers import TABLE1
from .plot import draw
from .record import Quantiles, aligned, save, short

PUBLISHED = "l2: VS as published"
RELEASED = "l2: VS as released, BROKEN"
SGL = "l2: SGL"
GRAM = "l2: Gram iteration"
BRACKET = "l2: bracket to 1e-2"
LARGEST = "l2: largest value to 1e-3"
EAGER = "l1, linf: PyTorch"
COMPILED = "l1, linf: torch.compile"
OURS = "l1, linf: convnorm"
GIVES = {
    PUBLISHED: "lower bound",
    RELEASED: "lower bound",
    SGL: "neither bound",
    GRAM: "upper bound",
    BRACKET: "both bounds",
    LARGEST: "lower bound",
    EAGER: "the norm",
    COMPILED: "the norm",
    OURS: "the norm",
}

PAPER = {  # seconds for 100 runs on a GTX 1080 Ti, of the paper's Table 1, in the order of TABLE1
    "paper: l2 (VS)": (26.5, 27.4, 29.0, 59.4, 59.7, 255),
    "paper: l2 (SGL)": (5.75, 6.92, 98.0, 490, 91.5, 523),
    "paper: l1 (ours)": (0.00605, 0.00682, 0.00576, 0.0117, 0.0103, 0.0239),
    "paper: linf (ours)": (0.00576, 0.00575, 0.00560, 0.00898, 0.00729, 0.0180),
}
BELOW = {RELEASED: ["paper: l2 (VS)"], SGL: ["paper: l2 (SGL)"], OURS: list(PAPER)[2:]}
GPU_OF_PAPER = "GTX 1080 Ti"
TRUE_TO = 2e-4  # relative error of the true l2 norm, and of what is computed in float32
FIRST = "seconds for 100 calls"

BUDGETS = (  # method, at most so many times the time of another, and within so much of the true norm
    (BRACKET, 0.1, SGL, None),
    (BRACKET, 1.0, PUBLISHED, None),
    (LARGEST, 1 / 3, PUBLISHED, 1e-3),
)

LEGEND = f"""\
**The l1 and linf norms are not the l2 norm.** They are different quantities, and what computes the one does not
compute the other: times alone do not compare them. Within l2, accuracy stands beside time: `value / true` is the
least and the largest ratio to the true norm over the layers of the table; of a bracket, from its lower to its upper
bound. True l2 norms are ARPACK's, right to 2e-4; true l1 and linf norms are another backend's, in float64.

Cells are seconds for 100 calls, from the median; `[3]`: timed on 3 calls and scaled; `[1/32]`: on a part of one call,
which gives no value; `-`: the method is not for this layer; empty: not measured. Weights are normal, in float32;
kernels are padded so that the output has the size of the input, 32x32.

- `paper:` seconds for 100 runs on a {GPU_OF_PAPER}, of kernels without padding: the paper's Table 1. Its `l2 (VS)` is
  of the iteration as released.
- `VS`: Virmaux and Scaman, 100 steps of power iteration by autograd. *As released* by the paper's authors: 502 steps
  that never clear the gradient; the value is too low.
- `SGL`: Sedghi, Gupta and Long, a Fourier transform and all singular values, in single precision. It takes padding
  for circular, so that its largest value is a bound of neither kind.
- `Gram iteration`: `convnorm.spectral.gram_iteration`, 6 steps. `bracket`: `convnorm.l2`, proved from both sides.
  `largest value`: `convnorm.spectral.lanczos`, from below.
- `l1, linf`: both norms of one call: the paper's formula in PyTorch, the same compiled, `torch.ops.convnorm.norms`."""


@dataclass(frozen=True)
class Cell:
    """One method on one layer, or on all layers of a network."""

    layer: str
    method: str
    seconds: Quantiles | None = None  # for 100 calls; None where the method is not for the layer
    calls: float = 0  # that were timed
    least: float | None = None  # value / true norm
    largest: float | None = None

    def __str__(self) -> str:
        if self.seconds is None:
            return "-"
        calls = f"{self.calls:.0f}" if self.calls >= 1 else f"1/{1 / self.calls:.0f}"
        return short(self.seconds.median) + (f" [{calls}]" if self.calls < 100 else "")


@dataclass
class Table:
    """Cells of some layers, which are its columns."""

    layers: Sequence[str]
    cells: list[Cell]

    @classmethod
    def of_layers(cls, layers: Iterable[str], cells: Sequence[Cell]) -> Table:
        names = list(layers)
        return cls(names, [cell for cell in cells if cell.layer in names])

    @property
    def complete(self) -> bool:
        return {cell.layer for cell in self.cells} == set(self.layers)

    def of(self, method: str) -> list[Cell | None]:
        found = {cell.layer: cell for cell in self.cells if cell.method == method}
        return [found.get(name) for name in self.layers]

    def times(self) -> str:
        rows = []
        for method, cells in self.measured():
            rows.append({FIRST: method, "value / true": span(cells)} | self.columns(cells))
            for label in BELOW.get(method, []) if set(self.layers) <= set(TABLE1) else []:
                rows.append({FIRST: label, "value / true": ""} | self.columns([short(s) for s in PAPER[label]]))
        return aligned(rows)

    def accuracy(self) -> str:
        rows = [(method, [span([cell]) for cell in cells]) for method, cells in self.measured()]
        return aligned([{"value / true": m, "gives": GIVES[m]} | self.columns(spans) for m, spans in rows])

    def measured(self) -> Iterator[tuple[str, list[Cell | None]]]:
        """The methods of which there are cells, and those."""
        found = ((method, self.of(method)) for method in GIVES)
        return ((method, cells) for method, cells in found if any(cells))

    def verdicts(self) -> str:
        """Whether the budgets are met."""
        rows = []
        for method, limit, other, off in BUDGETS:
            pairs = zip(self.of(method), self.of(other), strict=True)
            verdicts = [verdict(cell, against, limit, off) for cell, against in pairs]
            if any(verdicts):
                rows.append({"budget": f"{method}, at most {limit:.2g} x {other[4:]}"} | self.columns(verdicts))
        return aligned(rows)

    def columns(self, cells: Sequence[object]) -> dict[str, str]:
        return {name: str(cell or "") for name, cell in zip(self.layers, cells, strict=True)}


def verdict(cell: Cell | None, against: Cell | None, limit: float, off: float | None) -> str:
    """Its time as a share of the other's, and whether that and its accuracy are what they should be."""
    if not (cell and cell.seconds and against and against.seconds):
        return ""
    share = cell.seconds.median / against.seconds.median
    if off and cell.least < 1 - off:
        return f"{short(share)} MISSED: {1 - cell.least:.1e} off"
    return f"{short(share)} {'met' if share <= limit else 'MISSED'}"


def span(cells: Sequence[Cell | None]) -> str:
    """The least and the largest value, to true norm."""
    known = [cell for cell in cells if cell and cell.least is not None]
    if not known:
        return ""
    least, largest = (f"{v:.4f}" for v in (min(c.least for c in known), max(c.largest for c in known)))
    return least if least == largest else f"{least}-{largest}"


def text(paper: Table, beyond: Table, where: str) -> str:
    """All of it, as Markdown."""
    parts = [f"On {where}.", LEGEND, paper.times(), paper.accuracy(), paper.verdicts()]
    if beyond.cells:
        parts += ["What the paper leaves out; of networks, all layers together:", beyond.times(), beyond.verdicts()]
    return "\n\n".join(filter(None, parts))


def write(paper: Table, beyond: Table, where: str, failed: Sequence[str], command: str) -> Path:
    """JSON, Markdown and the plot; returns the second."""
    cells, published = [*paper.cells, *beyond.cells], {"device": where, "gpu_of_paper": GPU_OF_PAPER, "paper": PAPER}
    markdown = save("Table 1", text(paper, beyond, where), cells, failed, command, suffix="-table1", **published)
    plot = markdown.with_suffix(".svg")
    title = f"Table 1's kernels, input 32x32, on {where}; dashed: the paper's figures, on a {GPU_OF_PAPER}"
    draw(panels(paper), paper.layers, title, plot)
    with markdown.open("a") as file:
        file.write(f"\n![Seconds for 100 calls, on a logarithmic scale]({plot.name})\n")
    return markdown


def panels(paper: Table) -> dict[str, tuple[dict, dict]]:
    """The l2 norm, and the other quantities: what was measured, and the paper's."""
    seconds = {m: [c.seconds.median if c and c.seconds else None for c in cells] for m, cells in paper.measured()}
    titles = {"l2": "l2 norm", "l1": "l1 and linf norms, which are other quantities"}
    return {
        title: (
            {method: values for method, values in seconds.items() if method.startswith(norm)},
            {label: values for label, values in PAPER.items() if ("l2" in label) == (norm == "l2")},
        )
        for norm, title in titles.items()
    }
