"""What norm decay remembers: a resumed run is the uninterrupted one, and a state of another model is refused."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from every_layer import SHAPE, network, train
from torch import nn

import convnorm


@pytest.mark.parametrize("example", [[1, 4], None])
def test_the_state_of_a_penalty_of_computed_weights_resumes(example):
    def penalised(beta):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
        return model, convnorm.NormDecay(model, example, beta=beta)

    (model, decay), (other, resumed) = penalised(0.7), penalised(0.1)
    model(torch.zeros(1, 4))
    decay.penalty()
    resumed.load_state_dict(decay.state_dict())
    other.load_state_dict(model.state_dict())
    other(torch.zeros(1, 4))
    assert resumed.penalty() == decay.penalty()


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("example", [SHAPE, None], ids=["observed", "hooked"])
def test_a_resumed_run_is_the_uninterrupted_one(variant, example, tmp_path):
    def new_run():
        model = network(torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the released code skips
            decay = convnorm.NormDecay(model, SHAPE, beta=lambda step: 0.1 * (step + 1), variant=variant)
        if example is None:
            decay = convnorm.NormDecay(model, beta=0.2)
        return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), decay

    def steps(model, optimizer, decay, numbers):
        for number in numbers:
            optimizer.zero_grad()
            model(torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))).square().mean().backward()
            decay.step()
            optimizer.step()

    whole = new_run()
    steps(*whole, range(20))
    first = new_run()
    steps(*first, range(9))
    torch.save([part.state_dict() for part in first], tmp_path / "state.pt")
    second = new_run()
    for part, state in zip(second, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    steps(*second, range(9, 20))
    for a, b in zip(whole[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert str(whole[2].state_dict()) == str(second[2].state_dict())


def test_state_is_small():
    model = nn.Sequential(*(nn.Conv2d(256, 256, 3, padding=1) for _ in range(2)))
    decay = convnorm.NormDecay(model, [1, 256, 8, 8], beta=1.0)
    model(torch.randn(1, 256, 8, 8)).sum().backward()
    decay.step()
    kept = sum(tensor.nbytes for batch in decay._batches for tensor in batch.state.tensors())
    assert kept < 0.05 * sum(module.weight.nbytes for module in model)


def test_a_state_of_another_model_names_the_layer():
    model, other = network(), nn.Sequential(nn.Linear(3, 2))
    other(torch.randn(1, 3)).sum().backward()
    decay = convnorm.NormDecay(other, [1, 3], beta=1.0)
    decay.step()
    mine = convnorm.NormDecay(model, SHAPE, beta=1.0)
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match="'reflect' is not in the state"):
        mine.load_state_dict(decay.state_dict())
    wider = nn.Sequential(nn.Linear(3, 5))
    wider(torch.randn(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="does not fit layer '0'"):
        convnorm.NormDecay(wider, [1, 3], beta=1.0).load_state_dict(decay.state_dict())
    with pytest.raises(ValueError, match="ord inf is 1 in the state"):
        convnorm.NormDecay(other, [1, 3], beta=1.0, ord=math.inf).load_state_dict(decay.state_dict())
    assert str(mine.state_dict()["steps"]) == str(before["steps"])


def late_winner(channels, ord):
    """A layer whose last channel wins, its norm decay, and what lies behind its gradient."""
    weight = torch.ones(*((4, channels) if ord == 1 else (channels, 4)), 3, 3)
    (weight[:, -1] if ord == 1 else weight[-1]).mul_(10)
    model = nn.Sequential(nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False))
    model[0].weight = nn.Parameter(weight)
    decay = convnorm.NormDecay(model, {"0": [8, 8]}, beta=1.0, ord=ord)
    return model, decay, roomy_gradient(model[0])


def roomy_gradient(layer):
    memory = torch.zeros(20 * layer.weight.numel())
    layer.weight.grad = memory[: layer.weight.numel()].view_as(layer.weight)
    return memory[layer.weight.numel() :]


@pytest.mark.parametrize("ord", [1, math.inf])
def test_a_state_of_more_channels_is_refused_by_name(ord):
    """Slices of channels that are not there would be other memory."""
    _, wide, _ = late_winner(16, ord)
    wide.step()
    _, narrow, outside = late_winner(4, ord)
    with pytest.raises(ValueError, match="does not fit layer '0'"):
        narrow.load_state_dict(wide.state_dict())
    narrow.step()
    assert not outside.any()


@pytest.mark.parametrize("keep", [slice(0, 4), slice(12, 16)])
@pytest.mark.parametrize("ord", [1, math.inf])
def test_the_average_of_a_weight_with_fewer_channels_starts_anew(ord, keep):
    model, decay, _ = late_winner(16, ord)
    decay.step()
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter((weight[:, keep] if ord == 1 else weight[keep]).clone())
    outside = roomy_gradient(model[0])
    with pytest.warns(UserWarning, match="'0' was replaced.*the average of '0' starts anew"):
        decay.step()
    assert not outside.any()
    expected = 0.5 * convnorm.subgradient(model[0].weight.detach(), [8, 8], padding=1, ord=ord, layout="dense")
    torch.testing.assert_close(model[0].weight.grad, expected)


def test_a_weight_cut_in_place_is_refused():
    model, decay, _ = late_winner(16, 1)
    decay.step()
    model[0].weight.grad = None
    model[0].weight.data = model[0].weight.data[:, :4].clone()
    outside = roomy_gradient(model[0])
    with pytest.raises((RuntimeError, IndexError)):
        decay.step()
    assert not outside.any()


@pytest.mark.parametrize("example", [SHAPE, None])
def test_a_schedule_that_was_set_on_the_way_resumes_where_it_was(example):
    def run(model, decay, steps):
        train(model, decay.step, steps, lr=0.0)
        return decay.beta

    model = network()
    decay = convnorm.NormDecay(model, example, beta=0.5)
    run(model, decay, 3)
    decay.beta = lambda step: 1.0 + step
    assert run(model, decay, 2) == 2.0
    resumed = convnorm.NormDecay(model, example, beta=lambda step: 1.0 + step)
    resumed.load_state_dict(decay.state_dict())
    assert run(model, resumed, 1) == run(model, decay, 1) == 3.0
    model.linear.weight = nn.Parameter(model.linear.weight.detach())
    with pytest.warns(UserWarning, match="'linear' was replaced"):
        assert run(model, decay, 1) == 4.0


def test_beta_that_is_set_after_loading_counts_where_layers_are_not_known_yet():
    model = network()
    decay = convnorm.NormDecay(model, SHAPE, beta=0.5)
    train(model, decay.step, 1)
    resumed = convnorm.NormDecay(model, beta=0.1)
    resumed.load_state_dict(decay.state_dict())
    assert resumed.beta == 0.5
    resumed.beta = 2.0
    train(model, resumed.step, 1)
    assert resumed.beta == 2.0


@pytest.mark.parametrize(
    "beta",
    [np.float64(0.1), {"*": np.float32(0.1)}, lambda step: 0.1 * np.cos(step)],
    ids=["number", "named", "schedule"],
)
def test_a_beta_of_numpy_is_saved_and_loaded(beta):
    decay = convnorm.NormDecay(network(), SHAPE, beta=beta)
    file = io.BytesIO()
    torch.save(decay.state_dict(), file)
    file.seek(0)
    again = convnorm.NormDecay(network(), SHAPE, beta=beta)
    again.load_state_dict(torch.load(file))  # weights only
    assert again.beta == decay.beta
