"""The promise: a row does not depend on how many processes share a batch."""

import dataclasses
import hashlib
import json
import os
import socket
import time
import weakref

import numpy as np
import pytest
import torch
from small_training import CELLS, CPU, DATA, PROTOCOL, Plain, Stop, read_row, started, without_times

from train import attacks, ranks, rows, run
from train import training as loop
from train.cell import METHODS
from train.data import inputs


def in_rank(rank, world, port, out):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ranks.joined("cpu") as device:
        found = {"rows": {}, "digests": {}, "weights": {}, "told": {}, "images": set()}
        how = dataclasses.replace(PROTOCOL, learning_rate=1e30)
        row = run.run(CELLS["plain"], how, DATA, out / "diverged", device, watch=out / f"norms{rank}.csv")
        found["diverged"] = row["diverged"]
        attacked = loop.attacked
        loop.attacked = lambda network, x, *others: found["images"].add(len(x)) or attacked(network, x, *others)
        for method in ("plain", "trades"):
            row = run.run(CELLS[method], PROTOCOL, DATA, out, device)
            found["rows"][method] = json.dumps(row)
            training = loop.Training(CELLS[method], PROTOCOL, DATA, device)
            for _ in range(2):
                training.one_epoch(lambda news: None)
            digest = hashlib.sha256()
            for tensor in training.network.state_dict().values():
                digest.update(tensor.contiguous().numpy().tobytes())
            found["digests"][method] = digest.hexdigest()
        loop.PAPER["vgg11"] = Plain
        for method, cell in CELLS.items():
            training = loop.Training(cell, dataclasses.replace(PROTOCOL, train_noise=0), DATA, device)
            found["told"][method] = training.one_epoch(lambda news: None)
            found["weights"][method] = training.network.state_dict()
            del training  # before its process group: ranks.joined says why
    torch.save(found, out / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What each of two processes found, and the folder that they wrote to."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no torch.distributed with gloo")
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [started(in_rank, rank, 2, port, out) for rank in range(2)]
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
def test_two_processes_write_one_row_of_all_images(two_ranks, method):
    both, out = two_ranks
    cell = CELLS[method]
    row = read_row(out, cell)
    assert all(without_times(json.loads(each["rows"][method])) == without_times(row) for each in both)
    assert row["made"]["processes"] == 2
    network, _, _ = loop.network(loop.read(out / "checkpoints" / f"{cell.name}.pt"))
    x, labels = inputs(DATA.test.pixels), DATA.test.labels
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
def test_two_processes_step_as_one_does(two_ranks, monkeypatch, method):
    """A network without batch norm: the gradient is the mean over the shares, to rounding."""
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    training = loop.Training(CELLS[method], dataclasses.replace(PROTOCOL, train_noise=0), DATA, CPU)
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


def test_a_batch_that_does_not_divide_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    with pytest.raises(ValueError, match="batch 32 is not a multiple of the 3 processes"):
        run.run(CELLS["plain"], PROTOCOL, DATA, tmp_path, CPU)
