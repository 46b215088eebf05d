"""Claims 1 and 2, from Table 2: regularisation improves clean accuracy; the strongest costs robust accuracy.

Every regularised network is compared with the plain one of its model and seed, image by image. Claim 1 takes all
strengths, and networks that too much of it kept from learning count as well, those that diverged as right about no
image; claim 2 takes the strongest of each method, and leaves those out that diverged or may be guessing: they have no
robustness to lose.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .cell import Setting, settings, strongest
from .claims import ONE_NETWORK, UNDECIDED, Judgement, Verdict, count, judge, nothing_compared, points, span
from .published import CLEAN_IMAGES, MODELS, ROBUST_IMAGES, TABLE2
from .report import Report, accuracy, table
from .rows import Row, flags
from .statistics import LEVEL, Interval, holm, hull, mcnemar, normal, over_images, students_t

REGULARISED = settings("table2")[1:]
STRONGEST = strongest("table2")


@dataclass(frozen=True)
class Claim:
    """That accuracies of ``settings`` are above (``sign`` 1) or below (-1) the plain network's."""

    sentence: str
    which: str  # clean or robust
    settings: Sequence[Setting]
    sign: int


IMPROVES_CLEAN = Claim("regularisation improves clean accuracy", "clean", REGULARISED, 1)
COSTS_ROBUST = Claim("the strongest regularisation costs robust accuracy", "robust", STRONGEST, -1)


@dataclass(frozen=True)
class Pair:
    """A regularised network beside the plain one of its model and seed."""

    model: str
    seed: int
    differences: np.ndarray  # of each image: 1 where only the regularised one is right, -1 where only the plain one is
    p: float  # McNemar's, of no difference
    clean: float  # the change of clean accuracy, whichever the claim is about

    @property
    def change(self) -> float:
        return float(self.differences.mean())


def verdict(report: Report, claim: Claim) -> Verdict:
    """With a line for each model."""
    pairs, caveats = _pairs(report, claim)
    adjusted = holm([pair.p for pair in pairs])
    sure = [pair for pair, p in zip(pairs, adjusted, strict=True) if p < 1 - LEVEL]
    paper = printed(claim)
    head = ["", "networks up / down", "of these beyond chance", f"mean change of {claim.which} accuracy", "over images",
            "over networks", "their change of clean accuracy", "the paper: up / down, mean"]  # fmt: skip
    lines = []
    for name, models in {**{MODELS[model]: [model] for model in MODELS}, "all": MODELS}.items():
        mine, certain = ([pair for pair in some if pair.model in models] for some in (pairs, sure))
        changes = [change for model in models if model in paper for change in paper[model].changes]
        lines.append([name, *_line(mine, certain), _changes(changes) if changes else "-"])
    if claim.which == "clean":  # one column would be there twice
        del head[6]
        lines = [line[:6] + line[7:] for line in lines]
    return Verdict(claim.sentence, _here(claim, pairs, caveats), _in_paper(claim, paper), table(head, lines), caveats)


def _pairs(report: Report, claim: Claim) -> tuple[list[Pair], list[str]]:
    """Every regularised network that can be compared, and in words which cannot and why."""
    pairs, caveats = [], defaultdict(list)
    for row, plain in report.beside_plain(claim.settings):
        if doubt := report.doubt(plain):
            caveats[f"left out: the plain network of their model and seed {doubt}"].append(row)
        elif (doubt := report.doubt(row)) and claim.which == "robust":
            caveats[f"left out: they {doubt}, and have no robustness to lose"].append(row)
        else:
            pairs.append(_pair(row, plain, claim.which))
            if "diverged" in row:
                caveats["diverged, and count as right about no image"].append(row)
            elif doubt:
                caveats["may be guessing, and count: they were regularised until nothing was learnt"].append(row)
    return pairs, [f"{count(rows)} {what}." for what, rows in caveats.items()]


def _pair(row: Row, plain: Row, which: str) -> Pair:
    unregularised = flags(plain[which])
    diverged = "diverged" in row
    regularised = np.zeros_like(unregularised) if diverged else flags(row[which])
    p = mcnemar(regularised, unregularised)  # refuses flags of different images
    differences = regularised.astype(np.int8) - unregularised.astype(np.int8)
    clean = (0.0 if diverged else accuracy(row, "clean")) - accuracy(plain, "clean")
    return Pair(row["cell"]["model"], row["cell"]["seed"], differences, p, clean)


def _line(pairs: Sequence[Pair], sure: Sequence[Pair]) -> list[str]:
    if not pairs:
        return ["-"] * 6
    return [
        _up_down(pair.change for pair in pairs),
        _up_down(pair.change for pair in sure),
        points(_mean(pair.change for pair in pairs)),
        span(_over_images(pairs)),
        span(_over_networks(pairs)),
        points(_mean(pair.clean for pair in pairs)),
    ]


def _here(claim: Claim, pairs: Sequence[Pair], caveats: Sequence[str]) -> Judgement:
    if not pairs:
        return nothing_compared(caveats)
    because = _because(claim, [pair.change for pair in pairs])
    networks = _over_networks(pairs)
    if networks is None:
        return Judgement(UNDECIDED, f"{because}; {ONE_NETWORK}")
    return _judged(claim, because, hull(_over_images(pairs), networks))


def _over_images(pairs: Sequence[Pair]) -> Interval:
    return over_images(np.mean([pair.differences for pair in pairs], axis=0))


def _over_networks(pairs: Sequence[Pair]) -> Interval | None:
    """Of one number for each plain network: the mean over those that are compared with it."""
    changes = defaultdict(list)
    for pair in pairs:
        changes[pair.model, pair.seed].append(pair.change)
    return students_t([_mean(each) for each in changes.values()])


# The same of the paper's numbers, which come without flags


@dataclass(frozen=True)
class Printed:
    """A model's accuracies in the paper."""

    plain: float
    regularised: Sequence[float]

    @property
    def changes(self) -> list[float]:
        return [accuracy - self.plain for accuracy in self.regularised]


def printed(claim: Claim) -> dict[str, Printed]:
    """By model, without those whose plain accuracy the paper does not have."""
    column = ("clean", "robust").index(claim.which)
    return {
        model: Printed(plain / 100, [TABLE2[(model, *setting)][column] / 100 for setting in claim.settings])
        for model in MODELS
        if (plain := TABLE2[model, "plain", None][column]) is not None
    }


def _in_paper(claim: Claim, models: Mapping[str, Printed]) -> Judgement:
    """By the same rule."""
    networks = students_t([_mean(model.changes) for model in models.values()])
    because = _because(claim, [change for model in models.values() for change in model.changes])
    return _judged(claim, because, hull(printed_over_images(claim, models), networks))


def printed_over_images(claim: Claim, models: Mapping[str, Printed]) -> Interval:
    """That of independent binomials: too wide, as all networks saw the same images."""
    images = CLEAN_IMAGES if claim.which == "clean" else ROBUST_IMAGES
    every = [change for model in models.values() for change in model.changes]
    variance = sum(
        sum(p * (1 - p) for p in model.regularised)
        + len(model.regularised) ** 2 * model.plain * (1 - model.plain)  # the plain one is in all of these changes
        for model in models.values()
    )
    return normal(_mean(every), math.sqrt(variance / images) / len(every))


# How numbers become words


def _judged(claim: Claim, because: str, interval: Interval) -> Judgement:
    claimed = interval if claim.sign > 0 else Interval(-interval.high, -interval.low)
    return Judgement(judge(claimed, above=0), f"{because}; {LEVEL:.0%} interval {span(interval)}")


def _because(claim: Claim, changes: Sequence[float]) -> str:
    agree, direction = sum(claim.sign * change > 0 for change in changes), "up" if claim.sign > 0 else "down"
    return f"{points(_mean(changes))} points on average, {direction} in {agree} of {len(changes)} networks"


def _changes(changes: Sequence[float]) -> str:
    return f"{_up_down(changes)}, {points(_mean(changes))}"


def _up_down(changes: Iterable[float]) -> str:
    values = list(changes)
    return f"{sum(value > 0 for value in values)} / {sum(value < 0 for value in values)}"


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
