"""The promise: ``python -m convnorm check`` shows each norm beside what its witness attains; it fails if one is off."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import convnorm
from convnorm import __main__ as command
from convnorm.uses import observe

NETWORKS = """
import torch
from torch import nn
from torch.nn.utils import parametrizations

def network():
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 4, padding="same", groups=4)]
    more = [nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), nn.ConvTranspose2d(4, 2, 3, 2, output_padding=1)]
    return nn.Sequential(nn.Sequential(*convs), *more, nn.Flatten(), nn.Linear(200, 5))

def pointwise():
    return nn.Sequential(nn.Conv2d(3, 4, 1))

def zero():
    network = pointwise()
    nn.init.zeros_(network[0].weight)
    return network

def weight_norm():
    return parametrizations.weight_norm(nn.Conv2d(3, 4, 3))

def spectral_norm():
    torch.manual_seed(2)  # each use in training finds another weight
    return parametrizations.spectral_norm(nn.Conv2d(3, 32, 3))

def half():
    return network().half()

def needs_arguments(width):
    return network()

class OneSize(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)

    def forward(self, x):
        assert x.shape[-1] == 224, "224 only"
        return super().forward(x)

def a_dictionary():
    return {}

number = 3
"""
INPUT = ["--input", "3", "8", "8"]


@pytest.fixture(autouse=True)
def networks(tmp_path, monkeypatch):
    """A module ``networks`` to be imported by the name that the user gives."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("networks", None)


def check(name):
    return command.main(["check", f"networks:{name}", *INPUT])


def rows(printed):
    """(name, kind, weight, input, l1, attained, linf, attained) of each layer, as printed below a heading."""
    heading, *lines, conclusion = printed.splitlines()
    assert heading.split() == ["layer", "kind", "weight", "input", "l1", "attained", "linf", "attained"]
    assert conclusion.startswith("Largest difference")
    return [line.split() for line in lines]


def test_check_prints_the_norms_of_every_layer(capsys):
    assert check("network") == 0
    shown = rows(capsys.readouterr().out)
    assert [row[:-4] for row in shown] == [
        ["0.0", "Conv2d", "8x3x3x3", "8x8"],
        ["0.3", "Conv2d", "8x2x4x4", "4x4"],
        ["1", "Conv2d", "4x8x3x3", "4x4"],
        ["2", "ConvTranspose2d", "4x2x3x3", "4x4"],
        ["4", "Linear", "5x200"],  # a fully connected layer has no spatial size
    ]
    for row, use in zip(shown, observe(command.load_model("networks:network"), [1, 3, 8, 8]), strict=True):
        found = convnorm.norms(use.module, use.in_shape)
        exact = [found.l1.item()] * 2 + [found.linf.item()] * 2
        assert [float(number) for number in row[-4:]] == pytest.approx(exact, rel=1e-5)


def test_check_takes_the_projects_own_networks(capsys):
    pytest.importorskip("train.models", reason="away from the source tree")
    assert command.main(["check", "train.models:resnet20", "--input", "3", "32", "32"]) == 0
    assert len(rows(capsys.readouterr().out)) == 22


def test_check_runs_as_a_command(tmp_path):
    paths = [tmp_path, Path(convnorm.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    line = [sys.executable, "-m", "convnorm", "check", "networks:pointwise", *INPUT]
    run = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(rows(run.stdout)) == 1


@pytest.mark.parametrize("name", ["zero", "weight_norm", "spectral_norm", "half"])
def test_check_passes_for_right_norms(name):
    assert check(name) == 0


@pytest.mark.parametrize("norm", ["l1", "linf"])
@pytest.mark.parametrize("factor", [1.01, 0.99, math.nan, math.inf])
def test_check_fails_if_a_norm_is_off(monkeypatch, norm, factor):
    """In one layer, neither the first nor the last."""
    factors = iter([1, factor, 1, 1, 1])

    def off(*args, **options):
        found = convnorm.norms(*args, **options)
        values = {"l1": found.l1, "linf": found.linf}
        return SimpleNamespace(**values | {norm: values[norm] * next(factors)})

    monkeypatch.setattr(command, "norms", off)
    assert check("network") == 1


@pytest.mark.parametrize("wrong", [1, math.inf])
def test_check_fails_if_a_witness_is_none(monkeypatch, wrong):
    def other(*args, ord):
        x = convnorm.witness(*args, ord=ord)
        return torch.randn_like(x) if ord == wrong else x

    monkeypatch.setattr(command, "witness", other)
    assert check("network") == 1


def test_check_leaves_the_model_as_it_was():
    model = command.load_model("networks:network").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert command.check_model(model, [3, 8, 8]) == 0
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    "name",
    [
        "nowhere:network",
        "networks",
        "networks:",
        ":network",
        ".networks:network",
        "networks:nothing",
        "networks:number",
        "networks:needs_arguments",
        "networks:a_dictionary",
        "",
    ],
)
def test_a_wrong_model_is_refused_in_one_line(name, capsys):
    assert command.main(["check", name, *INPUT]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"convnorm: MODEL {name!r} ")


def test_a_wrong_input_is_refused_in_one_line(capsys):
    assert command.main(["check", "networks:network", "--input", "4", "8", "8"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("convnorm: the model does not run on an input of [1, 4, 8, 8]")
    assert check("OneSize") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("AssertionError: 224 only")


@pytest.mark.parametrize("arguments", [[], ["check"], ["check", "networks:network"], ["measure"], ["check", "--input"]])
def test_a_wrong_command_shows_how_to_use_it(capsys, arguments):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m convnorm" in capsys.readouterr().err


def test_check_refuses_a_model_without_layers(capsys):
    assert command.main(["check", "torch.nn:ReLU", "--input", "3", "8", "8"]) == 2
    assert "uses no convolutional or fully connected layer" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("hook", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_check_takes_weights_that_hooks_compute(hook, capsys):
    assert command.check_model(nn.Sequential(hook(nn.Conv2d(3, 4, 3)), hook(nn.Conv2d(4, 2, 3))), [3, 8, 8]) == 0


@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_check_passes_for_constrained_layers_in_half_precision(ord):
    torch.manual_seed(0)
    model = nn.Sequential(convnorm.constrain(nn.Conv2d(3, 4, 3), [6, 6], ord=ord, bound=0.5)).bfloat16()
    assert command.check_model(model, [3, 6, 6]) == 0
