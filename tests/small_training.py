"""What the tests of trainings share: a protocol of seconds, its cells and images, and processes."""

import dataclasses
import json
import multiprocessing
import os
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("train.run", reason="away from the source tree")
from train import rows
from train.cell import METHODS, STRENGTHS, Cell, protocol
from train.data import Data, load

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
WHOLE = load("synthetic", None)
DATA = Data(WHOLE.name, WHOLE.classes, WHOLE.training.first(128), WHOLE.test.first(64))


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


class Stop(Exception):
    pass


def started(function, *arguments):
    """A process that runs a function, of a fork server that has imported what takes seconds."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork server")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    process = context.Process(target=function, args=arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # where the fork server finds it
        process.start()
    return process
