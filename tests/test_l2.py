"""The promise: the l2 norm lies in its bracket, for either certificate, and the bracket is as tight as it says.

The truth is the largest singular value of the explicit matrix, in float64.
"""

import math
from dataclasses import replace

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, replay
from torch import nn

import convnorm
from convnorm.layers import as_layer
from convnorm.spectral import bracket, lanczos, singular_values
from convnorm.spectral.circle import circle_of, half_grid, symbol
from convnorm.spectral.definite import is_below, largest_eigenvalue
from convnorm.spectral.explicit import explicit_matrix, gram_matrices, groups_of
from convnorm.spectral.krylov import Lanczos, in_precision
from convnorm.spectral.lanczos import search
from convnorm.spectral.modes import largest_modes
from convnorm.spectral.on_circle import circle_upper, coarse_phases

ROUNDING = 1e-13  # of the truth itself


def zero_blocks(rng, shape):
    weight = rng.standard_normal(shape)
    weight[rng.random(shape[0]) < 0.5] = 0
    return weight * (rng.random((1, *shape[1:])) < 0.7)


def rank_one(rng, shape):
    weight = np.ones(())
    for size in shape:
        weight = np.multiply.outer(weight, rng.standard_normal(size))
    return weight


def repeated(rng, shape):
    """Identities at one tap: all singular values are equal, up to where the kernel leaves the input."""
    weight = np.zeros(shape)
    tap = tuple(int(rng.integers(size)) for size in shape[2:])
    for i in range(min(shape[:2])):
        weight[(i, i, *tap)] = 1
    return weight


def difference(rng, shape):
    """[1, 0, -1] along one axis, the same in all channels."""
    weight = np.zeros(shape)
    ends = [int(rng.integers(size)) for size in shape[2:]] or [0]
    weight[(..., *ends[: len(shape) - 2])] = 1
    weight[(..., *[size - 1 - end for size, end in zip(shape[2:], ends, strict=False)])] -= 1
    return weight


ADVERSARIAL = (zero_blocks, rank_one, repeated, difference)


def layer_and_norm(seed, number):
    """A random layer of any kind, its options as ``convnorm.l2`` takes them, and its norm times ``1 / unit``."""
    rng = np.random.default_rng((seed, number, 2))
    case = cases.random_case(rng)
    if rng.random() < 0.4:
        kind = ADVERSARIAL[int(rng.integers(len(ADVERSARIAL)))]
        weight = torch.from_numpy(np.ascontiguousarray(kind(rng, case.weight_shape)))
        weight = weight * 10.0 ** float(rng.choice([0, 0, -300, 300]))
    else:
        dtype = cases.DTYPES[int(rng.choice(4, p=[0.55, 0.25, 0.1, 0.1]))]
        weight = cases.random_weight(rng, case.weight_shape, dtype)
    unit = math.ldexp(1.0, math.frexp(weight.double().abs().max().item())[1])  # the oracle's sums must not overflow
    truth = true_norm(weight.double() / unit, case)
    return case, weight, truth, unit


def true_norm(weight, case):
    return torch.linalg.matrix_norm(oracle.matrix(weight, *case.args, **case.options), ord=2).item()


def options(case):
    return {"stride": case.stride, "padding": case.padding, **case.options}


def assert_brackets(found, truth, unit, message):
    lower, upper = found.lower.item() / unit, found.upper.item() / unit
    least = np.finfo(float).smallest_subnormal / unit  # norms that hardly are float64 numbers
    assert lower <= truth * (1 + ROUNDING) + least, f"lower {lower} > {truth}: {found}. {message}"
    assert upper >= truth * (1 - ROUNDING) - least, f"upper {upper} < {truth}: {found}. {message}"


def count(request, usual):
    return range(request.config.option.long or usual)


def test_the_norm_lies_in_the_bracket(request, seed):
    for number in count(request, 1500):
        case, weight, truth, unit = layer_and_norm(seed, number)
        rtol = (1e-2, 1e-2, 1e-5, 0.2)[number % 4]
        found = convnorm.l2(weight, case.in_shape, rtol=rtol, **options(case))
        assert_brackets(found, truth, unit, replay(seed, number, case))
        if truth < 1e-9 and found.stopped == "rounding in float64":  # merged taps that cancel
            assert found.upper.item() / unit < 1e-9
            continue
        assert not found.stopped, f"{found}. {replay(seed, number, case)}"
        assert found.ratio <= 1 + rtol, f"{found}. {replay(seed, number, case)}"


def test_circles_and_their_modes_bound_the_norm(request, seed, monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", 0)  # no explicit matrix to the rescue
    certificates = set()
    for number in count(request, 800):
        case, weight, truth, unit = layer_and_norm(seed, number)
        found = convnorm.l2(weight, case.in_shape, **options(case))
        assert_brackets(found, truth, unit, replay(seed, number, case))
        assert (found.ratio > 1.01) == bool(found.stopped), f"{found}. {replay(seed, number, case)}"
        certificates.add(found.certificate)
    assert certificates >= {"circle", "modes of the circle", "l1 and linf norms", "Frobenius norm"}


def test_random_starts_close_every_bracket(request, seed, monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", 0)
    certificates = set()
    for number in count(request, 400):
        case, weight, truth, unit = layer_and_norm(seed, number)
        found = convnorm.l2(weight, case.in_shape, rtol=1e-3, failure=1e-12, **options(case))
        assert_brackets(found, truth, unit, replay(seed, number, case))
        if truth < 1e-9 and found.stopped:  # merged taps that cancel
            assert found.upper.item() / unit < 1e-9
            continue
        assert not found.stopped, f"{found}. {replay(seed, number, case)}"
        assert found.ratio <= 1.001
        certificates.add(found.certificate)
    assert "Lanczos, fails with probability 1e-12" in certificates


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


def test_coarse_grids_bound_fine_ones(seed):
    """Long axes are looked at in fewer points than they have."""
    rng, used = np.random.default_rng(seed), 0
    for _ in range(60):
        taps, n = int(rng.integers(1, 6)), int(rng.integers(40, 120))
        stride, dilation, padding = (int(rng.integers(1, 4)) for _ in range(3))
        weight = torch.from_numpy(rng.standard_normal((2, 2, taps)))
        layer = as_layer(weight, [n], stride=stride, dilation=dilation, padding=padding)
        circle = circle_of(layer)
        truth = torch.linalg.matrix_norm(explicit_matrix(layer), ord=2).item() / circle.scale
        phases, factor = coarse_phases(circle, 0.1)
        used += len(phases) < len(half_grid(circle.points))
        upper = circle_upper(circle, 0.5 * truth, rtol=0.4).item()
        assert truth * (1 - ROUNDING) <= upper <= factor * truth * 1.1
    assert used > 20


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


@pytest.mark.parametrize("name", TABLE)
def test_gram_matrices_are_those_of_the_explicit_matrix(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64)
    layer = as_layer(weight, case.in_shape, **options(case))
    for group, gram in enumerate(gram_matrices(layer)):
        one = groups_of(layer, torch.tensor([group]))
        matrix = oracle.matrix(one.weight, *case.args, **{**case.options, "groups": 1})
        torch.testing.assert_close(explicit_matrix(one), matrix)
        assert len(gram) == min(matrix.shape)
        torch.testing.assert_close(torch.linalg.eigvalsh(gram)[-1].sqrt(), torch.linalg.matrix_norm(matrix, ord=2))
        torch.testing.assert_close(gram.square().sum(), (matrix @ matrix.T).square().sum())


@pytest.mark.parametrize("name", ["conv2d", "stride_2", "conv1d_same", "dilated", "asymmetric", "conv3d", "transposed"])
def test_all_modes_are_the_layer_itself(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    circle = circle_of(as_layer(weight, case.in_shape, **options(case)))
    modes = largest_modes(circle, 10**6)
    upper = modes.rest + torch.linalg.eigvalsh(modes.cut_and_weighted(circle.arcs))[-1].item()
    truth = true_norm(weight, case) / circle.scale
    assert truth * (1 - ROUNDING) <= upper <= 1.06 * truth + modes.rest
    singular = torch.linalg.svdvals(symbol(circle, half_grid(circle.points))).flatten()
    torch.testing.assert_close(modes.values[0], singular.max())


@pytest.mark.parametrize("name", TABLE)
def test_lanczos_finds_the_largest_singular_value(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(1))
    truth = true_norm(weight, case)
    found = lanczos(weight, case.in_shape, **options(case))
    assert truth * (1 - 1e-3) <= found.value.item() <= truth * (1 + ROUNDING)
    sharp = lanczos(weight, case.in_shape, rtol=1e-9, start=found.right, **options(case))
    assert truth * (1 - 1e-8) <= sharp.value.item() <= truth * (1 + ROUNDING)
    assert sharp.residual <= 1e-3
    layer = in_precision(as_layer(weight, case.in_shape, **options(case)), torch.float64)
    image = layer(sharp.right) * circle_of(as_layer(weight, case.in_shape, **options(case))).scale
    torch.testing.assert_close(image, sharp.value * sharp.left, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize(
    "name", ["linear", "stride_2", "grouped", "circular", "reflect", "transposed_grouped", "conv3d"]
)
def test_the_gradient_is_that_of_the_norm(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, requires_grad=True)
    convnorm.l2(weight, case.in_shape, rtol=1e-8, **options(case)).lower.backward()
    again = weight.detach().clone().requires_grad_()
    layer = as_layer(again, case.in_shape, **options(case))
    norms = [
        torch.linalg.matrix_norm(explicit_matrix(groups_of(layer, torch.tensor([g]))), ord=2)
        for g in range(layer.groups)
    ]
    torch.stack(norms).max().backward()
    torch.testing.assert_close(weight.grad, again.grad, rtol=1e-2, atol=1e-3)


def test_a_zero_layer_has_norm_zero():
    weight = torch.zeros(3, 2, 3, requires_grad=True)
    found = convnorm.l2(weight, [5], padding=1)
    assert (found.lower, found.upper, found.ratio) == (0, 0, 1)
    found.lower.backward()
    assert (weight.grad == 0).all()


def test_batch_norms_fold_into_the_norm():
    conv, bn = nn.Conv2d(3, 4, 3, padding=1).double(), nn.BatchNorm2d(4).double().eval()
    bn.running_var.uniform_(0.5, 2)
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    found = convnorm.l2(conv, [6, 6], scale=scale, rtol=1e-6)
    matrix = oracle.matrix(conv.weight * scale[:, None, None, None], 1, 1, [6, 6])
    truth = torch.linalg.matrix_norm(matrix, ord=2)
    assert found.lower <= truth <= found.upper


def test_the_search_leaves_random_numbers_alone():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    torch.manual_seed(3)
    first, state = convnorm.l2(conv, [8, 8]), torch.get_rng_state()
    second = convnorm.l2(conv, [8, 8])
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.lower, first.upper) == (second.lower, second.upper)


@pytest.mark.parametrize("name", TABLE)
def test_singular_values_are_those_of_the_explicit_matrix(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64)
    found = singular_values(weight, case.in_shape, **options(case))
    expected = torch.linalg.svdvals(oracle.matrix(weight, *case.args, **case.options))
    torch.testing.assert_close(found, expected)


def test_whole_circles_need_no_matrix():
    conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular").double()
    assert circle_of(as_layer(conv, [64, 64])).whole
    values = singular_values(conv, [64, 64])  # the matrix would have 65536 rows
    assert len(values) == 65536
    torch.testing.assert_close(values.square().sum(), conv.weight.square().sum() * 64 * 64)


BAD = {
    "rtol": (lambda: convnorm.l2(torch.ones(2, 2), rtol=0), "rtol 0 must be at least"),
    "nan rtol": (lambda: convnorm.l2(torch.ones(2, 2), rtol=math.nan), "rtol nan must be"),
    "failure": (lambda: convnorm.l2(torch.ones(2, 2), failure=1.0), "failure 1.0 must be a probability"),
    "nan": (lambda: convnorm.l2(torch.full((2, 2), math.nan)), "weight holds NaN or inf"),
    "inf": (lambda: singular_values(torch.full((2, 2), math.inf)), "weight holds NaN or inf"),
    "meta": (lambda: convnorm.l2(torch.ones(2, 2, device="meta")), "on device meta has no values"),
    "small input": (lambda: convnorm.l2(torch.ones(2, 2, 3), [2]), "smaller than the kernel"),
    "steps": (lambda: lanczos(torch.ones(2, 2), steps=0), "steps 0 must be at least 1"),
    "start": (lambda: lanczos(torch.ones(2, 2), start=torch.ones(1, 3)), r"start of shape \[1, 3\] must have"),
    "spectrum": (lambda: singular_values(torch.ones(9, 9, 3, 3), [99, 99]), "too large to decompose"),
    "layer": (lambda: convnorm.l2(nn.ReLU()), "layer of type ReLU must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_small_inputs_save_most_steps_at_full_size():
    layer = as_layer(torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)), [64, 64], padding=1)
    working = in_precision(layer, torch.float32)
    begun, alone = search(working, 1e-3, 300), Lanczos(working)
    alone.run(1e-3, 300)
    assert begun.steps <= alone.steps / 2
    assert begun.ritz() >= alone.ritz() * (1 - 2e-3)
