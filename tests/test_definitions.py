"""The rival methods: each is what its paper defines, worked out again here, most often from explicit matrices."""

import math
from functools import partial, reduce
from itertools import product

import numpy as np
import oracle
import pytest
import torch
from cases import fuzz, random_case, random_values, replay
from torch import nn

from convnorm.layers import as_layer
from convnorm.spectral.circle import circle_of
from convnorm.spectral.clip import clip_singular_values
from convnorm.spectral.fft import circle_norm, fft_singular_values
from convnorm.spectral.gram import gram_bounds, gram_iteration
from convnorm.spectral.reshaped import four_reshapings, reshaped_estimate
from convnorm.spectral.tensor_norm import tensor_norm_estimate


def circulant(kernel, sizes):
    """The matrix of a circular cross-correlation, entry by entry."""
    rows, columns, *taps = kernel.shape
    matrix = np.zeros((rows, *sizes, columns, *sizes))
    for place in product(*map(range, sizes)):
        for tap in product(*map(range, taps)):
            read = tuple((p + t) % n for p, t, n in zip(place, tap, sizes, strict=True))
            matrix[(slice(None), *place, slice(None), *read)] += kernel[(..., *tap)]
    return matrix.reshape(rows * math.prod(sizes), -1)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((3, 2, 2), (5,)), ((2, 3, 3, 3), (5, 4)), ((2, 2, 3, 1), (3, 3)), ((2, 1, 2, 2, 2), (3, 2, 3))],
)
def test_fft_singular_values_are_those_of_the_doubly_block_circulant_matrix(shape, sizes):
    kernel = np.random.default_rng(2).standard_normal(shape)
    values = fft_singular_values(torch.from_numpy(kernel), sizes)
    assert values.shape == (*sizes, min(shape[:2]))
    expected = np.linalg.svd(circulant(kernel, sizes), compute_uv=False)
    np.testing.assert_allclose(
        values.flatten().sort(descending=True)[0].numpy(), expected[: values.numel()], atol=1e-12
    )
    layer = {"padding": [k // 2 if side else (k - 1) // 2 for k in shape[2:] for side in (0, 1)]}
    norm = circle_norm(torch.from_numpy(kernel), sizes, padding_mode="circular", **layer).item()
    assert norm == pytest.approx(expected[0], rel=1e-12)


def test_fft_singular_values_of_a_linear_layer_are_its_own():
    weight = torch.randn(4, 6)
    expected = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(fft_singular_values(weight), expected)


@pytest.mark.parametrize("iterations", [1, 2, 5, 20])
def test_gram_iteration_is_a_schatten_norm_of_the_largest_frequency(iterations):
    """|G_t|_F^(1 / 2^t) = (sum of s^(2^(t+1)))^(1 / 2^(t+1)) over the singular values s of one symbol."""
    kernel, sizes = np.random.default_rng(3).standard_normal((3, 4, 3, 2)), (5, 4)
    waves = [np.exp(2j * np.pi * np.outer(np.arange(n), np.arange(k)) / n) for n, k in zip(sizes, (3, 2), strict=True)]
    symbols = np.einsum("fp,gq,rcpq->fgrc", *waves, kernel)
    singular, power = np.linalg.svd(symbols, compute_uv=False), 2.0 ** (iterations + 1)
    largest = singular.max()
    expected = largest * (((singular / largest) ** power).sum(-1) ** (1 / power)).max()
    layer = {"padding": [1, 1, 0, 1], "padding_mode": "circular"}
    found = gram_iteration(torch.from_numpy(kernel), sizes, iterations=iterations, **layer).item()
    assert found == pytest.approx(expected, rel=1e-11)


def test_gram_iteration_of_what_nearly_vanishes():
    """Its Frobenius norm underflows. Were the block divided by nothing, the error alone would grow to about 1."""
    bound = gram_bounds(torch.full((2, 2), 1e-200, dtype=torch.float64), 10).item()
    assert 2e-200 <= bound < 1e-140


def test_circle_norm_is_the_norm_where_the_layer_uses_the_circle_whole(seed):
    rng, seen = np.random.default_rng((seed, 4)), 0
    for _ in range(200):
        case = random_case(rng, merging=True)
        weight = random_values(rng, case.weight_shape, torch.float64, "normal")
        if circle_of(as_layer(weight, case.in_shape, **case.keywords)).whole:
            found = circle_norm(weight, case.in_shape, **case.keywords).item()
            exact = torch.linalg.matrix_norm(oracle.matrix(weight, *case.args, **case.options), ord=2).item()
            assert found == pytest.approx(exact, rel=1e-11)
            seen += 1
    assert seen >= 10


def test_four_reshapings_as_defined():
    kernel = np.random.default_rng(5).standard_normal((4, 3, 2, 3))
    layouts = [(0, 2, 1, 3), (0, 3, 1, 2), (0, 1, 2, 3), (0, 2, 3, 1)]  # R, S, T, U: rows first
    splits = [2, 2, 1, 3]
    norms = []
    for layout, split in zip(layouts, splits, strict=True):
        moved = kernel.transpose(layout)
        norms.append(np.linalg.norm(moved.reshape(math.prod(moved.shape[:split]), -1), 2))
    expected = math.sqrt(6) * min(norms)
    assert four_reshapings(torch.from_numpy(kernel), [8, 8]).item() == pytest.approx(expected, rel=1e-12)


def test_reshaped_estimate_is_of_the_flattened_weight():
    kernel = np.random.default_rng(6).standard_normal((4, 3, 2, 3))
    plain, exchanged = kernel.reshape(4, -1), kernel.transpose(1, 0, 2, 3).reshape(3, -1)
    weight = torch.from_numpy(kernel)
    assert reshaped_estimate(weight, [8, 8]).item() == pytest.approx(np.linalg.norm(plain, 2), rel=1e-12)
    found = reshaped_estimate(weight, [8, 8], transposed=True).item()
    assert found == pytest.approx(np.linalg.norm(exchanged, 2), rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 3), (3, 4, 5), (3, 2, 2, 3), (2, 2, 2, 3, 2)])
def test_tensor_norm_of_rank_one(shape):
    rng = np.random.default_rng(7)
    weight = torch.from_numpy(reduce(np.multiply.outer, [rng.standard_normal(n) for n in shape]))
    expected = math.sqrt(math.prod(shape[2:])) * float(torch.linalg.vector_norm(weight))
    assert tensor_norm_estimate(weight, [6] * (len(shape) - 2)).item() == pytest.approx(expected, rel=1e-12)


def test_tensor_norm_is_over_complex_vectors():
    """Of the tensor of Re (a + ib)^3 the largest value at real unit vectors is 1, at complex ones sqrt(2)."""
    kernel = torch.zeros(2, 2, 2, dtype=torch.float64)
    kernel[0, 0, 0] = 1
    kernel[0, 1, 1] = kernel[1, 0, 1] = kernel[1, 1, 0] = -1
    found = tensor_norm_estimate(kernel, [5], generator=torch.Generator().manual_seed(0))
    assert found.item() == pytest.approx(math.sqrt(2) * math.sqrt(2), rel=1e-9)


def test_tensor_norm_of_one_tap_counts_what_padding_repeats():
    """An end of three outputs has the norm sqrt(3)."""
    weight = torch.ones(1, 1, 1, dtype=torch.float64)
    found = tensor_norm_estimate(weight, [4], padding=2, padding_mode="replicate")
    assert found.item() >= math.sqrt(3) * (1 - 1e-12)


def test_tensor_norm_never_exceeds_a_reshaping(seed):
    for number in range(60):
        case, weight = fuzz(seed, number)
        methods = tensor_norm_estimate, four_reshapings
        found, most = (method(weight, case.in_shape, **case.keywords).item() for method in methods)
        assert found <= most * (1 + 1e-9), replay(seed, number, case)


CIRCULAR = [
    ((3, 2, 3), (5,)),
    ((2, 3, 4), (4,)),
    ((2, 3, 3, 2), (4, 5)),
    ((2, 2, 2, 2, 2), (2, 3, 4)),
    ((3, 4, 1), (4,)),
]


@pytest.mark.parametrize(("shape", "sizes"), [*CIRCULAR, ((4, 3), ())], ids=str)
@pytest.mark.parametrize("cut", [1.2, 0.6, 1e-7])
def test_the_published_clip_is_that_of_the_dense_matrix(shape, sizes, cut):
    kernel = np.random.default_rng(0).standard_normal(shape)
    matrix = circulant(kernel, sizes)
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    bound = cut * s[0]
    dense = (u * np.minimum(s, bound)) @ vh
    expected = dense.reshape(shape[0], *sizes, shape[1], *sizes)[(slice(None), *(0 for _ in sizes))]  # at the origin
    padding = [p for k in shape[2:] for p in (0, k - 1)]
    call = partial(clip_singular_values, torch.tensor(kernel), sizes, bound, padding=padding, padding_mode="circular")
    full = call()
    np.testing.assert_allclose(full, expected, rtol=0, atol=1e-12 * bound + 1e-15 * s[0])
    np.testing.assert_allclose(circulant(full.numpy(), sizes), dense, rtol=0, atol=1e-12 * bound + 1e-15 * s[0])
    assert torch.equal(call(cut=True), full[tuple(map(slice, shape))])


def test_singular_values_far_below_the_largest_are_clipped_as_precisely():
    """Their squares vanish beside its own."""
    u, v = (torch.linalg.qr(part).Q for part in torch.randn(2, 4, 4, dtype=torch.float64))
    weight = u * torch.tensor([1.0, 3e-9, 2e-9, 1e-10], dtype=torch.float64) @ v
    found = torch.linalg.svdvals(clip_singular_values(weight, [], 1e-9))
    torch.testing.assert_close(found, torch.tensor([1e-9, 1e-9, 1e-9, 1e-10], dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_published_clip_takes_groups_one_by_one():
    conv = nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular", groups=2)
    parts = [clip_singular_values(part, [5], 0.3, padding=1, padding_mode="circular") for part in conv.weight.chunk(2)]
    torch.testing.assert_close(clip_singular_values(conv, [5], 0.3), torch.cat(parts))
