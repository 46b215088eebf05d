"""The promise: the width sweep trains each width with each β, and its page says what their evaluations hold."""

import json
import shutil
from pathlib import Path

import pytest

widths = pytest.importorskip("train.widths", reason="away from the source tree")
cell = pytest.importorskip("train.cell")
rows = pytest.importorskip("train.rows")


def found(width, strength, robust):
    """As ``python -m train evaluate`` writes it, in what the page reads of it."""
    flags = {"images": 100, "interval": [0.1, 0.3]}
    return {
        "cell": {"model": "resnet18", "method": "trades", "strength": strength, "seed": 0},
        "protocol": {"width": width, "preset": "smoke", "epochs": 4, "training_images": 5120, "dataset": "cifar10"},
        "made": {"commit": "abc", "torch": "2.13.0", "device": "a CPU", "date": "2026-01-01"},
        "attacks": ["apgd-ce"],
        "iterations": 10,
        "eps": 8 / 255,
        "right": flags | {"right": 50},
        "stable": flags | {"right": 40},
        "robust": flags | {"right": robust},
        "local_lipschitz": [10.0, 20.0],
    }


def test_every_width_is_trained_with_every_strength(tmp_path):
    parts = list(widths.parts(cell.protocol("figure2", "smoke"), tmp_path))
    assert [how.width for how, _, _ in parts] == list(widths.WIDTHS["smoke"])
    assert len({folder for _, folder, _ in parts}) == len(parts)
    for _, _, cells in parts:
        assert [(one.model, one.method, one.strength) for one in cells] == [
            ("resnet18", "trades", strength) for strength in widths.STRENGTHS
        ]


def test_the_page_is_that_of_the_evaluations(tmp_path):
    pytest.importorskip("matplotlib")
    robust = {(1 / 16, 1.0): 20, (1 / 16, 9.0): 10, (1 / 8, 1.0): 15, (1 / 8, 9.0): 25}
    for how, folder, cells in widths.parts(cell.protocol("figure2", "smoke"), tmp_path):
        for one in cells:
            if (how.width, one.strength) in robust:
                file = widths.evaluation(folder, one) / "evaluation.json"
                file.parent.mkdir(parents=True)
                file.write_text(json.dumps(found(how.width, one.strength, robust[how.width, one.strength])))
    lost = {"cell": {"model": "resnet18", "method": "trades", "strength": 3.0, "seed": 0}, "diverged": {"epoch": 2}}
    lost |= dict.fromkeys(rows.PARTS - lost.keys()) | {"protocol": {"width": 1 / 8}}
    rows.write(tmp_path / "width-0.125", cell.Cell(**lost["cell"]), lost)
    read = widths.read(tmp_path)
    assert len(read) == len(robust)
    assert (widths.best(read, 1 / 16), widths.best(read, 1 / 8)) == (1.0, 9.0)
    page = widths.render(tmp_path).read_text()
    assert (
        "| 0.125 | 3 | diverged | diverged | diverged | diverged |\n| 0.125 | 9 | 50.0 | 40.0 | 25.0 | 15.0 |" in page
    )
    assert "β 1 at width 0.0625, β 9 at width 0.125" in page
    assert (tmp_path / "figures" / "widths.svg").exists()


def test_nothing_to_show_is_said(tmp_path):
    with pytest.raises(ValueError, match="holds no evaluation"):
        widths.render(tmp_path)


def test_the_committed_page_is_that_of_the_committed_evaluations(tmp_path, monkeypatch):
    monkeypatch.setattr(widths, "draw", lambda *_: None)
    committed = Path(widths.__file__).parent / "results" / "widths-smoke"
    found = shutil.copytree(committed, tmp_path / "found", ignore=shutil.ignore_patterns("widths.md", "figures"))
    assert widths.render(found).read_text() == (committed / "widths.md").read_text()
