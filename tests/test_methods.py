"""The promise: each method does to gradients and weights what its formula says, written here a second time."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convnorm.uses import observe

methods = pytest.importorskip("train.methods", reason="away from the source tree")
from train.cell import Cell, protocol  # noqa: E402

RATE, MOMENTUM, BETA = 0.1, 0.9, 0.25
PROTOCOL = dataclasses.replace(
    protocol("figure2", "paper"), learning_rate=RATE, momentum=MOMENTUM, variant="paper", clip_every=2
)
SHAPE = [4, 4, 8, 8]


class Tiny(nn.Sequential):
    """Layers of every kind: strided, grouped, 1x1, on an input smaller than the kernel."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(4, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4, 6, 3, padding=1, groups=2),
            nn.Conv2d(6, 3, 1),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Flatten(),
            nn.Linear(20, 4),
        )


CONVOLUTIONS = {"0": 8, "3": 8, "5": 4, "6": 4, "8": 2}  # and the sizes of their inputs
OF_THE_RELEASE = {"clip": {"0", "3", "5", "6"}, "decay": {"0", "3", "6", "10"}}


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Tiny().to(memory_format=torch.channels_last)


@pytest.fixture
def batch():
    draws = torch.Generator().manual_seed(1)
    return torch.rand(SHAPE, generator=draws), torch.randint(4, (4,), generator=draws)


def regulariser(network, method, strength, variant="paper"):
    how = dataclasses.replace(PROTOCOL, variant=variant)
    return methods.Regulariser(network, observe(network, SHAPE), Cell("vgg11", method, strength), how)


def steps(network, batch, method, strength=None, variant="paper", count=2):
    """What is checked after ``count`` steps: the gradients and the weights before each, and the weights at the end."""
    acting, seen = regulariser(network, method, strength, variant), []
    for _ in range(count):
        network.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        named = list(network.named_parameters())
        seen.append({name: (each.grad.clone(), each.detach().clone()) for name, each in named})
        acting.step()
    return seen, {name: each.detach().clone() for name, each in network.named_parameters()}


def by_momentum(gradients, weight):
    """torch.optim.SGD's recurrence."""
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        velocity = MOMENTUM * velocity + gradient
        weight = weight - RATE * velocity
    return weight


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Gradients


@pytest.mark.parametrize(("method", "beta"), [("plain", 0), ("weight-decay", BETA), ("pgd-at", 0), ("trades", 0)])
def test_weight_decay_adds_to_every_parameter_and_other_methods_to_none(network, batch, method, beta):
    strength = {"plain": None, "pgd-at": None}.get(method, BETA)
    seen, found = steps(network, batch, method, strength)
    assert "1.weight" in found  # of the batch norm
    for name, weight in found.items():
        close(
            weight,
            by_momentum([gradient + beta * w for gradient, w in (each[name] for each in seen)], seen[0][name][1]),
        )


def matrix(layer, weight, size):
    """[outputs, inputs], from the images of the unit vectors; differentiable."""
    if isinstance(layer, nn.Linear):
        return weight
    inputs = layer.in_channels * size * size
    units = torch.eye(inputs).view(inputs, layer.in_channels, size, size)
    return F.conv2d(units, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups).flatten(1).T


def subgradient(layer, weight, size, ord):
    """Of the largest column or row sum, by autograd."""
    weight = weight.clone().requires_grad_()
    sums = matrix(layer, weight, size).abs().sum(0 if ord == 1 else 1)
    (found,) = torch.autograd.grad(sums[sums.argmax()], weight)
    return found


@pytest.mark.parametrize(("method", "ord"), [("l1-decay", 1), ("linf-decay", math.inf)])
def test_norm_decay_is_algorithm_1(network, batch, method, ord):
    """h = γ h + (1 - γ) p and g + β / N h, γ = 0.5, over all N = 6 layers."""
    seen, found = steps(network, batch, method, BETA, count=3)
    layers = {f"{name}.weight": (network[int(name)], size) for name, size in [*CONVOLUTIONS.items(), ("10", 1)]}
    for name, weight in found.items():
        gradients, average = [], 0
        for gradient, before in (each[name] for each in seen):
            if name in layers:
                layer, size = layers[name]
                average = 0.5 * average + 0.5 * subgradient(layer, before, size, ord)
                gradient = gradient + BETA / 6 * average
            gradients.append(gradient)
        close(weight, by_momentum(gradients, seen[0][name][1]))


@pytest.mark.parametrize(("method", "own"), [("l1-decay", 1), ("linf-decay", 0)])
def test_norm_decay_as_released(network, batch, method, own):
    """h = γ h, then the winning channel's signs in their place, and g + β h; grouped and small layers left out.

    ``own`` is the weight's axis of the channel. The strided layer's winner does not see all taps, in l1: it is left to
    the tests of norm decay.
    """
    seen, found = steps(network, batch, method, BETA, variant="released", count=3)
    layers = {f"{name}.weight" for name in OF_THE_RELEASE["decay"]}
    for name, weight in found.items():
        if name == "3.weight" and own == 1:
            assert not torch.allclose(weight, by_momentum([each[name][0] for each in seen], seen[0][name][1]))
            continue
        gradients, average = [], torch.zeros_like(weight)
        for gradient, before in (each[name] for each in seen):
            if name in layers:
                sums = before.abs().movedim(own, 0).flatten(1).sum(1)
                average = 0.5 * average
                average.select(own, sums.argmax()).copy_(before.select(own, sums.argmax()).sign())
                gradient = gradient + BETA * average
            gradients.append(gradient)
        close(weight, by_momentum(gradients, seen[0][name][1]))


# Weights


def clipped(kernel, size, bound):
    """Sedghi et al.'s Clip_OperatorNorm, as published in numpy: kernel[height, width, in, out]."""
    transforms = np.fft.fft2(kernel, [size, size], axes=[0, 1])
    u, s, vh = np.linalg.svd(transforms, compute_uv=True, full_matrices=False)
    clipped = np.matmul(u * np.minimum(s, bound)[..., None, :], vh)
    return np.fft.ifft2(clipped, axes=[0, 1]).real[: kernel.shape[0], : kernel.shape[1]]


def clipped_layer(layer, weight, size, bound, groups):
    size = max(size, layer.kernel_size[0])
    parts = [clipped(part.permute(2, 3, 1, 0).double().numpy(), size, bound) for part in weight.chunk(groups)]
    return torch.cat([torch.from_numpy(part).permute(3, 2, 0, 1) for part in parts]).float()


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_clipping_is_sedghis_after_every_second_step(network, batch, variant):
    """In the release a grouped weight is clipped as if it were not, and one larger than its input is left out."""
    bound, plain = 0.3, copy.deepcopy(network)
    unclipped, _ = steps(plain, batch, "plain", count=3)
    seen, _ = steps(network, batch, "clip", bound, variant, count=3)
    taken = set(CONVOLUTIONS) if variant == "paper" else OF_THE_RELEASE["clip"]
    for name in seen[0]:
        close(seen[1][name][1], unclipped[1][name][1])  # nothing is clipped after the first step
        layer, expected = network[int(name[:-7])] if name.endswith("weight") else None, unclipped[2][name][1]
        if layer is not None and name[:-7] in taken:
            groups = layer.groups if variant == "paper" else 1
            expected = clipped_layer(layer, expected, CONVOLUTIONS[name[:-7]], bound, groups)
            assert not torch.allclose(expected, unclipped[2][name][1], atol=1e-3), name
        torch.testing.assert_close(seen[2][name][1], expected, rtol=1e-4, atol=1e-5)


def test_clipping_comes_again_after_as_many_steps(network, batch):
    """Seen at the 1x1 layer, whose singular values are clipped exactly."""
    acting, largest = regulariser(network, "clip", 0.3), []
    for _ in range(7):
        network.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        acting.step()
        largest.append(float(np.linalg.norm(network[6].weight.detach()[:, :, 0, 0], 2)))
    assert [norm < 0.3001 for norm in largest] == [False, True] * 3 + [False]


@pytest.mark.parametrize(("method", "beta"), [("plain", None), ("l1-decay", BETA), ("clip", 0.5)])
def test_a_step_takes_weights_that_diverged_and_hides_no_other_error(network, batch, method, beta):
    def refuse(*_):
        raise RuntimeError("of another kind")

    other = copy.deepcopy(network)
    with torch.no_grad():
        network[0].weight[0] = math.nan
    steps(network, batch, method, beta, count=2)  # clipping comes in the second
    assert network[0].weight.isnan().any()
    acting = regulariser(other, method, beta)
    acting.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="of another kind"):
        acting.step()


def test_a_regulariser_goes_on_from_its_state(network, batch):
    other = copy.deepcopy(network)
    for method, strength in (("clip", 0.3), ("l1-decay", BETA), ("weight-decay", BETA)):
        whole, first = regulariser(network, method, strength), regulariser(other, method, strength)
        for step in range(5):
            for net, acting in ((network, whole), (other, first)):
                net.zero_grad()
                F.cross_entropy(net(batch[0]), batch[1]).backward()
                acting.step()
            if step == 2:
                state = copy.deepcopy(first.state_dict())
                first = regulariser(other, method, strength)
                first.load_state_dict(state)
        assert all(map(torch.equal, network.parameters(), other.parameters()))


# Losses


def softmax(logits):
    powers = logits.exp()
    return powers / powers.sum(1, keepdim=True)


def entropy(logits, labels):
    return -softmax(logits)[range(len(labels)), labels].log().mean()


def alp(clean, attacked, labels):
    squares = ((clean - attacked) ** 2).sum() / clean.numel()
    return (entropy(clean, labels) + entropy(attacked, labels)) / 2 + BETA * squares


def trades(clean, attacked, labels):
    p, q = softmax(clean), softmax(attacked)
    return entropy(clean, labels) + BETA * (p * (p / q).log()).sum() / len(labels)


LOSSES = {
    "plain": lambda clean, attacked, labels: entropy(clean, labels),
    "weight-decay": lambda clean, attacked, labels: entropy(clean, labels),
    "l1-decay": lambda clean, attacked, labels: entropy(clean, labels),
    "linf-decay": lambda clean, attacked, labels: entropy(clean, labels),
    "clip": lambda clean, attacked, labels: entropy(clean, labels),
    "pgd-at": lambda clean, attacked, labels: entropy(attacked, labels),
    "alp": alp,
    "trades": trades,
}


@pytest.mark.parametrize("method", LOSSES)
def test_the_loss_and_its_gradient_are_the_formulas(network, batch, method):
    x, labels = batch
    x_attacked = x + 0.5 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(2))
    network, (x, x_attacked) = network.double(), (x.double(), x_attacked.double())
    strength = None if method in ("plain", "pgd-at") else BETA
    loss, logits = methods.Objective(network, Cell("vgg11", method, strength))(x, x_attacked, labels)
    expected = LOSSES[method](network(x), network(x_attacked), labels)
    close(loss, expected)
    torch.testing.assert_close(logits, network(x_attacked if method == "pgd-at" else x))
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss, parameters)
    for gradient, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(gradient, other)


# Attacks


def by_hand(network, x, loss, noise, eps=0.031, step=0.007, count=10):
    """x' of the steps x' + step sign(gradient), kept within eps of x and within 0 and 1."""
    point = x + noise
    for _ in range(count):
        point = point.detach().requires_grad_()
        loss(network(point)).backward()
        moved = point.detach() + step * point.grad.sign()
        point = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
    return point.detach()


@pytest.mark.parametrize("method", ["pgd-at", "alp", "trades"])
def test_the_attack_is_on_the_network_in_evaluation_mode(network, batch, method):
    network, x, labels = network.double(), batch[0].double(), batch[1]
    for _ in range(3):
        network(10 * x)  # running statistics that are not those of the batch
    before, twin = copy.deepcopy(network.state_dict()), copy.deepcopy(network).eval()
    cell = Cell("vgg11", method, None if method == "pgd-at" else BETA)
    found = methods.attacked(network, x, labels, cell, PROTOCOL, torch.Generator().manual_seed(5))

    with torch.no_grad():
        p = softmax(twin(x))
    divergence = lambda logits: (p * (p / softmax(logits)).log()).sum()  # noqa: E731
    loss = divergence if method == "trades" else lambda logits: entropy(logits, labels)
    noise = 0.001 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.double)
    expected = by_hand(twin, x, loss, noise)
    close(found, expected)
    assert not torch.allclose(found, by_hand(twin.train(), x, loss, noise), atol=1e-3)

    assert network.training
    assert not found.requires_grad
    assert all(torch.equal(before[name], after) for name, after in network.state_dict().items())
    assert all(each.grad is None and each.requires_grad for each in network.parameters())


def test_the_attack_keeps_nothing_that_a_cuda_graph_writes_over(network, batch):
    class Replayed(nn.Sequential):
        """As a network compiled with CUDA graphs: every call returns in the same memory."""

        def forward(self, x):
            logits = super().forward(x)
            memory = self.memory = getattr(self, "memory", torch.empty_like(logits))
            memory.data.copy_(logits)
            return logits if logits.requires_grad else memory

    cell, x = Cell("vgg11", "trades", BETA), batch[0]
    expected, found = (
        methods.attacked(each, x, batch[1], cell, PROTOCOL, torch.Generator().manual_seed(5))
        for each in (network, Replayed(network))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", ["plain", "weight-decay", "clip", "l1-decay", "linf-decay"])
def test_table_2_attacks_no_training_images(network, batch, method):
    draws = torch.Generator().manual_seed(5)
    cell = Cell("vgg11", method, None if method == "plain" else BETA)
    assert methods.attacked(network, *batch, cell, PROTOCOL, draws) is batch[0]
    assert torch.equal(draws.get_state(), torch.Generator().manual_seed(5).get_state())
