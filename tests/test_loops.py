"""The promise: in the training loops that people write, norm decay is Algorithm 1, in the place where it stands."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import convnorm

SHAPE, SIZES = [2, 3, 8, 8], {"0": (8, 8), "2": (8, 8), "4": ()}
STEPS, BETA = 5, 0.3
ROUNDED = {torch.float64: {"rtol": 1e-12, "atol": 1e-14}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-3}}
pytestmark = pytest.mark.filterwarnings("error:convnorm")  # norm decay leaves nothing out that a test does not name


def network(dtype=torch.float32):
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(36, 5)).to(dtype)


def loss(model, step, shape=SHAPE):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)


class ByHand:
    """Algorithm 1 with whole tensors; of subgradients that tests/test_gradients.py compares with explicit matrices."""

    def __init__(self, model, sizes=None):
        self.layers = [(model.get_submodule(name), in_shape) for name, in_shape in sizes or SIZES.items()]
        self.averages = [torch.zeros_like(layer.weight, dtype=torch.float64) for layer, _ in self.layers]

    @torch.no_grad()
    def step(self, scale=1):
        for (layer, in_shape), h in zip(self.layers, self.averages, strict=True):
            h.mul_(0.5).add_(convnorm.subgradient(layer, in_shape, layout="dense"), alpha=0.5)
            if layer.weight.grad is not None:
                layer.weight.grad += scale * BETA / len(self.layers) * h  # rounded once


def decayed(model, example=SHAPE, **options):
    return convnorm.NormDecay(model, example, beta=BETA, **options)


def train(model, decay, make_optimizer=sgd, unused=()):
    """The plain loop. In ``unused`` steps nothing is updated."""
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        decay.step()
        if step not in unused:
            optimizer.step()
    return model


def assert_same(model, expected, **tolerance):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda why, name=name: f"{name}: {why}", **tolerance)


def steps_of(decay):
    return decay.state_dict()["steps"]


OPTIMIZERS = {
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "foreach": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-2}),
    "adamw_fused": (torch.optim.AdamW, {"lr": 0.01, "eps": 1e-2, "fused": True}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "eps": 1e-2}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_attach_steps_before_any_optimizer(name):
    kind, options = OPTIMIZERS[name]
    expected = network()
    train(expected, ByHand(expected), lambda model: kind(model.parameters(), **options))
    model = network()
    optimizer = kind(model.parameters(), **options)
    decay = decayed(model)
    decay.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    assert_same(model, expected)
    assert steps_of(decay) == STEPS


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, convnorm.optim.SGD])
def test_norms_decay_also_where_an_optimizer_maximizes(kind, variant):
    """To go up a gradient, here that of one group, is to go down its negative."""
    models = []
    for maximize in (False, True):
        model = network()
        models.append(model)
        decay = decayed(model, variant=variant)
        groups = [{"params": [*model[0].parameters()], "maximize": maximize}, {"params": [*model[2:].parameters()]}]
        own = {"norm_decay": decay} if kind is convnorm.optim.SGD else {}
        optimizer = kind(groups, lr=0.1, momentum=0.9, **own)
        if not own:
            decay.attach(optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, step).backward()
            for p in () if maximize else model[0].parameters():
                p.grad.neg_()
            optimizer.step()
    assert_same(*models)


def test_lbfgs_is_told_what_to_do_instead():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())
    decay = decayed(model)
    handle = decay.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"call step\(\) in closure"):
        optimizer.step(lambda: loss(model, 0))
    handle.remove()

    def closure():
        optimizer.zero_grad()
        value = loss(model, 0)
        value.backward()
        decay.step()
        return value

    optimizer.step(closure)
    assert steps_of(decay) > 1


def test_a_removed_handle_ends_it():
    expected, model = network(), network()
    train(expected, ByHand(expected), unused=range(1, STEPS))
    optimizer, decay = sgd(model), decayed(model)
    handle = decay.attach(optimizer)
    loss(model, 0).backward()
    optimizer.step()
    handle.remove()
    optimizer.zero_grad()
    optimizer.step()
    assert_same(model, expected)
    assert steps_of(decay) == 1


# --- mixed precision --------------------------------------------------------------------------------------------------


class Scaled:
    """A loop with a ``GradScaler``, whose scale changes on the way; ``how`` norm decay takes part in it."""

    def __init__(self, how, model):
        self.how, self.model = how, model
        self.optimizer = sgd(model, fused="fused" in how)
        self.decay = decayed(model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        if "attached" in how:
            self.decay.attach(self.optimizer)

    def step(self, step, overflows=False):
        self.optimizer.zero_grad()
        self.scaler.scale(loss(self.model, step)).backward()
        if overflows:
            self.model[0].weight.grad[0] = math.inf
        if self.how == "scaled":
            self.decay.step(self.scaler.get_scale())
        if "unscaled" in self.how:
            self.scaler.unscale_(self.optimizer)
        if self.how == "unscaled":
            self.decay.step()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize(
    "how", ["attached", "attached, unscaled", "attached, fused", "attached, fused, unscaled", "scaled", "unscaled"]
)
def test_scaled_gradients_give_the_update_of_unscaled_ones(how):
    expected, model = network(), network()
    train(expected, ByHand(expected))
    loop = Scaled(how, model)
    for step in range(STEPS):
        loop.step(step)
    assert loop.scaler.get_scale() == 2.0**12
    assert_same(model, expected)


@pytest.mark.parametrize("how", ["attached", "attached, fused", "scaled", "unscaled"])
def test_a_step_that_overflow_skips_updates_nothing(how):
    """The average goes on where decay does not know that the step is skipped: by hand, and in fused optimizers, which
    find it out themselves.
    """
    model, expected = network(), network()
    by_hand = ByHand(expected)
    optimizer = sgd(expected)
    loop = Scaled(how, model)
    for step in range(STEPS):
        loop.step(step, overflows=step == 2)
        if step != 2:
            optimizer.zero_grad()
            loss(expected, step).backward()
            by_hand.step()
            optimizer.step()
        elif how != "attached":
            by_hand.step()
    assert loop.scaler.get_scale() == 2.0**11
    assert_same(model, expected)
    assert steps_of(loop.decay) == STEPS - (how == "attached")


@pytest.mark.parametrize("example", [SHAPE, None])
def test_autocast(example):
    expected, model = network(), network()
    for one, decay in ((expected, ByHand(expected)), (model, decayed(model, example))):
        optimizer = sgd(one)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(one, step)
            value.backward()
            decay.step()
            optimizer.step()
    assert_same(model, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype(dtype):
    expected, model = network(dtype), network(dtype)
    train(expected, ByHand(expected))
    train(model, decayed(model))
    assert_same(model, expected, **ROUNDED[dtype])


def test_a_model_that_is_cast_on_the_way():
    expected, model = network(), network()
    for one, decay in ((expected, ByHand(expected)), (model, decayed(model))):
        train(one, decay)
        train(one.bfloat16(), decay)
    assert_same(model, expected, **ROUNDED[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_released_variant_of_a_model_that_is_cast_on_the_way(dtype):
    model = network()
    decay = decayed(model, variant="released")
    train(model, decay)
    train(model.to(dtype), decay)
    assert steps_of(decay) == 2 * STEPS


def test_a_model_that_is_cast_to_doubles_on_the_way_starts_anew():
    """A float64 average has more terms than are remembered of a float32 one."""
    model = network()
    decay = decayed(model)
    train(model, decay)
    expected = copy.deepcopy(model).double()
    train(expected, ByHand(expected))
    with pytest.warns(UserWarning, match=r"the weight of layer '0', '2', '4' was cast.* starts anew"):
        train(model.double(), decay)
    assert_same(model, expected)
    assert decay.norms["0"].dtype == torch.float64
    assert steps_of(decay) == 2 * STEPS


def test_gradients_of_another_dtype_than_the_weight():
    model = network(torch.bfloat16)
    decay, by_hand = decayed(model), ByHand(model)
    for layer, _ in by_hand.layers:
        layer.weight.grad_dtype = torch.float32
        layer.weight.grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    decay.step()
    gradients = [layer.weight.grad.clone() for layer, _ in by_hand.layers]
    model.zero_grad(set_to_none=False)
    by_hand.step()
    torch.testing.assert_close(gradients, [layer.weight.grad for layer, _ in by_hand.layers], rtol=1e-6, atol=0)


# --- when an optimizer steps ------------------------------------------------------------------------------------------


def test_gradient_accumulation_decays_once_for_each_step_of_the_optimizer():
    expected, model = network(), network()
    by_hand, decay = ByHand(expected), decayed(model)
    optimizers = sgd(expected), sgd(model)
    decay.attach(optimizers[1])
    for step in range(3 * STEPS):
        for one in (expected, model):
            (loss(one, step) / 3).backward()
        if step % 3 == 2:
            by_hand.step()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert_same(model, expected)
    assert steps_of(decay) == STEPS


@pytest.mark.parametrize("clipped", ["before", "after"])
def test_clipping(clipped):
    """``attach`` comes after clipping; ``step()`` where it is called."""
    expected, model = network(), network()
    by_hand, decay = ByHand(expected), decayed(model)
    optimizers = sgd(expected), sgd(model)
    if clipped == "before":
        decay.attach(optimizers[1])
    for step in range(STEPS):
        for one, optimizer in zip((expected, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss(one, step).backward()
            if clipped == "before":
                assert clip_grad_norm_(one.parameters(), 0.01) > 0.01
                if one is expected:
                    by_hand.step()
            else:
                (by_hand if one is expected else decay).step()
                assert clip_grad_norm_(one.parameters(), 0.01) > 0.01
            optimizer.step()
    assert_same(model, expected)


def test_parameter_groups():
    def grouped(model):
        groups = [{"params": model[0].parameters(), "lr": 0.01}, {"params": [*model[2].parameters()]}]
        return torch.optim.SGD([*groups, {"params": model[4].parameters(), "weight_decay": 0.1}], lr=0.1)

    expected, model = network(), network()
    train(expected, ByHand(expected), grouped)
    optimizer = grouped(model)
    decayed(model).attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    assert_same(model, expected)


def test_two_optimizers_share_one_step_before_both():
    expected, model = network(), network()
    train(expected, ByHand(expected))
    halves = sgd(model[:2]), sgd(model[2:])
    decay = decayed(model)
    for step in range(STEPS):
        model.zero_grad()
        loss(model, step).backward()
        decay.step()
        for optimizer in halves:
            optimizer.step()
    assert_same(model, expected)


@pytest.mark.parametrize("example", [SHAPE, None])
def test_an_optimizer_of_some_layers_only_is_told_of_the_others(example):
    model = network()
    decay, optimizer = decayed(model, example), sgd(model[:2])

    def attach_and_step():
        decay.attach(optimizer)
        loss(model, 0).backward()
        optimizer.step()

    with pytest.warns(UserWarning, match="does not hold the weight of layer '2', '4'"):
        attach_and_step()
    model[2].requires_grad_(False)
    model[4].requires_grad_(False)
    decay.attach(optimizer)  # frozen ones are meant to be missing
