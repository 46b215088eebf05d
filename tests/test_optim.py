"""convnorm.optim.SGD does what torch.optim.SGD with norm decay attached does."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import convnorm
from convnorm.backends import why_not

native = pytest.mark.skipif(bool(why_not("native", "cpu")), reason="the extension was not built")


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 20, 3, stride=2, padding=1),
        nn.BatchNorm2d(20),
        nn.Conv2d(20, 20, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(20, 20, 3, groups=20),
        nn.Conv2d(20, 8, 2, groups=2),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(6, 150),
        nn.Linear(150, 40),
    ).to(dtype)


def train(model, optimizer, steps=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 3, 8, 8, generator=generator)
        model(x.to(dtype)).square().mean().backward()
        optimizer.step()
    return list(model.parameters())


def both(model_of=network, ord=1, example=(1, 3, 8, 8), groups=lambda model: model.parameters(), **options):
    """Parameters after training with the one optimizer, and with the other."""
    results = []
    for own in (True, False):
        model = model_of()
        decay = convnorm.NormDecay(model, list(example), ord=ord, beta=0.3)
        if own:
            optimizer = convnorm.optim.SGD(groups(model), **options, norm_decay=decay)
        else:
            optimizer = torch.optim.SGD(groups(model), **options)
            decay.attach(optimizer)
        results.append(train(model, optimizer))
    return results


def assert_same(one, other, dtype=torch.float32):
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("ord", [1, math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1},
        {"lr": 0.05, "momentum": 0.9},
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "dampening": 0.2},
        {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True},
        {"lr": 0.001, "momentum": 0.5, "maximize": True},
        {"lr": torch.tensor(0.1), "momentum": 0.9},
    ],
    ids=str,
)
def test_results_are_those_of_torch(options, ord):
    assert_same(*both(lambda: network(torch.float64), ord, **options), torch.float64)
    assert_same(*both(network, ord, **options))


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_infinite_parameters_stay_infinite_without_weight_decay(momentum):
    """Such as a mask that is added to what a softmax takes."""
    model = network()
    mask = nn.Parameter(torch.tensor([1.0, -math.inf] * 20))
    mask.grad = torch.ones(40)
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer = convnorm.optim.SGD([*model.parameters(), mask], lr=0.5, momentum=momentum, norm_decay=decay)
    optimizer.step()
    assert mask.tolist() == [0.5, -math.inf] * 20


def test_groups_of_parameters():
    def groups(model):
        return [
            {"params": [*model[:3].parameters()], "lr": 0.1, "weight_decay": 0.01},
            {"params": [*model[3:].parameters()], "lr": 0.01, "nesterov": True},
        ]

    assert_same(*both(groups=groups, momentum=0.9))


@native
def test_weights_are_read_once(monkeypatch):
    """After the first step, and one after a change of the weights, no step measures: the winners are there."""
    model = network()
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, norm_decay=decay)
    seen, is_written_ahead = [], convnorm.batch.Batch.is_written_ahead

    def watched(self):
        seen.append(is_written_ahead(self))
        return seen[-1]

    monkeypatch.setattr(convnorm.batch.Batch, "is_written_ahead", watched)
    train(model, optimizer, 3)
    model[0].weight.data = model[0].weight.data.clone()
    with torch.no_grad():
        model[7].weight.mul_(2)
    train(model, optimizer, 2)
    assert seen == [False, True, True, False, True]
    for use in convnorm.observe(model, [1, 3, 8, 8]):
        torch.testing.assert_close(decay.norms[use.name], convnorm.norms(use.layer).l1, rtol=1e-6, atol=0)


@native
@pytest.mark.parametrize("threads", [1, 2])
def test_norms_are_those_of_the_operators(threads):
    """Also where a layer is cut into many blocks, and a block into many pieces. Rows are rounded alike."""
    torch.set_num_threads(threads)
    convs = nn.Conv2d(128, 256, 3, padding=1), nn.Flatten()
    model = nn.Sequential(*convs, nn.Linear(256 * 4, 7000), nn.Linear(7000, 50))
    for ord in (1, math.inf):
        decay = convnorm.NormDecay(model, [1, 128, 2, 2], ord=ord, beta=0.3)
        optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay)
        model(torch.randn(2, 128, 2, 2)).square().mean().backward()
        optimizer.step()
        for use in convnorm.observe(model, [1, 128, 2, 2]):
            norms = convnorm.norms(use.layer)
            torch.testing.assert_close(
                decay.norms[use.name], norms.l1 if ord == 1 else norms.linf, rtol=1e-6 if ord == 1 else 0, atol=0
            )
    torch.set_num_threads(1)


def without_gradient():
    model = network()
    model[2].weight.requires_grad_(False)
    return model


def channels_last():
    return network().to(memory_format=torch.channels_last)


def shared_weight():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize("model_of", [without_gradient, channels_last, shared_weight, lambda: network(torch.bfloat16)])
def test_what_cannot_be_read_once_is_stepped_all_the_same(model_of):
    assert_same(*both(model_of, lr=0.1, momentum=0.9))


@pytest.mark.parametrize("backend", ["reference"])
def test_other_backends(backend):
    with convnorm.use_backend(backend):
        assert_same(*both(lr=0.1, momentum=0.9))


def test_a_backend_need_not_serve_where_no_weights_are(monkeypatch):
    """As Triton does not serve CPUs. Weights without values are refused for that, by norm decay."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = nn.Linear(3, 3, device="meta")
    optimizer = convnorm.optim.SGD(model.parameters(), norm_decay=convnorm.NormDecay(model, [1, 3], beta=0.3))
    with convnorm.use_backend("triton"), pytest.raises(RuntimeError, match="give it values first"):
        optimizer.step()


def test_hooks_run_once_and_schedulers_are_content():
    model = network()
    torch.optim.SGD(model.parameters(), lr=1.0)  # has torch wrap its step
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    scheduler.step()
    assert calls == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_state_is_that_of_torch():
    model, other = network(), network()
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, norm_decay=decay)
    train(model, optimizer, 3)
    other.load_state_dict(model.state_dict())
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_decay = convnorm.NormDecay(other, [1, 3, 8, 8], beta=0.3)
    other_decay.load_state_dict(decay.state_dict())
    other_decay.attach(plain)
    assert_same(train(model, optimizer, 3, seed=1), train(other, plain, 3, seed=1))


def test_layers_that_the_optimizer_does_not_hold_are_named():
    model = network()
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    with pytest.warns(UserWarning, match=f"does not hold the weight of layer '{decay.uses[-1].name}'"):
        convnorm.optim.SGD([use.module.weight for use in decay.uses[:-1]], lr=0.1, norm_decay=decay)


def test_closure():
    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(1, 3, 8, 8)).square().mean()
        loss.backward()
        return loss

    model = network().eval()
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.01, norm_decay=decay)
    assert optimizer.step(closure) > optimizer.step(closure)


# --- what differs from step to step -----------------------------------------------------------------------------------


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()


def loops(before_step, steps=6, model_of=linear, example=(1, 3), **options):
    """The parameters after a loop with the one optimizer, and with the other as it is by default, not fused."""
    results = []
    for own in (True, False):
        model = model_of()
        decay = convnorm.NormDecay(model, list(example), beta=2.0, momentum=0)
        if own:
            optimizer = convnorm.optim.SGD(model.parameters(), **options, norm_decay=decay)
        else:
            optimizer = torch.optim.SGD(model.parameters(), **options)
            decay.attach(optimizer)
        for step in range(steps):
            optimizer.zero_grad()
            before_step(model, step)
            optimizer.step()
        results.append(list(model.parameters()))
    return results


def test_norms_are_measured_again_after_a_step_that_does_not_measure():
    def zero_gradients(model, step):
        for i, layer in enumerate(model):
            unused = i == 1 and step % 2 == 1
            layer.weight.grad = None if unused else torch.zeros_like(layer.weight)

    def model_of():
        model = linear()
        model[0].weight.data = torch.diag(torch.tensor([1.0, 0.9, 0.0], dtype=torch.float64))
        return model

    assert_same(*loops(zero_gradients, 3, model_of, lr=0.1), torch.float64)


def test_norms_are_measured_again_for_another_norm_decay_and_another_state():
    model = linear()
    decay = convnorm.NormDecay(model, [1, 3], beta=2.0, momentum=0)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.0, norm_decay=decay)

    def added():
        for layer in model:
            layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        return [layer.weight.grad for layer in model]

    def expected(ord):
        return [convnorm.subgradient(layer, ord=ord).to_dense() for layer in model]

    added()
    state = decay.state_dict()
    for layer in state["layers"].values():
        layer["winner"][0] = (layer["winner"][0] + 1) % 3
        layer["signs"].zero_()
    decay.load_state_dict(state)
    assert_same(added(), expected(1))
    optimizer.norm_decay = convnorm.NormDecay(model, [1, 3], ord=math.inf, beta=2.0, momentum=0)
    assert_same(added(), expected(math.inf))


@pytest.mark.parametrize("ord", [1, math.inf])
def test_a_resumed_run_finds_the_same_of_equal_channels(ord):
    """Whose sums differ in their rounding, which differs with the order of the additions."""
    torch.manual_seed(0)
    values = torch.randn(150)
    shuffled = torch.stack([values[torch.randperm(150)] for _ in range(40)])

    def optimizers():
        model = nn.Sequential(nn.Linear(40, 150) if ord == 1 else nn.Linear(150, 40))
        model[0].weight.data = shuffled.T.contiguous() if ord == 1 else shuffled.clone()
        decay = convnorm.NormDecay(model, list(model[0].weight.shape[1:]), ord=ord, beta=1.0, momentum=0)
        return convnorm.optim.SGD(model.parameters(), lr=0.0, norm_decay=decay)

    def added(optimizer):
        weight = optimizer.param_groups[0]["params"][0]
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        return weight.grad

    going, resumed = optimizers(), optimizers()
    for _ in range(2):
        assert torch.equal(added(resumed), added(going))
        resumed = optimizers()
        resumed.norm_decay.load_state_dict(going.norm_decay.state_dict())


def test_norms_are_measured_again_after_a_step_of_norm_decay_alone():
    """Which has used up the terms that were written ahead."""
    results = []
    for own in (True, False):
        model = linear()
        decay = convnorm.NormDecay(model, [1, 3], beta=2.0, momentum=0.5)
        if own:
            optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            decay.attach(optimizer)
        for step in range(4):
            for layer in model:
                layer.weight.grad = torch.zeros_like(layer.weight)
            if step == 2:
                decay.step()
            optimizer.step()
        results.append(list(model.parameters()))
    assert_same(*results, torch.float64)


def test_a_layer_that_is_used_later_begins_its_momentum_then():
    def backward(model, step):
        y = model[0](torch.ones(1, 3, dtype=torch.float64))
        (model[1](y) if step % 3 else y).square().sum().backward()

    assert_same(*loops(backward, lr=0.05, momentum=0.9, dampening=0.3), torch.float64)


@pytest.mark.parametrize("first", [torch.channels_last, torch.contiguous_format], ids=str)
def test_weights_of_other_strides_keep_their_momentum(first):
    (then,) = {torch.channels_last, torch.contiguous_format} - {first}

    def backward(model, step):
        model.to(memory_format=then if step else first)
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).double()
        model(x).square().mean().backward()

    assert_same(*loops(backward, 3, lambda: network(torch.float64), (1, 3, 8, 8), lr=0.1, momentum=0.9), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_in_half_precision(dtype):
    def backward(model, step):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
        model(x).square().mean().backward()

    torch.testing.assert_close(*loops(backward, 3, lambda: network(dtype), (1, 3, 8, 8), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_gradients_of_other_strides_than_their_weights(momentum):
    """As ``torch.autograd.grad`` gives them for channels last images."""

    def backward(model, step):
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).double()
        loss = model(x.to(memory_format=torch.channels_last)).square().mean()
        parameters = list(model.parameters())
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = grad

    options = {"lr": 0.1, "momentum": momentum}
    assert_same(*loops(backward, 3, lambda: network(torch.float64), (1, 3, 8, 8), **options), torch.float64)


@pytest.mark.parametrize("dampening", [0, 0.3])
def test_a_first_step_that_overflows_leaves_no_momentum(dampening):
    results = []
    for own in (True, False):
        model = linear().float()
        decay = convnorm.NormDecay(model, [1, 3], beta=0.0)
        options = {"lr": 0.1, "momentum": 0.9, "dampening": dampening}
        optimizer = (
            convnorm.optim.SGD(model.parameters(), **options, norm_decay=decay)
            if own
            else torch.optim.SGD(model.parameters(), **options)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 3)).square().sum()).backward()
            if step == 0:
                model[0].weight.grad[0, 0] = math.inf
            scaler.step(optimizer)
            assert step or not any(any(b is not None for b in state.values()) for state in optimizer.state.values())
            scaler.update()
        results.append(list(model.parameters()))
    assert_same(*results)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(value, steps):
    model = linear()
    decay = convnorm.NormDecay(model, [1, 3], beta=1.0)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay)
    for layer in model:
        layer.weight.grad = torch.zeros_like(layer.weight)
    for _ in range(steps):
        optimizer.step()
    with torch.no_grad():
        model[1].weight[0, 0] = value
    with pytest.raises(RuntimeError, match=rf"norm of layer '1' \({value}\) is not finite"):
        optimizer.step()


@native
def test_a_step_that_is_refused_leaves_no_momentum():
    model = linear()
    decay = convnorm.NormDecay(model, [1, 3], beta=1.0)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, norm_decay=decay)
    for layer in model:
        layer.weight.grad = torch.ones_like(layer.weight)
    decay.batches()[0].state.channels.fill_(99)
    with pytest.raises(RuntimeError, match="state of norm decay is of other weights"):
        optimizer.step()
    assert not any(optimizer.state.values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on(duplicate):
    model = network()
    decay = convnorm.NormDecay(model, [1, 3, 8, 8], beta=0.3)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, norm_decay=decay)
    train(model, optimizer, 3)
    other, other_optimizer = duplicate((model, optimizer))
    assert other_optimizer.norm_decay is not decay
    assert_same(train(model, optimizer, 3, seed=1), train(other, other_optimizer, 3, seed=1))


def test_a_copy_counts_versions_anew():
    """A copy whose weight happens to be at the version of the original's is not taken to be the original."""
    layer = nn.Linear(3, 3).double()
    decay = convnorm.NormDecay(layer, [1, 3], beta=1.0, momentum=0)
    optimizer = convnorm.optim.SGD(layer.parameters(), lr=0.0, norm_decay=decay)
    decay.load_state_dict(decay.state_dict())  # which counts, as copying does
    layer.weight.grad = torch.zeros(3, 3, dtype=torch.float64)
    optimizer.step()
    other, other_optimizer = copy.deepcopy((layer, optimizer))
    with torch.no_grad():
        other.weight.copy_(torch.randn(3, 3, dtype=torch.float64))
        while other.weight._version < layer.weight._version:
            other.weight.neg_()
    other.weight.grad = torch.zeros(3, 3, dtype=torch.float64)
    other_optimizer.step()
    assert_same([other.weight.grad], [convnorm.subgradient(other, ord=1).to_dense()])


def test_a_weight_that_is_frozen_with_a_gradient_is_not_decayed():
    def freeze(model, step):
        for layer in model:
            layer.weight.grad = torch.zeros_like(layer.weight)
        model[1].weight.requires_grad_(step < 2)

    assert_same(*loops(freeze, lr=0.1), torch.float64)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.complex64))

    def forward(self, x):
        return (self.last(self.words(x)) * self.scale).abs()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=str)
def test_sparse_gradients_and_complex_parameters_are_stepped_all_the_same(options):
    results = []
    for own in (True, False):
        model = Words()
        decay = convnorm.NormDecay(model, {"last": ()}, beta=0.3)
        if own:
            optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay, **options)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
            decay.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "state of another"])
def test_what_is_not_fused_takes_scaled_gradients(sparse):
    """For sparse gradients PyTorch has no fused operator, and the state of an optimizer that is not fused says so."""
    results = []
    for own in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Linear(4, 3))
        decay, plain = convnorm.NormDecay(model, {"1": ()}, beta=0.0), torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay) if own else plain
        optimizer.load_state_dict(optimizer.state_dict() if sparse else plain.state_dict())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(torch.tensor([1, 2])).square().sum()).backward()
            if step == 1:
                model[1].bias.grad[0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results)


def test_a_fused_step_takes_scaled_gradients():
    results = []
    for own in (True, False):
        model = linear().float()
        decay = convnorm.NormDecay(model, [1, 3], beta=0.3)
        if own:
            optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, fused=True, norm_decay=decay)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
            decay.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 3)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results)


def test_only_the_embedding_is_sparse():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3))
    decay = convnorm.NormDecay(model, {"1": ()}, beta=0.3)
    optimizer = convnorm.optim.SGD(model.parameters(), lr=0.1, norm_decay=decay)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.tensor([1, 2])).square().sum().backward()
        optimizer.step()
