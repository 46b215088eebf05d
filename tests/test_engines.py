"""The promise: whichever engine trains them, whoever kills what, the rows are the same, and no process stays behind."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

engines = pytest.importorskip("train.engines", reason="away from the source tree")
from small_training import without_times  # noqa: E402

from train import rows, run  # noqa: E402
from train.cell import Cell, protocol  # noqa: E402
from train.data import load  # noqa: E402

pytest.importorskip("pyautoattack")
ROOT = Path(engines.__file__).parents[1]
CHANGES = {"epochs": 10, "training_images": 64, "batch": 32, "test_images": 32, "attacked_images": 16}
PROTOCOL = dataclasses.replace(protocol("table2", "smoke"), dataset="synthetic", **CHANGES)
CELLS = [Cell("vgg11", "plain"), Cell("vgg11", "clip", 0.5), Cell("vgg11", "l1-decay", 0.01)]
COMMAND = [sys.executable, "-m", "train", "table2", "--dataset", "synthetic", "--jobs", "2"]
COMMAND += [f"--{name.replace('_', '-')}={value}" for name, value in CHANGES.items()]
COMMAND += ["--only", "vgg11-plain-*", "vgg11-clip-0.5-*"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Row by row, from this process."""
    out, data = tmp_path_factory.mktemp("expected"), load("synthetic", None)
    return [without_times(run.run(cell, PROTOCOL, data, out, torch.device("cpu"))) for cell in CELLS]


def found(out, cells=CELLS):
    return [without_times(rows.read_one(rows.path(out, cell))) for cell in cells]


@pytest.fixture
def work(tmp_path):
    return engines.Work(PROTOCOL, tmp_path, None, "cpu", threads=1)


def damage(work, cell):
    file = work.out / "checkpoints" / f"{cell.name}.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PK")
    return file


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


# Workers


def test_a_worker_takes_as_many_threads_as_it_is_told_and_clears_its_news(work, monkeypatch):
    seen = []

    def run(cell, how, data, out, device, tell):
        tell({"stage": "attack", "part": 1.0})
        seen.append((torch.get_num_threads(), device.type, engines.news_file(out, cell).read_text()))

    monkeypatch.setattr(engines, "run", run)
    before = torch.get_num_threads()
    try:
        assert dataclasses.replace(work, threads=2).do(CELLS[0], "cpu") is None
    finally:
        torch.set_num_threads(before)
    assert seen == [(2, "cpu", '{"stage": "attack", "part": 1.0}')]
    assert list((work.out / "progress").iterdir()) == []


def test_what_went_wrong_is_one_line_or_a_traceback(work, monkeypatch):
    damage(work, CELLS[0])
    assert "\n" not in work.do(CELLS[0], "cpu")
    monkeypatch.setattr(engines, "run", lambda *_: 1 / 0)
    assert work.do(CELLS[0], "cpu").startswith("Traceback")


def test_a_device_that_is_not_there_is_named(work):
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used: "):
        next(engines.local(CELLS, dataclasses.replace(work, device="cuda:99"), jobs=1))


def test_there_are_as_many_places_as_threads_fit(work, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [dataclasses.replace(work, threads=threads).places() for threads in (1, 3, 16)] == [8, 2, 1]


# Engines


def test_local_rows_are_those_of_one_process_though_a_worker_is_killed(work, expected, monkeypatch):
    monkeypatch.setattr(engines, "TICK", 0.02)
    stale = engines.news_file(work.out, CELLS[2])
    engines.write_news(stale, {"stage": "training", "part": 0.9})
    ended = {}
    for event in engines.local(CELLS, work, jobs=2):
        if event:
            ended[event[0]] = event[1]
        elif not ended:
            assert not stale.exists()  # a cell that waits has no news
            if engines.news_file(work.out, CELLS[0]).exists() and (victims := multiprocessing.active_children()):
                victims[0].kill()
                victims[0].join()
    (killed,) = [cell for cell, error in ended.items() if error]
    assert set(ended) == set(CELLS)
    assert ended[killed] == "its process was killed, by the system if memory ran out"
    assert rows.missing(work.out, CELLS, PROTOCOL) == [killed]
    assert [event for event in engines.local([killed], work, jobs=1) if event] == [(killed, None)]
    assert found(work.out) == expected
    wait_for(lambda: not multiprocessing.active_children())


def test_a_network_that_diverges_is_one_that_ended(work, monkeypatch):
    how = dataclasses.replace(PROTOCOL, learning_rate=1e30)
    assert dataclasses.replace(work, protocol=how).do(CELLS[0], "cpu") is None
    assert rows.read_one(rows.path(work.out, CELLS[0]))["diverged"]["epoch"] == 1
    assert rows.missing(work.out, CELLS, how) == CELLS[1:]


def test_ray_rows_are_those_of_one_process(work, expected, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(work.out)
    work = dataclasses.replace(work, out=Path("relative"))
    file = damage(work, CELLS[0])
    ended = dict(filter(None, engines.ray(CELLS, work, jobs=2)))
    assert [ended[cell] for cell in CELLS[1:]] == [None, None]
    assert str(file.absolute()) in ended[CELLS[0]]
    assert "\n" not in ended[CELLS[0]]
    assert found(work.out, CELLS[1:]) == expected[1:]


def test_ctrl_c_waits_until_processes_have_started():
    """Also where another thread takes the signal, which the mask of this one does not hold up."""
    ended = []

    def start():
        interrupting.start()
        with engines.uninterrupted():
            interrupting.join()
            time.sleep(0.1)
            ended.append(True)

    interrupting = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended


def living(group):
    """Processes of a group that are not dead yet, if unburied."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_group) == group and state not in "ZX":
            states.append(stat.parent.name)
    return states


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_killed_or_interrupted_command_leaves_no_process_and_goes_on(tmp_path, expected):
    """SIGKILL of the command itself, then Ctrl-C while its workers start, who get it too, then nothing."""
    command = [*COMMAND, "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CONVNORM_DATA"}

    def start():
        pipe = subprocess.PIPE
        heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background may not
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
            preexec_fn=heeding,
        )

    process = start()
    wait_for(lambda: any((tmp_path / "progress").glob("*.json")))
    process.kill()
    process.wait()
    wait_for(lambda: not living(process.pid), 10)
    process.communicate()

    process = start()
    wait_for(lambda: len(living(process.pid)) >= 4)  # with multiprocessing's resource tracker
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert (process.returncode, errors) == (
        130,
        "python -m train: interrupted; the same command goes on from here\n",
    )
    wait_for(lambda: not living(process.pid), 10)

    process = start()
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    assert found(tmp_path, CELLS[:2]) == expected[:2]
    assert output == f"{tmp_path / 'table2.md'}\n"
    assert len(errors.splitlines()) == 2  # no terminal: a line for each cell
    for cell in CELLS[:2]:
        assert f"{cell.name}: clean " in errors


# Progress


@pytest.fixture
def board(monkeypatch):
    progress = pytest.importorskip("train.progress")
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    return progress.Board


def test_the_board_of_a_terminal_shows_bars(board, work, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    board = board(4)
    with board.shown():
        news = {"stage": "training", "part": 0.5, "loss": 1.2345, "accuracy": 0.5}
        engines.write_news(engines.news_file(work.out, CELLS[0]), news)
        board.look(work.out, CELLS)
        board.bars.refresh()
        shown = capsys.readouterr().err
        board.tell(CELLS[0], {"stage": "attack", "part": 1.0})
        board.bars.refresh()
        later = capsys.readouterr().err
        board.ended(CELLS[0], "lost")
        board.bars.refresh()
        last = capsys.readouterr().err
    for text in ("4 cells", "  0 %", "vgg11-plain-seed0", " 50 %", "loss 1.23, accuracy 0.5"):
        assert text in shown
    assert "attack" in later
    assert "vgg11-plain-seed0: lost" in last
    assert " 25 %" in last
    assert "[progress" not in shown + later + last
    assert CELLS[1].name not in shown + later + last


def test_without_a_terminal_there_are_lines_only(board, expected, monkeypatch, capsys):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    row = expected[0] | {"seconds": {"training": 60.2, "evaluation": 3.1}}
    lost = {"diverged": {"epoch": 3, "step": 17}, "seconds": {"training": 63.4}}
    board = board(3)
    with board.shown():
        board.tell(CELLS[0], {"stage": "training", "part": 0.5, "loss": 1.0})
        board.ended(CELLS[0], row)
        board.ended(CELLS[1], "see [/here] and [red]")
        board.ended(CELLS[2], lost)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith(f"vgg11-plain-seed0: clean {row['clean']['accuracy']:.1%}, robust ")
    assert first.endswith(" 63 s")
    assert f"l1 {max(row['norms']['l1']):.3g}, " in first
    assert second == "vgg11-clip-0.5-seed0: see [/here] and [red]"
    assert third == "vgg11-l1-decay-0.01-seed0: diverged in epoch 3, step 17; 63 s"
