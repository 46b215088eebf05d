"""The promise: training that is killed and resumed from a checkpoint ends with the bits of training that was not."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import convnorm

STEPS, KILLED_IN, SAVED_AFTER = 40, 34, 10  # at 30 steps the ring of 24 terms has gone round


def network():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*convs, nn.Conv2d(4, 8, 3, 2, groups=2), nn.Flatten(), nn.Linear(72, 5))


def beta(step):
    return 0.01 * (1 + step % 7)


def train(checkpoint, variant, ord, killed_in=None):
    """Resumes from the checkpoint where there is one; saves to it on the way."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=beta, ord=ord, variant=variant)
    parts = {"model": model, "optimizer": optimizer, "decay": decay}
    begin = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        begin = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for step in range(begin, STEPS):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        decay.step()
        if step == killed_in:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        if (step + 1) % SAVED_AFTER == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1} | states, checkpoint)
    return parts


def in_a_process(*arguments):
    paths = [str(Path(convnorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, __file__, *map(str, arguments)], env=environment, check=False).returncode


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a system that has no SIGKILL")
@pytest.mark.parametrize(("variant", "ord"), [("paper", math.inf), ("released", 1)])
def test_killed_and_resumed(variant, ord, tmp_path):
    checkpoint = tmp_path / "checkpoint.pt"
    assert in_a_process(checkpoint, variant, ord, KILLED_IN) == -signal.SIGKILL
    assert torch.load(checkpoint, weights_only=True)["step"] == KILLED_IN // SAVED_AFTER * SAVED_AFTER
    assert in_a_process(checkpoint, variant, ord) == 0
    resumed = torch.load(checkpoint, weights_only=True)
    assert resumed["step"] == STEPS
    whole = train(tmp_path / "another.pt", variant, ord)
    for name, tensor in whole["model"].state_dict().items():
        assert torch.equal(resumed["model"][name], tensor), name
    for layer, tensors in whole["decay"].state_dict()["layers"].items():
        for name, tensor in tensors.items():
            assert torch.equal(resumed["decay"]["layers"][layer][name], tensor), f"{name} of layer {layer}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), *map(int, sys.argv[4:]))
