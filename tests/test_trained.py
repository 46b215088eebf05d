"""The promise: what a benchmark trains is kept, also in a folder that is not there yet."""

import pytest
import torch

trained = pytest.importorskip("benchmarks.trained", reason="away from the source tree")
from train.models import resnet20  # noqa: E402


def test_a_checkpoint_is_kept_in_a_new_folder(tmp_path, monkeypatch):
    class Data:
        training = test = None

    monkeypatch.setattr(trained, "load", lambda *_: Data)
    monkeypatch.setattr(trained, "train", lambda *_: resnet20())
    monkeypatch.setattr(trained, "accuracy", lambda *_: 0.5)
    file = tmp_path / "new" / "weights.pt"
    network, accuracy = trained.trained("data", 3, "cpu", file)
    again, same = trained.trained("data", 3, "cpu", file)
    assert accuracy == same == 0.5
    assert torch.equal(network.stem[0].weight, again.stem[0].weight)
    assert [path.name for path in file.parent.iterdir()] == ["weights.pt"]
