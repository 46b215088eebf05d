"""The promise: norm decay is Algorithm 1 of the layers that a model has, however it uses, copies and replaces them."""

import copy
import math
import pickle

import pytest
import torch
from test_loops import SHAPE, SIZES, STEPS, ByHand, assert_same, decayed, loss, network, sgd, steps_of, train
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import convnorm

pytestmark = pytest.mark.filterwarnings("error:convnorm")  # norm decay leaves nothing out that a test does not name


# --- layers -----------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """Two modules share a weight; one is used at two sizes, and twice at one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, stride=2)
        self.other.weight = self.one.weight

    def forward(self, x):
        y = self.one(self.one(x).relu())
        return self.other(y).mean() + self.one(x[..., :1, :2]).mean()


@pytest.mark.parametrize("example", [SHAPE, None])
def test_shared_weights_and_several_sizes_each_count(example):
    expected, model = Twice(), Twice()
    sizes = [("one", (8, 8)), ("other", (8, 8)), ("one", (1, 2))]
    train(expected, ByHand(expected, sizes))
    decay = decayed(model, example)
    train(model, decay)
    assert_same(model, expected)
    assert list(decay.norms) == ["one [8, 8]", "other", "one [1, 2]"]


def test_a_frozen_layer_gets_nothing_its_average_goes_on():
    expected, model = network(), network()
    for one, decay in ((expected, ByHand(expected)), (model, decayed(model))):
        one[2].requires_grad_(False)
        before = one[2].weight.clone()
        train(one, decay)
        assert torch.equal(one[2].weight, before)
        one[2].requires_grad_(True)
        train(one, decay)
        assert not torch.equal(one[2].weight, before)
    assert_same(model, expected)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_layer_that_is_frozen_with_a_gradient_keeps_it(variant):
    """As it is left by ``zero_grad(set_to_none=False)``, for an optimizer to apply."""
    model = network()
    loss(model, 0).backward()
    model[2].requires_grad_(False)
    left = model[2].weight.grad.clone()
    decayed(model, variant=variant).step()
    assert torch.equal(model[2].weight.grad, left)


def test_a_layer_without_a_gradient_gets_nothing():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.takes = network(), 0

        def forward(self, x):
            self.takes += 1
            return self.net[:2](x) if self.takes % 2 else self.net(x)

    expected, model = Branches(), Branches()
    sizes = {f"net.{name}": in_shape for name, in_shape in SIZES.items()}
    train(expected, ByHand(expected, sizes.items()))
    train(model, decayed(model, sizes))
    assert_same(model, expected)


def test_a_sparse_gradient_is_refused_by_name():
    """An embedding that shares its weight with a fully connected layer may leave one, where that layer did not run."""
    model = network()
    decay = decayed(model)
    loss(model, 0).backward()
    model[4].weight.grad = model[4].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"gradient of layer '4' is torch\.sparse_coo"):
        decay.step()


@pytest.mark.parametrize("example", [SHAPE, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, example):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            hidden = checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=use_reentrant)
            return checkpoint(self.net[3:], hidden, use_reentrant=use_reentrant)

    expected, model = network(), Checkpointed()
    train(expected, ByHand(expected))
    decay = decayed(model, example)
    train(model, decay)
    assert_same(model, expected)
    assert list(decay.norms) == ["net.0", "net.2", "net.4"]


def test_a_transposed_layer_with_output_size():
    """The norm is that of the size it gives: at one output of the two that are possible, two taps are not read."""

    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1)
            self.size = 2

        def forward(self, x):
            return self.up(x, output_size=[self.size])

    for size in (1, 2):
        model = Up()
        model.size = size
        decay = decayed(model, [1, 2, 1])
        loss(model, 0, [1, 2, 1]).backward()
        decay.step()
        first, beyond = model.up.weight.abs()[..., 1], model.up.weight.abs()[..., 2]
        expected = (first if size == 1 else first + beyond).sum(1).max()
        torch.testing.assert_close(decay.norms["up"], expected.detach())


def test_lazy_layers_are_seen_once_they_have_run():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(convnorm.GeometryError, match="run the model once"):
        decayed(model)
    decay = decayed(model, None)
    loss_of_it = model(torch.randn(SHAPE)).square().mean()
    loss_of_it.backward()
    before = [model[i].weight.grad.clone() for i in (0, 2)]
    decay.step()
    assert list(decay.norms) == ["0", "2"]
    assert not any(torch.equal(model[i].weight.grad, grad) for i, grad in zip((0, 2), before, strict=True))


@pytest.mark.parametrize("of", [torch.zeros, tuple])
def test_a_model_of_two_inputs(of):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.image, self.extra = nn.Conv2d(2, 3, 3), nn.Linear(4, 3)

        def forward(self, x, y):
            return self.image(x).mean((2, 3)) + self.extra(y)

    model = Two()
    decay = decayed(model, (of([1, 2, 5, 5]), of([1, 4])))
    model(torch.zeros(1, 2, 5, 5), torch.zeros(1, 4)).sum().backward()
    decay.step()
    assert list(decay.norms) == ["image", "extra"]


def test_attention_has_a_layer_that_never_runs():
    """``nn.MultiheadAttention`` reads the weight of its ``out_proj`` without calling it: named sizes take it in."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    model = Attention()
    with pytest.warns(UserWarning, match=r"layer 'attention\.out_proj' did not run"):
        decayed(model, [1, 5, 8])
    decayed(model, [1, 5, 8], exclude="*.out_proj")
    decay = decayed(model, {"attention.out_proj": (), "head": ()})
    loss(model, 0, [1, 5, 8]).backward()
    decay.step()
    assert list(decay.norms) == ["attention.out_proj", "head"]


# --- models that change under way -------------------------------------------------------------------------------------


def test_averages_and_copies_of_a_model_are_left_alone():
    """Also where they were made while norm decay waited for the first forward pass, and observed."""
    expected, model = network(), network()
    for one, decay in ((expected, ByHand(expected)), (model, decayed(model, None))):
        mean, copied, optimizer = AveragedModel(one), copy.deepcopy(one), sgd(one)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(one, step).backward()
            loss(copied, step).backward()
            plain = [p.grad.clone() for p in copied.parameters()]
            decay.step()
            assert all(torch.equal(p.grad, grad) for p, grad in zip(copied.parameters(), plain, strict=True))
            copied = copy.deepcopy(one)
            copied.zero_grad()
            optimizer.step()
            mean.update_parameters(one)
        if one is expected:
            wanted = mean
    assert_same(model, expected)
    assert_same(mean.module, wanted.module)
    assert list(decay.norms) == list(SIZES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def duplicate_by_deepcopy(pair):
    return copy.deepcopy(pair)


def duplicate_by_pickle(pair):
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize("example", [SHAPE, None])
@pytest.mark.parametrize("duplicate", [duplicate_by_deepcopy, duplicate_by_pickle])
def test_model_and_norm_decay_copied_together_go_on_together(duplicate, example):
    expected, model = network(), network()
    by_hand, decay = ByHand(expected), decayed(model, example)
    model, decay = duplicate((model, decay))
    train(expected, by_hand)
    train(model, decay)
    other, other_decay = duplicate((model, decay))
    train(other, other_decay)
    assert_same(model, expected)
    train(expected, by_hand)
    assert_same(other, expected)
    assert steps_of(decay) == STEPS


def test_parameters_assigned_anew_are_followed():
    expected, model = network(), network()
    by_hand, decay = ByHand(expected), decayed(model)
    train(expected, by_hand)
    train(model, decay)
    saved = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    expected.load_state_dict(saved)
    model.load_state_dict(saved, assign=True)
    with pytest.warns(UserWarning, match="the weight of layer '0', '2', '4' was replaced"):
        train(model, decay)
    train(expected, by_hand)
    assert_same(model, expected)


def test_a_model_on_meta_that_becomes_real():
    expected = network()
    train(expected, ByHand(expected))
    with torch.device("meta"):
        model = network()
    decay = decayed(model)
    with pytest.raises(RuntimeError, match="layer '0' is on device meta"):
        decay.step()
    model.to_empty(device="cpu").load_state_dict(network().state_dict())
    train(model, decay)
    assert_same(model, expected)


def test_a_state_outlives_a_process_that_never_stepped():
    model = network()
    decay = decayed(model)
    train(model, decay)
    state = decay.state_dict()
    for _ in range(5):
        train(model, decay)  # the state stays what it was
    waiting = decayed(network(), None)
    waiting.load_state_dict(state)
    assert steps_of(waiting) == STEPS
    resumed, expected = network(), network()
    third = decayed(resumed)
    third.load_state_dict(waiting.state_dict())
    by_hand = ByHand(expected)
    train(expected, by_hand)
    for one, other in ((expected, by_hand), (resumed, third)):
        one.load_state_dict(network().state_dict())
        train(one, other)
    assert_same(resumed, expected)


def test_the_state_before_the_first_step_starts_anew():
    model = network()
    decay = decayed(model)
    start = decay.state_dict()
    for _ in range(5):
        train(model, decay)
    decay.load_state_dict(start)
    expected = copy.deepcopy(model)
    train(expected, ByHand(expected))
    train(model, decay)
    assert_same(model, expected)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [[2, 3, 9, 9], [[2, 3, 9, 9]], torch.zeros(2, 3, 9, 9)])
def test_an_example_of_the_wrong_shape_names_the_layer(example):
    with pytest.raises(convnorm.GeometryError, match=r"input of \[2, 3, 9, 9\], in or after layer '4'"):
        decayed(network(), example)


def test_named_sizes_that_cannot_be_name_the_layer():
    with pytest.raises(convnorm.GeometryError, match=r"layer '2': .* smaller than the kernel"):
        decayed(network(), SIZES | {"2": (2, 2)})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_names_the_layer(value):
    model = network()
    optimizer, decay = sgd(model), decayed(model)
    decay.attach(optimizer)
    loss(model, 0).backward()
    with torch.no_grad():
        model[2].weight[1, 2, 0, 1] = value
    with pytest.raises(RuntimeError, match=f"norm of layer '2' \\({value}\\) is not finite"):
        optimizer.step()


def test_a_layer_of_another_shape_in_the_state_is_named():
    model, other = network(), network()
    train(model, decay := decayed(model))
    other[4] = nn.Linear(36, 7)
    with pytest.raises(ValueError, match="does not fit layer '4'"):
        decayed(other).load_state_dict(decay.state_dict())


def test_norms_are_those_of_their_step_also_later():
    model = network()
    decay, history = decayed(model), []
    for _ in range(3):
        train(model, decay)
        history.append(decay.norms)
    assert len({norms["0"].item() for norms in history}) == 3
