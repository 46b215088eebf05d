"""How a claim of the paper is judged, from the rows and from what the paper printed alike.

The rule: a claim names a mean and a value that it must exceed. It *holds* if the 95 % interval of the mean lies above
that value, *does not hold* if it lies below, and is *undecided* otherwise. A network that was not trained, or not made
robust, says nothing about any of them: such comparisons are left out, and a claim without others is *not meaningful*.

What is repeated matters. Networks of the same model and seed are compared with one plain network, whose luck is in all
of these differences: their mean is one number, and Student's t over these numbers gives the interval. The claims on
accuracies join it with the one over test images, which all networks share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .report import table
from .rows import Row
from .statistics import LEVEL, Interval

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
MEANINGLESS, MISSING = "not meaningful", "not measured"
COMPARABLE = 0.9  # of the plain network's norm: what is still "as large"

ONE_NETWORK = "one plain network does not tell what another training would give"
LEGEND = f"""\
How the words are meant: a claim *holds* if the {LEVEL:.0%} interval of the mean lies above the value to exceed (no
change; {COMPARABLE} times the plain network's norm), *does not hold* if it lies below, and is *undecided* otherwise.
Networks of one model and seed share one plain network, whose luck is in all their differences: "over networks" has one
number for each plain network (Student's t). "Over images" is about these networks on other images; claims on accuracies
need both. "Beyond chance": McNemar's exact test on the same images, adjusted for the number of networks (Holm, 5 %).
Layers of a network are not independent: "over layers" describes it, and does not decide."""


@dataclass(frozen=True)
class Judgement:
    """A word and the numbers that it rests on."""

    word: str
    because: str

    def __str__(self) -> str:
        """In Markdown."""
        return f"**{self.word}**: {self.because}"


@dataclass(frozen=True)
class Verdict:
    """A claim, here and from the paper's numbers, with those of each model and what weakens it."""

    claim: str
    here: Judgement
    paper: Judgement | None  # where it printed none
    details: str  # a Markdown table
    caveats: Sequence[str]

    def __str__(self) -> str:
        """In Markdown."""
        title = f"### {self.claim[0].upper()}{self.claim[1:]}: {self.here.word}"
        caveats = ["\n".join(f"- {caveat}" for caveat in self.caveats)] if self.caveats else []
        return "\n\n".join([title, self.details, *caveats])


def summary(verdicts: Iterable[Verdict]) -> str:
    """All of them as one Markdown table."""
    lines = [[each.claim, str(each.here), "-" if each.paper is None else str(each.paper)] for each in verdicts]
    return table(["claim", "here", "from the paper's own numbers"], lines)


def judge(interval: Interval | None, above: float) -> str:
    """The rule."""
    if interval is None or interval.low <= above <= interval.high:
        return UNDECIDED
    return HOLDS if interval.low > above else FAILS


def nothing_compared(caveats: Sequence[str]) -> Judgement:
    """Of a claim without a comparison that means anything; ``caveats`` say why each one was left out."""
    return Judgement(MEANINGLESS, " ".join(caveats)) if caveats else Judgement(MISSING, "no rows")


# How numbers are written


def points(change: float) -> str:
    """A difference of accuracies, in percentage points."""
    return f"{100 * change:+.1f}"


def span(interval: Interval | None, write: Callable[[float], str] = points) -> str:
    """Both ends."""
    return "-" if interval is None else f"[{write(interval.low)}, {write(interval.high)}]"


def count(rows: Sequence[Row]) -> str:
    """How many networks."""
    return f"{len(rows)} network{'s' * (len(rows) > 1)}"
