"""The promise: every example runs as it stands, without anything to download, and shows what its first line says.

What a picture claims, its script asserts before it draws it.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

import convnorm

EXAMPLES = Path(__file__).parent.parent / "examples"
GALLERY = ("windows", "reshaping", "input_sizes", "worst_input", "norm_decay")
NEEDS = {
    "plain_loop": (),
    "lightning_callback": ("lightning",),
    "transformers_callback": ("transformers", "accelerate"),
    **dict.fromkeys(GALLERY, ("matplotlib",)),
}


pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="away from the source tree there are no examples")


def run(name, folder, *arguments, writes=()):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    paths = [str(Path(convnorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    line = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    done = subprocess.run(line, cwd=folder, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in folder.iterdir()] == list(writes)
    return done.stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


def test_readme_lists_every_example():
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(NEEDS)


def test_plain_loop(tmp_path):
    *layers, accuracy = [line.split()[-3:] for line in run("plain_loop", tmp_path).splitlines()[1:]]
    assert len(layers) == 4
    assert all(float(decayed) < 0.75 * float(without) for _, without, decayed in layers)
    assert min(map(float, accuracy[1:])) > 0.95


@pytest.mark.parametrize("name", ["lightning_callback", "transformers_callback"])
def test_callback(name, tmp_path):
    printed = (line.split(":  ", 1) for line in run(name, tmp_path).splitlines() if ":  norm of" in line)
    runs = {which: dict(norm.rsplit(" ", 1) for norm in norms.split("  ")) for which, norms in printed}
    assert len(runs["with"]) > 1
    assert runs["resumed"] == runs["with"]
    decayed = [float(runs["with"][layer]) / float(runs["without"][layer]) for layer in runs["without"]]
    assert max(decayed) < 1
    assert min(decayed) < 0.75


@pytest.mark.filterwarnings("ignore")  # of few workers, and the like
def test_the_sizes_that_lightning_tells_are_those_of_training(tmp_path):
    lightning = pytest.importorskip("lightning")
    example = runpy.run_path(str(EXAMPLES / "lightning_callback.py"))

    class Validated(example["Classifier"]):
        def __init__(self):
            super().__init__()
            self.model.insert(1, nn.AdaptiveAvgPool2d(16))

        def validation_step(self, batch):
            self.model(batch[0])

    def batches(size):
        data = torch.utils.data.TensorDataset(torch.randn(8, 3, size, size), torch.zeros(8, dtype=torch.int64))
        return torch.utils.data.DataLoader(data, 4)

    callback = example["NormDecayCallback"](beta=0.1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(max_epochs=1, callbacks=callback, default_root_dir=tmp_path, **quiet)
    trainer.fit(Validated(), batches(16), batches(24))
    assert [use.in_shape for use in callback.decay.uses] == [(16, 16), ()]


@pytest.mark.parametrize("name", GALLERY)
def test_picture_is_drawn(name, tmp_path):
    run(name, tmp_path, writes=[f"{name}.png"])
    picture = pytest.importorskip("matplotlib.image").imread(tmp_path / f"{name}.png")[..., :3]
    height, width, _ = picture.shape
    assert width >= 1000
    assert height >= 400
    coloured = np.ptp(picture, axis=-1) > 0.2  # what is drawn; axes, ticks and titles are black and grey
    assert all(part.mean() > 0.005 for part in np.array_split(coloured, 3, axis=1))


@pytest.mark.parametrize("name", GALLERY)
def test_picture_is_drawn_where_and_as_asked(name, tmp_path):
    run(name, tmp_path, "asked.svg", writes=["asked.svg"])
    text = (tmp_path / "asked.svg").read_text()
    assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    coloured = [rgb for rgb in re.findall("#([0-9a-f]{6})", text) if len({rgb[:2], rgb[2:4], rgb[4:]}) > 1]
    assert coloured or "<image" in text
