"""The promise: every operation has its true Lipschitz constant."""

import math

import pytest
import torch
import torch.nn.functional as F
from as_matrix import ORDS, Of, batch_normed, largest_jacobian, matrix_of, norm_of, normal, without_matrices
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.network import jacobian_norm, lipschitz, trace
from convnorm.network.activations import SLOPES
from convnorm.network.calls import RULES

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
    "pad_circular_crops": (Of(lambda x: F.pad(x, (-1, 1, 2, -1), mode="circular")), (2, 4, 5)),
    "pad_reflect_crops": (Of(lambda x: F.pad(x, (-1, 2, 1, -2), mode="reflect")), (2, 4, 5)),
    "pad_replicate_crops": (Of(lambda x: F.pad(x, (-1, 2, 1, -2), mode="replicate")), (2, 4, 5)),
    "pad_batch_by_nothing": (Of(lambda x: F.pad(x, (1, 1, 0, 0, 0, 0))), (2, 3)),
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
    "full_like": (Of(lambda x, w: (x + w) * torch.full_like(x, 0.7) * x.new_full((3,), 1e40), w=normal(3)), (2, 3)),
    "constant_type_as": (Of(lambda x, w: x * w.type_as(x) + w.expand_as(x), w=normal(1, 1, 3)), (2, 3)),
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


LONG = {
    "avg_pool1d": (nn.AvgPool1d(4), (1 / 4, 1 / 2, 1)),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d(250_000), (1 / 4, 1 / 2, 1)),
    "pad": (nn.ReflectionPad1d(3), (2, 2**0.5, 1)),
    "repeat": (Of(lambda x: x.repeat(1, 1, 2)), (2, 2**0.5, 1)),
}


@pytest.mark.parametrize("name", LONG)
def test_long_axes_have_no_dense_matrix(name):
    model, expected = LONG[name]
    traced = trace(model, [1, 2, 10**6])
    assert [lipschitz(traced, ord=ord).upper for ord in ORDS] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_operation_is_bounded_without_its_matrix(name, monkeypatch):
    without_matrices(monkeypatch)
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


def test_prelu_without_a_number_is_refused():
    model = nn.PReLU(3)
    with torch.no_grad():
        model.weight[1] = math.nan
    with pytest.raises(GeometryError, match="slope of nan"):
        lipschitz(model, [2, 3, 2])


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
    "adaptive_max_pool1d_apart": (nn.AdaptiveMaxPool1d(2), (1, 4), (1, 1, 1)),
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
    "rms_norm_of_one": (nn.RMSNorm(1, eps=0.3), (3, 1)),
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


@pytest.mark.parametrize("ord", ORDS)
def test_an_instance_norm_is_a_group_norm_of_each_channel(ord):
    models = nn.InstanceNorm1d(2, eps=0.2), nn.GroupNorm(2, 2, eps=0.2, affine=False)
    instance, group = (lipschitz(model, [2, 2, 4], ord=ord).upper for model in models)
    assert instance == group


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_without_eps_has_that_of_its_precision(dtype):
    model, x = nn.RMSNorm(5, dtype=dtype), torch.zeros(1, 5, dtype=dtype)
    for ord in ORDS:
        found = lipschitz(model, x, ord=ord).upper
        assert jacobian_norm(model, x, ord=ord).item() <= found
    small = torch.full((1, 5), 1e-12, dtype=torch.float64)
    assert F.rms_norm(small, (5,)).norm() <= lipschitz(nn.RMSNorm(5, dtype=torch.float64), small).upper * small.norm()


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


def test_every_rule_is_of_an_operation_that_pytorch_has():
    assert all(hasattr(torch.ops.aten, name) for name in RULES)
    assert len(RULES) > 100


@pytest.mark.parametrize("function", [F.rms_norm, torch.rms_norm])
@pytest.mark.parametrize("ord", [1, 2, math.inf])
def test_jacobians_of_rms_norm_as_a_function_have_the_eps_of_the_networks_precision(function, ord):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), Of(lambda x: function(x, (4,))))
    below = jacobian_norm(model, torch.full((1, 4), 1e-12), ord=ord)
    assert below <= lipschitz(model, [1, 4], ord=ord).upper
