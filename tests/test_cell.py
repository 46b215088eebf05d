"""The promise: the cells are those of the paper's table and figure, each under a name of its own."""

import dataclasses
from collections import Counter

import pytest

cell = pytest.importorskip("train.cell", reason="away from the source tree")
Cell, Protocol, protocol = cell.Cell, cell.Protocol, cell.protocol


@pytest.mark.parametrize("preset", cell.PRESETS)
@pytest.mark.parametrize(("experiment", "count"), [("table2", 68), ("figure2", 16)])
def test_every_preset_has_all_cells(experiment, preset, count):
    how = protocol(experiment, preset)
    cells = how.cells()
    assert len(cells) == len({each.name for each in cells}) == count * how.seeds
    assert Counter(each.model for each in cells) == dict.fromkeys(cell.PAPER, count // 4 * how.seeds)
    assert {each.seed for each in cells} == set(range(how.seeds))


def test_table_2_has_the_papers_strengths():
    cells = protocol("table2", "paper").cells()
    found = {method: [each.strength for each in cells if each.method == method][:4] for method in cell.METHODS}
    decays = [1e-2, 1e-3, 1e-4, 1e-5]
    assert found["weight-decay"] == found["l1-decay"] == found["linf-decay"] == decays
    assert found["clip"] == [0.5, 1.0, 1.5, 2.0]
    assert found["plain"] == [None] * 4  # one for each model


def test_the_papers_protocol_is_the_papers():
    table2, figure2 = protocol("table2", "paper"), protocol("figure2", "paper")
    assert (table2.learning_rate, table2.eps * 255, figure2.learning_rate, figure2.eps * 255) == (0.01, 1, 0.1, 8)
    for how in (table2, figure2):
        assert (how.epochs, how.training_images, how.batch, how.momentum, how.width) == (120, 50_000, 128, 0.9, 1)
        assert (how.train_eps, how.train_step, how.train_steps, how.train_noise) == (0.031, 0.007, 10, 0.001)
        assert (how.attacked_images, how.attacks, how.seeds) == (1024, ("apgd-ce", "apgd-t"), 1)
    full = protocol("table2", "full")
    assert (full.variant, full.seeds, full.attacked_images, full.test_images) == ("paper", 3, 10_000, 10_000)
    assert full.attacks == ("apgd-ce", "apgd-t", "fab-t", "square")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("vgg16", "plain"), "model 'vgg16' must be one of vgg11, "),
        (("vgg11", "dropout"), "method 'dropout' must be one of plain, "),
        (("vgg11", "l1-decay"), r"method 'l1-decay' needs a strength \(--beta\)"),
        (("vgg11", "plain", 0.1), r"method 'plain' has no strength \(--beta\)"),
        (("vgg11", "pgd-at", 1.0), r"method 'pgd-at' has no strength \(--beta\)"),
        (("vgg11", "clip", -1.0), "strength -1.0 must be a number of at least 0"),
        (("vgg11", "clip", float("nan")), "strength nan must be"),
        (("vgg11", "clip", float("inf")), "strength inf must be"),
        (("vgg11", "plain", None, -1), r"seed -1 must be from 0 to 2\^32 - 1"),
        (("vgg11", "plain", None, 2**32), "seed 4294967296 must be from 0 to"),
    ],
)
def test_what_is_no_cell_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Cell(*fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experiment": "table3"}, "experiment 'table3' must be one of table2, figure2"),
        ({"variant": "printed"}, "variant 'printed' must be one of paper, released"),
        ({"precision": "float16"}, "precision 'float16' must be one of float32, bfloat16"),
        ({"epochs": 0}, "epochs 0 must be at least 1"),
        ({"batch": 65, "training_images": 64}, "batch 65 must be at most training_images 64"),
        ({"width": 0.0}, "width 0.0 must be a number more than 0"),
        ({"width": float("nan")}, "width nan must be a number more than 0"),
        ({"learning_rate": float("inf")}, "learning_rate inf must be a number more than 0"),
        ({"eps": -0.1}, "eps -0.1 must be a number more than 0"),
        ({"attacks": ("apgd-ce", "pgd")}, "attacks 'pgd' must be of apgd-ce, apgd-t, fab-t, square"),
    ],
)
def test_what_is_no_protocol_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(protocol("table2", "smoke"), **changes)


@pytest.mark.parametrize(
    ("arguments", "message"), [(("table3", "smoke"), "experiment 'table3'"), (("table2", "large"), "preset 'large'")]
)
def test_an_unknown_preset_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        protocol(*arguments)
