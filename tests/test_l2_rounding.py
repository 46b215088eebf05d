"""The promise: rounding opens the brackets of the l2 norm, and never takes the norm out of them.

The truth is a norm, or a part of its proof, that is known exactly.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch

import convnorm
from convnorm.layers import as_layer
from convnorm.spectral.circle import circle_of, half_grid, symbol
from convnorm.spectral.definite import is_below, largest_eigenvalue
from convnorm.spectral.explicit import explicit_uppers, gram_error, gram_matrices
from convnorm.spectral.on_circle import GramSymbol, circle_phases, circle_upper
from convnorm.spectral.rayleigh import rayleigh, rounding_error


def test_rows_are_bounded_to_the_last_bit():
    rng = np.random.default_rng(0)
    for size in range(1, 40):
        row = rng.standard_normal((1, size)) * 10.0 ** rng.integers(-2, 3)
        square = sum(Fraction(float(entry)) ** 2 for entry in row[0])
        for weight in (torch.from_numpy(row), torch.from_numpy(row.T)):
            found = convnorm.l2(weight)
            assert Fraction(found.lower.item()) ** 2 <= square <= Fraction(found.upper.item()) ** 2


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_the_smallest_numbers_are_bounded(size):
    found = convnorm.l2(torch.full((1, size), 5e-324, dtype=torch.float64))
    lower, upper = (round(bound.item() / 5e-324) for bound in (found.lower, found.upper))
    assert lower**2 <= size <= upper**2


@pytest.mark.parametrize("padding", [500, 5000])
@pytest.mark.parametrize("entry", [0.1, 0.7, 0.37])
def test_inputs_that_are_read_many_times_are_summed_upward(padding, entry):
    entry, reads = Fraction(entry), 2 * padding + 1
    one = torch.full((1, 1, 1), float(entry), dtype=torch.float64)
    turned = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]], dtype=torch.float64) * float(entry)
    for weight, square in ((one, entry**2 * reads), (turned, 2 * entry**2 * reads)):
        found = convnorm.l2(weight, [1], padding=padding, padding_mode="replicate", rtol=1e-9)
        assert Fraction(found.lower.item()) ** 2 <= square <= Fraction(found.upper.item()) ** 2, found


def test_matrices_of_inputs_read_many_times_are_rounded_upward():
    entry, padding = 0.7, 5000
    weight = torch.tensor([[[1.0], [1.0]], [[1.0], [-1.0]]], dtype=torch.float64) * entry
    layer = as_layer(weight, [1], padding=padding, padding_mode="replicate")
    square = 2 * Fraction(entry) ** 2 * (2 * padding + 1)
    assert 0 < abs(Fraction(gram_matrices(layer)[0, 0, 0].item()) - square) <= gram_error(layer)
    assert Fraction(explicit_uppers(layer, 0.0).item()) ** 2 >= square


def test_angles_of_far_taps_are_rounded_upward():
    """The circle is the layer itself, and its norm the largest of 1009 sums, here of exact angles."""
    rng = np.random.default_rng(0)
    n, spacing = 1009, 55
    turns = (np.arange(n)[:, None] * np.arange(9) * spacing % n).astype(np.longdouble) / n
    angles = turns * 8 * np.arctan(np.longdouble(1))
    for _ in range(20):
        weight = rng.standard_normal(9)
        sums = np.hypot(np.cos(angles) @ weight.astype(np.longdouble), np.sin(angles) @ weight.astype(np.longdouble))
        layer = as_layer(
            torch.from_numpy(weight)[None, None], [n], padding=220, dilation=spacing, padding_mode="circular"
        )
        circle = circle_of(layer)
        assert circle.whole
        upper = circle_upper(circle, level=0.0, rtol=1e-9)[0].item()
        assert sums.max() <= upper <= sums.max() * (1 + 1e-10)


def test_lengths_of_long_inputs_are_rounded_downward():
    """An input of equal entries: the sum of its squares is off by ever the same way."""
    n, taps = 1_000_000, 250  # an orthogonal projection, so that every input of equal entries attains the norm
    layer = as_layer(torch.ones(1, 1, taps, dtype=torch.float64), [n], stride=taps)
    for entry in (0.1, 0.3, 0.37, 0.7, 1 / 3):
        value = rayleigh(layer, torch.full((1, 1, n), entry, dtype=torch.float64)).value
        assert Fraction(value.item()) ** 2 <= taps


def test_merged_taps_that_cancel_still_round():
    layer = as_layer(torch.tensor([[[1.0, -1.0]]]), [1], padding=1, padding_mode="replicate")
    assert rounding_error(layer) > 1e-16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_proofs_of_definiteness_keep_their_distance(dtype):
    gram = torch.zeros(100, 100, dtype=dtype)
    gram[0, 0] = 1
    eps = torch.finfo(dtype).eps
    assert not is_below(gram, 1 + 1000 * eps)  # within what a factorisation of this size may be wrong by
    assert is_below(gram, 1 + 20000 * eps)
    assert not is_below(gram, 1.05, error=0.1)
    assert largest_eigenvalue(gram, error=0.1) >= 1.1


def test_symbols_are_summed_in_float64():
    """What a product of float32 matrices means, is for the user of PyTorch to set."""
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    circle = circle_of(as_layer(weight, [7, 7], padding=1))
    gram, phases = GramSymbol(circle), circle_phases(circle)
    exact, rounded = (
        torch.cat([part for _, part in gram.at(phases, of)], 1) for of in (torch.complex128, torch.complex64)
    )
    assert torch.equal(rounded, exact.to(torch.complex64))
    off = torch.linalg.matrix_norm(rounded - exact, ord=2).max()
    assert 0 < off <= gram.rounding(torch.complex64)
    symbols = symbol(circle, half_grid(circle.points))
    torch.testing.assert_close(exact, symbols.mH @ symbols)
