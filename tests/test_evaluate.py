"""The promise: ``evaluate`` gives what the parts it is made of give, on disk and on a page that shows it."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

evaluate = pytest.importorskip("train.evaluate", reason="away from the source tree")

from train import training as loop  # noqa: E402
from train.attacks import autoattack  # noqa: E402
from train.cell import Cell, Protocol  # noqa: E402
from train.data import Data, Images, inputs  # noqa: E402
from train.rows import flags  # noqa: E402
from train.run import folded_norms_of  # noqa: E402

CPU = torch.device("cpu")
PROTOCOL = Protocol(
    "table2",
    "smoke",
    learning_rate=0.1,
    eps=0.002,
    dataset="synthetic",
    width=1 / 16,
    batch=20,
    attacked_images=20,
    l2_rtol=0.5,
)


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (60, 3, 32, 32), generator=random, dtype=torch.uint8)
    images = Images(pixels, torch.randint(10, (60,), generator=random))
    return Data("synthetic", 10, images, images)


@pytest.fixture(scope="module")
def training(data):
    """Not trained at all, of a network that is right about two images of three."""
    training = loop.Training(Cell("vgg11", "l1-decay", 1e-3), PROTOCOL, data, CPU)
    model, x = training.network.eval(), inputs(data.test.pixels)
    with torch.no_grad():
        model.head[-1].bias -= model(x).mean(0)  # else one class has all images, far from any other
        predicted = model(x).argmax(1)
    data.test.labels[:] = torch.where(torch.arange(60) % 3 > 0, predicted, (predicted + 1) % 10)
    return training


@pytest.fixture(scope="module")
def checkpoint(training, tmp_path_factory):
    training.save(file := tmp_path_factory.mktemp("run") / "vgg11.pt")
    return file


@pytest.mark.parametrize("attacks", [("pgd",), ("apgd-ce",)])
def test_evaluate_gives_what_its_parts_give(checkpoint, data, tmp_path, attacks):
    if attacks != ("pgd",):
        pytest.importorskip("pyautoattack")
    pytest.importorskip("matplotlib")
    stages = []
    size = {"eps": 0.001, "images": 20, "attacks": attacks, "iterations": 5}
    found = evaluate.evaluate(checkpoint, data, **size, out=tmp_path, device=CPU, tell=stages.append)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == found
    assert len(stages) == 4
    assert not list(tmp_path.glob("*.attack"))

    right, stable, robust = (flags(found[name]) for name in ("right", "stable", "robust"))
    assert np.array_equal(right, np.arange(20) % 3 > 0)
    assert found["all"]["images"] == 60
    assert found["all"]["right"] == 40
    assert np.array_equal(robust, right & stable)
    assert 0 < robust.sum() < right.sum()
    model, _, _ = loop.network(loop.read(checkpoint))
    x, y = inputs(data.test.pixels[:20]), data.test.labels[:20]
    if attacks != ("pgd",):  # what a row says of the same network
        expected = autoattack(model, x, y, eps=0.001, attacks=attacks, iterations=5, batch=500, seed=0)
        assert np.array_equal(robust, expected.numpy())

    with torch.no_grad():
        logits = model(x)
    mine = logits.gather(1, y[:, None])[:, 0]
    others = [max(row[:label] + row[label + 1 :]) for row, label in zip(logits.tolist(), y.tolist(), strict=True)]
    assert found["margin"]["clean"] == pytest.approx((mine - torch.tensor(others)).tolist(), rel=1e-3, abs=1e-6)
    assert np.mean(found["margin"]["attacked"]) < np.mean(found["margin"]["clean"])
    assert found["confidence"]["clean"] == pytest.approx(logits.softmax(1).amax(1).tolist(), rel=1e-4)
    assert all(constant > 0 for constant in found["local_lipschitz"])
    assert len(found["local_lipschitz"]) == 20

    assert found["folded"] == folded_norms_of(model, data, PROTOCOL.l2_rtol)
    assert len(found["layers"]) == len(found["spectra"]) == len(found["norms"]["l2"]) == 9
    for (lower, upper), spectrum in zip(found["norms"]["l2"], found["spectra"], strict=True):
        if not spectrum["circular"]:
            assert lower * (1 - 1e-4) <= spectrum["ranks"][0] <= upper * (1 + 1e-4)
        assert spectrum["ranks"] == sorted(spectrum["ranks"], reverse=True)
        assert spectrum["ranks"][-1] <= spectrum["mean"] <= spectrum["ranks"][0]


def test_the_page_shows_the_numbers(checkpoint, data, tmp_path):
    pytest.importorskip("matplotlib")
    found = evaluate.evaluate(checkpoint, data, eps=0.002, images=20, attacks=("pgd",), out=tmp_path, device=CPU)
    page = (tmp_path / "evaluation.md").read_text()
    assert page.startswith("# VGG-11, l1 norm decay 0.001, seed 0\n")
    assert "| right, all test images | 40 of 60 | 66.7 | 54.1 to 77.3 |" in page
    assert f"| robust | {found['robust']['right']} of 20 |" in page
    assert "pgd (20 iterations), linf, eps 0.51/255, on the first 20 test images" in page
    middle = np.quantile(found["local_lipschitz"], 0.5)
    assert f" {middle:.3g} |" in page
    folded = zip(found["layers"], *(found["folded"][norm] for norm in ("l1", "linf", "l2")), strict=True)
    for name, l1, linf, (low, high) in folded:
        assert page.count(f"| `{name}` |") == 2
        assert f"| `{name}` | {l1:.4g} | {linf:.4g} | {low:.4g} to {high:.4g} |\n" in page
    for name in ("distributions", "spectra", "norms"):
        assert f"(figures/{name}.png)](figures/{name}.svg)" in page
        assert (tmp_path / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"figures/{name}.svg").read_text()


@pytest.fixture
def asked(checkpoint, data, monkeypatch):
    """What a command line asks ``evaluate`` for."""

    def given(*options):
        seen = {}
        monkeypatch.setattr(evaluate, "load", lambda name, directory: seen.update(data=(name, directory)))
        monkeypatch.setattr(evaluate, "evaluate", lambda checkpoint, data, **asked: seen.update(asked))
        parser = argparse.ArgumentParser()
        evaluate.add_arguments(parser)
        assert evaluate.main(parser.parse_args([str(checkpoint), *options])) == 0
        return seen

    return given


def test_the_command_asks_for_what_the_checkpoint_says(asked, checkpoint, monkeypatch):
    monkeypatch.delenv("CONVNORM_DATA", raising=False)
    seen = asked("--device", "cpu")
    assert seen["data"] == ("synthetic", None)
    assert (seen["eps"], seen["images"]) == (0.002, 20)
    assert (seen["attacks"], seen["iterations"]) == (PROTOCOL.attacks, PROTOCOL.attack_iterations)
    assert seen["out"] == checkpoint.with_name("vgg11.evaluation")
    assert seen["device"] == CPU


def test_the_command_asks_for_what_it_is_given(asked, tmp_path):
    seen = asked("--attacks", "standard", "--eps", "8/255", "--images", "7", "--out", str(tmp_path), "--data", "there")
    assert seen["attacks"] == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert (seen["iterations"], seen["images"], seen["out"]) == (100, 7, tmp_path)
    assert seen["eps"] == pytest.approx(8 / 255)
    assert str(seen["data"][1]) == "there"
    assert asked("--attacks", "released", "--iterations", "3")["iterations"] == 3


def test_pgd_takes_no_iterations(asked):
    with pytest.raises(ValueError, match="--iterations is of AutoAttack, and --attacks pgd always takes 20"):
        asked("--attacks", "pgd", "--iterations", "7")


@pytest.mark.parametrize("text", ["0", "8/0", "-1/255", "255/8", "large", "nan"])
def test_what_is_no_eps_is_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"eps '{text}' must be a number such as 8/255"):
        evaluate.radius(text)


def test_too_many_images_are_named(checkpoint, data, tmp_path):
    with pytest.raises(ValueError, match="61"):
        evaluate.evaluate(checkpoint, data, eps=0.1, images=61, attacks=("pgd",), out=tmp_path, device=CPU)


def test_a_network_without_numbers_is_named(training, data, tmp_path):
    broken = deepcopy(training)
    with torch.no_grad():
        broken.network.head[-1].bias[3] = float("nan")
    broken.save(file := tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"broken.pt' gives logits that are not finite"):
        evaluate.evaluate(file, data, eps=0.1, images=2, attacks=("pgd",), out=tmp_path, device=CPU)


def test_the_page_says_how_far_a_killed_training_came(training, data, tmp_path):
    killed = deepcopy(training)
    killed.history = [{"epoch": 1}, {"epoch": 2}]
    killed.save(file := tmp_path / "killed.pt")
    found = evaluate.evaluate(file, data, eps=0.1, images=2, attacks=("pgd",), out=tmp_path, device=CPU)
    assert found["epochs"] == 2
    assert ", 2 of 120 epochs of " in (tmp_path / "evaluation.md").read_text(encoding="utf-8")


def test_what_is_evaluated_stays_while_the_training_goes_on(training, data, tmp_path):
    running = deepcopy(training)
    running.history = [{"epoch": 1}]
    running.save(file := tmp_path / "running.pt")

    def goes_on(stage):
        running.history.append({"epoch": len(running.history) + 1})
        running.save(file)

    options = {"eps": 0.1, "images": 2, "attacks": ("pgd",), "out": tmp_path, "device": CPU}
    assert evaluate.evaluate(file, data, **options, tell=goes_on)["epochs"] == 1


def test_numbers_are_there_only_with_their_page(checkpoint, data, tmp_path, monkeypatch):
    """``widths`` takes an evaluation whose numbers are there for done."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "render", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(checkpoint, data, eps=0.1, images=2, attacks=("pgd",), out=tmp_path, device=CPU)
    assert not (tmp_path / "evaluation.json").exists()


def test_evaluation_and_training_are_without_tf32(training, checkpoint, data, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    loop.network(loop.read(checkpoint))
    assert not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    loop.Training(training.cell, PROTOCOL, data, CPU)  # what benchmarks.epoch times
    assert not torch.backends.cudnn.allow_tf32


def test_the_page_can_be_written_under_any_locale(tmp_path):
    results = Path(evaluate.__file__).parent / "results" / "widths-smoke"
    if not results.exists():
        pytest.skip("away from the source tree")
    shutil.copytree(results, tmp_path / "widths")
    ascii_only = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-m", "train", "widths", "--render", "--out", str(tmp_path / "widths")]
    root = Path(evaluate.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=ascii_only, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
