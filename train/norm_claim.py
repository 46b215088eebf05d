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

from .cell import STRENGTHS
from .claims import COMPARABLE, ONE_NETWORK, UNDECIDED, Judgement, Verdict, count, judge, nothing_compared, span
from .published import METHODS, MODELS
from .report import Report, Setting, norms_of, table
from .rows import Row, flags
from .statistics import LEVEL, Interval, holm, over_images, signed_rank, students_t

NORMS = ("linf", "l1", "l2")  # the paper's text, its released code, and the one that Lipschitz constants are usually of
ADVERSARIAL: list[Setting] = [
    (method, strengths[0]) for method, strengths in STRENGTHS["figure2"].items() if method != "plain"
]
CAVEAT = (
    "A convolution that a batch norm follows can be scaled at will without changing the network: these norms are of "
    "the weights, and not of the function."
)


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


def verdict(report: Report, norm: str) -> Verdict:
    """For one of the norms, with a line for each model and method."""
    comparisons, caveats = _comparisons(report, norm)
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
    return Verdict(sentence, _here(comparisons, caveats), None, table(head, lines), caveats)


def _comparisons(report: Report, norm: str) -> tuple[list[Comparison], list[str]]:
    """Those that mean something, and in words which others do not and why."""
    comparisons, reasons = [], defaultdict(list)
    for model in MODELS:
        plains = {row["cell"]["seed"]: row for row in report.seeds(model, "plain", None)}
        for row in (row for setting in ADVERSARIAL for row in report.seeds(model, *setting)):
            plain = plains.get(row["cell"]["seed"])
            if reason := _why_not(report, row, plain, norm):
                reasons[reason].append(row)
            else:
                logarithms = np.log(norms_of(row, norm) / norms_of(plain, norm))
                cell = row["cell"]
                comparisons.append(Comparison(cell["model"], cell["method"], cell["seed"], logarithms))
    return comparisons, [f"{count(rows)} left out: {reason}." for reason, rows in reasons.items()]


def _why_not(report: Report, row: Row, plain: Row | None, norm: str) -> str:
    if plain is None:
        return "the plain network of their model and seed is missing"
    if row["layers"] != plain["layers"]:
        raise ValueError(f"rows of {row['cell']} and {plain['cell']} name different layers")
    if report.at_chance(row) or report.at_chance(plain):
        return "they or the plain one may be guessing"
    robust = flags(row["robust"]).astype(np.int8) - flags(plain["robust"]).astype(np.int8)
    if over_images(robust).low <= 0:
        return "they were not seen to be more robust than the plain one"
    values = np.concatenate([norms_of(row, norm), norms_of(plain, norm)])
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
