"""The promise: an epoch is the plain loop, with the rates, attacks and precision that its protocol names."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_training import CELLS, CPU, DATA, PROTOCOL, Plain

from train import training as loop
from train.cell import METHODS, Cell
from train.data import epoch

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


# Epochs


def test_an_epoch_is_the_plain_loop(monkeypatch):
    """With the rate of each step, momentum and weight decay written out."""
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    how, cell = dataclasses.replace(PROTOCOL, epochs=2), Cell("vgg11", "weight-decay", 0.01, seed=3)
    training = loop.Training(cell, how, DATA, CPU)
    torch.manual_seed(3)
    network = Plain(10, how.width)
    velocity = {name: 0 for name, _ in network.named_parameters()}
    for done in range(2):
        told = training.one_epoch(lambda news: None)
        training.history.append(told)
        losses, right = [], []
        draws = torch.Generator().manual_seed(3_000_009 + done)
        for step, (x, labels) in enumerate(epoch(DATA.training, 32, draws)):
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
def test_batch_norm_sees_what_the_loss_sees_and_not_the_attack(method, forwards):
    training = loop.Training(CELLS[method], PROTOCOL, DATA, CPU)
    training.network.eval()
    training.one_epoch(lambda news: None)
    assert {int(n) for name, n in training.network.named_buffers() if "num_batches" in name} == {4 * forwards}


def test_seeds_are_other_networks_and_batches():
    first, second = (loop.Training(Cell("vgg11", "plain", seed=seed), PROTOCOL, DATA, CPU) for seed in (0, 1))
    assert not torch.equal(first.network.head[1].weight, second.network.head[1].weight)
    second.network.load_state_dict(first.network.state_dict())
    for training in (first, second):
        training.one_epoch(lambda news: None)
    assert not torch.equal(first.network.head[1].weight, second.network.head[1].weight)


def test_weights_and_norms_tell_whether_a_network_is_finite(monkeypatch):
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    training = loop.Training(CELLS["plain"], PROTOCOL, DATA, CPU)
    assert training.is_finite()
    with torch.no_grad():
        training.network.second.weight.fill_(1e37)
    assert not training.is_finite()  # a sum of 72 of them is too large for float32
    training.network.second.weight.data.zero_()
    assert training.is_finite()
    training.network.head.bias.data[3] = math.nan
    assert not training.is_finite()


# Ways to train


def test_bfloat16_learns():
    full, narrow = (
        loop.Training(CELLS["trades"], dataclasses.replace(PROTOCOL, epochs=6, precision=precision), DATA, CPU)
        for precision in ("float32", "bfloat16")
    )
    losses = [[training.one_epoch(lambda news: None)["loss"] for _ in range(6)] for training in (full, narrow)]
    assert losses[1][-1] < 0.8 * losses[1][0]
    assert losses[0] != losses[1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.05)
    assert {each.dtype for each in narrow.network.parameters()} == {torch.float32}


def test_compiled_steps_learn_the_same(monkeypatch):
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    monkeypatch.setitem(loop.PAPER, "vgg11", Plain)
    losses = []
    for compiled in (False, True):
        how = dataclasses.replace(PROTOCOL, epochs=6, compiled=compiled)
        training = loop.Training(CELLS["trades"], how, DATA, CPU)
        losses.append([training.one_epoch(lambda news: None)["loss"] for _ in range(6)])
    assert losses[1][-1] < losses[1][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert training.under_attack is not training.network


def test_every_cell_of_a_process_is_compiled(monkeypatch):
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
            loop.Training(CELLS[method], how, DATA, CPU).one_epoch(lambda news: None)
        assert calls == 4 * (1 + in_an_attack.get(method, 0)), method
