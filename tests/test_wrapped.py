"""The promise: layers have the names that the user knows, whatever a model is wrapped in, and who is gone is named."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import convnorm
from convnorm.uses import observe


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))


WRAPPED = {
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "a part compiled": lambda: nn.Sequential(network()[0], torch.compile(network()[1], backend="eager")),
    "parallel": lambda: nn.DataParallel(network()),
    "averaged": lambda: AveragedModel(network()),
}


@pytest.mark.parametrize("wrapped", WRAPPED.values(), ids=WRAPPED)
def test_layers_of_wrapped_models_have_the_names_of_the_model(wrapped, tmp_path):
    model, names = wrapped(), ["0", "1.1"]
    found = convnorm.report(model, [1, 3, 8, 8], l2=False)
    assert [row.name for row in found.rows] == names
    assert found.title == "Sequential"
    assert convnorm.compare([network(), model], [1, 3, 8, 8], l2=False).names == names
    assert [use.name for use in observe(model, [1, 3, 8, 8])] == names
    convnorm.Projection(model, [1, 3, 8, 8], bound=dict.fromkeys(names, 1.0)).step()
    bound = convnorm.lipschitz(model, [1, 3, 8, 8], ord=1, assume={"1.1": 2.0})
    assert [node.module for node in bound.nodes if node.module in names] == names
    decay = convnorm.NormDecay(model, {"0": (8, 8), "1.1": ()}, beta={"0": 1, "1.1": 1})
    decay.step()
    assert list(decay.norms) == names
    with convnorm.Recorder(model, [1, 3, 8, 8], tmp_path / "norms.csv"):
        pass
    assert (tmp_path / "norms.csv").read_text() == "step,l1/0,linf/0,l1/1.1,linf/1.1\n"


def made(kind, model, folder):
    if kind == "NormDecay":
        return convnorm.NormDecay(model, [1, 3, 8, 8], beta=1.0)
    if kind == "Projection":
        return convnorm.Projection(model, [1, 3, 8, 8], bound=1.0)
    return convnorm.Recorder(model, [1, 3, 8, 8], folder / "norms.csv")


@pytest.mark.parametrize("kind", ["NormDecay", "Projection", "Recorder"])
def test_layers_that_were_replaced_are_named_once(kind, tmp_path):
    for part in ("1", "1.1"):
        model = network()
        model[0].register_module("absent", None)
        one = made(kind, model, tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.step()
            model[0] = torch.compile(model[0], backend="eager")  # still there
            one.step()
        model.set_submodule(part, nn.Sequential(nn.Flatten(), nn.Linear(144, 5)))
        with pytest.warns(UserWarning, match=rf"does not hold layer '1.1' any more.*make another {kind}"):
            one.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one.step()


def test_a_penalty_names_a_layer_that_was_replaced():
    model = network()
    decay = made("NormDecay", model, None)
    model[1][1] = nn.Linear(144, 5)
    with pytest.warns(UserWarning, match=r"does not hold layer '1.1' any more"):
        decay.penalty()


@pytest.mark.parametrize("kind", ["NormDecay", "Projection", "Recorder"])
def test_a_layer_that_is_replaced_after_another_child_was_deleted_is_named(kind, tmp_path):
    """Sequential makes a new dictionary of its children then."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    one = made(kind, model, tmp_path)
    del model[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.step()
    model[0] = nn.Conv2d(3, 4, 3)
    with pytest.warns(UserWarning, match=rf"does not hold layer '0' any more.*make another {kind}"):
        one.step()
