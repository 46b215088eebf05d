"""The rows of one run, for the pages made of them: what they share, which cells are missing, how they were made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import cifar, synthetic
from .cell import PUBLISHED, STANDARD, Cell, Protocol, Setting, settings
from .published import MODELS
from .rows import Row, check_same, from_json
from .statistics import wilson


@dataclass(frozen=True)
class Report:
    """One experiment's rows: of one protocol, so that they can be compared.

    ``rows`` are those of networks that were trained to the end; those of the others are ``diverged``.
    """

    protocol: Protocol
    rows: dict[Cell, Row]
    diverged: dict[Cell, Row]

    @classmethod
    def of(cls, rows: Iterable[Row], experiment: str) -> Report:
        """Those of ``rows`` that belong to ``experiment``."""
        mine = [row for row in rows if row["protocol"]["experiment"] == experiment]
        if not mine:
            raise ValueError(f"rows hold none of {experiment}: there is nothing to show")
        protocol = from_json(max((row["protocol"] for row in mine), key=lambda protocol: protocol["seeds"]))
        found: dict[Cell, Row] = {}
        for row in mine:
            cell = Cell(**row["cell"])
            check_same(row["protocol"], protocol, f"rows hold {cell.name}")
            if cell in found:
                raise ValueError(f"rows hold {cell.name} twice")
            found[cell] = row
        by_name = sorted(found.items(), key=lambda pair: pair[0].name)
        rows, diverged = ({cell: row for cell, row in by_name if ("diverged" in row) == so} for so in (False, True))
        return cls(protocol, rows, diverged)

    @property
    def settings(self) -> list[Setting]:
        """Those of each line of its table."""
        return settings(self.protocol.experiment)

    def seeds(self, model: str, method: str, strength: float | None) -> list[Row]:
        """The rows of one setting, by seed; empty where all are missing or diverged."""
        return _of_setting(self.rows, (model, method, strength))

    def lost(self, model: str, method: str, strength: float | None) -> list[Row]:
        """Those of one setting that diverged, by seed."""
        return _of_setting(self.diverged, (model, method, strength))

    def ended(self, model: str, method: str, strength: float | None) -> list[Row]:
        """Both."""
        return self.seeds(model, method, strength) + self.lost(model, method, strength)

    def beside_plain(self, settings: Iterable[Setting]) -> Iterator[tuple[Row, Row | None]]:
        """The rows of these settings, each with the plain network's of its model and seed, where there is one."""
        for model in MODELS:
            plains = {row["cell"]["seed"]: row for row in self.ended(model, "plain", None)}
            for row in (row for setting in settings for row in self.ended(model, *setting)):
                yield row, plains.get(row["cell"]["seed"])

    def absent(self, model: str, method: str, strength: float | None) -> str:
        """Why a setting has no rows."""
        return "diverged" if self.lost(model, method, strength) else "missing"

    @property
    def missing(self) -> list[Cell]:
        """Cells that the protocol asks for and that have no row."""
        return [cell for cell in self.protocol.cells() if cell not in self._all]

    @property
    def several_seeds(self) -> bool:
        settings = self.settings  # folders may hold cells beyond these, which no table shows
        return len({cell.seed for cell in self._all if (cell.method, cell.strength) in settings}) > 1

    def at_chance(self, row: Row) -> bool:
        """Whether its clean accuracy may be that of guessing."""
        dataset = self.protocol.dataset
        classes = synthetic.CLASSES if dataset == "synthetic" else cifar.SOURCES[dataset].classes
        return wilson(row["clean"]["right"], row["clean"]["images"]).low <= 1 / classes

    def doubt(self, row: Row | None) -> str:
        """What keeps a network's accuracy from meaning anything, if something does."""
        if row is None:
            return "is missing"
        if "diverged" in row:
            return "diverged"
        return "may be guessing" if self.at_chance(row) else ""

    @property
    def spread(self) -> str:
        """What stands behind each ± of ``written``."""
        if self.several_seeds:
            return "mean ± deviation over seeds"
        return "one seed; ± is half of the 95 % interval over images (Wilson)"

    def written(self, model: str, method: str, strength: float | None, which: str) -> str:
        """An accuracy of one setting in percent, from all its seeds."""
        rows, lost = self.seeds(model, method, strength), self.lost(model, method, strength)
        if not rows:
            return self.absent(model, method, strength)
        return self._accuracy(rows, which) + (f", {len(lost)} diverged" if lost else "")

    def _accuracy(self, rows: Sequence[Row], which: str) -> str:
        percent = [100 * accuracy(row, which) for row in rows]
        if len(rows) > 1:
            return f"{np.mean(percent):.1f} ± {np.std(percent, ddof=1):.1f}"
        if self.several_seeds:
            return f"{percent[0]:.1f}"
        low, high = wilson(rows[0][which]["right"], rows[0][which]["images"])
        return f"{percent[0]:.1f} ± {50 * (high - low):.1f}"

    def caveats(self) -> list[str]:
        """What stands between this run and any conclusion from it."""
        protocol, found = self.protocol, []
        published = PUBLISHED[protocol.experiment]
        if any(getattr(protocol, name) != getattr(published, name) for name in ("width", "epochs", "training_images")):
            found.append(
                f"Preset {protocol.preset}: networks of {protocol.width:g} times the width, trained for "
                f"{protocol.epochs} epochs on {protocol.training_images:,} images. What holds for them need not hold "
                "at the paper's size."
            )
        if self.missing:
            found.append(
                f"{len(self.missing)} of {len(protocol.cells())} cells are missing: not trained yet, or failed."
            )
        if self.diverged:
            when = ", ".join(f"{cell.name} (epoch {row['diverged']['epoch']})" for cell, row in self.diverged.items())
            found.append(f"{len(self.diverged)} of {len(self._all)} networks diverged, and have no accuracy: {when}.")
        if not self.several_seeds:
            found.append(
                "One seed. Intervals and tests over test images are about these trained networks: they do not say what "
                "another training would give. Seeds would."
            )
        few = protocol.attack_iterations < published.attack_iterations
        if few or set(protocol.attacks) != set(STANDARD):
            attacked = ", ".join(protocol.attacks) + f" with {protocol.attack_iterations} iterations" * few
            found.append(f"Attacked by {attacked} only: standard AutoAttack could only find less robustness.")
        if protocol.dataset == "synthetic":
            found.append("Synthetic images: nothing here is about natural ones.")
        return found

    def header(self) -> str:
        """How it was run, as a Markdown list."""
        protocol, rows = self.protocol, list(self._all.values())
        made = [row["made"] for row in rows]
        minutes = sum(sum(row["seconds"].values()) for row in rows) / 60
        time = f"{minutes:.2g} minutes" if minutes < 60 else f"{minutes / 60:.1f} hours"
        dates = sorted(each["date"] for each in made)
        lines = {
            "cells": f"{len(rows) - self._beyond} of {len(protocol.cells())}"
            + (f", and {self._beyond} more" if self._beyond else "")
            + (f"; diverged: {_names(list(self.diverged))}" if self.diverged else "")
            + (f"; missing: {_names(self.missing)}" if self.missing else ""),
            "training": f"preset `{protocol.preset}`, variant `{protocol.variant}`, width x {protocol.width:g}, "
            f"{protocol.epochs} epochs of {protocol.training_images:,} images of {protocol.dataset}, batch "
            f"{protocol.batch}, learning rate {protocol.learning_rate:g}, {protocol.precision}",
            "test": f"clean on {protocol.test_images:,} images; robust on the first {protocol.attacked_images:,} "
            f"against {', '.join(protocol.attacks)} ({protocol.attack_iterations} iterations), linf, "
            f"eps {protocol.eps * 255:.3g}/255",
            "time": f"{time} of cells one after another",
            "made by": f"commit {_all(made, 'commit')}, torch {_all(made, 'torch')}, Python {_all(made, 'python')}, on "
            f"{_all(made, 'device')}, {dates[0]}" + (f" to {dates[-1]}" if dates[-1] != dates[0] else ""),
        }
        return "\n".join(f"- **{name}**: {line}" for name, line in lines.items())

    @property
    def _all(self) -> dict[Cell, Row]:
        return self.rows | self.diverged

    @property
    def _beyond(self) -> int:
        return len(set(self._all) - set(self.protocol.cells()))


def _of_setting(rows: dict[Cell, Row], setting: tuple[str, str, float | None]) -> list[Row]:
    found = [cell for cell in rows if (cell.model, cell.method, cell.strength) == setting]
    return [rows[cell] for cell in sorted(found, key=lambda cell: cell.seed)]


def accuracy(row: Row, which: str) -> float:
    """``which`` is clean or robust."""
    return row[which]["right"] / row[which]["images"]


def norms_of(row: Row, norm: str, part: str = "norms") -> np.ndarray:
    """One number for each layer; of l2 brackets the middle. ``part`` is norms, or folded: with batch norm."""
    return middles(row[part][norm])


def middles(norms: Sequence[float] | Sequence[Sequence[float]]) -> np.ndarray:
    """
    >>> middles([[2.0, 4.0]]), middles([3.0])
    (array([3.]), array([3.]))
    """
    values = np.asarray(norms, dtype=float)
    return values.mean(axis=-1) if values.ndim == 2 else values


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def write(page: Path, sections: Iterable[str]) -> Path:
    """Of Markdown; returns the page."""
    page.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page


def image(file: str, what: str) -> str:
    """In Markdown: the PNG, which leads to the SVG beside it."""
    return f"[![{what}]({file}.png)]({file}.svg)"


def _names(cells: Sequence[Cell], shown: int = 6) -> str:
    names = ", ".join(cell.name for cell in cells[:shown])
    return names + (f" and {len(cells) - shown} more" if len(cells) > shown else "")


def _all(made: Iterable[dict[str, Any]], what: str) -> str:
    """Every value that some row has."""
    return ", ".join(dict.fromkeys(str(each[what]) for each in made))
