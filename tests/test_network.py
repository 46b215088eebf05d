"""The promise: every operation has its true Lipschitz constant, linear ones are composed exactly, and what has no
constant is an error that names the node.
"""

import math
from fractions import Fraction

import cases
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.network import bound, certified_radius, jacobian_norm, lipschitz, operators, trace
from convnorm.network.activations import SLOPES
from convnorm.network.calls import RULES
from convnorm.network.merge import add, compose
from convnorm.network.operators import LayerOperator, Merged
from convnorm.network.rounding import joined, matrix_norm, plus, root, times

ORDS = (1, 2, math.inf)


class Of(nn.Module):
    """A function as a model."""

    def __init__(self, function, **tensors):
        super().__init__()
        self.function = function
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, *x):
        return self.function(*x, **dict(self.named_buffers(recurse=False)))


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix_of(model, shape):
    """The model less its constant, on the identity, [outputs, inputs] in float64."""
    size = math.prod(shape)
    basis = torch.cat([torch.eye(size, dtype=torch.float64), torch.zeros(1, size, dtype=torch.float64)])
    with torch.no_grad():
        y = model.double().eval()(basis.view(-1, *shape)).flatten(1)
    return (y[:-1] - y[-1:]).T


def norm_of(matrix, ord):
    return torch.linalg.matrix_norm(matrix, ord).item()


@pytest.fixture
def no_matrices(monkeypatch):
    """Composite operators are never small: only what is merged is composed."""
    monkeypatch.setattr(operators, "MOST_ENTRIES", 0)


def batch_normed(channels, kind=nn.BatchNorm2d):
    norm = kind(channels)
    with torch.no_grad():
        norm.weight.copy_(normal(channels, seed=2))
        norm.running_var.copy_(normal(channels, seed=3).abs() + 0.1)
        norm.running_mean.copy_(normal(channels, seed=4))
    return norm


LINEAR = {
    "conv1d": (nn.Conv1d(2, 3, 3, 2, 1), (2, 9)),
    "conv2d": (nn.Conv2d(2, 4, 3, 2, 1, groups=2), (2, 5, 6)),
    "conv2d_same": (nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), (2, 5, 6)),
    "conv2d_valid": (nn.Conv2d(2, 3, 2, padding="valid"), (2, 3, 4)),
    "conv2d_circular": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 5)),
    "conv2d_reflect": (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 4, 5)),
    "conv3d": (nn.Conv3d(1, 2, 2, padding=1), (1, 2, 3, 2)),
    "conv_transpose1d": (nn.ConvTranspose1d(2, 3, 3, 2, 1, output_padding=1), (2, 4)),
    "conv_transpose2d": (nn.ConvTranspose2d(2, 4, 3, 2, 1, groups=2), (2, 3, 4)),
    "conv_transpose3d": (nn.ConvTranspose3d(1, 2, 2, 2), (1, 2, 2, 2)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear_tokens": (nn.Linear(5, 3), (4, 5)),
    "matmul": (Of(lambda x, w: x @ w, w=normal(4, 3)), (2, 4)),
    "matmul_left": (Of(lambda x, w: w @ x, w=normal(3, 4)), (4, 2)),
    "matmul_vector": (Of(lambda x, w: x @ w, w=normal(4)), (2, 4)),
    "addmm": (Of(lambda x, w, b: torch.addmm(b, x, w), w=normal(4, 3), b=normal(3)), (4,)),
    "mm": (Of(lambda x, w: torch.mm(x, w), w=normal(4, 3)), (4,)),
    "batch_norm": (batch_normed(3), (3, 2, 2)),
    "batch_norm1d": (batch_normed(3, nn.BatchNorm1d), (3,)),
    "instance_norm_stored": (nn.InstanceNorm2d(3, track_running_stats=True, affine=True), (3, 2, 2)),
    "mul_scalar": (Of(lambda x: -2.5 * x), (3, 2)),
    "mul_channels": (Of(lambda x, w: x * w, w=normal(3, 1, 1)), (3, 2, 2)),
    "mul_each": (Of(lambda x, w: w * x, w=normal(1, 3, 2)), (3, 2)),
    "mul_broadcast": (Of(lambda x, w: x * w, w=normal(3, 4)), (3, 1)),
    "div": (Of(lambda x: x / 3), (3, 2)),
    "div_each": (Of(lambda x, w: x / w, w=normal(3, 2)), (3, 2)),
    "mul_negative": (Of(lambda x: x + -0.25 * x), (3, 2)),
    "neg": (Of(lambda x: -x), (3,)),
    "add_constant": (Of(lambda x, w: x + w, w=normal(3, 4)), (3, 1)),
    "rsub_constant": (Of(lambda x: 1 - x), (3, 2)),
    "rsub": (Of(lambda x: torch.rsub(x, x[:, :1], alpha=2)), (3, 2)),
    "add_itself": (Of(lambda x: torch.add(x, x, alpha=-3)), (3, 2)),
    "sub_part": (Of(lambda x: x - x[:, :1]), (3, 2)),
    "expand": (Of(lambda x: x.expand(-1, 3, 4)), (3, 1)),
    "repeat": (Of(lambda x: x.repeat(1, 2, 3)), (3, 2)),
    "sum": (Of(lambda x: x.sum((1, 2))), (3, 2, 2)),
    "mean": (Of(lambda x: x.mean((-1, -2), keepdim=True)), (3, 2, 2)),
    "avg_pool1d": (nn.AvgPool1d(3, 2, 1), (2, 7)),
    "avg_pool2d": (nn.AvgPool2d((3, 2), (1, 2), (1, 0)), (2, 5, 5)),
    "avg_pool2d_whole": (nn.AvgPool2d(2), (2, 5, 4)),
    "avg_pool2d_ceil": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (1, 6, 7)),
    "avg_pool2d_inside": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (1, 6, 7)),
    "avg_pool2d_divisor": (nn.AvgPool2d(3, 2, 1, divisor_override=5), (1, 6, 7)),
    "avg_pool3d": (nn.AvgPool3d(2, 1), (1, 3, 2, 3)),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d(3), (2, 7)),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d((3, None)), (2, 5, 2)),
    "adaptive_avg_pool2d_one": (nn.AdaptiveAvgPool2d(1), (2, 3, 3)),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d((2, 1, 2)), (1, 3, 2, 3)),
    "pad": (nn.ZeroPad2d((1, 0, 2, 3)), (2, 2, 3)),
    "pad_constant": (nn.ConstantPad2d((1, 0, 2, 3), 3.5), (2, 2, 3)),
    "pad_crops": (Of(lambda x: F.pad(x, (-1, 2))), (2, 3)),
    "pad_reflect": (nn.ReflectionPad2d((1, 2, 1, 0)), (2, 3, 4)),
    "pad_replicate": (nn.ReplicationPad1d((2, 1)), (2, 3)),
    "pad_circular": (nn.CircularPad2d((1, 2, 0, 1)), (2, 3, 4)),
    "pad_channels": (Of(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))), (2, 4, 3)),
    "upsample_nearest1d": (nn.Upsample(size=5), (2, 3)),
    "upsample_nearest2d": (nn.Upsample(scale_factor=(2, 1.5)), (1, 3, 4)),
    "upsample_nearest3d": (nn.Upsample(scale_factor=2), (1, 2, 1, 2)),
    "upsample_exact": (nn.Upsample(size=(5, 3), mode="nearest-exact"), (1, 3, 4)),
    "upsample_linear": (nn.Upsample(scale_factor=2, mode="linear"), (1, 4)),
    "upsample_bilinear": (nn.Upsample(size=(5, 3), mode="bilinear"), (1, 3, 4)),
    "upsample_bilinear_scale": (nn.Upsample(scale_factor=(1.7, 2.3), mode="bilinear"), (1, 3, 4)),
    "upsample_bilinear_corners": (nn.Upsample(size=(5, 7), mode="bilinear", align_corners=True), (1, 3, 4)),
    "upsample_bilinear_aa": (Of(lambda x: F.interpolate(x, (2, 3), mode="bilinear", antialias=True)), (1, 5, 6)),
    "upsample_trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), (1, 2, 2, 3)),
    "upsample_bicubic": (nn.Upsample(size=(5, 6), mode="bicubic"), (1, 3, 4)),
    "flatten": (nn.Flatten(), (2, 3)),
    "unflatten": (nn.Unflatten(1, (2, 3)), (6, 2)),
    "reshape": (Of(lambda x: x.reshape(len(x), 3, 4)), (2, 6)),
    "view": (Of(lambda x: x.view(x.size(0), -1)), (2, 6)),
    "squeeze": (Of(lambda x: x.squeeze(1).unsqueeze(-1)), (1, 3)),
    "permute": (Of(lambda x: x.permute(0, 2, 1).transpose(1, 2).movedim(-1, 1)), (2, 3)),
    "flip": (Of(lambda x: x.flip((1, 2)).roll(1, -1)), (2, 3)),
    "pixel_shuffle": (nn.PixelShuffle(2), (4, 2, 3)),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), (1, 2, 4)),
    "channel_shuffle": (nn.ChannelShuffle(2), (4, 2, 1)),
    "slice": (Of(lambda x: x[:, 1:, ::2]), (3, 4)),
    "select": (Of(lambda x: x[:, 1].narrow(1, 0, 2)), (3, 4)),
    "chunk": (Of(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), (4, 2)),
    "split": (Of(lambda x: torch.cat([*x.split([1, 3], 1), x.split(2, 1)[0]], 1)), (4, 2)),
    "unbind": (Of(lambda x: torch.stack(x.unbind(1), -1)), (4, 2)),
    "tensor_split": (Of(lambda x: x.tensor_split(2, 2)[1]), (2, 3)),
    "cat_constant": (Of(lambda x, w: torch.cat([x, w.expand(len(x), -1)], 1), w=normal(1, 3)), (2,)),
    "dropout": (nn.Sequential(nn.Dropout(), nn.Identity(), nn.Dropout2d()), (2, 2, 2)),
    "contiguous": (Of(lambda x: x.contiguous().clone().detach()), (2, 3)),
    "to": (Of(lambda x: x.to(torch.float64).type_as(x)), (2, 3)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_operation_has_the_norm_of_its_matrix(name, monkeypatch):
    model, shape = LINEAR[name]
    model = model.double()
    matrix = matrix_of(model, shape)
    traced = trace(model, [2, *shape])
    for ord in ORDS:
        found, exact = lipschitz(traced, ord=ord, rtol=1e-6).upper, norm_of(matrix, ord)
        assert exact * (1 - 1e-12) <= found <= exact * (1 + 2e-6 if ord == 2 else 1 + 1e-9), (ord, found, exact)


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_operation_is_bounded_without_its_matrix(name, no_matrices):
    model, shape = LINEAR[name]
    matrix = matrix_of(model.double(), shape)
    traced = trace(model, [2, *shape])
    single = len(traced.steps) == 2 and name != "mul_broadcast"
    for ord in ORDS:
        found, exact = lipschitz(traced, ord=ord, rtol=1e-6).upper, norm_of(matrix, ord)
        assert found >= exact * (1 - 1e-12)
        if single:  # others are products
            assert found <= exact * (1 + 2e-6 if ord == 2 else 1 + 1e-9), (ord, found, exact)


SCALAR = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "leaky_relu_steep": nn.LeakyReLU(-1.7),
    "rrelu": nn.RReLU(0.1, 3.0),
    "elu": nn.ELU(),
    "elu_steep": nn.ELU(2.5),
    "celu": nn.CELU(0.4),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "sigmoid": nn.Sigmoid(),
    "log_sigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(2.0),
    "softshrink": nn.Softshrink(),
    "hardtanh": nn.Hardtanh(-2, 3),
    "clamp": Of(lambda x: x.clamp(-1, 2)),
    "clamp_min": Of(lambda x: x.clamp_min(0.5)),
    "clamp_max": Of(lambda x: torch.clamp_max(x, 0.5)),
    "maximum": Of(lambda x: torch.maximum(x, torch.zeros_like(x))),
    "abs": Of(torch.abs),
    "sin": Of(torch.sin),
    "cos": Of(torch.cos),
    "atan": Of(torch.atan),
    "erf": Of(torch.erf),
}
SLOWLY = {"log_sigmoid", "softplus"}  # reach their largest slope at infinity


@pytest.mark.parametrize("name", SCALAR)
def test_an_activation_has_its_largest_slope(name):
    coarse = torch.linspace(-40, 40, 800001, dtype=torch.float64)
    slopes = abs(slope(SCALAR[name], coarse))
    fine = coarse[slopes.argmax()] + torch.linspace(-1e-4, 1e-4, 200001, dtype=torch.float64)
    largest = max(slopes.max().item(), abs(slope(SCALAR[name], fine)).max().item())
    for ord in ORDS:
        found = lipschitz(SCALAR[name], [2, 3], ord=ord).upper
        assert largest <= found * (1 + 1e-15)
        assert found <= largest * (1 + 2e-10)


def slope(model, x):
    if isinstance(model, nn.Hardsigmoid):  # whose derivative PyTorch has in float32
        return (model(x + 2) - model(x)) / 2
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model.double().eval()(x).sum(), x)[0]


def test_every_fixed_slope_is_sampled():
    assert set(SLOPES) <= set(SCALAR)


def test_prelu_has_its_steepest_channel():
    model = nn.PReLU(3)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([0.5, -2.5, 1.0]))
    assert [lipschitz(model, [2, 3, 2], ord=ord).upper for ord in ORDS] == [2.5] * 3


# What attains, or comes near, the constant of a nonlinear operation: two inputs.
PEAK = torch.full((1, 1, 6, 6), -9.0).double()
NONLINEAR = {
    "max_pool1d": (nn.MaxPool1d(3, 2), (2, 7), (2, 2**0.5, 1)),
    "max_pool2d": (nn.MaxPool2d(3, 1, 1), (1, 6, 6), (9, 3, 1)),
    "max_pool2d_dilated": (nn.MaxPool2d(2, 1, dilation=2), (1, 6, 6), (4, 2, 1)),
    "max_pool2d_ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (1, 6, 6), (4, 2, 1)),
    "max_pool2d_apart": (nn.MaxPool2d(2), (1, 6, 6), (1, 1, 1)),
    "max_pool3d": (nn.MaxPool3d(2, 1), (1, 3, 3, 3), (8, 8**0.5, 1)),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d(3), (1, 5), (2, 2**0.5, 1)),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d(4), (1, 6, 6), (4, 2, 1)),
    "amax": (Of(lambda x: x.amax((2, 3))), (2, 3, 3), (1, 1, 1)),
    "max_dim": (Of(lambda x: x.max(1).values), (3, 3), (1, 1, 1)),
    "min_dim": (Of(lambda x: x.min(2)[0]), (3, 3), (1, 1, 1)),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_largest_element_has_the_constant_of_its_overlap(name):
    model, shape, constants = NONLINEAR[name]
    peaks = -9 * torch.ones(math.prod(shape), math.prod(shape), dtype=torch.float64)
    x, y = (peaks.clone().fill_diagonal_(at).view(-1, *shape) for at in (1.0, 2.0))
    if name == "min_dim":
        x, y = -x, -y
    change = (model(y) - model(x)).flatten(1)
    for ord, constant in zip(ORDS, constants, strict=True):
        attained = torch.linalg.vector_norm(change, ord, dim=1).max().item()
        assert attained == pytest.approx(constant, rel=1e-12)
        assert constant <= lipschitz(model, [2, *shape], ord=ord).upper <= constant * (1 + 1e-15)


def largest_jacobian(model, shape, ord, points):
    """The largest norm of explicit Jacobians."""
    model = model.double().eval()
    jacobians = torch.vmap(torch.func.jacrev(lambda x: model(x[None])[0].flatten()))(points.view(-1, *shape))
    return torch.linalg.matrix_norm(jacobians.flatten(2), ord).max().item()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("n", [2, 3, 7])
def test_softmax_is_half_and_log_softmax_grows(n, ord):
    points = torch.cat([normal(300, n), 30 * torch.eye(n).double(), 30 * (torch.arange(n) < 2).double()[None]])
    half = lipschitz(nn.Softmax(1), [2, n], ord=ord).upper
    assert half == 0.5
    assert 0.5 - 1e-9 <= largest_jacobian(nn.Softmax(1), (n,), ord, points) <= half + 1e-15
    found, sampled = (
        lipschitz(nn.LogSoftmax(1), [2, n], ord=ord).upper,
        largest_jacobian(nn.LogSoftmax(1), (n,), ord, points),
    )
    assert sampled <= found <= sampled * (1 + 1e-9)
    assert lipschitz(Of(lambda x: torch.logsumexp(x, 1)), [2, n], ord=ord).upper == 1


def test_softmax_of_one_number_is_constant():
    for ord in ORDS:
        assert lipschitz(nn.Softmax(1), [2, 1, 3], ord=ord).upper == 0
        assert lipschitz(nn.LogSoftmax(1), [2, 1, 3], ord=ord).upper == 0


NORMALISING = {
    "layer_norm": (nn.LayerNorm(5, eps=0.3), (5,)),
    "layer_norm_2d": (nn.LayerNorm((2, 3), eps=0.01), (2, 2, 3)),
    "group_norm": (nn.GroupNorm(2, 4, eps=0.1), (4, 3)),
    "instance_norm": (nn.InstanceNorm1d(2, eps=0.2), (2, 4)),
    "rms_norm": (nn.RMSNorm(5, eps=0.3), (5,)),
    "layer_norm_of_one": (nn.LayerNorm(1, eps=0.3), (3, 1)),
}


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("name", NORMALISING)
def test_normalisation_is_bounded_through_eps(name, ord):
    model, shape = NORMALISING[name]
    if getattr(model, "weight", None) is not None:
        with torch.no_grad():
            model.weight.copy_(normal(*model.weight.shape, seed=2))
    points = normal(4000, *shape) * torch.logspace(-4, 1, 4000, dtype=torch.float64).view(-1, *[1] * len(shape))
    found, sampled = lipschitz(model, [2, *shape], ord=ord).upper, largest_jacobian(model, shape, ord, points)
    assert sampled <= found
    if ord == 2 and name == "instance_norm":  # no weight: attained at 0
        assert found <= sampled * (1 + 1e-6)
    if name == "layer_norm_of_one":
        assert found == 0


def test_sums_joins_and_largest_of_two_add_up():
    shape = [2, 3]
    two = Of(lambda x: torch.relu(x) + 2 * torch.tanh(x))
    assert [lipschitz(two, shape, ord=ord).upper for ord in ORDS] == [3, 3, 3]
    three = Of(lambda x: torch.relu(x) + 2 * torch.tanh(x) - torch.sigmoid(x) + x)
    assert [lipschitz(three, shape, ord=ord).upper for ord in ORDS] == [4.25, 4.25, 4.25]
    joined_two = Of(lambda x: torch.cat([3 * torch.relu(x), 4 * torch.tanh(x)], 1))
    assert [lipschitz(joined_two, shape, ord=ord).upper for ord in ORDS] == [7, 5, 4]
    largest = Of(lambda x: torch.maximum(3 * torch.relu(x), 4 * torch.tanh(x)))
    assert [lipschitz(largest, shape, ord=ord).upper for ord in ORDS] == [7, 5, 4]


def test_several_inputs_and_outputs_are_parts_of_one():
    model = Of(lambda x, y: (torch.relu(x) + y, 3 * y))
    assert [lipschitz(model, [2, 3], [2, 3], ord=ord).upper for ord in ORDS] == [5, pytest.approx(13**0.5), 3]


# Composition


def explicit(operator):
    n = math.prod(operator.in_shape)
    return operator(torch.eye(n, dtype=torch.float64).view(n, *operator.in_shape)).reshape(n, -1).T


def random_layer(rng, in_shape, channel, spatial):
    """A layer that fits, or None."""
    case = cases.random_case(rng)
    if len(case.in_shape) > len(spatial):
        return None
    channels = in_shape[channel - 1]
    groups = case.groups if channels % case.groups == 0 else 1
    groups = channels if rng.random() < 0.2 else groups
    own = channels // groups
    other = own if rng.random() < 0.5 else int(rng.integers(1, 3))
    shape = (channels, other) if case.transposed else (groups * other, own)
    kernel = tuple(case.weight_shape[2:]) if rng.random() < 0.7 else (1,) * len(case.in_shape)
    axes = spatial[: len(kernel)]
    weight = torch.from_numpy(rng.standard_normal((*shape, *kernel)))
    sizes = tuple(in_shape[axis - 1] for axis in axes)
    if not axes:
        groups, weight = 1, torch.from_numpy(rng.standard_normal((3, channels)))
    options = case.options | {"groups": groups} if axes else {}
    arguments = {"stride": case.stride, "padding": case.padding} if axes else {}
    try:
        layer = as_layer(weight, sizes, **arguments, **options)
        _ = layer.geometry
    except GeometryError:
        return None
    ends = layer.geometry.padding
    if layer.padding_mode == "circular" and any(max(p) > n for p, n in zip(ends, sizes, strict=True)):
        return None  # PyTorch wraps around once
    return LayerOperator(layer, tuple(in_shape), channel, axes)


def test_two_layers_are_merged_into_the_one_that_does_both(seed):
    merged = {"product": 0, "sum": 0}
    for number in range(1200):
        rng = np.random.default_rng((seed, number, 61))
        in_shape = tuple(int(n) for n in rng.integers(1, 7, 3))
        spatial = (2, 3)
        first = random_layer(rng, in_shape, 1, spatial)
        if first is None or min(first.out_shape) < 1:
            continue
        second = random_layer(rng, first.out_shape, 1, spatial)
        if second is not None:
            merged["product"] += check_merged(compose(second, first), explicit(second) @ explicit(first), number)
        besides = [random_layer(rng, in_shape, 1, spatial) for _ in range(10)]
        for beside in (b for b in besides if b is not None and b.out_shape == first.out_shape):
            merged["sum"] += check_merged(add(first, beside), explicit(first) + explicit(beside), number)
    assert min(merged.values()) > 30, merged


def check_merged(operator, matrix, number):
    if not isinstance(operator, Merged):
        return 0
    torch.testing.assert_close(explicit(operator.layer), matrix, rtol=1e-10, atol=1e-12, msg=f"case {number}")
    for ord in (1, math.inf):
        exact = norm_of(matrix, ord)
        assert exact * (1 - 1e-13) <= operator.layer.norm(ord)[0] <= exact * (1 + 1e-9) + 1e-10, (number, ord)
    return 1


COMPOSED = {
    "conv_bn": (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), batch_normed(4)), (3, 6, 5)),
    "conv_bn_scale": (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), batch_normed(4), Of(lambda x: x / 3)), (3, 6, 5)),
    "bn_conv": (nn.Sequential(batch_normed(3), nn.Conv2d(3, 4, 3, 2, 1)), (3, 6, 5)),
    "bn_conv_grouped": (nn.Sequential(batch_normed(4), nn.Conv2d(4, 6, 3, padding=1, groups=2)), (4, 5, 5)),
    "bn_transposed_bn": (
        nn.Sequential(batch_normed(4), nn.ConvTranspose2d(4, 6, 3, 2, groups=2), batch_normed(6)), (4, 3, 3)),
    "bn_linear_bn": (
        nn.Sequential(batch_normed(5, nn.BatchNorm1d), nn.Linear(5, 4), batch_normed(4, nn.BatchNorm1d)), (5,)),
    "pad_conv": (nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, 3, 2)), (2, 5, 6)),
    "pad_conv_padded": (nn.Sequential(nn.ZeroPad2d((1, 0, 2, 1)), nn.Conv2d(2, 3, 3, padding=1)), (2, 5, 6)),
    "reflect_conv": (nn.Sequential(nn.ReflectionPad2d(2), nn.Conv2d(2, 3, 3)), (2, 4, 3)),
    "conv_avg_pool": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.AvgPool2d(2)), (2, 6, 6)),
    "avg_pool_conv": (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(2, 3, 1)), (2, 6, 6)),
    "depthwise_pointwise": (
        nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 6, 1), batch_normed(6)), (4, 5, 5)),
    "pointwise_conv": (nn.Sequential(nn.Conv2d(2, 5, 1, 2), nn.Conv2d(5, 3, 3, padding=1)), (2, 7, 7)),
    "conv_conv": (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, 2)), (2, 7, 6)),
    "conv1d_conv1d": (nn.Sequential(nn.Conv1d(2, 3, 3, 2, dilation=2), nn.Conv1d(3, 2, 2, dilation=2)), (2, 15)),
    "linear_linear": (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)), (6,)),
    "tokens": (nn.Sequential(nn.Linear(6, 4), Of(lambda x, w: x * w, w=normal(4)), nn.Linear(4, 5)), (3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("ord", ORDS)
def test_neighbours_are_composed_without_their_matrix(name, ord, no_matrices):
    model, shape = COMPOSED[name]
    model = model.double()
    exact = norm_of(matrix_of(model, shape), ord)
    found = lipschitz(model, [2, *shape], ord=ord, rtol=1e-6)
    assert exact * (1 - 1e-12) <= found.upper <= exact * (1 + 2e-6 if ord == 2 else 1 + 1e-9)
    assert found.upper <= found.product


@pytest.mark.parametrize("entries", [0, 1 << 20])
def test_rounded_products_stay_below_the_bound(entries, seed, monkeypatch):
    """Products that cancel to less than their rounding, against exact arithmetic."""
    monkeypatch.setattr(operators, "MOST_ENTRIES", entries)
    rng = np.random.default_rng((seed, 65))
    above = 0
    for a, b, v in rng.uniform(0.1, 1, (200, 3)).tolist():
        first, second = nn.Linear(1, 3, dtype=torch.float64), nn.Linear(3, 1, dtype=torch.float64)
        with torch.no_grad():
            first.weight.copy_(torch.tensor([[v], [v], [v]], dtype=torch.float64))
            second.weight.copy_(torch.tensor([[a, b, -(a + b)]], dtype=torch.float64))
        exact = abs(sum(Fraction(x) * Fraction(v) for x in second.weight[0].tolist()))
        composed = compose(*(LayerOperator(as_layer(one.weight), (n,), 1, ()) for one, n in ((second, 3), (first, 1))))
        for ord in ORDS:
            assert exact <= Fraction(composed.norm(ord)[0]) < 1e-7
        above += exact > 0
    assert above > 50


class RepVGG(nn.Module):
    """Three linear branches of one input, which are one convolution."""

    def __init__(self):
        super().__init__()
        self.wide, self.point, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), batch_normed(4)

    def forward(self, x):
        return torch.relu(self.norm(x) + self.wide(x) - self.point(x) + x)


@pytest.mark.parametrize("ord", ORDS)
def test_linear_branches_of_one_input_are_one_layer(ord, no_matrices):
    model = RepVGG().double().eval()
    exact = norm_of(matrix_of(Of(lambda x: model.norm(x) + model.wide(x) - model.point(x) + x), (4, 5, 5)), ord)
    found = lipschitz(model, [2, 4, 5, 5], ord=ord, rtol=1e-6)
    assert exact * (1 - 1e-12) <= found.upper <= exact * (1 + 2e-6 if ord == 2 else 1 + 1e-9)
    assert found.upper < 0.99 * found.product


# Arithmetic


def test_bounds_are_rounded_up(seed):
    rng = np.random.default_rng((seed, 62))
    for a, b in rng.lognormal(0, 20, (500, 2)).tolist():
        assert Fraction(times(a, b)) >= Fraction(a) * Fraction(b)
        assert Fraction(plus(a, b)) >= Fraction(a) + Fraction(b)
        assert Fraction(root(a)) ** 2 >= Fraction(a)
        assert times(a, b) <= a * b * (1 + 1e-15)
    assert times(0.0, math.inf) == 0
    assert times(1e200, 1e200) == plus(1e308, 1e308) == math.inf
    assert joined([], math.inf) == 0


def test_norms_of_matrices_are_rounded_up():
    for i in range(50):
        matrix = normal(7, 5, seed=i) * 10.0 ** (i - 25)
        for ord in ORDS:
            exact = norm_of(matrix, ord)
            assert exact * (1 - 1e-15) <= matrix_norm(matrix, ord) <= exact * (1 + 1e-6 if ord == 2 else 1 + 1e-13)
    assert matrix_norm(torch.zeros(3, 2).double(), 2) == matrix_norm(torch.zeros(0, 2).double(), 1) == 0


# What is refused


class Gated(nn.Module):
    """A squeeze-excitation product."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.gate(x)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Overwriting(nn.Module):
    def forward(self, x):
        x = 2 * x
        flat = x.view(len(x), -1)
        flat.mul_(3)
        return x


REFUSED = {
    "gate": (Gated(), [2, 3, 4, 4], r"node 'mul' \(mul\) multiplies what depends .* not globally Lipschitz"),
    "square": (Of(lambda x: x * x), [2, 3], "not globally Lipschitz"),
    "attention": (Of(lambda x: x @ x.transpose(1, 2)), [2, 3, 3], "not globally Lipschitz"),
    "quotient": (Of(lambda x: 1 / x), [2, 3], r"node 'reciprocal'|divides by"),
    "exponential": (Of(torch.exp), [2, 3], r"node 'exp' \(exp\) has no known Lipschitz constant"),
    "in_module": (nn.Sequential(nn.ReLU(), nn.Hardshrink()), [2, 3], r"'hardshrink' \(hardshrink in module '1'\)"),
    "control_flow": (Branching(), [2, 3], "model Branching cannot be exported .* data-dependent"),
    "shape": (
        nn.Sequential(nn.Conv2d(3, 4, 3)),
        [2, 1, 8, 8],
        r"cannot be exported for an input of \[2, 1, 8, 8\].* '0'",
    ),
    "arguments": (nn.Bilinear(3, 3, 3), [2, 3], "cannot be exported"),
    "batch_statistics": (nn.BatchNorm2d(3, track_running_stats=False), [2, 3, 4, 4], "statistics of the batch"),
    "batch_sum": (Of(lambda x: x.sum(0, keepdim=True).expand(len(x), -1)), [2, 3], "batch axis"),
    "batch_mean": (Of(lambda x: x - x.mean()), [2, 3], "batch"),
    "batch_transposed": (Of(lambda x: x.T), [2, 3], "batch axis"),
    "batch_permuted": (Of(lambda x: x.permute(1, 0, 2)), [2, 2, 3], "batch axis"),
    "batch_flattened": (Of(lambda x: x.reshape(-1)), [2, 3], "batch"),
    "batch_broadcast": (Of(lambda x: x + x.unsqueeze(1)), [3, 3], "batch axis"),
    "batch_rolled": (Of(lambda x: x.roll(1)), [2, 3], "batch"),
    "batch_flipped": (Of(lambda x: x.flip(0)), [2, 3], "batch axis"),
    "batch_joined": (Of(lambda x: torch.cat([x, x])), [2, 3], "batch axis"),
    "batch_tiled": (Of(lambda x: x.repeat(2, 1)), [2, 3], "batch axis"),
    "batch_product": (Of(lambda x, w: w @ x, w=normal(2, 2).float()), [2, 3], "within each sample"),
    "batch_softmax": (nn.Softmax(0), [2, 3], "batch axis"),
    "batch_scaled": (Of(lambda x, w: x * w, w=normal(2, 3)), [2, 3], "each sample"),
    "unbatched": (nn.Conv2d(3, 4, 3), [3, 8, 8], "without a batch axis"),
    "unbatched_pool": (nn.MaxPool2d(2), [3, 8, 8], "without a batch axis"),
    "random": (Of(lambda x: x + torch.rand(3)), [2, 3], "draws random numbers"),
    "dropping": (Of(lambda x: F.dropout(x, training=True)), [2, 3], "drops at random"),
    "no_eps": (nn.LayerNorm(3, eps=0), [2, 3], "no eps"),
    "softplus_jump": (nn.Softplus(1, 1), [2, 3], "jumps"),
    "celu_negative": (nn.CELU(-1.0), [2, 3], "exponentially"),
    "rounding": (Of(lambda x: torch.div(x, 2, rounding_mode="floor")), [2, 3], "not continuous"),
    "integers": (Of(lambda x: x.to(torch.int64)), [2, 3], "rounds to"),
    "limits": (Of(lambda x: torch.clamp(torch.zeros(2, 3), x, x + 1)), [2, 3], "limits|depend"),
    "overwritten": (Overwriting(), [2, 3], "overwritten in place"),
    "no_number": (nn.Linear(3, 2), [2, 3], "node 'linear' .*NaN or inf"),
    "scalar_input": (nn.Identity(), [], "no batch axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_constant_is_refused_by_name(name):
    model, shape, message = REFUSED[name]
    if name == "no_number":
        with torch.no_grad():
            model.weight[0, 0] = math.nan
    with pytest.raises(GeometryError, match=rf"(?s)^convnorm: .*({message})") as error:
        lipschitz(model, shape, ord=1)
    assert "\n" not in str(error.value)


def test_arguments_that_ask_for_nothing_are_refused():
    model = nn.Linear(3, 2)
    for ord in (0, 3, "fro"):
        with pytest.raises(GeometryError, match=r"convnorm: ord .* must be 1, 2 or inf"):
            lipschitz(model, [2, 3], ord=ord)
    with pytest.raises(GeometryError, match="convnorm: assume 'nobody' names no node"):
        lipschitz(model, [2, 3], assume={"nobody": 1.0})
    for value in (-1.0, math.nan):
        with pytest.raises(GeometryError, match=r"convnorm: assume 'linear' .* at least 0"):
            lipschitz(model, [2, 3], assume={"linear": value})
    with pytest.raises(GeometryError, match="is traced"):
        lipschitz(trace(model, [2, 3]), [2, 3])


# What is assumed


def test_a_node_takes_the_constant_that_is_assumed():
    found = lipschitz(Gated(), [2, 3, 4, 4], ord=1, assume={"mul": 7.0})
    assert found.assumed == ("mul",)
    assert found.nodes[-1].how == "assumed"
    gate = lipschitz(Gated().gate, [2, 3, 4, 4], ord=1)
    model = Gated()
    gate = lipschitz(model.gate, [2, 3, 4, 4], ord=1).upper
    assert lipschitz(model, [2, 3, 4, 4], ord=1, assume={"mul": 7.0}).upper == pytest.approx(7 * (1 + gate))


def test_a_module_takes_the_constant_that_is_assumed():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Gated(), nn.ReLU(), Gated())
    conv = lipschitz(model[0], [2, 3, 4, 4], ord=2).upper
    with pytest.raises(GeometryError, match="module '3'"):
        lipschitz(model, [2, 3, 4, 4], assume={"1": 2.0})
    found = lipschitz(model, [2, 3, 4, 4], assume={"1": 2.0, "3": 3.0})
    assert found.upper == pytest.approx(6 * conv)
    assert [node.operation for node in found.nodes] == ["input", "conv2d", "assumed", "relu", "assumed"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = Gated()

    def forward(self, x):
        return self.gate(torch.relu(self.gate(x)))


def test_a_module_used_twice_is_assumed_twice():
    assert lipschitz(Twice(), [2, 3, 4, 4], assume={"gate": 2.0}).upper == 4


class Reusing(nn.Module):
    """A module that overwrites what is read again."""

    def __init__(self):
        super().__init__()
        self.twice = Of(lambda x: x.view(-1, 3).mul_(2))

    def forward(self, x):
        x = torch.relu(x)
        return self.twice(x) + x


def test_a_module_that_is_assumed_may_not_overwrite_what_is_read_again():
    with pytest.raises(GeometryError, match="overwritten in place"):
        lipschitz(Reusing(), [2, 3], assume={"twice": 2.0})


# Models


def test_tracing_leaves_a_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lipschitz(model, [2, 3, 8, 8])
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_exported_model_and_one_in_inference_operations_have_the_same_bound():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), batch_normed(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Softmax(1)
    )
    program = torch.export.export(model.float().eval(), (torch.zeros(2, 3, 8, 8),))
    for ord in (1, math.inf):
        expected = lipschitz(model, [2, 3, 8, 8], ord=ord).upper
        assert lipschitz(program, ord=ord).upper == expected
        assert lipschitz(program.run_decompositions(), ord=ord).upper == pytest.approx(expected, rel=1e-12)


def test_parametrized_weights_are_those_that_the_layer_uses():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)).eval()
    exact = norm_of(model.weight.detach().double(), 1)
    assert lipschitz(model, [2, 5], ord=1).upper == pytest.approx(exact, rel=1e-6)


def test_operations_in_place_are_those_of_their_results():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True))
    plain = nn.Sequential(model[0], nn.ReLU(), nn.Hardtanh())
    assert lipschitz(model, [2, 3], ord=1).upper == lipschitz(plain, [2, 3], ord=1).upper

    def residual(x):
        y = torch.tanh(2 * x)
        y += 3 * x
        return y

    assert lipschitz(Of(residual), [2, 3], ord=1).upper == 5


def test_half_precision_weights_are_measured_as_stored():
    model = nn.Linear(8, 4, dtype=torch.bfloat16)
    exact = norm_of(model.weight.detach().double(), math.inf)
    assert lipschitz(model, [2, 8], ord=math.inf).upper == pytest.approx(exact, rel=1e-14)


def test_a_bound_prints_as_a_table():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_normed(4), nn.ReLU())
    found = lipschitz(model.float(), [2, 3, 8, 8], ord=1)
    lines = str(found).splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["node", "operation"], ["input", "input"], ["0", "conv2d"], ["1", "batch_norm"], ["2", "relu"]]  # fmt: skip
    assert "composed" in lines[3]
    assert lines[-1] == repr(found)
    assert float(found) == found.upper == found.nodes[-1].upper


def test_a_bound_is_never_below_zero_or_lost():
    dead = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        dead[0].weight.zero_()
    assert lipschitz(dead, [2, 3]).upper == 0
    assert lipschitz(Of(lambda x: torch.ones(2, 1) + torch.zeros_like(x)), [2, 1]).upper == 0
    huge = nn.Sequential(*[Of(lambda x: x * 1e200) for _ in range(2)])
    assert lipschitz(huge, [2, 3]).upper == math.inf


# From below, and what a bound is for


@pytest.mark.parametrize("ord", ORDS)
def test_jacobian_norms_are_those_of_explicit_jacobians(ord):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double()
    x = normal(3, 2, 6, 6)
    found = jacobian_norm(model, x, ord=ord, steps=200)
    for one, norm in zip(x, found, strict=True):
        exact = largest_jacobian(model, (2, 6, 6), ord, one[None])
        assert exact * (1 - 1e-6) <= norm.item() <= exact


@pytest.mark.parametrize("ord", [1, math.inf])
def test_jacobian_norms_that_are_climbed_are_lower_bounds(ord, monkeypatch):
    model, x = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 40)).double(), normal(4, 30)
    exact = jacobian_norm(model, x, ord=ord)
    monkeypatch.setattr("convnorm.network.jacobian.MOST_EXACT", 10)
    found = jacobian_norm(model, x, ord=ord)
    assert (found <= exact).all()
    assert (found >= 0.75 * exact).all()


@pytest.mark.parametrize("ord", ORDS)
def test_within_its_radius_no_prediction_changes(ord):
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    found = lipschitz(model, [2, 6], ord=ord, rtol=1e-9)
    x = normal(50, 6)
    logits = model(x)
    radius = certified_radius(logits, found)
    assert (radius > 0).all()
    for _ in range(50):
        step = torch.randn_like(x)
        moved = x + step * (radius / torch.linalg.vector_norm(step, ord, dim=1))[:, None]
        assert torch.equal(model(moved).argmax(1), logits.argmax(1))


@pytest.mark.parametrize("ord", ORDS)
def test_a_radius_is_attained(ord):
    """The identity with two classes: the nearest input with another prediction lies at the radius."""
    found = lipschitz(nn.Identity(), [2, 2], ord=ord)
    radius = certified_radius(torch.tensor([3.0, 1.0]), found).item()
    step = {1: [-2.0, 0.0], 2: [-1.0, 1.0], math.inf: [-1.0, 1.0]}[ord]
    assert radius == pytest.approx(torch.linalg.vector_norm(torch.tensor(step), ord).item(), rel=1e-6)


def test_logits_without_a_margin_are_refused():
    found = bound.Bound(2, 1.0, 1.0, (), ())
    for logits in (torch.ones(3, 1), torch.tensor(1.0), torch.tensor([1.0, math.nan])):
        with pytest.raises(GeometryError, match="convnorm: logits"):
            certified_radius(logits, found)


def test_every_rule_is_of_an_operation_that_pytorch_has():
    assert all(hasattr(torch.ops.aten, name) for name in RULES)
    assert len(RULES) > 100
