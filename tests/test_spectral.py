"""The rival methods: every bound is one, of all layers and all weights."""

import math
from fractions import Fraction
from functools import partial

import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, fuzz, random_values, replay
from torch import nn

from conftest import CASES, DEVICES
from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.spectral import fft
from convnorm.spectral.bounds import frobenius, sqrt_l1_linf
from convnorm.spectral.circle import circle_of, half_grid, symbol
from convnorm.spectral.fft import circle_norm, fft_singular_values
from convnorm.spectral.gram import gram_bounds, gram_iteration
from convnorm.spectral.lanczos import lanczos
from convnorm.spectral.outward import norms_from_above
from convnorm.spectral.power_iteration import power_iteration
from convnorm.spectral.reshaped import four_reshapings, reshaped_estimate
from convnorm.spectral.tensor_norm import tensor_norm_estimate

UPPER = (frobenius, sqrt_l1_linf, circle_norm, gram_iteration, four_reshapings)
ESTIMATES = (reshaped_estimate, tensor_norm_estimate)
ALL = (*UPPER, *ESTIMATES, power_iteration)
RANDOM = (power_iteration, tensor_norm_estimate)
DIFFERENCE = torch.tensor([[[1.0, 0.0, -1.0]]])


def call(method, case, weight, **settings):
    found = method(weight, case.in_shape, **settings, **case.keywords)
    return found.value if method is power_iteration else found


def true_norm(case, weight):
    """By the SVD of the explicit matrix, of weights brought to about 1, and exactly scaled back: a product of floating
    point numbers might leave their range, or be rounded to a denormal one.
    """
    scale = 2.0 ** max(math.frexp(float(weight.abs().max()))[1], -1022)
    norm = torch.linalg.svdvals(oracle.matrix(weight.double() / scale, *case.args, **case.options))[0]
    return Fraction(float(norm)) * Fraction(scale)


def holds(case, weight, told=""):
    norm = true_norm(case, weight)
    for method in UPPER:
        bound = call(method, case, weight)
        assert bound.dtype == torch.float64
        assert bound.shape == ()
        assert bound.isinf() or Fraction(bound.item()) >= norm, f"{method.__name__} {bound} < {norm}. {told}"
    circle, gram = call(circle_norm, case, weight), call(gram_iteration, case, weight, iterations=4)
    assert gram <= circle * 500 ** (1 / 32), told  # no matrix here has 500 rows
    found = call(power_iteration, case, weight, iterations=10)
    assert Fraction(found.item()) <= norm, f"power_iteration {found} > {norm}. {told}"
    return norm


# Bounds


@pytest.mark.parametrize("device", DEVICES)
def test_every_bound_holds_for_random_layers(device, seed, request):
    for number in range((request.config.option.long or CASES) // 20):
        case, weight = fuzz(seed, number, device)
        holds(case, weight, replay(seed, number, case))


def vanishing(rng, shape):
    """Each kernel sums to 0, so the symbol at frequency 0 is a zero block; the first output channel is 0."""
    weight = random_values(rng, shape, torch.float64, "integers")
    weight -= weight.flatten(2).mean(2).view(*shape[:2], *[1] * (len(shape) - 2)) if len(shape) > 2 else weight.mean()
    weight[0] = 0
    return weight


def repeated(rng, shape):
    """The identity where it fits: all singular values of a pointwise layer are the same."""
    weight = torch.zeros(shape, dtype=torch.float64)
    weight[(*[torch.arange(min(shape[:2]))] * 2, *[0] * (len(shape) - 2))] = 1
    return weight


def rank_one(rng, shape):
    parts = [torch.from_numpy(rng.standard_normal(size)) for size in shape]
    weight = parts[0]
    for part in parts[1:]:
        weight = weight.unsqueeze(-1) * part
    return weight


ADVERSARIES = {
    "vanishing": vanishing,
    "repeated": repeated,
    "rank_one": rank_one,
    "one_entry": lambda rng, shape: (
        repeated(rng, shape) * (torch.arange(shape[0]) == 0).view(-1, *[1] * (len(shape) - 1))
    ),
    "1e300": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape)) * 1e300,
    "1e-300": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape)) * 1e-300,
    "denormal": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape)) * 1e-321,
    "both": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape) * 10.0 ** rng.integers(-300, 300, shape)),
    "1e30 in float32": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape)).float() * 1e30,
    "denormal in float32": lambda rng, shape: torch.from_numpy(rng.standard_normal(shape)).float() * 1e-41,
    "zeros": lambda rng, shape: torch.zeros(shape),
}


@pytest.mark.parametrize("weights", ADVERSARIES)
@pytest.mark.parametrize("name", TABLE)
def test_every_bound_holds_for_adversarial_weights(name, weights):
    case = TABLE[name]
    weight = ADVERSARIES[weights](np.random.default_rng(0), case.weight_shape)
    norm = holds(case, weight)
    if weights == "zeros":
        assert norm == 0
        assert [call(method, case, weight).item() for method in ALL] == [0.0] * len(ALL)


def test_what_fft_misses_under_zero_padding():
    """Eigenvalues of the difference matrix: 2 i cos(k pi / 7), k = 1 .. 6; of the circulant: 2 i sin(k pi / 3)."""
    norm = 2 * math.cos(math.pi / 7)
    assert fft_singular_values(DIFFERENCE, [6], padding=1).max().item() == pytest.approx(math.sqrt(3), rel=1e-12)
    found = power_iteration(DIFFERENCE.double(), [6], padding=1, iterations=300, start=torch.arange(6.0).view(1, 1, 6))
    assert 0 <= norm - found.value.item() < 1e-12
    assert circle_norm(DIFFERENCE, [6], padding=1).item() == pytest.approx(2 * math.sin(3 * math.pi / 7), rel=1e-12)
    assert frobenius(DIFFERENCE, [6], padding=1).item() == pytest.approx(math.sqrt(10), rel=1e-12)
    assert sqrt_l1_linf(DIFFERENCE, [6], padding=1).item() == pytest.approx(2, rel=1e-12)
    assert four_reshapings(DIFFERENCE, [6], padding=1).item() == pytest.approx(math.sqrt(6), rel=1e-12)


@pytest.mark.parametrize("method", UPPER)
def test_bounds_are_tight_where_they_can_be(method):
    """One input, one output, one tap."""
    weight = torch.tensor([[[[-3.0]]]], dtype=torch.float64)
    assert 3 <= method(weight, [1, 1]).item() < 3 * (1 + 1e-12)


@pytest.mark.parametrize("seed_of_weights", range(50))
def test_bounds_hold_in_exact_arithmetic(seed_of_weights):
    """Where a norm is known as a fraction: rounded to nearest, half of the bounds would be on the wrong side."""
    rng = np.random.default_rng(seed_of_weights)
    row = rng.standard_normal((1, 5, 1))
    square = sum(Fraction(entry) ** 2 for entry in row.flatten())
    for method in (frobenius, circle_norm, gram_iteration, four_reshapings):
        assert square <= Fraction(method(torch.from_numpy(row), [1]).item()) ** 2 < square * (1 + Fraction(1e-11))
    found = power_iteration(torch.from_numpy(row), [1], iterations=1).value.item()
    assert square * (1 - Fraction(1e-11)) < Fraction(found) ** 2 <= square

    a, b = rng.random((2, 3))
    kernel = torch.from_numpy(np.array([[a, b], [b, a]]))
    total = sum(map(Fraction, (*a, *b)))  # at frequency 0, on (1, 1)
    circular = {"padding": 1, "padding_mode": "circular"}
    for method in (sqrt_l1_linf, circle_norm, partial(gram_iteration, iterations=40)):
        assert total <= Fraction(method(kernel, [6], **circular).item()) < total * (1 + Fraction(1e-11))
    found = power_iteration(kernel, [6], start=torch.ones(1, 2, 6), **circular).value.item()
    assert total * (1 - Fraction(1e-11)) < Fraction(found) <= total


def test_norms_of_matrices_hold_in_exact_arithmetic():
    """The norm of [[a, b], [b, a]] is a + b, and of (a, b) the root of a^2 + b^2."""
    a, b = np.random.default_rng(0).random((2, 300))
    squares, rows = (
        torch.from_numpy(np.array([[a, b], [b, a]])).permute(2, 0, 1),
        torch.from_numpy(np.array([[a, b]]).T),
    )
    for bounds in (norms_from_above, partial(gram_bounds, iterations=50)):
        for one, other, square, row in zip(a, b, bounds(squares).tolist(), bounds(rows.mT).tolist(), strict=True):
            assert Fraction(square) >= Fraction(one) + Fraction(other)
            assert Fraction(row) ** 2 >= Fraction(one) ** 2 + Fraction(other) ** 2


def test_what_a_symbol_may_be_off(monkeypatch):
    """Against one in extended precision."""
    circle = circle_of(as_layer(torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 9, 9))), [40, 31]))
    frequencies = half_grid(circle.points)
    index = (frequencies * torch.tensor(circle.points) / (2 * math.pi)).round().numpy().astype(np.longdouble)
    turn = 8 * np.arctan(np.longdouble(1)) / np.array(circle.points)
    waves = [np.exp(1j * np.outer(index[:, axis] * turn[axis], np.arange(9))) for axis in (0, 1)]
    exact = np.einsum("fp,fq,pq->f", *waves, circle.kernel[0, 0, 0].numpy().astype(np.longdouble))
    off = abs(symbol(circle, frequencies)[0, :, 0, 0].numpy() - exact).max()
    allowed = fft.symbol_error(circle).item()
    assert off <= allowed < 1e-11 * abs(exact).max()
    before = fft.over_frequencies(circle, norms_from_above)[0]
    monkeypatch.setattr(fft, "symbol_error", lambda circle: 2 * allowed)
    assert fft.over_frequencies(circle, norms_from_above)[0] > before


@pytest.mark.parametrize("taps", [(0.1, 0.2, -0.3), (-0.3, 0.1, 0.2), (1.0, 2**-53, -1.0), (1e16, 1.0, -1e16)])
@pytest.mark.parametrize("method", UPPER)
def test_bounds_hold_where_merged_taps_cancel(method, taps):
    """All three read the one input, and the norm is their sum, of which rounding leaves nothing right."""
    kernel = torch.tensor([[taps]], dtype=torch.float64)
    bound = method(kernel, [1], padding=1, padding_mode="replicate")
    assert Fraction(bound.item()) >= abs(sum(map(Fraction, taps))) > 0


@pytest.mark.parametrize("power", [900, -900])
@pytest.mark.parametrize("method", ALL)
def test_scale_changes_nothing_else(method, power):
    case, rng = TABLE["grouped"], np.random.default_rng(1)
    weight = random_values(rng, case.weight_shape, torch.float64, "normal")
    found = []
    for scaled in (weight, weight * 2.0**power):
        random = {"generator": torch.Generator().manual_seed(0)} if method in RANDOM else {}
        found.append(call(method, case, scaled, **random))
    one, other = found
    assert other.item() == pytest.approx(one.item() * 2.0**power, rel=1e-14)


# Power iteration


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.groups == 1])
def test_power_iteration_is_that_of_the_explicit_matrix(name):
    case, rng = TABLE[name], np.random.default_rng(8)
    weight = random_values(rng, case.weight_shape, torch.float64, "normal")
    matrix = oracle.matrix(weight, *case.args, **case.options)
    channels = matrix.shape[1] // math.prod(case.in_shape)
    start = torch.from_numpy(rng.standard_normal((1, channels, *case.in_shape)))
    x = torch.linalg.matrix_power(matrix.T @ matrix, 3) @ start.flatten()
    expected = (matrix @ x).norm() / x.norm() if x.any() else x.sum()
    found = call(power_iteration, case, weight, iterations=3, start=start)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", TABLE)
def test_power_iteration_finds_the_singular_vectors(name):
    case, rng = TABLE[name], np.random.default_rng(9)
    weight = random_values(rng, case.weight_shape, torch.float64, "normal")
    layer = as_layer(weight, case.in_shape, **case.keywords)
    torch.manual_seed(0)
    found, norm = power_iteration(layer, iterations=2000, restarts=2), float(true_norm(case, weight))
    assert found.value.item() == pytest.approx(norm, rel=1e-6)
    if norm:
        assert found.right.norm().item() == pytest.approx(1)
        torch.testing.assert_close(layer(found.right), found.value * found.left)
        off = layer.adjoint(found.left) - found.value * found.right
        assert found.residual.item() == pytest.approx(float(off.norm() / found.value), abs=1e-12)
        assert found.residual < 1e-3


def test_groups_converge_side_by_side():
    """A group of two equal singular values and one far below: were they one vector, the small one would vanish, and
    would have to grow from nothing when its weights do.
    """
    weight = torch.tensor([[[1.0]], [[1e-3]]], dtype=torch.float64)
    start = power_iteration(weight, [4], groups=2, iterations=50).start
    assert start.flatten(2).norm(dim=2).flatten().tolist() == pytest.approx([1, 1])
    weight[1] = 2
    found = power_iteration(weight, [4], groups=2, iterations=1, start=start)
    assert found.value.item() == pytest.approx(2)
    assert not found.right[:, 0].any()  # the vectors are those of one group
    again = power_iteration(weight.flip(0), [4], groups=2, iterations=1, start=found.right)
    assert again.value.item() == pytest.approx(2)  # what is zero in a start is drawn anew


def test_restarts_help_and_are_kept():
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 3, 3)
    one, many = (power_iteration(weight, [8, 8], padding=1, iterations=3, restarts=n).value for n in (1, 20))
    assert many > one
    found = power_iteration(weight, [8, 8], padding=1, iterations=100, restarts=3)
    assert found.start.shape == (3, 3, 8, 8)
    warm = power_iteration(weight, [8, 8], padding=1, iterations=1, start=found.start)
    assert warm.value >= found.value * (1 - 1e-6)
    assert power_iteration(weight, [8, 8], padding=1, iterations=1, restarts=4, start=found.start).start.shape[0] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_power_iteration_runs_in_single_precision_and_ends_in_double(dtype):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = power_iteration(weight, [8, 8], padding=1, iterations=500, generator=torch.Generator().manual_seed(0))
    assert found.start.dtype == torch.float32
    matrix = oracle.matrix(weight, 1, 1, [8, 8])
    assert found.value.item() == pytest.approx(float((matrix @ found.right.flatten()).norm()), rel=1e-10)
    assert (
        float(torch.linalg.svdvals(matrix)[0]) * 0.999 <= found.value.item() <= float(torch.linalg.svdvals(matrix)[0])
    )


# Gradients


@pytest.mark.parametrize("name", ["conv2d", "stride_2", "grouped", "transposed", "circular", "replicate", "linear"])
@pytest.mark.parametrize("method", ALL)
def test_gradients(method, name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[-1] *= 3  # the last group is the largest

    def value(w):
        settings = {}
        if method is power_iteration:  # from where it leads
            vector = torch.linalg.svd(oracle.matrix(w, *case.args, **case.options))[2][0]
            settings = {"iterations": 1, "start": vector.view(1, -1, *case.in_shape)}
        if method is tensor_norm_estimate:
            settings = {"iterations": 300, "generator": torch.Generator().manual_seed(0)}
        return call(method, case, w, **settings)

    direction = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ahead, behind = (value(weight + step * direction) for step in (1e-5, -1e-5))
    value(weight.requires_grad_()).backward()
    torch.testing.assert_close((weight.grad * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["zeros", "vanishing", "repeated", "rank_one", "one_entry", "1e-300", "denormal"])
@pytest.mark.parametrize("name", ["linear", "conv2d", "grouped", "reflect"])
@pytest.mark.parametrize("method", ALL)
def test_gradients_are_finite(method, name, weights):
    case = TABLE[name]
    weight = ADVERSARIES[weights](np.random.default_rng(0), case.weight_shape).requires_grad_()
    call(method, case, weight).backward()
    assert weight.grad.isfinite().all()
    assert bool(weight.grad.any()) == (weights != "zeros")
    _, tangent = torch.func.jvp(partial(call, method, case), (weight.detach(),), (weight.detach(),))
    assert tangent.isfinite()


@pytest.mark.parametrize("outer", ["grad", "jvp"])
@pytest.mark.parametrize("inner", ["grad", "jvp"])
@pytest.mark.parametrize("method", [circle_norm, four_reshapings, reshaped_estimate, tensor_norm_estimate, lanczos])
def test_second_derivatives_are_refused(method, inner, outer):
    """Those of vectors held fixed would be wrong."""

    def value(weight):
        return method(weight).value if method is lanczos else method(weight)

    def along(function, how):
        if how == "jvp":
            return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]
        return lambda x: torch.func.grad(function)(x).sum()

    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = along(value, inner)
    assert first(weight).isfinite()
    with pytest.raises(GeometryError, match="has first derivatives, and no second ones"):
        along(first, outer)(weight)


# What they are called with


@pytest.mark.parametrize("method", [*UPPER, reshaped_estimate, fft_singular_values])
def test_modules_weights_and_layers_are_the_same(method):
    module = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    layer = as_layer(module, [5, 4])
    assert torch.equal(method(module, [5, 4]), method(module.weight, [5, 4], padding=1))
    assert torch.equal(method(module, [5, 4]), method(layer))


@pytest.mark.parametrize("method", [circle_norm, gram_iteration])
def test_chunks_of_frequencies_change_nothing(method, monkeypatch):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = method(weight, [7, 9], padding=1)
    monkeypatch.setattr(fft, "ENTRIES", 40)
    assert method(weight, [7, 9], padding=1).item() == pytest.approx(whole.item(), rel=1e-13)


@pytest.mark.parametrize("method", [*ALL, fft_singular_values])
def test_bad_weights_are_named(method):
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(GeometryError, match="weight holds NaN or inf"):
            method(torch.tensor([[[1.0, bad]]]), [4])
    with pytest.raises(GeometryError, match="weight on device meta"):
        method(torch.empty(2, 2, 3, device="meta"), [4])
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(GeometryError, match=f"weight of {dtype}"):
            method(torch.ones(2, 2, 3, dtype=dtype), [4])
    with pytest.raises(GeometryError, match=r"in_shape \[2\] .* smaller than the kernel"):
        method(torch.ones(2, 2, 3), [2])
    with pytest.raises(GeometryError, match="in_shape"):
        method(torch.ones(2, 2, 3))
    with pytest.raises(TypeError, match="nn_like"):
        method(torch.ones(2, 2, 3), [4], nn_like=1)


@pytest.mark.parametrize("method", [gram_iteration, tensor_norm_estimate, power_iteration])
@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iterations_are_refused(method, iterations):
    with pytest.raises(GeometryError, match=f"iterations {iterations} must be at least 1"):
        method(torch.ones(2, 2, 3), [4], iterations=iterations)


def test_bad_starts_are_named():
    weight = torch.ones(2, 2, 3)
    with pytest.raises(GeometryError, match="restarts 0 must be at least 1"):
        power_iteration(weight, [4], restarts=0)
    for shape in ((2, 4), (1, 2, 5), (1, 3, 4)):
        with pytest.raises(GeometryError, match=r"start of shape .* must be \[batch, 2, 4\]"):
            power_iteration(weight, [4], start=torch.ones(shape))
    with pytest.raises(GeometryError, match="start holds NaN or inf"):
        power_iteration(weight, [4], start=torch.full((1, 2, 4), math.nan))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"stride": 2}, "stride 2"),
        ({"dilation": 2}, "dilation 2"),
        ({"groups": 2}, "groups 2"),
        ({"transposed": True}, "transposed True"),
        ({"padding": 1, "padding_mode": "reflect"}, "padding_mode 'reflect'"),
        ({"padding": 1, "padding_mode": "replicate"}, "padding_mode 'replicate'"),
        ({"padding": 4, "in_shape": [2]}, r"in_shape \[2\] is smaller than the kernel \[3\]"),
    ],
)
def test_what_the_published_fft_method_is_not_for(options, named):
    in_shape = options.pop("in_shape", [6])
    with pytest.raises(GeometryError, match=f"{named}.*circle_norm"):
        fft_singular_values(torch.ones(2, 2, 3), in_shape, **options)
    assert circle_norm(torch.ones(2, 2, 3), in_shape, **options) > 0
