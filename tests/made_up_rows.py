"""Rows of trainings that nobody did: networks that are right on the easier images, and layers that have given norms."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

pytest.importorskip("train.cell", reason="away from the source tree")
from train import cell
from train import rows as storage

IMAGES = 500
LAYERS = {"vgg11": 9, "resnet18": 21, "senet18": 37, "regnetx200mf": 45}
MADE = {"commit": "0123abc", "torch": "2.13.0", "python": "3.11.7", "device": "a device", "processes": 1, "threads": 1}


def made_up(experiment, clean=0.6, robust=0.4, norm=1.0, seeds=1, preset="smoke", **changes):
    """A row for each cell; ``clean``, ``robust`` and ``norm`` are numbers or functions of the cell."""
    protocol = replace(cell.protocol(experiment, preset), seeds=seeds, **changes)
    difficulty = np.random.default_rng(0).permutation(IMAGES) / IMAGES  # the same images for all networks

    def one(which):
        draw = np.random.default_rng([*which.name.encode()])
        count = LAYERS[which.model]

        def value(of):
            return of(which) if callable(of) else of

        def right(share):
            return storage.counted(difficulty + draw.normal(0, 0.1, IMAGES) < value(share) + draw.normal(0, 0.01))

        norms = value(norm) * np.exp(np.random.default_rng(count).normal(3, 0.7, (3, count)))
        norms *= np.exp(draw.normal(0, 0.03, (3, count)))

        def after(share):  # of the training
            l1, linf, l2 = norms**share
            return {"l1": [*l1], "linf": [*linf], "l2": [[low, 1.02 * low] for low in l2]}

        return {
            "cell": asdict(which),
            "protocol": storage.as_json(protocol),
            "clean": right(clean),
            "robust": right(robust),
            "layers": [f"layer{number}" for number in range(count)],
            "norms": after(1),
            "history": [
                {"epoch": epoch, "loss": 1.0, "test_accuracy": 0.5, **after(epoch / 4)} for epoch in (1, 2, 3, 4)
            ],
            "seconds": {"training": 60.0, "evaluation": 30.0},
            "made": {**MADE, "date": f"2026-01-0{1 + which.seed}"},
        }

    return json.loads(json.dumps([one(which) for which in protocol.cells()]))


def diverging(rows, epoch=2, **cells):
    """The same, but those whose cells have these values diverged in that epoch."""

    def lost(row):
        kept = {part: row[part] for part in storage.PARTS}
        return kept | {"diverged": {"epoch": epoch, "step": 7}, "history": row["history"][: epoch - 1]}

    chosen = [all(row["cell"][name] == value for name, value in cells.items()) for row in rows]
    return [lost(row) if is_one else row for row, is_one in zip(rows, chosen, strict=True)]


def by(**methods):
    """A function of a cell: the number of its method, or ``other``."""
    return lambda which: methods.get(which.method.replace("-", "_"), methods["other"])


def without(rows, **cells):
    return [row for row in rows if any(row["cell"][name] != value for name, value in cells.items())]


def shifted(base, change):
    """An accuracy: ``base`` of the plain networks; of others ``change`` more, a number or one for each model."""
    changes = change if isinstance(change, dict) else dict.fromkeys(LAYERS, change)
    return lambda which: base + (which.method != "plain") * changes[which.model]


def folded(rows, factor):
    """The same, with norms with batch norm: the others times ``factor`` of the cell."""

    def of(row):
        times = factor(cell.Cell(**row["cell"]))
        return {name: (times * np.array(norms)).tolist() for name, norms in row["norms"].items()}

    return [row | {"folded": of(row)} for row in rows]


ROBUST = by(plain=0.1, other=0.4)
