"""The promise: a row depends on its cell and protocol, and not on kills."""

import csv
import dataclasses
import json
import math
import os
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_training import CELLS, CPU, DATA, PROTOCOL, Plain, Stop, read_row, started, without_times
from torch import nn

import convnorm
from convnorm.uses import observe
from train import attacks, rows, run
from train import training as loop
from train.cell import METHODS, Cell
from train.data import inputs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The row of a cell, and the folder of its run."""
    found = {}

    def get(cell):
        if cell not in found:
            out = tmp_path_factory.mktemp(cell.name)
            found[cell] = run.run(cell, PROTOCOL, DATA, out, CPU), out
        return found[cell]

    return get


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The row of a cell whose norms are recorded, and the file that has them."""
    out = tmp_path_factory.mktemp("watched")
    file = out / "of the" / "norms.csv"
    return run.run(CELLS["l1-decay"], PROTOCOL, DATA, out, CPU, watch=file), file


# One cell


def test_the_row_is_what_the_checkpoint_measures(uninterrupted):
    cell = CELLS["l1-decay"]
    row, out = uninterrupted(cell)
    assert json.loads(json.dumps(row)) == read_row(out, cell)
    network, its_cell, its_protocol = loop.network(loop.read(out / "checkpoints" / f"{cell.name}.pt"))
    assert (its_cell, its_protocol) == (cell, PROTOCOL)
    assert not network.training
    with torch.no_grad():
        clean = network(inputs(DATA.test.pixels)).argmax(1) == DATA.test.labels
    robust = attacks.autoattack(
        network, inputs(DATA.test.pixels[:33]), DATA.test.labels[:33],
        eps=0.02, attacks=PROTOCOL.attacks, iterations=2, batch=500, seed=0,
    )  # fmt: skip
    for part, flags in (("clean", clean), ("robust", robust)):
        assert rows.flags(row[part]).tolist() == flags.tolist()
        assert (row[part]["images"], row[part]["right"]) == (len(flags), int(flags.sum()))
    assert 0 < row["robust"]["right"] <= clean[:33].sum() < row["clean"]["right"]

    uses = observe(network, [1, 3, 32, 32])
    assert row["layers"] == [use.name for use in uses]
    for i, use in enumerate(uses):
        norms = convnorm.norms(use.layer)
        assert row["norms"]["l1"][i] == pytest.approx(norms.l1.item(), rel=1e-7)
        assert row["norms"]["linf"][i] == pytest.approx(norms.linf.item(), rel=1e-7)
        lower, upper = row["norms"]["l2"][i]
        assert lower <= convnorm.l2(use.layer, rtol=1e-3).upper
        assert convnorm.l2(use.layer, rtol=1e-3).lower <= upper <= 1.11 * lower

    assert [entry["epoch"] for entry in row["history"]] == [1, 2, 3]
    assert {name: row["history"][-1][name] for name in ("l1", "linf", "l2")} == row["norms"]
    assert row["history"][0]["l1"] != row["norms"]["l1"]
    assert row["history"][-1]["test_accuracy"] == pytest.approx(row["clean"]["right"] / 64, abs=1e-5)
    assert row["made"]["threads"] == torch.get_num_threads()
    assert row["made"]["torch"] == torch.__version__


def test_a_row_has_the_norms_of_layers_with_batch_norm(uninterrupted):
    row, out = uninterrupted(CELLS["l1-decay"])
    network, _, _ = loop.network(loop.read(out / "checkpoints" / f"{CELLS['l1-decay'].name}.pt"))
    modules, uses = list(network.modules()), observe(network, [1, 3, 32, 32])
    followed = 0
    for i, use in enumerate(uses):
        after = modules[modules.index(use.module) + 1 :][:1]
        layer = use.layer
        if after and isinstance(after[0], nn.BatchNorm2d):
            scale = after[0].weight / (after[0].running_var + after[0].eps).sqrt()
            layer = dataclasses.replace(layer, weight=(use.module.weight * scale[:, None, None, None]).detach())
            followed += 1
        norms, bracket = convnorm.norms(layer), convnorm.l2(layer, rtol=1e-3)
        assert row["folded"]["l1"][i] == pytest.approx(norms.l1.item(), rel=1e-6)
        assert row["folded"]["linf"][i] == pytest.approx(norms.linf.item(), rel=1e-6)
        lower, upper = row["folded"]["l2"][i]
        assert bracket.lower.item() <= upper * (1 + 1e-6)  # of a weight rounded to float32
        assert lower <= bracket.upper.item() * (1 + 1e-6)
        assert upper <= 1.11 * lower
    assert followed == 8
    assert row["folded"]["l1"][-1] == row["norms"]["l1"][-1]  # the linear layer
    assert row["folded"]["l1"][0] != row["norms"]["l1"][0]


def test_watching_writes_the_norms_of_each_step_and_changes_nothing(uninterrupted, watched):
    row, file = watched
    assert without_times(row) == without_times(uninterrupted(CELLS["l1-decay"])[0])
    heads, *lines = csv.reader(file.open())
    assert heads == ["step", *(f"{norm}/{layer}" for layer in row["layers"] for norm in ("l1", "linf"))]
    assert [int(line[0]) for line in lines] == list(range(12))
    for entry, line in zip(row["history"], lines[3::4], strict=True):  # after each epoch
        assert [float(norm) for norm in line[1::2]] == pytest.approx(entry["l1"], rel=1e-8)
        assert [float(norm) for norm in line[2::2]] == pytest.approx(entry["linf"], rel=1e-8)
    assert len({tuple(line[1:]) for line in lines}) == 12


# Divergence


def strict(file):
    """JSON without NaN, which Python would write and read."""

    def refuse(constant):
        raise AssertionError(f"{file.name} holds {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_diverges_has_a_row_that_says_when(tmp_path, method):
    cell, how = CELLS[method], dataclasses.replace(PROTOCOL, learning_rate=1e30)
    row = run.run(cell, how, DATA, tmp_path, CPU)
    assert strict(rows.path(tmp_path, cell)) == json.loads(json.dumps(row)) == read_row(tmp_path, cell)
    assert row["diverged"] == {"epoch": 1, "step": 2}
    assert row.keys() == rows.PARTS | {"diverged"}
    assert row["history"] == []
    assert row["seconds"]["training"] > 0
    assert rows.missing(tmp_path, [cell], how) == []


def rate_of(steps, rate, monkeypatch):
    """This rate in these of all steps, counted from 0."""
    learning_rate = loop.learning_rate
    chosen = lambda first, done, all: rate if done in steps else learning_rate(first, done, all)  # noqa: E731
    monkeypatch.setattr(loop, "learning_rate", chosen)


def test_a_run_that_diverges_late_keeps_what_came_before(tmp_path, uninterrupted, monkeypatch):
    cell, losses = CELLS["plain"], []
    expected = uninterrupted(cell)[0]["history"][0]
    cross_entropy = F.cross_entropy

    def noted(logits, labels):
        loss = cross_entropy(logits, labels)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(F, "cross_entropy", noted)
    rate_of([5], 1e30, monkeypatch)  # the second step of the second epoch
    row = run.run(cell, PROTOCOL, DATA, tmp_path, CPU)
    (first,) = row["history"]
    assert first | {"seconds": 0} == expected | {"seconds": 0}
    finite = [math.isfinite(loss) for loss in losses]
    assert len(finite) == 8
    assert row["diverged"] == {"epoch": 2, "step": finite.index(False) - 4 + 1}
    assert row["seconds"]["training"] > first["seconds"]
    rows.path(tmp_path, cell).unlink()  # as if killed before it was written: from the first checkpoint on, the same
    again = run.run(cell, PROTOCOL, DATA, tmp_path, CPU)
    assert len(losses) == 12
    assert without_times(again) == without_times(row)


def test_a_network_that_is_not_finite_has_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Training, "is_finite", lambda training: training.done < 1)
    row = run.run(CELLS["plain"], PROTOCOL, DATA, tmp_path, CPU)
    assert row["diverged"] == {"epoch": 2, "step": 4}


@pytest.mark.parametrize("rate", [1e30, 1e42], ids=["logits", "weights"])
def test_a_last_step_that_diverges_counts(tmp_path, monkeypatch, rate):
    """The loss was finite at every step, but what the last one left behind is not."""
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    rate_of([11], rate, monkeypatch)
    row = run.run(CELLS["plain"], PROTOCOL, DATA, tmp_path, CPU)
    assert row["diverged"] == {"epoch": 3, "step": 4}
    assert [entry["epoch"] for entry in row["history"]] == [1, 2]
    assert strict(rows.path(tmp_path, CELLS["plain"]))


# Checkpoints


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_checkpoint(tmp_path, uninterrupted, monkeypatch, method):
    cell, steps = CELLS[method], 0

    def stop_in_epoch_2(*arguments):
        nonlocal steps
        steps += 1
        if steps == 6:
            raise Stop
        return learning_rate(*arguments)

    learning_rate = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", stop_in_epoch_2)
    with pytest.raises(Stop):
        run.run(cell, PROTOCOL, DATA, tmp_path, CPU)
    row = run.run(cell, PROTOCOL, DATA, tmp_path, CPU)
    assert steps == 6 + 8  # the first epoch is not trained again
    assert without_times(row) == without_times(uninterrupted(cell)[0])


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of one, where a run of it would look."""
    cell = CELLS["plain"]
    file = tmp_path / "checkpoints" / f"{cell.name}.pt"
    file.parent.mkdir()
    return shutil.copy(uninterrupted(cell)[1] / "checkpoints" / file.name, file)


def test_a_checkpoint_of_another_protocol_is_refused(tmp_path, checkpoint):
    how = dataclasses.replace(PROTOCOL, epochs=4)
    with pytest.raises(ValueError, match=r"seed0.pt' is of another protocol, with epochs 3 and not 4"):
        run.run(CELLS["plain"], how, DATA, tmp_path, CPU)


def test_seeds_and_preset_may_differ(tmp_path, checkpoint):
    run.run(CELLS["plain"], dataclasses.replace(PROTOCOL, seeds=3, preset="full"), DATA, tmp_path, CPU)


def test_a_checkpoint_of_another_cell_is_refused(tmp_path, checkpoint):
    other = Cell("vgg11", "plain", seed=1)
    checkpoint.rename(checkpoint.with_stem(other.name))
    with pytest.raises(ValueError, match=r"seed1.pt' is of another cell, .*'seed': 0"):
        run.run(other, PROTOCOL, DATA, tmp_path, CPU)


@pytest.mark.parametrize("what", ["truncated", "empty", "text", "flipped", "other"])
def test_what_is_no_checkpoint_is_named_in_one_line(checkpoint, what):
    whole = checkpoint.read_bytes()
    if what == "other":
        torch.save({"model": {}}, checkpoint)
    else:
        flipped = whole[:100] + bytes(100) + whole[200:]
        parts = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n", "flipped": flipped}
        checkpoint.write_bytes(parts[what])
    with pytest.raises(ValueError, match=r"seed0.pt' is damaged, or not one of python -m train run$"):
        loop.read(checkpoint)


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(checkpoint):
    training, before = loop.Training(CELLS["plain"], PROTOCOL, DATA, CPU), checkpoint.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # bytes of a file, as if no more fitted
        with pytest.raises(OSError, match="File too large"):
            training.save(checkpoint)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read_bytes() == before
    assert len(list(checkpoint.parent.iterdir())) == 1


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pt' is not there"):
        loop.read(tmp_path / "none.pt")


# Kills: real processes, SIGKILL


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, call):
    """``function``, and death instead of its so manyeth call."""
    calls = 0

    def counted(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            die()
        return function(*arguments, **options)

    return counted


def by_half(write, name):
    def written(self, content):
        if name in self.name:
            write(self, content[: len(content) // 2])
            die()
        return write(self, content)

    return written


MOMENTS = {
    "in the first epoch": lambda patch: patch(loop, "learning_rate", dying(loop.learning_rate, 2)),
    "a checkpoint written, not in place": lambda patch: patch(os, "fsync", dying(os.fsync, 1)),
    "in the second epoch": lambda patch: patch(loop, "learning_rate", dying(loop.learning_rate, 4 + 3)),
    "a checkpoint written by half": lambda patch: patch(Path, "write_bytes", by_half(Path.write_bytes, ".pt.")),
    "before the last checkpoint": lambda patch: patch(torch, "save", dying(torch.save, 2)),
    "before the attacks": lambda patch: patch(run, "autoattack", dying(run.autoattack, 1)),
    "the attacks' state by half": lambda patch: patch(Path, "write_text", by_half(Path.write_text, ".attack0.")),
    "between the attacks": lambda patch: patch(attacks, "_attack", dying(attacks._attack, 2)),
    "the row written by half": lambda patch: patch(Path, "write_text", by_half(Path.write_text, ".json.")),
}


def run_in(out, cell, moment, watch=None):
    torch.set_num_threads(1)
    if moment:
        MOMENTS[moment](setattr)
    run.run(cell, PROTOCOL, DATA, out, CPU, watch=watch)


def test_kills_at_chosen_moments_change_nothing(tmp_path, uninterrupted, watched):
    """One after another in the same run, which every start goes on with."""
    cell, watch = CELLS["l1-decay"], tmp_path / "norms.csv"
    for moment in (*MOMENTS, None):
        process = started(run_in, tmp_path, cell, moment, watch)
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if moment else 0), moment
        partial = [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
        assert len(partial) <= 1, moment  # the next start removes it
    assert without_times(read_row(tmp_path, cell)) == without_times(uninterrupted(cell)[0])
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {f"checkpoints/{cell.name}.pt", f"rows/{cell.name}.json", watch.name}
    assert watch.read_bytes() == watched[1].read_bytes()


def test_kills_at_any_moment_change_nothing(tmp_path, uninterrupted, seed):
    cell, draws, killed, longest = CELLS["alp"], random.Random(seed), 0, 0.1
    while True:
        process = started(run_in, tmp_path, cell, None)
        longest *= 1.5
        process.join(draws.uniform(0, longest))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        killed += 1
    assert process.exitcode == 0
    assert killed > 1
    assert without_times(read_row(tmp_path, cell)) == without_times(uninterrupted(cell)[0])
