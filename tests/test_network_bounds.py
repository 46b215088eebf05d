"""The promise: on networks of random shapes no bound is below what an attack finds, and composing never loosens one."""

import copy
import math

import numpy as np
import pytest
import torch
from as_matrix import Of
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.network import jacobian_norm, lipschitz, operators, trace
from convnorm.network.trace import exported

ORDS = (1, 2, math.inf)
NETWORKS = 200


class Net(nn.Module):
    """A list of operations: each a module, or a name, of earlier tensors."""

    def __init__(self, plan, modules):
        super().__init__()
        self.plan = plan
        self.parts = nn.ModuleDict(modules)

    def forward(self, x):
        tensors = [x.clone()]  # operations in place may follow
        for name, *sources in self.plan:
            inputs = [tensors[i] for i in sources]
            tensors.append(self.parts[name](*inputs) if name in self.parts else TWO[name](*inputs))
        return tensors[-1]


TWO = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - 0.5 * y,
    "cat": lambda x, y: torch.cat([x, y], 1),
    "maximum": torch.maximum,
    "halves": lambda x: torch.cat([torch.relu(x[:, ::2]), x[:, 1::2]], 1),
    "shuffle": lambda x: x.transpose(1, 2).flip(2).transpose(1, 2),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "scaled": lambda x: x / -1.7,
    "clipped": lambda x: x.clamp(-0.5, 1),
}


def choose(rng, options):
    return options[int(rng.integers(len(options)))]


def random_network(rng):
    """A network of 3 to 9 operations on images of up to 7 x 7, and the shape of its input."""
    channels, size = int(choose(rng, (2, 3, 4))), int(choose(rng, (4, 5, 7)))
    shapes = [(channels, size, size)]
    plan, modules = [], {}
    for step in range(int(rng.integers(3, 10))):
        source = len(shapes) - 1
        name, module, sources = random_operation(rng, shapes[source], source, shapes, f"p{step}")
        plan.append((name, *sources))
        modules |= {name: module} if module is not None else {}
        network = Net(plan, modules).eval()
        try:
            with torch.no_grad():
                shape = tuple(network(torch.zeros(1, *shapes[0])).shape[1:])
        except RuntimeError:  # of an operation that does not fit: another one may
            shape = (0,)
        if 0 in shape or math.prod(shape) > 400:
            plan.pop()
            modules.pop(name, None)
            continue
        shapes.append(shape)
    plan.append(("flat", len(shapes) - 1))
    modules["flat"] = nn.Flatten()
    if rng.random() < 0.5:
        plan.append(("head", len(shapes)))
        modules["head"] = nn.Linear(math.prod(shapes[-1]), 5)
    network = Net(plan, modules).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(float(rng.uniform(0.5, 3)))
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.1, 3)
                module.running_mean.normal_()
                module.weight.normal_()
    return network, shapes[0]


def random_operation(rng, shape, last, shapes, name):
    channels = shape[0]
    kind = choose(rng, ("conv",) * 5 + ("norm",) * 3 + ("activation",) * 4 + ("pool",) * 2 + ("pad", "up", "one", "one")
                  + ("two",) * 4)  # fmt: skip
    if kind == "two":
        same = [i for i, other in enumerate(shapes) if other == shape]
        both = choose(rng, ("add", "sub", "cat", "maximum"))
        return both, None, (last, choose(rng, same))
    if kind == "one":
        return choose(rng, ("halves", "shuffle", "mean", "scaled", "clipped")), None, (last,)
    makers = {"conv": random_conv, "activation": random_activation, "pool": random_pool, "pad": random_pad,
              "norm": lambda rng, channels: nn.BatchNorm2d(channels), "up": random_upsampling}  # fmt: skip
    return name, makers[kind](rng, channels), (last,)


def random_conv(rng, channels):
    kernel, stride = int(choose(rng, (1, 2, 3))), int(choose(rng, (1, 1, 1, 2)))
    padding, mode = int(choose(rng, (0, 1, 1))), choose(rng, ("zeros", "zeros", "zeros", "reflect", "circular"))
    groups = choose(rng, (1, 1, channels))
    if rng.random() < 0.15:
        return nn.ConvTranspose2d(channels, channels, kernel, stride, groups=groups)
    out = channels if groups > 1 or rng.random() < 0.6 else int(rng.integers(1, 5))
    dilation = int(choose(rng, (1, 1, 2)))
    return nn.Conv2d(channels, out, kernel, stride, padding, dilation, groups, padding_mode=mode)


def random_activation(rng, channels):
    return choose(rng, (nn.ReLU(), nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2), nn.ELU(1.5), nn.GELU(),
                        nn.SiLU(),
                        nn.Tanh(), nn.Hardswish(), nn.PReLU(channels), nn.Softmax(1), nn.LogSoftmax(1),
                        nn.GroupNorm(1, channels, eps=0.1)))  # fmt: skip


def random_pool(rng, channels):
    return choose(rng, (nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1), nn.AvgPool2d(2),
                        nn.AvgPool2d(3, 1, 1),
                        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.AdaptiveAvgPool2d(2),
                        nn.AdaptiveMaxPool2d(3)))  # fmt: skip


def random_pad(rng, channels):
    return choose(rng, (nn.ZeroPad2d(1), nn.ZeroPad2d((0, 1, 2, 0)), nn.ReflectionPad2d(1), nn.ReplicationPad2d(2)))


def random_upsampling(rng, channels):
    return choose(rng, (nn.Upsample(scale_factor=2), nn.Upsample(size=(5, 3), mode="bilinear"), nn.PixelShuffle(2)))


def network_of(seed, number):
    rng = np.random.default_rng((seed, number, 63))
    torch.manual_seed(int(rng.integers(2**31)))
    return random_network(rng)


def differentiable(network, x):
    """Autograd refuses networks that overwrite what it needs."""
    x = x.clone().requires_grad_()
    try:
        torch.autograd.grad(network(x).sum(), x)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


def attack(network, shape, ord, steps=12):
    """The largest difference quotient: of random pairs, near and far; climbed; of Jacobians, which are its limit."""
    torch.manual_seed(0)
    x = torch.randn(12, *shape, dtype=torch.float64) * torch.logspace(-1, 1, 12, dtype=torch.float64).view(-1, 1, 1, 1)
    best = max(quotients(network, x, x + scale * torch.randn_like(x), ord).max().item() for scale in (1e-3, 0.1, 3.0))
    if not differentiable(network, x):
        return best
    y = x + 0.3 * torch.randn_like(x)
    for _ in range(steps):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        found = quotients(network, x, y, ord)
        best = max(best, found.max().item())
        rises = torch.autograd.grad(found.sum(), (x, y))
        sizes = [torch.linalg.vector_norm(g.flatten(1), dim=1).clamp_min(1e-30).view(-1, 1, 1, 1) for g in rises]
        distance = torch.linalg.vector_norm((x - y).detach().flatten(1), dim=1).view(-1, 1, 1, 1)
        x, y = (one + 0.3 * distance * g / size for one, g, size in zip((x, y), rises, sizes, strict=True))
    return max(best, jacobian_norm(network, x[:4].detach(), ord=ord, steps=8).max().item())


def quotients(network, x, y, ord):
    change = torch.linalg.vector_norm(network(x).flatten(1) - network(y).flatten(1), ord, dim=1)
    return change / torch.linalg.vector_norm((x - y).flatten(1), ord, dim=1).clamp_min(1e-12)


@pytest.mark.parametrize("part", range(8))
def test_no_attack_beats_the_bound_of_a_random_network(seed, part, monkeypatch):
    composed = 0
    for number in range(part, NETWORKS, 8):
        network, shape = network_of(seed, number)
        program = exported(network, [2, *shape])
        attacks = {ord: attack(network, shape, ord) for ord in ORDS}
        for entries in (operators.MOST_ENTRIES, 0):  # with matrices, and without
            monkeypatch.setattr(operators, "MOST_ENTRIES", entries)
            traced = trace(program)
            for ord in ORDS:
                found = lipschitz(traced, ord=ord)
                again = f"network_of({seed}, {number}), ord {ord}, {entries} entries: {network}"
                assert attacks[ord] <= found.upper * (1 + 1e-9), again  # of which differences are off by rounding
                assert found.upper <= found.product, again
                assert all(node.upper <= node.product for node in found.nodes), again
                composed += found.upper < 0.999 * found.product
        monkeypatch.undo()
    assert composed > 20


def test_bounds_of_linear_networks_are_attained(seed):
    """Without anything nonlinear, a composed bound is the norm of the network's own matrix."""
    checked = 0
    for number in range(200):
        rng = np.random.default_rng((seed, number, 64))
        torch.manual_seed(number)
        network, shape = random_network(rng)
        traced = trace(network, [2, *shape])
        if len({anchor for step in traced.outputs for anchor, _ in step.terms}) != 1 or math.prod(shape) > 200:
            continue
        ((anchor, _),) = traced.outputs[0].terms
        if anchor is not traced.steps[0]:
            continue
        basis = torch.cat([torch.eye(math.prod(shape)), torch.zeros(1, math.prod(shape))]).double().view(-1, *shape)
        with torch.no_grad():
            images = network(basis)
        for ord in ORDS:
            exact = torch.linalg.matrix_norm((images[:-1] - images[-1:]).T, ord).item()
            found = lipschitz(traced, ord=ord, rtol=1e-6).upper
            assert exact * (1 - 1e-12) <= found <= exact * (1 + 2e-6) + 1e-12, (number, ord)
        checked += 1
    assert checked >= 10


# Whole models


def test_a_residual_network_adds_what_its_branches_do():
    models = pytest.importorskip("train.models")
    model = models.resnet20().eval()
    traced = trace(model, [2, 3, 32, 32])
    assert sum(step.operation == "add" for step in traced.steps) == 9
    for ord in (1, math.inf):
        found = lipschitz(traced, ord=ord)
        x = torch.randn(2, 3, 32, 32)
        assert 0 < jacobian_norm(model, x, ord=ord, steps=2).max().item() <= found.upper <= found.product < math.inf


def test_a_batch_norm_is_folded_into_the_layer_before_it():
    import convnorm

    models = pytest.importorskip("train.models")
    model = models.resnet18().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.1, 2)
    found = lipschitz(model, [1, 3, 64, 64], ord=1)
    conv, norm = model.stem[0], model.stem[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = convnorm.norms(conv, [64, 64], scale=scale.detach()).l1.item()
    assert found.nodes[2].operation == "batch_norm"
    assert found.nodes[2].upper == pytest.approx(folded, rel=1e-5)
    assert found.nodes[2].product == pytest.approx(
        convnorm.norms(conv, [64, 64]).l1.item() * scale.max().item(), rel=1e-5
    )
    assert found.upper < 0.01 * found.product


def test_a_network_with_gates_is_bounded_once_they_are_assumed():
    models = pytest.importorskip("train.models")
    model = models.senet18_cifar().eval()
    with pytest.raises(ValueError, match="not globally Lipschitz") as error:
        lipschitz(model, [1, 3, 32, 32], ord=1)
    names = {error.value.args[0].split("'")[1]}
    for _ in range(20):
        try:
            found = lipschitz(model, [1, 3, 32, 32], ord=1, assume=dict.fromkeys(names, 1.0))
            break
        except ValueError as error:
            names.add(str(error).split("'")[1])
    assert found.assumed
    assert found.upper < math.inf


def test_a_copy_in_double_precision_has_the_same_bound():
    network, shape = network_of(0, 3)
    single = copy.deepcopy(network).float()
    for ord in ORDS:
        expected = lipschitz(single.double(), [2, *shape], ord=ord).upper
        assert lipschitz(copy.deepcopy(network).float(), [2, *shape], ord=ord).upper == pytest.approx(
            expected, rel=1e-6
        )


def test_a_bound_needs_no_forward_pass():
    """Sizes at which a forward pass would need terabytes."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 8, 3))
    small, large = (lipschitz(model, [1, 3, n, n], ord=1).upper for n in (64, 1 << 18))
    assert small == pytest.approx(large, rel=1e-12)


def test_factors_beyond_float64_are_no_crash():
    for divisor in (5e-324, -5e-324, torch.full((3, 1, 1), 5e-324, dtype=torch.float64)):
        with pytest.raises(GeometryError, match=r"node 'div'.*no finite number"):
            lipschitz(Of(lambda x, divisor=divisor: x / divisor), [1, 3, 8, 8])
    bound = lipschitz(Of(lambda x: (x * 1.7e308).sum((1, 2))), [1, 3, 2, 2], ord=2)
    assert bound.log10_upper == pytest.approx(math.log10(1.7e308) + math.log10(6) / 2)
