"""The promise: each part of a bracket, Lanczos, the circle and the explicit matrix, keeps what it says by itself."""

import math
from dataclasses import replace

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE
from test_l2 import ROUNDING, true_norm
from torch import nn

import convnorm
from convnorm.layers import as_layer
from convnorm.spectral import circle_norm, explicit, lanczos, modes, on_circle, singular_values
from convnorm.spectral.circle import circle_of, groups_of, half_grid, symbol
from convnorm.spectral.definite import is_below, largest_eigenvalue
from convnorm.spectral.explicit import explicit_matrix, gram_matrices
from convnorm.spectral.krylov import Lanczos, in_precision
from convnorm.spectral.lanczos import search
from convnorm.spectral.modes import largest_modes
from convnorm.spectral.on_circle import GramSymbol, circle_phases, circle_upper, coarse_phases
from convnorm.spectral.rayleigh import in_best_group
from convnorm.spectral.wave import DECOMPOSED, first_wave, refined

# Lanczos


@pytest.mark.parametrize("name", TABLE)
def test_lanczos_finds_the_largest_singular_value(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(1))
    truth = true_norm(weight, case)
    found = lanczos(weight, case.in_shape, **case.keywords)
    assert truth * (1 - 1e-3) <= found.value.item() <= truth * (1 + ROUNDING)
    sharp = lanczos(weight, case.in_shape, rtol=1e-9, start=found.right, **case.keywords)
    assert truth * (1 - 1e-8) <= sharp.value.item() <= truth * (1 + ROUNDING)
    assert sharp.residual <= 1e-3
    layer = in_precision(as_layer(weight, case.in_shape, **case.keywords), torch.float64)
    image = layer(sharp.right) * circle_of(as_layer(weight, case.in_shape, **case.keywords)).scale
    torch.testing.assert_close(image, sharp.value * sharp.left, rtol=1e-6, atol=1e-6)


def test_orthonormal_polynomials_are_those_of_the_process():
    """q_j = p_j(A) q_0, entry by entry where A is diagonal."""
    entries = torch.linspace(0.3, 1.0, 40, dtype=torch.float64)
    process = Lanczos(as_layer(torch.diag(entries)), generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        process.extend()
    vectors = torch.cat([process._basis[: process.steps], process._next[None]])
    for i in (0, 7, 39):
        expected = (vectors[:, i] / vectors[0, i]).square().sum().item()
        assert math.isclose(process._christoffel(entries[i].item() ** 2), expected, rel_tol=1e-9)


@pytest.mark.parametrize("failure", [0.05, 0.2, 0.5])
def test_probable_bounds_fail_as_often_as_they_say(failure):
    """Where Bessel's inequality is an equality: one step from a random start finds the space of both eigenvalues."""
    layer, truth = as_layer(torch.diag(torch.tensor([1.5] + [1.0] * 199, dtype=torch.float64))), 1.5
    uppers = []
    for seed in range(1000):
        process = Lanczos(layer, generator=torch.Generator().manual_seed(seed))
        process.extend()
        uppers.append(math.sqrt(process.upper(failure)))
    failed = sum(upper < truth for upper in uppers) / len(uppers)
    spread = math.sqrt(failure * (1 - failure) / len(uppers))
    assert 0.8 * failure - 3 * spread <= failed <= failure + 3 * spread


def test_probable_bounds_are_sharp_after_a_few_steps():
    weight = torch.randn(30, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.linalg.matrix_norm(weight, ord=2).item()
    process = Lanczos(as_layer(weight), generator=torch.Generator().manual_seed(1))
    for _ in range(25):
        process.extend()
    assert truth <= math.sqrt(process.upper(1e-6)) <= truth * 1.001


def test_a_warm_start_saves_steps():
    torch.manual_seed(0)
    weight = torch.randn(8, 8, 3, 3)
    layer = as_layer(weight, [12, 12], padding=1)
    before = lanczos(layer, rtol=1e-6).right
    changed = in_precision(replace(layer, weight=weight + 1e-4 * torch.randn_like(weight)), torch.float64)
    cold, warm = Lanczos(changed), Lanczos(changed, before)
    cold.run(1e-5, 100)
    warm.run(1e-5, 100)
    assert warm.steps < cold.steps
    assert math.isclose(warm.ritz(), cold.ritz(), rel_tol=1e-4)


def test_a_wave_saves_most_steps():
    layer = as_layer(torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)), [64, 64], padding=1)
    working = in_precision(layer, torch.float32)
    begun, alone = search(working, 1e-3, 300), Lanczos(working)
    alone.run(1e-3, 300)
    assert begun.steps <= alone.steps / 4
    assert begun.ritz() >= alone.ritz() * (1 - 2e-3)


WAVES = {
    "1d": ((6, 4, 5), [60], {"padding": 2}),
    "2d": ((6, 4, 3, 3), [40, 30], {"padding": 1}),
    "one tap": ((6, 4, 1, 3), [40, 30], {}),
    "asymmetric": ((6, 4, 3, 2), [40, 30], {"padding": (2, 0, 0, 1)}),
    "dilated": ((6, 4, 3, 3), [60, 60], {"dilation": (2, 3), "padding": (2, 3)}),
    "strided": ((6, 4, 3, 5), [60, 61], {"stride": (2, 3), "padding": (1, 2)}),
    "strided, dilated": ((6, 4, 4), [120], {"stride": 3, "dilation": 2, "padding": 1}),
    "grouped": ((12, 4, 3, 3), [40, 40], {"groups": 3, "padding": 1}),
    "circular": ((6, 4, 3, 3), [40, 30], {"padding": 1, "padding_mode": "circular"}),
    "strided, circular": ((6, 4, 5), [120], {"stride": 2, "padding": 2, "padding_mode": "circular"}),
    "transposed": ((6, 4, 3, 3), [40, 30], {"transposed": True, "padding": 1}),
    "strided, transposed": ((6, 4, 4), [60], {"transposed": True, "stride": 2, "padding": 1}),
    "grouped, transposed": ((6, 4, 5), [60], {"transposed": True, "stride": 3, "groups": 2, "output_padding": 1}),
    "3d": ((4, 3, 2, 2, 2), [24, 24, 24], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WAVES)
def test_the_first_wave_is_nearly_the_norm(name):
    shape, in_shape, how = WAVES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    layer = as_layer(weight, in_shape, **how)
    start = first_wave(layer, 1e-3)
    of_circle = circle_norm(weight, in_shape, **how).item()
    attained = torch.linalg.vector_norm(layer(start)) / torch.linalg.vector_norm(start)
    assert 0.97 * of_circle <= attained <= (1 + 1e-5) * of_circle
    if "circular" in name:
        assert attained >= 0.9999 * of_circle


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize(
    "shape", [(5, 3), (DECOMPOSED + 6, DECOMPOSED + 20), (DECOMPOSED + 20, DECOMPOSED + 6)], ids=str
)
def test_a_wave_gets_the_best_channels(shape, real, started):
    """Decomposed or searched for. Those of a real matrix are real, for only the real part of a wave is used."""
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.complex128)
    if real:
        matrix = matrix.real.to(matrix)
    start = torch.randn(shape[1], dtype=torch.complex64) if started else None
    channels = refined(matrix, start, 1e-3)
    assert channels.is_complex() == (not real)
    channels = channels.to(matrix)
    attained = torch.linalg.vector_norm(matrix @ channels) / torch.linalg.vector_norm(channels)
    torch.testing.assert_close(attained, torch.linalg.matrix_norm(matrix, 2), rtol=1e-3, atol=0)


def test_inputs_that_padding_repeats_are_no_place_for_waves():
    """They are passed on together: the largest singular vector is at an end."""
    layer = as_layer(
        torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)),
        [202],
        padding=(4, 2),
        padding_mode="replicate",
    )
    truth = torch.linalg.matrix_norm(explicit_matrix(layer), ord=2)
    assert circle_norm(layer) / circle_of(layer).factor < 0.8 * truth
    assert first_wave(layer, 1e-3) is None
    assert lanczos(layer).value >= (1 - 1e-3) * truth


@pytest.mark.parametrize("shape", [(64, 32, 3, 3), (32, 64, 5, 5)])
def test_waves_of_all_frequencies_are_tried(shape):
    """Random kernels have several local maxima, within some percent of each other."""
    for seed in range(10):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        found = search(in_precision(as_layer(weight, [32, 32]), torch.float32), 1e-3, 300).ritz() ** 0.5
        circle = circle_of(as_layer(weight, [32, 32]))
        assert found >= 0.985 * torch.linalg.svdvals(symbol(circle, half_grid(circle.points))).max()


@pytest.mark.parametrize("transposed", [False, True])
def test_what_lies_in_the_best_group_is_no_worse_than_the_whole(transposed):
    """And a bracket's input lies in one group, which alone is measured for its lower bound and its gradient."""
    torch.manual_seed(0)
    layer = as_layer(torch.randn(12, 3, 3, 3).double(), [6, 6], padding=1, groups=4, transposed=transposed)
    for _ in range(20):
        x = torch.randn(1, 12, 6, 6, dtype=torch.float64)
        best = in_best_group(layer, x)
        assert best.unflatten(1, (4, -1)).flatten(2).any(2).sum() == 1
        assert layer(best).norm() / best.norm() >= layer(x).norm() / x.norm()
    weight = layer.weight.requires_grad_()
    found = convnorm.l2(layer, rtol=1e-6)
    assert found.right.unflatten(1, (4, -1)).flatten(2).any(2).sum() == 1
    (gradient,) = torch.autograd.grad(found.lower, weight)
    (expected,) = torch.autograd.grad(layer(found.right).norm(), weight)
    torch.testing.assert_close(gradient, expected)
    assert in_best_group(layer, torch.zeros_like(x)).eq(0).all()


# The circle, and its modes


@pytest.mark.parametrize("mode", cases.MODES)
def test_every_circle_bounds_its_layer(seed, mode):
    rng = np.random.default_rng((seed, cases.MODES.index(mode)))
    for _ in range(150):
        case = cases.random_case(rng, merging=mode != "zeros")
        weight = torch.from_numpy(rng.standard_normal(case.weight_shape))
        circle = circle_of(as_layer(weight, case.in_shape, **case.keywords))
        values = torch.linalg.svdvals(symbol(circle, half_grid(circle.points)))
        truth = true_norm(weight, case)
        assert truth * (1 - ROUNDING) <= circle.factor * circle.scale * values.max().item(), case


def test_coarse_grids_bound_fine_ones(seed):
    """Long axes are looked at in fewer points than they have."""
    rng, used = np.random.default_rng(seed), 0
    for _ in range(60):
        taps, n = int(rng.integers(1, 6)), int(rng.integers(40, 120))
        stride, dilation, padding = (int(rng.integers(1, 4)) for _ in range(3))
        weight = torch.from_numpy(rng.standard_normal((2, 2, taps)))
        layer = as_layer(weight, [n], stride=stride, dilation=dilation, padding=padding)
        circle = circle_of(layer)
        truth = torch.linalg.matrix_norm(explicit_matrix(layer), ord=2).item()
        phases, factor = coarse_phases(circle, 0.1)
        used += len(phases) < len(half_grid(circle.points))
        upper = circle_upper(circle, 0.5 * truth, rtol=0.4)[0].item()
        assert truth * (1 - ROUNDING) <= upper <= factor * truth * 1.1
    assert used > 20


def test_a_level_never_falls(monkeypatch):
    """Were every factorisation to fail, each frequency would be decomposed, and the largest eigenvalue holds."""
    monkeypatch.setattr(on_circle, "is_below", lambda gram, *levels: torch.zeros(gram.shape[:-2], dtype=torch.bool))
    for seed in range(5):
        weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(seed))
        circle = circle_of(as_layer(weight, [6, 7], padding=1))
        largest = torch.linalg.svdvals(symbol(circle, circle_phases(circle))).max() * circle.scale
        upper, _ = circle_upper(circle, 0.0, rtol=1e-9)
        assert upper >= largest * (1 - ROUNDING)


def test_gram_matrices_of_small_chunks_are_the_same(monkeypatch):
    weight = torch.randn(3, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    circle = circle_of(as_layer(weight, [7, 7], padding=1))
    found = []
    for most in (on_circle.CHUNK, 1):
        monkeypatch.setattr(on_circle, "CHUNK", most)
        found.append(torch.cat([part for _, part in GramSymbol(circle).at(circle_phases(circle))], 1))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_no_matrix_above_the_level_is_certified(dtype):
    generator = torch.Generator().manual_seed(0)
    certified = 0
    for size in (1, 2, 5, 20, 60):
        half = torch.randn(200, size, 2 * size, dtype=dtype, generator=generator)
        gram = half @ half.mH
        truth = torch.linalg.eigvalsh(gram.to(torch.complex128))[:, -1]
        known = 1e-13 if dtype in (torch.float64, torch.complex128) else 0  # no better than the truth itself
        for nearness in (-1e-2, -1e-4, -1e-6, -1e-8, -known, 1e-15, 1e-8, 1e-4):
            level = (truth * (1 + nearness)).unsqueeze(-1).tolist()
            below = torch.tensor([is_below(one, at[0]).item() for one, at in zip(gram, level, strict=True)])
            assert not below.any() or nearness > 0
            certified += below.sum().item()
        assert (largest_eigenvalue(gram) >= truth).all()
    assert certified > 0


@pytest.mark.parametrize("name", ["conv2d", "stride_2", "conv1d_same", "dilated", "asymmetric", "conv3d", "transposed"])
def test_all_modes_are_nearly_the_layer_itself(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    circle = circle_of(as_layer(weight, case.in_shape, **case.keywords))
    modes = largest_modes(circle, 10**6)
    upper = modes.rest + torch.linalg.eigvalsh(modes.cut_and_weighted(circle.arcs))[-1].item()
    truth = true_norm(weight, case) / circle.scale
    assert truth * (1 - ROUNDING) <= upper <= 1.06 * truth + modes.rest
    singular = torch.linalg.svdvals(symbol(circle, half_grid(circle.points))).flatten()
    torch.testing.assert_close(modes.values[0], singular.max())


@pytest.mark.parametrize("real", [2, 6, 20, 10**6])
@pytest.mark.parametrize("small", [1.0, 1e-3])
@pytest.mark.parametrize("chunk", [1, modes.CHUNK])
def test_the_rest_holds_whatever_modes_leave_out(real, small, chunk, monkeypatch):
    """``small`` channels make modes that stay in the rest by themselves."""
    monkeypatch.setattr(modes, "CHUNK", chunk)  # of one frequency at a time, those below all before have no vectors
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight[1:] *= small
    circle = circle_of(as_layer(weight, [5, 6], padding=1))
    every = torch.linalg.svdvals(symbol(circle, half_grid(circle.points))).flatten().sort(descending=True).values
    found = largest_modes(circle, real)
    for some in (found, found.first(max(2, len(found.values)))):
        left_out = every[len(some.values) :]
        torch.testing.assert_close(some.values, every[: len(some.values)])
        assert some.rest >= (left_out.max() if len(left_out) else 0) + 1e-13 * every[0]


# Explicit matrices, and all singular values


@pytest.mark.parametrize("pair", [0, math.inf])
@pytest.mark.parametrize("name", TABLE)
def test_gram_matrices_are_those_of_the_explicit_matrix(monkeypatch, name, pair):
    monkeypatch.setattr(explicit, "PAIR", pair)
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64)
    layer = as_layer(weight, case.in_shape, **case.keywords)
    for group, gram in enumerate(gram_matrices(layer)):
        one = groups_of(layer, torch.tensor([group]))
        matrix = oracle.matrix(one.weight, *case.args, **{**case.options, "groups": 1})
        torch.testing.assert_close(explicit_matrix(one), matrix)
        assert len(gram) == min(matrix.shape)
        torch.testing.assert_close(torch.linalg.eigvalsh(gram)[-1].sqrt(), torch.linalg.matrix_norm(matrix, ord=2))
        torch.testing.assert_close(gram.square().sum(), (matrix @ matrix.T).square().sum())


@pytest.mark.parametrize("name", TABLE)
def test_singular_values_are_those_of_the_explicit_matrix(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64)
    found = singular_values(weight, case.in_shape, **case.keywords)
    expected = torch.linalg.svdvals(oracle.matrix(weight, *case.args, **case.options))
    torch.testing.assert_close(found, expected)


def test_places_that_one_tap_passes_over_are_no_part_of_the_circle():
    weight = torch.randn(6, 4, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    circle = circle_of(as_layer(weight, [9, 8], stride=(2, 3)))
    assert circle.whole
    assert circle.kernel.shape == (1, 6, 4, 1, 1)
    values = torch.linalg.svdvals(weight.flatten(1)).repeat_interleave(15)
    torch.testing.assert_close(singular_values(weight, [9, 8], stride=(2, 3))[: 4 * 15], values)


def test_whole_circles_need_no_matrix():
    conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular").double()
    assert circle_of(as_layer(conv, [64, 64])).whole
    values = singular_values(conv, [64, 64])  # the matrix would have 65536 rows
    assert len(values) == 65536
    torch.testing.assert_close(values.square().sum(), conv.weight.square().sum() * 64 * 64)


@pytest.mark.parametrize(("n", "taps", "stride", "mode"), [(8, 1, 2, "replicate"), (4, 2, 3, "reflect")])
def test_no_singular_value_is_lost_on_a_circle_that_is_larger_than_the_input(n, taps, stride, mode):
    torch.manual_seed(0)
    weight = torch.randn(3, 1, taps, dtype=torch.float64)
    found = singular_values(weight, [n], stride=stride, padding=1, padding_mode=mode)
    conv = nn.Conv1d(1, 3, taps, stride, 1, padding_mode=mode, bias=False, dtype=torch.float64)
    conv.weight.data = weight
    matrix = conv(torch.eye(n, dtype=torch.float64)[:, None]).flatten(1).T.detach()
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix))
