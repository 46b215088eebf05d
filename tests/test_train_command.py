"""The promise: ``python -m train`` does as it is told, and says in one line what it cannot do."""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

command = pytest.importorskip("train.__main__", reason="away from the source tree")
from train import rows, run  # noqa: E402
from train.cell import Cell, protocol  # noqa: E402

pytest.importorskip("pyautoattack")
pytest.importorskip("rich")
ROOT = Path(command.__file__).parents[1]
SMALL = {"epochs": 2, "training-images": 128, "batch": 32, "test-images": 64, "attacked-images": 32, "width": 0.125}
OPTIONS = [f"--{name}={value}" for name, value in SMALL.items()]
RUN = ["run", "--model", "vgg11", "--method"]
CELL = Cell("vgg11", "plain")
load = functools.lru_cache(command.load)


@pytest.fixture(autouse=True)
def without_data(monkeypatch):
    monkeypatch.delenv("CONVNORM_DATA", raising=False)
    monkeypatch.setattr(command, "load", load)


@pytest.fixture
def main(tmp_path, capsys):
    """Exit status, and what is printed to the output and as errors."""

    def call(*arguments):
        try:
            options = [option for option in OPTIONS if "widths" not in arguments or not option.startswith("--width=")]
            status = command.main([*map(str, arguments), *options, "--out", str(tmp_path)])
        except SystemExit as exit:  # argparse's
            status = exit.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a finished cell."""
    out = tmp_path_factory.mktemp("plain")
    assert command.main([*RUN, "plain", *OPTIONS, "--dataset", "synthetic", "--out", str(out)]) == 0
    return out


def put_row(plain, out, text=None, **changes):
    """The row of the finished cell into another folder."""
    row = rows.read_one(rows.path(plain, CELL))
    file = rows.path(out, CELL)
    file.parent.mkdir(parents=True)
    file.write_text(text or json.dumps(row | {"protocol": row["protocol"] | changes}))


def last_line(errors):
    return errors.rstrip("\n").rpartition("\n")[2]


# What it does


def test_run_needs_no_data_and_writes_a_row_of_the_changed_protocol(main, tmp_path):
    changes = ["--learning-rate", 0.05, "--eps", "8/255", "--attacks", "apgd-ce", "--variant", "paper"]
    changes += ["--precision", "bfloat16", "--seed", 3]
    status, output, errors = main(*RUN, "l1-decay", "--beta", "1e-3", *changes)
    assert (status, output) == (0, "")
    (row,) = rows.read(tmp_path)
    assert row["cell"] == {"model": "vgg11", "method": "l1-decay", "strength": 1e-3, "seed": 3}
    smoke = dataclasses.asdict(protocol("table2", "smoke"))
    expected = smoke | {name.replace("-", "_"): value for name, value in SMALL.items()} | {
        "dataset": "synthetic", "learning_rate": 0.05, "eps": 8 / 255, "attacks": ["apgd-ce"], "variant": "paper",
        "precision": "bfloat16",
    }  # fmt: skip
    assert row["protocol"] == expected
    told, result = errors.splitlines()
    assert told == "neither --data nor CONVNORM_DATA: on synthetic images"
    assert result.startswith("vgg11-l1-decay-0.001-seed3: clean ")


def test_a_finished_cell_is_not_trained_again(main, plain, tmp_path, monkeypatch):
    put_row(plain, tmp_path)
    monkeypatch.delattr(run, "Training")
    status, output, _ = main(*RUN, "plain")
    assert (status, output) == (0, f"row {str(rows.path(tmp_path, CELL))!r} is there\n")


def test_a_network_that_diverges_is_a_result(main, tmp_path, monkeypatch):
    status, _, errors = main(*RUN, "plain", "--learning-rate", "1e30")
    assert status == 0
    assert last_line(errors).startswith("vgg11-plain-seed0: diverged in epoch 1, step 2; ")
    (row,) = rows.read(tmp_path)
    assert row["diverged"] == {"epoch": 1, "step": 2}
    monkeypatch.delattr(run, "Training")  # and is not trained again
    status, output, _ = main(*RUN, "plain", "--learning-rate", "1e30")
    assert (status, output) == (0, f"row {str(rows.path(tmp_path, CELL))!r} is there\n")


def test_what_is_watched_is_written_and_the_row_is_the_same(main, plain, tmp_path):
    file = tmp_path / "watched" / "norms.csv"
    status, _, _ = main(*RUN, "plain", "--watch", file)
    assert status == 0
    found, expected = (rows.read_one(rows.path(out, CELL)) for out in (tmp_path, plain))
    for part in ("clean", "robust", "norms", "folded"):
        assert found[part] == expected[part]
    head, *lines = file.read_text().splitlines()
    assert head.startswith("step,l1/stage1.0,linf/stage1.0,l1/stage2.0,")
    assert [line.partition(",")[0] for line in lines] == [str(step) for step in range(2 * 4)]


def test_a_finished_cell_cannot_be_watched_any_more(main, plain, tmp_path):
    put_row(plain, tmp_path)
    file = tmp_path / "norms.csv"
    status, _, errors = main(*RUN, "plain", "--watch", file)
    assert (status, file.exists()) == (2, False)
    assert last_line(errors).endswith("seed0.json' is there: its training can be watched with another --out only")
    file.touch()  # what was watched stays: the same command again is no error
    assert main(*RUN, "plain", "--watch", file)[0] == 0


def test_tensorboard_is_watched_too(main, tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    status, _, _ = main(*RUN, "plain", "--watch", tmp_path / "events")
    assert status == 0
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("l1/stage1.0")] == list(range(2 * 4))


@pytest.mark.parametrize(
    ("method", "options", "experiment"),
    [("plain", [], "table2"), ("plain", ["--experiment", "figure2"], "figure2"), ("pgd-at", [], "figure2")],
)
def test_a_method_has_its_experiments_protocol(main, monkeypatch, method, options, experiment):
    seen = []
    monkeypatch.setattr(command, "run", lambda cell, how, *_: seen.append(how) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(*RUN, method, "--preset", "paper", *options)
    paper = protocol(experiment, "paper")
    for name in ("experiment", "eps", "learning_rate", "attacks", "train_steps", "preset"):
        assert getattr(seen[0], name) == getattr(paper, name)


def test_no_more_images_are_asked_for_than_there_are(main, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "run", lambda cell, how, *_: seen.append(how) or 1 / 0)
    monkeypatch.setattr(sys.modules[__name__], "OPTIONS", [])
    with pytest.raises(ZeroDivisionError):
        main(*RUN, "plain", "--preset", "full")
    (how,) = seen
    assert (how.training_images, how.test_images, how.attacked_images) == (5000, 1000, 1000)


def engine_of(outcomes, seen):
    """One that ends each cell as told, after a row of it was there or not."""

    def engine(cells, work, jobs):
        seen.append(([cell.name for cell in cells], work, jobs))
        for cell in cells:
            yield None
            if not outcomes.get(cell.name):
                rows.write(work.out, cell, outcomes["row"] | {"cell": dataclasses.asdict(cell)})
            yield cell, outcomes.get(cell.name)

    return engine


def test_table2_trains_what_is_missing_and_says_what_failed(main, plain, tmp_path, monkeypatch):
    put_row(plain, tmp_path)
    row, seen, shown = rows.read_one(rows.path(plain, CELL)), [], []
    outcomes = {"row": row, "resnet18-plain-seed0": "its process was killed"}
    monkeypatch.setitem(command.ENGINES, "local", engine_of(outcomes, seen))
    monkeypatch.setitem(command.PAGES, "table2", lambda rows, out: shown.append(len(rows)) or out / "page")
    status, output, errors = main("table2", "--only", "*-plain-*", "--jobs", "7", "--threads", "3")
    names = [f"{model}-plain-seed0" for model in ("resnet18", "senet18", "regnetx200mf")]
    ((started, work, jobs),) = seen
    assert (started, jobs, work.threads, work.out) == (names, 3, 3, tmp_path)
    assert (status, output, shown) == (1, f"{tmp_path / 'page'}\n", [3])
    assert "resnet18-plain-seed0: its process was killed\n" in errors
    assert "senet18-plain-seed0: clean " in errors

    del outcomes["resnet18-plain-seed0"]  # the same again trains what is still missing
    status, _, _ = main("table2", "--only", "*-plain-*")
    assert (status, seen[1][0], shown) == (0, names[:1], [3, 4])


def test_widths_evaluates_what_was_trained_to_the_end(main, plain, tmp_path, monkeypatch):
    row = rows.read_one(rows.path(plain, CELL))
    row = {part: row[part] for part in rows.PARTS} | {"diverged": {"epoch": 1, "step": 2}}
    monkeypatch.setitem(command.ENGINES, "local", engine_of({"row": row}, seen := []))
    status, _, errors = main("widths", "--only", "resnet18-trades-9-*")
    assert [names for names, _, _ in seen] == [["resnet18-trades-9-seed0"]] * len(command.widths.WIDTHS["smoke"])
    assert errors.count("resnet18-trades-9-seed0: diverged in epoch 1, step 2") == len(seen)
    assert status == 2
    assert last_line(errors) == (
        f"python -m train: folder {str(tmp_path)!r} holds no evaluation: there is nothing to show"
    )


def test_widths_evaluates_what_it_is_asked_for_only(main, plain, monkeypatch):
    """Also where an interruption left others trained."""
    evaluated = []
    monkeypatch.setitem(command.ENGINES, "local", engine_of({"row": rows.read_one(rows.path(plain, CELL))}, []))
    monkeypatch.setattr(command.rows, "check_same", lambda *_: None)
    monkeypatch.setattr(command.evaluate, "evaluate", lambda checkpoint, *_, **__: evaluated.append(checkpoint.stem))
    for strength in (1, 9):
        main("widths", "--only", f"resnet18-trades-{strength}-*")
    widths = len(command.widths.WIDTHS["smoke"])
    assert evaluated == ["resnet18-trades-1-seed0"] * widths + ["resnet18-trades-9-seed0"] * widths


def test_torchrun_is_for_one_network(main, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(command.ENGINES, "local", lambda *_: iter(()))
    status, _, errors = main("table2")
    assert status == 2
    assert last_line(errors).startswith("python -m train: torchrun is for one network: python -m train run")


def test_interrupted_it_says_so(main, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    status, _, errors = main(*RUN, "plain")
    assert (status, last_line(errors)) == (130, "python -m train: interrupted; the same command goes on from here")


def test_torchrun_trains_one_network_in_two_processes(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no torch.distributed with gloo")
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    arguments = [*RUN, "plain", *OPTIONS, "--dataset", "synthetic", "--out", str(tmp_path)]
    done = subprocess.run(together + arguments, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("vgg11-plain-seed0: clean ") == 1
    (row,) = rows.read(tmp_path)
    assert (row["made"]["processes"], row["clean"]["images"], row["robust"]["images"]) == (2, 64, 32)


# What it cannot do: one line, status 2


WRONG = {
    "no such model": (["run", "--model", "vgg16", "--method", "plain"], "argument --model: invalid choice: 'vgg16'"),
    "no such method": ([*RUN, "dropout"], "argument --method: invalid choice: 'dropout'"),
    "no such preset": ([*RUN, "plain", "--preset", "large"], "argument --preset: invalid choice: 'large'"),
    "no beta": ([*RUN, "l1-decay"], "method 'l1-decay' needs a strength (--beta)"),
    "beta for plain": ([*RUN, "plain", "--beta", "1"], "method 'plain' has no strength (--beta)"),
    "negative beta": ([*RUN, "clip", "--beta", "-1"], "strength -1.0 must be a number of at least 0"),
    "no number": ([*RUN, "clip", "--beta", "x"], "argument --beta: invalid float value: 'x'"),
    "no ball": ([*RUN, "plain", "--eps", "8/0"], "argument --eps: eps '8/0' must be"),
    "no seed": ([*RUN, "plain", "--seed", "-1"], "seed -1 must be from 0 to 2^32 - 1"),
    "no attack": ([*RUN, "plain", "--attacks", "pgd"], "attacks 'pgd' must be of apgd-ce, apgd-t, fab-t, square"),
    "no learning rate": ([*RUN, "plain", "--learning-rate", "nan"], "learning_rate nan must be a number more than 0"),
    "no threads": ([*RUN, "plain", "--threads", "0"], "argument --threads: '0' must be a whole number of at least 1"),
    "no short form": (["table2", "--seed", "3"], "unrecognized arguments: --seed 3"),
    "no memory of a device": ([*RUN, "plain", "--device", "meta"], "device 'meta' cannot be used: "),
    "no jobs": (["table2", "--jobs", "-1"], "argument --jobs: '-1' must be a whole number of at least 1"),
    "no cells": (["table2", "--only", "vgg16-*"], "--only vgg16-* is none of the cells, such as vgg11-plain-seed0"),
    "no directory": ([*RUN, "plain", "--dataset", "cifar10"], "data set 'cifar10' needs a directory: --data DIR"),
    "no data": ([*RUN, "plain", "--data", ROOT / "train"], "train' has no data_batch_1, "),
    "no cells of widths": (["widths", "--only", "vgg16-*"], "--only vgg16-* is none of the cells, such as resnet18-"),
    "no device for widths": (["widths", "--device", "cuda:99"], "device 'cuda:99' cannot be used: "),
    "no width of widths": (["widths", "--width", "0.5"], "unrecognized arguments: --width 0.5"),
    "no device": ([*RUN, "plain", "--device", "cuda:99"], "device 'cuda:99' cannot be used: "),
    "no rows": (["table2", "--render"], "rows hold none of table2: there is nothing to show"),
    "no rows of its own": (["figure2", "--render"], "rows hold none of figure2: there is nothing to show"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_line(main, case, tmp_path):
    arguments, message = WRONG[case]
    status, output, errors = main(*arguments)
    assert (status, output) == (2, "")
    assert last_line(errors).startswith("python -m train")
    assert message in last_line(errors)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize("device", ["cuda:99", "no device"])
def test_a_device_that_evaluate_cannot_use_is_named(plain, tmp_path, capsys, device):
    checkpoint = plain / "checkpoints" / f"{CELL.name}.pt"
    assert command.main(["evaluate", str(checkpoint), "--device", device, "--out", str(tmp_path)]) == 2
    assert last_line(capsys.readouterr().err).startswith(f"python -m train: device {device!r} cannot be used: ")


@pytest.mark.parametrize("arguments", [[*RUN, "clip", "--beta", "1"], ["table2"]])
def test_rows_of_another_protocol_are_not_added_to(main, plain, tmp_path, arguments):
    put_row(plain, tmp_path, epochs=9)
    status, _, errors = main(*arguments)
    assert status == 2
    assert last_line(errors) == (
        f"python -m train: folder {str(tmp_path)!r} has rows of another protocol, with epochs 9 and not 2"
    )


@pytest.mark.parametrize("arguments", [[*RUN, "plain"], ["table2"], ["table2", "--render"]])
def test_a_damaged_row_is_named(main, plain, tmp_path, arguments):
    put_row(plain, tmp_path, text='{"cell": {"mod')
    status, _, errors = main(*arguments)
    assert status == 2
    assert last_line(errors).startswith(f"python -m train: row {str(rows.path(tmp_path, CELL))!r} is damaged: ")


def test_what_cannot_be_watched_is_named(main, tmp_path, monkeypatch):
    file = tmp_path / "norms.csv"
    file.write_text("step,l1/another,linf/another\n")
    status, _, errors = main(*RUN, "plain", "--watch", file)
    assert status == 2
    assert last_line(errors) == (
        f"python -m train: convnorm: path {str(file)!r} has other columns than those of the model's layers"
    )
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    status, _, errors = main(*RUN, "plain", "--watch", tmp_path / "events")
    assert status == 2
    assert "pip install tensorboard" in last_line(errors)


def test_a_damaged_checkpoint_is_named(main, tmp_path):
    file = tmp_path / "checkpoints" / f"{CELL.name}.pt"
    file.parent.mkdir()
    file.write_bytes(b"PK")
    status, _, errors = main(*RUN, "plain")
    assert status == 2
    assert last_line(errors) == (
        f"python -m train: checkpoint {str(file)!r} is damaged, or not one of python -m train run"
    )
