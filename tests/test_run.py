"""The promise: a row depends on its cell and protocol, not on kills, nor on how many processes share a batch."""

import csv
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convnorm
from convnorm.uses import observe

train = pytest.importorskip("train.run", reason="away from the source tree")
from train import attacks, ranks, rows  # noqa: E402
from train import training as loop  # noqa: E402
from train.cell import METHODS, STRENGTHS, Cell, protocol  # noqa: E402
from train.data import Data, epoch, inputs, load  # noqa: E402

pytest.importorskip("pyautoattack")
CPU = torch.device("cpu")
PROTOCOL = dataclasses.replace(
    protocol("table2", "smoke"),
    dataset="synthetic",
    variant="paper",
    epochs=3,
    training_images=128,
    batch=32,
    test_images=64,
    attacked_images=33,
    eps=0.02,
    attacks=("apgd-ce", "apgd-t"),
    attack_iterations=2,
    clip_every=3,
    train_steps=2,
)
STRENGTH = {method: strengths[0] for methods in STRENGTHS.values() for method, strengths in methods.items()}
CELLS = {method: Cell("vgg11", method, STRENGTH[method]) for method in METHODS}


@pytest.fixture(scope="module")
def data():
    whole = load("synthetic", None)
    return Data(whole.name, whole.classes, whole.training.first(128), whole.test.first(64))


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The row of a cell, and the folder of its run."""
    found = {}

    def get(cell):
        if cell not in found:
            out = tmp_path_factory.mktemp(cell.name)
            found[cell] = train.run(cell, PROTOCOL, data, out, CPU), out
        return found[cell]

    return get


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """The row of a cell whose norms are recorded, and the file that has them."""
    out = tmp_path_factory.mktemp("watched")
    return train.run(CELLS["l1-decay"], PROTOCOL, data, out, CPU, watch=out / "of the" / "norms.csv"), (
        out / "of the" / "norms.csv"
    )


def without_times(row):
    row = json.loads(json.dumps(row))
    del row["seconds"], row["made"]
    for entry in row["history"]:
        del entry["seconds"]
    return row


def read_row(out, cell):
    return rows.read_one(rows.path(out, cell))


class Plain(nn.Module):
    """Without batch norm, so that a batch is no more than its images."""

    def __init__(self, classes, width):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.second = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().amax((2, 3)))


# Learning rates


def test_the_learning_rate_is_a_tenth_from_epochs_75_90_and_100_on():
    steps = 390
    for number in range(1, 121):
        expected = 0.1 * 0.1 ** sum(number >= start for start in (75, 90, 100))
        for step in (0, steps - 1):
            found = loop.learning_rate(0.1, (number - 1) * steps + step, 120 * steps)
            assert found == pytest.approx(expected, rel=1e-12), number


def test_short_runs_fall_at_the_same_parts():
    assert [loop.learning_rate(1.0, done, 40) for done in (0, 24, 25, 29, 30, 32, 33, 39)] == [
        1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001,
    ]  # fmt: skip
    assert loop.learning_rate(1.0, 0, 1) == 1


# One cell


def test_an_epoch_is_the_plain_loop(data, monkeypatch):
    """With the rate of each step, momentum and weight decay written out."""
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    how, cell = dataclasses.replace(PROTOCOL, epochs=2), Cell("vgg11", "weight-decay", 0.01, seed=3)
    training = loop.Training(cell, how, data, CPU)
    torch.manual_seed(3)
    network = Plain(10, how.width)
    velocity = {name: 0 for name, _ in network.named_parameters()}
    for done in range(2):
        told = training.one_epoch(lambda news: None)
        training.history.append(told)
        losses, right = [], []
        draws = torch.Generator().manual_seed(3_000_009 + done)
        for step, (x, labels) in enumerate(epoch(data.training, 32, draws)):
            rate = 0.1 * 0.1 ** sum(4 * done + step >= 8 * fall / 120 for fall in (74, 89, 99))
            network.zero_grad()
            logits = network(x)
            F.cross_entropy(logits, labels).backward()
            losses.append(F.cross_entropy(logits, labels).item())
            right.append((logits.argmax(1) == labels).float().mean().item())
            with torch.no_grad():
                for name, weight in network.named_parameters():
                    velocity[name] = 0.9 * velocity[name] + weight.grad + 0.01 * weight
                    weight -= rate * velocity[name]
        for name, weight in training.network.named_parameters():
            torch.testing.assert_close(weight, network.get_parameter(name), rtol=1e-5, atol=1e-6)
        assert told["loss"] == pytest.approx(np.mean(losses), abs=2e-5)
        assert told["training_accuracy"] == pytest.approx(np.mean(right), abs=2e-5)
        assert (told["epoch"], told["learning_rate"]) == (done + 1, pytest.approx(rate))


@pytest.mark.parametrize(("method", "forwards"), [("plain", 1), ("pgd-at", 1), ("alp", 2), ("trades", 2)])
def test_batch_norm_sees_what_the_loss_sees_and_not_the_attack(data, method, forwards):
    training = loop.Training(CELLS[method], PROTOCOL, data, CPU)
    training.network.eval()
    training.one_epoch(lambda news: None)
    assert {int(n) for name, n in training.network.named_buffers() if "num_batches" in name} == {4 * forwards}


def test_the_row_is_what_the_checkpoint_measures(data, uninterrupted):
    cell = CELLS["l1-decay"]
    row, out = uninterrupted(cell)
    assert json.loads(json.dumps(row)) == read_row(out, cell)
    network, its_cell, its_protocol = loop.network(loop.read(out / "checkpoints" / f"{cell.name}.pt"))
    assert (its_cell, its_protocol) == (cell, PROTOCOL)
    assert not network.training
    with torch.no_grad():
        clean = network(inputs(data.test.pixels)).argmax(1) == data.test.labels
    robust = attacks.autoattack(
        network, inputs(data.test.pixels[:33]), data.test.labels[:33],
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


def test_seeds_are_other_networks_and_batches(data):
    first, second = (loop.Training(Cell("vgg11", "plain", seed=seed), PROTOCOL, data, CPU) for seed in (0, 1))
    assert not torch.equal(first.network.head[1].weight, second.network.head[1].weight)
    second.network.load_state_dict(first.network.state_dict())
    for training in (first, second):
        training.one_epoch(lambda news: None)
    assert not torch.equal(first.network.head[1].weight, second.network.head[1].weight)


# Divergence


def strict(file):
    """JSON without NaN, which Python would write and read."""

    def refuse(constant):
        raise AssertionError(f"{file.name} holds {constant}")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_diverges_has_a_row_that_says_when(data, tmp_path, method):
    cell, how = CELLS[method], dataclasses.replace(PROTOCOL, learning_rate=1e30)
    row = train.run(cell, how, data, tmp_path, CPU)
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


def test_a_run_that_diverges_late_keeps_what_came_before(data, tmp_path, uninterrupted, monkeypatch):
    cell, losses = CELLS["plain"], []
    expected = uninterrupted(cell)[0]["history"][0]
    cross_entropy = F.cross_entropy

    def noted(logits, labels):
        loss = cross_entropy(logits, labels)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(F, "cross_entropy", noted)
    rate_of([5], 1e30, monkeypatch)  # the second step of the second epoch
    row = train.run(cell, PROTOCOL, data, tmp_path, CPU)
    (first,) = row["history"]
    assert first | {"seconds": 0} == expected | {"seconds": 0}
    finite = [math.isfinite(loss) for loss in losses]
    assert len(finite) == 8
    assert row["diverged"] == {"epoch": 2, "step": finite.index(False) - 4 + 1}
    assert row["seconds"]["training"] > first["seconds"]
    rows.path(tmp_path, cell).unlink()  # as if killed before it was written: from the first checkpoint on, the same
    again = train.run(cell, PROTOCOL, data, tmp_path, CPU)
    assert len(losses) == 12
    assert without_times(again) == without_times(row)


def test_weights_and_norms_tell_whether_a_network_is_finite(data, monkeypatch):
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    training = loop.Training(CELLS["plain"], PROTOCOL, data, CPU)
    assert training.is_finite()
    with torch.no_grad():
        training.network.second.weight.fill_(1e37)
    assert not training.is_finite()  # a sum of 72 of them is too large for float32
    training.network.second.weight.data.zero_()
    assert training.is_finite()
    training.network.head.bias.data[3] = math.nan
    assert not training.is_finite()


def test_a_network_that_is_not_finite_has_diverged(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Training, "is_finite", lambda training: training.done < 1)
    row = train.run(CELLS["plain"], PROTOCOL, data, tmp_path, CPU)
    assert row["diverged"] == {"epoch": 2, "step": 4}


@pytest.mark.parametrize("rate", [1e30, 1e42], ids=["logits", "weights"])
def test_a_last_step_that_diverges_counts(data, tmp_path, monkeypatch, rate):
    """The loss was finite at every step, but what the last one left behind is not."""
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    rate_of([11], rate, monkeypatch)
    row = train.run(CELLS["plain"], PROTOCOL, data, tmp_path, CPU)
    assert row["diverged"] == {"epoch": 3, "step": 4}
    assert [entry["epoch"] for entry in row["history"]] == [1, 2]
    assert strict(rows.path(tmp_path, CELLS["plain"]))


# Ways to train


def test_bfloat16_learns(data):
    full, narrow = (
        loop.Training(CELLS["trades"], dataclasses.replace(PROTOCOL, epochs=6, precision=precision), data, CPU)
        for precision in ("float32", "bfloat16")
    )
    losses = [[training.one_epoch(lambda news: None)["loss"] for _ in range(6)] for training in (full, narrow)]
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert losses[0] != losses[1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
    assert {each.dtype for each in narrow.network.parameters()} == {torch.float32}


def test_compiled_steps_learn_the_same(data, monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    losses = []
    for compiled in (False, True):
        how = dataclasses.replace(PROTOCOL, epochs=6, compiled=compiled)
        training = loop.Training(CELLS["trades"], how, data, CPU)
        losses.append([training.one_epoch(lambda news: None)["loss"] for _ in range(6)])
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert training.under_attack is not training.network


def test_every_cell_of_a_process_is_compiled(data, monkeypatch):
    compile, calls = torch.compile, 0

    def counted(graph, inputs):
        def call(*arguments):
            nonlocal calls
            calls += 1
            return graph(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", lambda module, mode: compile(module, backend=counted))
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    how = dataclasses.replace(PROTOCOL, compiled=True)
    in_an_attack = {"pgd-at": how.train_steps, "alp": how.train_steps, "trades": 1 + how.train_steps}
    for method in METHODS:
        calls = 0
        with torch._dynamo.config.patch(recompile_limit=2):
            loop.Training(CELLS[method], how, data, CPU).one_epoch(lambda news: None)
        assert calls == 4 * (1 + in_an_attack.get(method, 0)), method


# Checkpoints


class Stop(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_checkpoint(data, tmp_path, uninterrupted, monkeypatch, method):
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
        train.run(cell, PROTOCOL, data, tmp_path, CPU)
    row = train.run(cell, PROTOCOL, data, tmp_path, CPU)
    assert steps == 6 + 8  # the first epoch is not trained again
    assert without_times(row) == without_times(uninterrupted(cell)[0])


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy of one, where a run of it would look."""
    cell = CELLS["plain"]
    file = tmp_path / "checkpoints" / f"{cell.name}.pt"
    file.parent.mkdir()
    return shutil.copy(uninterrupted(cell)[1] / "checkpoints" / file.name, file)


def test_a_checkpoint_of_another_protocol_is_refused(data, tmp_path, checkpoint):
    how = dataclasses.replace(PROTOCOL, epochs=4)
    with pytest.raises(ValueError, match=r"seed0.pt' is of another protocol, with epochs 3 and not 4"):
        train.run(CELLS["plain"], how, data, tmp_path, CPU)


def test_seeds_and_preset_may_differ(data, tmp_path, checkpoint):
    train.run(CELLS["plain"], dataclasses.replace(PROTOCOL, seeds=3, preset="full"), data, tmp_path, CPU)


def test_a_checkpoint_of_another_cell_is_refused(data, tmp_path, checkpoint):
    other = Cell("vgg11", "plain", seed=1)
    checkpoint.rename(checkpoint.with_stem(other.name))
    with pytest.raises(ValueError, match=r"seed1.pt' is of another cell, .*'seed': 0"):
        train.run(other, PROTOCOL, data, tmp_path, CPU)


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


def test_a_full_disk_is_named_and_leaves_the_checkpoint_before(data, checkpoint):
    training, before = loop.Training(CELLS["plain"], PROTOCOL, data, CPU), checkpoint.read_bytes()
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


# Rows


def test_rows_are_sorted_and_missing_cells_found(uninterrupted, tmp_path):
    row, _ = uninterrupted(CELLS["plain"])
    assert rows.read(tmp_path) == []
    wanted = [CELLS["trades"], CELLS["plain"], CELLS["alp"]]
    assert rows.missing(tmp_path, wanted, PROTOCOL) == wanted
    for cell in (CELLS["plain"], CELLS["alp"]):
        rows.write(tmp_path, cell, row | {"cell": dataclasses.asdict(cell)})
    assert [each["cell"]["method"] for each in rows.read(tmp_path)] == ["alp", "plain"]
    assert rows.missing(tmp_path, wanted, PROTOCOL) == [CELLS["trades"]]
    with pytest.raises(ValueError, match=r"has rows of another protocol, with width 0.125 and not 0.25"):
        rows.missing(tmp_path, wanted, dataclasses.replace(PROTOCOL, width=0.25))


@pytest.mark.parametrize("text", ["", '{"cell": {"mod', "[]", "null", "\xff", '{"cell": {}, "protocol": {}}'])
def test_what_is_no_row_is_named(tmp_path, text):
    file = tmp_path / "rows" / "vgg11-plain-seed0.json"
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^row .*vgg11-plain-seed0.json' is [^\n]+$"):
        rows.read(tmp_path)


def test_flags_come_back():
    right = np.random.default_rng(0).random(77) < 0.4
    part = json.loads(json.dumps(rows.counted(right)))
    assert rows.flags(part).tolist() == right.tolist()
    assert (part["images"], part["right"]) == (77, int(right.sum()))


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "row.json"
    with rows.replacing(file) as new:
        new.write_text("first")
    with pytest.raises(ZeroDivisionError), rows.replacing(file) as new:
        1 / new.write_text("")
    assert [each.name for each in file.parent.iterdir()] == ["row.json"]
    assert file.read_text() == "first"


# Kills: real processes, SIGKILL


@pytest.fixture(scope="module")
def processes():
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork server")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # which takes a second
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the fork server finds it
        yield context


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
    "before the attacks": lambda patch: patch(train, "autoattack", dying(train.autoattack, 1)),
    "the attacks' state by half": lambda patch: patch(Path, "write_text", by_half(Path.write_text, ".attack0.")),
    "between the attacks": lambda patch: patch(attacks, "_attack", dying(attacks._attack, 2)),
    "the row written by half": lambda patch: patch(Path, "write_text", by_half(Path.write_text, ".json.")),
}


def run_in(out, cell, data, moment, watch=None):
    torch.set_num_threads(1)
    if moment:
        MOMENTS[moment](setattr)
    train.run(cell, PROTOCOL, data, out, CPU, watch=watch)


def test_kills_at_chosen_moments_change_nothing(processes, data, tmp_path, uninterrupted, watched):
    """One after another in the same run, which every start goes on with."""
    cell, watch = CELLS["l1-decay"], tmp_path / "norms.csv"
    for moment in (*MOMENTS, None):
        process = processes.Process(target=run_in, args=(tmp_path, cell, data, moment, watch))
        process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if moment else 0), moment
        partial = [file for file in tmp_path.rglob("*") if file.name.startswith(".")]
        assert len(partial) <= 1, moment  # the next start removes it
    assert without_times(read_row(tmp_path, cell)) == without_times(uninterrupted(cell)[0])
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {f"checkpoints/{cell.name}.pt", f"rows/{cell.name}.json", watch.name}
    assert watch.read_bytes() == watched[1].read_bytes()


def test_kills_at_any_moment_change_nothing(processes, data, tmp_path, uninterrupted, seed):
    cell, draws, killed, longest = CELLS["alp"], random.Random(seed), 0, 0.1
    while True:
        process = processes.Process(target=run_in, args=(tmp_path, cell, data, None))
        process.start()
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


# Several processes


def in_rank(rank, world, port, out, data):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ranks.joined("cpu") as device:
        found = {"rows": {}, "digests": {}, "weights": {}, "told": {}, "images": set()}
        how = dataclasses.replace(PROTOCOL, learning_rate=1e30)
        row = train.run(CELLS["plain"], how, data, out / "diverged", device, watch=out / f"norms{rank}.csv")
        found["diverged"] = row["diverged"]
        attacked = loop.attacked
        loop.attacked = lambda network, x, *others: found["images"].add(len(x)) or attacked(network, x, *others)
        for method in ("plain", "trades"):
            row = train.run(CELLS[method], PROTOCOL, data, out, device)
            found["rows"][method] = json.dumps(row)
            training = loop.Training(CELLS[method], PROTOCOL, data, device)
            for _ in range(2):
                training.one_epoch(lambda news: None)
            digest = hashlib.sha256()
            for tensor in training.network.state_dict().values():
                digest.update(tensor.contiguous().numpy().tobytes())
            found["digests"][method] = digest.hexdigest()
        loop.PAPER["vgg11"] = Plain
        for method, cell in CELLS.items():
            training = loop.Training(cell, dataclasses.replace(PROTOCOL, train_noise=0), data, device)
            found["told"][method] = training.one_epoch(lambda news: None)
            found["weights"][method] = training.network.state_dict()
            del training  # before its process group: ranks.joined says why
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(processes, data, tmp_path_factory):
    """What each of two processes found, and the folder that they wrote to."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no torch.distributed with gloo")
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [processes.Process(target=in_rank, args=(rank, 2, port, out, data)) for rank in range(2)]
    for process in both:
        process.start()
    end = time.monotonic() + 60
    for process in both:
        process.join(max(0, end - time.monotonic()))
        process.kill()
    assert [process.exitcode for process in both] == [0, 0]
    return [torch.load(out / f"{rank}.pt") for rank in range(2)], out


def test_replicas_agree_bit_for_bit(two_ranks):
    """Weights and running statistics."""
    (first, second), _ = two_ranks
    assert first["digests"] == second["digests"]
    assert len(set(first["digests"].values())) == 2
    assert first["images"] == second["images"] == {16}  # half a batch


def test_two_processes_diverge_together_and_one_records(two_ranks):
    both, out = two_ranks
    row = read_row(out / "diverged", CELLS["plain"])
    assert row["diverged"] == both[0]["diverged"] == both[1]["diverged"] == {"epoch": 1, "step": 2}
    assert [file.name for file in out.glob("norms*.csv")] == ["norms0.csv"]
    assert len((out / "norms0.csv").read_text().splitlines()) == 1 + 4


@pytest.mark.parametrize("method", ["plain", "trades"])
def test_two_processes_write_one_row_of_all_images(two_ranks, data, method):
    both, out = two_ranks
    cell = CELLS[method]
    row = read_row(out, cell)
    assert all(without_times(json.loads(each["rows"][method])) == without_times(row) for each in both)
    assert row["made"]["processes"] == 2
    network, _, _ = loop.network(loop.read(out / "checkpoints" / f"{cell.name}.pt"))
    x, labels = inputs(data.test.pixels), data.test.labels
    with torch.no_grad():
        assert rows.flags(row["clean"]).tolist() == (network(x).argmax(1) == labels).tolist()
    robust = np.zeros(33, bool)
    for rank in range(2):  # each attacks its share as one process would
        share = slice(rank, 33, 2)
        robust[share] = attacks.autoattack(
            network, x[share], labels[share],
            eps=0.02, attacks=PROTOCOL.attacks, iterations=2, batch=500, seed=0,
        )  # fmt: skip
    assert rows.flags(row["robust"]).tolist() == robust.tolist()
    assert {file.name for file in (out / "checkpoints").iterdir()} == {
        f"{CELLS[m].name}.pt" for m in ("plain", "trades")
    }


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_step_as_one_does(two_ranks, data, monkeypatch, method):
    """A network without batch norm: the gradient is the mean over the shares, to rounding."""
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    training = loop.Training(CELLS[method], dataclasses.replace(PROTOCOL, train_noise=0), data, CPU)
    begin = {name: tensor.clone() for name, tensor in training.network.state_dict().items()}
    told = training.one_epoch(lambda news: None)
    for found in two_ranks[0]:
        for name in ("loss", "training_accuracy", "learning_rate"):
            assert found["told"][method][name] == pytest.approx(told[name], abs=2e-5)
        for name, tensor in training.network.state_dict().items():
            moved = (tensor - begin[name]).abs().max().item()
            assert (found["weights"][method][name] - tensor).abs().max() < 1e-3 * moved, name


def test_what_a_failed_run_holds_goes_before_the_process_group(monkeypatch):
    """DDP's destructor would else wait for a thread of the group that waits for Python."""

    class Held:
        pass

    def fails():
        held = Held()
        alive.append(weakref.ref(held))
        raise Stop

    alive, at_the_end = [], []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: at_the_end.append(alive[0]()))
    with pytest.raises(Stop), ranks.joined("cpu"):
        fails()
    assert at_the_end == [None]


def test_a_batch_that_does_not_divide_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(ValueError, match="batch 32 is not a multiple of the 3 processes"):
        train.run(CELLS["plain"], PROTOCOL, data, tmp_path, CPU)
