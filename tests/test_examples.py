"""The promise: every example runs as it stands, without anything to download, and shows what its first line says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import convnorm

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS = {
    "plain_loop": (),
    "lightning_callback": ("lightning",),
    "transformers_callback": ("transformers", "accelerate"),
}


pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="away from the source tree there are no examples")


def run(name, folder):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    paths = [str(Path(convnorm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    line = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(line, cwd=folder, env=os.environ | offline, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir())
    return done.stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


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
