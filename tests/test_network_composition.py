"""The promise: linear operations that follow each other are composed exactly, and every bound is rounded up."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import cases
import numpy as np
import pytest
import torch
from as_matrix import ORDS, Of, batch_normed, matrix_of, norm_of, normal, without_matrices
from torch import nn

from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.network import lipschitz, operators
from convnorm.network.merge import add, compose
from convnorm.network.operators import LayerOperator, Merged
from convnorm.network.rounding import as_float, joined, log10, matrix_norm, plus, root, times


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


class Residual(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class Concatenated(Residual):
    def forward(self, x):
        for layer in self.layers:
            x = layer(torch.cat([x[:, :1], x[:, 1:]], 1))
        return x


class Doubled(Residual):
    def forward(self, x):
        x = self.layers[0](x)
        for _ in self.layers:
            x = x + x
        return x


def plain(count):
    return nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(count)))


@pytest.mark.parametrize("model_of", [plain, Residual, Concatenated, Doubled])
def test_hundreds_of_linear_operations_are_composed_some_at_a_time(model_of):
    torch.manual_seed(0)
    few, many = model_of(5).double(), model_of(300).double()
    assert lipschitz(few, [1, 2], ord=1).upper == pytest.approx(norm_of(matrix_of(few, (2,)), 1), rel=1e-6)
    bound = lipschitz(many, [1, 2], ord=1)
    assert norm_of(matrix_of(many, (2,)), 1) <= bound.upper <= (1 if model_of is Doubled else 0.1) * bound.product


@pytest.mark.parametrize("ord", ORDS)
def test_a_stride_over_one_place_does_not_spread_circular_padding(ord):
    model = nn.Sequential(nn.Conv2d(2, 3, 1, 2), nn.Conv2d(3, 2, 3, padding=1, padding_mode="circular")).double()
    exact = norm_of(matrix_of(model, (2, 1, 1)), ord)
    assert exact * (1 - 1e-12) <= lipschitz(model, [1, 2, 1, 1], ord=ord, rtol=1e-6).upper <= exact * (1 + 2e-6)


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
    "linear_beside_identity": (Of(lambda x, w: x @ w + x / 2, w=normal(5, 5)), (5,)),
    "linear_linear": (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.Linear(5, 3)), (6,)),
    "tokens": (nn.Sequential(nn.Linear(6, 4), Of(lambda x, w: x * w, w=normal(4)), nn.Linear(4, 5)), (3, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("ord", ORDS)
def test_neighbours_are_composed_without_their_matrix(name, ord, monkeypatch):
    without_matrices(monkeypatch)
    model, shape = COMPOSED[name]
    model = model.double()
    exact = norm_of(matrix_of(model, shape), ord)
    found = lipschitz(model, [2, *shape], ord=ord, rtol=1e-6)
    assert exact * (1 - 1e-12) <= found.upper <= exact * (1 + 2e-6 if ord == 2 else 1 + 1e-9)
    assert found.upper <= found.product


@pytest.mark.filterwarnings("error")
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
def test_linear_branches_of_one_input_are_one_layer(ord, monkeypatch):
    without_matrices(monkeypatch)
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


def test_bounds_beyond_float64_are_rounded_up(seed):
    rng = np.random.default_rng((seed, 66))
    for a, b, size in rng.lognormal(0, 20, (500, 3)).tolist():
        large, other = Fraction(a) * Fraction(10) ** int(size % 5000), Fraction(b)
        for found, exact in [(times(large, b), large * other), (plus(large, other), large + other)]:
            assert exact <= found <= exact * (1 + Fraction(1, 2**52))
            assert (found.numerator // (found.numerator & -found.numerator)).bit_length() <= 54
        assert large <= root(large) ** 2 <= large * (1 + Fraction(1, 2**50))
        assert joined([large, b], math.inf) == max(large, other)
        with localcontext() as context:
            context.prec = 50
            digits = (Decimal(large.numerator) / Decimal(large.denominator)).log10()
            assert digits <= Decimal(log10(large)) <= digits + Decimal("1e-11")
    assert root(9 * Fraction(4) ** 900) == 3 * 2**900
    assert as_float(Fraction(10) ** 309) == math.inf
    assert as_float(1 / Fraction(10) ** 400) == 5e-324
    assert log10(math.inf) == math.inf


def test_norms_of_matrices_are_rounded_up():
    for i in range(50):
        matrix = normal(7, 5, seed=i) * 10.0 ** (i - 25)
        for ord in ORDS:
            exact = norm_of(matrix, ord)
            assert exact * (1 - 1e-15) <= matrix_norm(matrix, ord) <= exact * (1 + 1e-6 if ord == 2 else 1 + 1e-13)
    assert matrix_norm(torch.zeros(3, 2).double(), 2) == matrix_norm(torch.zeros(0, 2).double(), 1) == 0
