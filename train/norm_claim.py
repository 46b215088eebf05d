"""Claim 3, from Figure 2: adversarially trained networks have norms as large as plain ones, or larger.

Each layer's norm is divided by that of the same layer in the plain network of the same model and seed. Layers of a
network are not independent of each other: what is said over layers describes it, and does not decide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cell import strongest
from .claims import COMPARABLE, ONE_NETWORK, UNDECIDED, Judgement, Verdict, count, judge, nothing_compared, span
from .published import METHODS, MODELS
from .report import Report, norms_of, table
from .rows import Row, flags
from .statistics import LEVEL, Interval, holm, over_images, signed_rank, students_t

NORMS = ("linf", "l1", "l2")  # the paper's text, its released code, and the one that Lipschitz constants are usually of
ADVERSARIAL = strongest("figure2")
CAVEATS = {  # by the part of a row that the norms are in
    "norms": "A convolution that a batch norm follows can be scaled at will without changing the network: these norms "
    "are of the weights, and not of the function.",
    "folded": "*With batch norm*: of each layer and the batch norm that directly follows it, where one does, as one "
    "map, in evaluation.",
}


@dataclass(frozen=True)
class Comparison:
    """The norms of an adversarially trained network over those of the plain one of its model and seed."""

    model: str
    method: str
    seed: int
    logarithms: np.ndarray  # of the ratio of each layer's norms

    @property
    def mean(self) -> float:
        return float(self.logarithms.mean())


def verdict(report: Report, norm: str, part: str = "norms") -> Verdict:
    """For one of the norms, of the weights or ``folded`` with batch norm, with a line for each model and method."""
    comparisons, caveats = _comparisons(report, norm, part)
    groups: dict[tuple[str, str], list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.model, comparison.method].append(comparison)
    layers = {key: np.mean([each.logarithms for each in group], axis=0) for key, group in groups.items()}  # over seeds
    adjusted = dict(zip(layers, holm([signed_rank(values) for values in layers.values()]), strict=True))
    head = ["", "", "layers with a larger norm", "Wilcoxon's p (Holm)", "mean ratio", "over layers", "over seeds"]
    lines = []
    for model in MODELS:
        for key in ((model, method) for method, _ in ADVERSARIAL):
            line = ["-"] * 5
            if key in groups:
                mean, seeds = float(layers[key].mean()), students_t([each.mean for each in groups[key]])
                line = [f"{np.mean(layers[key] > 0):.0%}", f"{adjusted[key]:.1g}", _ratio(mean),
                        _ratios(students_t(layers[key])), _ratios(seeds)]  # fmt: skip
            lines.append([MODELS[model], METHODS[key[1]], *line])
    sentence = f"adversarially trained networks have {norm} norms as large or larger"
    sentence += ", with batch norm" if part == "folded" else ""
    return Verdict(sentence, _here(comparisons, caveats), None, table(head, lines), caveats)


def _comparisons(report: Report, norm: str, part: str) -> tuple[list[Comparison], list[str]]:
    """Those that mean something, and in words which others do not and why."""
    comparisons, reasons = [], defaultdict(list)
    for row, plain in report.beside_plain(ADVERSARIAL):
        if reason := _why_not(report, row, plain, norm, part):
            reasons[reason].append(row)
        else:
            logarithms = np.log(norms_of(row, norm, part) / norms_of(plain, norm, part))
            cell = row["cell"]
            comparisons.append(Comparison(cell["model"], cell["method"], cell["seed"], logarithms))
    return comparisons, [f"{count(rows)} left out: {reason}." for reason, rows in reasons.items()]


def _why_not(report: Report, row: Row, plain: Row | None, norm: str, part: str) -> str:
    if plain is None:
        return "the plain network of their model and seed is missing"
    if row["layers"] != plain["layers"]:
        raise ValueError(f"rows of {row['cell']} and {plain['cell']} name different layers")
    if "diverged" in row or "diverged" in plain:
        return "they or the plain one diverged"
    if report.at_chance(row) or report.at_chance(plain):
        return "they or the plain one may be guessing"
    robust = flags(row["robust"]).astype(np.int8) - flags(plain["robust"]).astype(np.int8)
    if over_images(robust).low <= 0:
        return "they were not seen to be more robust than the plain one"
    if not (part in row and part in plain):
        return "their rows or the plain ones are without these norms"
    values = np.concatenate([norms_of(row, norm, part), norms_of(plain, norm, part)])
    if not (np.isfinite(values).all() and (values > 0).all()):
        return f"an {norm} norm is zero or not finite"
    return ""


def _here(comparisons: Sequence[Comparison], caveats: Sequence[str]) -> Judgement:
    if not comparisons:
        return nothing_compared(caveats)
    ratios = defaultdict(list)
    for comparison in comparisons:
        ratios[comparison.model, comparison.seed].append(comparison.mean)
    means = [float(np.mean(each)) for each in ratios.values()]
    because = f"{_ratio(float(np.mean(means)))} times the plain networks', geometric mean"
    interval = students_t(means)
    if interval is None:
        return Judgement(UNDECIDED, f"{because}; {ONE_NETWORK}")
    word = judge(interval, above=math.log(COMPARABLE)) + ", larger" * (interval.low > 0)
    return Judgement(word, f"{because}; {LEVEL:.0%} interval {_ratios(interval)}, to lie above {COMPARABLE}")


def _ratio(logarithm: float) -> str:
    return f"{math.exp(logarithm):.2f}"


def _ratios(interval: Interval | None) -> str:
    return span(interval, _ratio)
