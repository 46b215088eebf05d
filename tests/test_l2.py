"""The promise: the l2 norm lies in its bracket, for either certificate, and the bracket is as tight as it says.

The truth is the largest singular value of the explicit matrix, in float64.
"""

import math

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, replay
from torch import nn

import convnorm
from convnorm import spectral
from convnorm.layers import as_layer
from convnorm.spectral import (
    bracket,
    circle_norm,
    explicit,
    frobenius,
    lanczos,
    power_iteration,
    rescale,
    singular_values,
)
from convnorm.spectral.circle import circle_of, groups_of
from convnorm.spectral.explicit import explicit_matrix
from convnorm.spectral.krylov import Lanczos
from convnorm.spectral.lanczos import search
from convnorm.spectral.modes import modes_upper
from convnorm.spectral.on_circle import circle_upper

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
    """A random layer of any kind, its weight, its norm divided by ``unit``, and ``unit``."""
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
        found = convnorm.l2(weight, case.in_shape, rtol=rtol, **case.keywords)
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
        found = convnorm.l2(weight, case.in_shape, **case.keywords)
        assert_brackets(found, truth, unit, replay(seed, number, case))
        assert (found.ratio > 1.01) == bool(found.stopped), f"{found}. {replay(seed, number, case)}"
        certificates.add(found.certificate)
    assert certificates >= {"circle", "modes of the circle", "l1 and linf norms", "Frobenius norm"}


def test_random_starts_close_every_bracket(request, seed, monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", 0)
    certificates = set()
    for number in count(request, 400):
        case, weight, truth, unit = layer_and_norm(seed, number)
        found = convnorm.l2(weight, case.in_shape, rtol=1e-3, failure=1e-12, **case.keywords)
        assert_brackets(found, truth, unit, replay(seed, number, case))
        if truth < 1e-9 and found.stopped:  # merged taps that cancel
            assert found.upper.item() / unit < 1e-9
            continue
        assert not found.stopped, f"{found}. {replay(seed, number, case)}"
        assert found.ratio <= 1.001
        certificates.add(found.certificate)
    assert "Lanczos, fails with probability 1e-12" in certificates


def test_kernels_of_many_taps_are_not_multiplied_tap_by_tap(monkeypatch):
    """Of 1000 taps there are a million pairs."""
    monkeypatch.setattr(explicit, "product", None)
    weight = torch.randn(2, 2, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.linalg.matrix_norm(oracle.matrix(weight, 1, 50, [100]), ord=2).item()
    found = convnorm.l2(weight, [100], padding=50, rtol=1e-5)
    assert found.certificate == "explicit matrix"
    assert_brackets(found, truth, 1, found)


@pytest.mark.parametrize(
    "name", ["linear", "stride_2", "grouped", "circular", "reflect", "transposed_grouped", "conv3d"]
)
def test_the_gradient_is_that_of_the_norm(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, requires_grad=True)
    convnorm.l2(weight, case.in_shape, rtol=1e-8, **case.keywords).lower.backward()
    again = weight.detach().clone().requires_grad_()
    layer = as_layer(again, case.in_shape, **case.keywords)
    norms = [
        torch.linalg.matrix_norm(explicit_matrix(groups_of(layer, torch.tensor([g]))), ord=2)
        for g in range(layer.groups)
    ]
    torch.stack(norms).max().backward()
    torch.testing.assert_close(weight.grad, again.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["linear", "stride_2", "reflect", "transposed_grouped"])
def test_the_gradient_is_there_in_forward_mode(name):
    """Where no weight says that it takes part."""
    case = TABLE[name]
    generator = torch.Generator().manual_seed(0)
    weight, along = (torch.randn(case.weight_shape, dtype=torch.float64, generator=generator) for _ in range(2))

    def lower(weight):
        return convnorm.l2(weight, case.in_shape, **case.keywords).lower

    _, tangent = torch.func.jvp(lower, (weight,), (along,))
    torch.testing.assert_close(tangent, (torch.func.grad(lower)(weight) * along).sum())
    assert tangent != 0


def test_second_derivatives_are_refused():
    """Singular vectors turn with the weight."""
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(convnorm.l2(weight).lower, weight, create_graph=True)
    with pytest.raises(ValueError, match="has first derivatives, and no second ones: singular_values has"):
        first.sum().backward()


def test_a_transposed_layer_may_leave_out_most_of_its_inputs():
    weight = torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(0))
    found = convnorm.l2(weight, [60], padding=15, transposed=True)
    truth = torch.linalg.matrix_norm(weight[..., 0].double(), ord=2).item()
    assert found.lower <= truth * (1 + ROUNDING)
    assert found.upper >= truth * (1 - ROUNDING)


def test_a_norm_beyond_float64_is_said_to_be():
    found = convnorm.l2(torch.full((4, 4), 1e308, dtype=torch.float64))
    assert found.lower.isfinite()
    assert found.upper.isinf()
    assert found.stopped == "float64, which has no number as large"


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


@pytest.mark.parametrize(("size", "factor"), [(1.0, 1.0), (1e30, 1e30), (1e-30, 1e-30), (1e30, 1e-30)])
def test_weights_are_scaled_without_rounding(size, factor):
    """The product of two float32 numbers is none in general, and may be beyond all of them."""
    weight, scale = torch.tensor([[0.1, 0.7, 0.3]]) * size, torch.tensor([0.37]) * factor
    truth = torch.linalg.vector_norm(weight.double() * scale.double()).item()
    found = convnorm.l2(weight, scale=scale, rtol=1e-9)
    assert_brackets(found, truth, 1, found)
    assert found.ratio <= 1 + 1e-9
    assert math.isclose(singular_values(weight, scale=scale).item(), truth, rel_tol=1e-14)


def test_the_search_leaves_random_numbers_alone():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    torch.manual_seed(3)
    first, state = convnorm.l2(conv, [8, 8]), torch.get_rng_state()
    second = convnorm.l2(conv, [8, 8])
    assert torch.equal(torch.get_rng_state(), state)
    assert (first.lower, first.upper) == (second.lower, second.upper)


class Blind(bracket.Search):
    """A search that finds but a part of the norm, so that proofs must refuse what it asks for."""

    sight = 1.0

    @property
    def level(self):
        return self.sight * super().level

    def closed(self, upper):
        return super().closed(upper / self.sight)


@pytest.mark.parametrize("largest", [0, bracket.LARGEST])
def test_proofs_do_not_rest_on_the_search(request, seed, largest, monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", largest)
    monkeypatch.setattr(bracket, "MODES", (4, 16, 64))  # fewer than most layers have
    monkeypatch.setattr(bracket, "Search", Blind)
    certificates = set()
    for number in count(request, 400):
        case, weight, truth, unit = layer_and_norm(seed, number)
        Blind.sight = (0.3, 0.8, 0.95, 0.999, 1 - 1e-6)[number % 5]
        found = convnorm.l2(weight, case.in_shape, **case.keywords)
        assert_brackets(found, truth, unit, replay(seed, number, case))
        certificates.add(found.certificate)
    assert certificates >= {"circle", "explicit matrix" if largest else "modes of the circle"}


def test_modes_close_brackets_that_circles_leave_open(monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", 0)
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = convnorm.l2(weight, [12, 12], padding=1, rtol=1e-3)
    assert (found.certificate, found.stopped) == ("modes of the circle", "")


def test_all_modes_may_show_no_more(monkeypatch):
    """Of rank one there are a few hundred."""
    monkeypatch.setattr(bracket, "LARGEST", 0)
    weight = torch.from_numpy(rank_one(np.random.default_rng(0), (2, 2, 3, 3)))
    found = convnorm.l2(weight, [8, 9], padding=3, dilation=3, rtol=1e-4)
    assert (found.certificate, found.ratio > 1.001) == ("modes of the circle", True)
    assert found.stopped.startswith("modes of the circle, up to 4096, which show no more, and a matrix of")


def test_modes_are_for_zero_padding_only(monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", 0)
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = convnorm.l2(weight, [8, 8], padding=1, padding_mode="reflect", rtol=1e-3)
    assert found.certificate == "circle"
    assert "padding_mode 'reflect'" in found.stopped


def test_a_probable_bound_is_the_largest_of_its_starts(monkeypatch):
    """It fails only if all of them do."""
    asked, answers = [], iter([1.0, 100.0] * 1000)
    monkeypatch.setattr(Lanczos, "upper", lambda self, failure: asked.append(failure) or next(answers))
    layer = as_layer(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    proof = bracket.prove_probably(bracket.Search(layer, 1e-3, None), 1e-6)
    assert proof.upper >= 10
    assert math.isclose(asked[0] ** bracket.STARTS, 1e-6)


def test_a_probability_too_small_leaves_the_proof(monkeypatch):
    monkeypatch.setattr(bracket, "LARGEST", 0)
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    found = convnorm.l2(weight, [5, 5], padding=1, padding_mode="reflect", failure=1e-300)
    assert found.certificate == "circle"
    assert math.isfinite(found.upper)


def test_autocast_leaves_brackets_alone():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    truth = true_norm(weight, cases.Case(weight.shape, (1,), (1,), (8, 8)))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = convnorm.l2(weight, [8, 8], padding=1)
        assert found.lower <= truth <= found.upper
        assert not found.stopped


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_default_dtype_leaves_brackets_alone(default):
    layer = as_layer(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)), [80], padding=1)
    expected = convnorm.l2(layer)
    torch.set_default_dtype(default)
    try:
        found = convnorm.l2(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found.lower, found.upper) == (expected.lower, expected.upper)


@pytest.mark.parametrize("name", ["conv2d", "reflect"])
def test_calls_from_compiled_code_give_the_same(name):
    """Dynamo would trace NumPy as PyTorch, whose quotients of integers are float32."""
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(0))

    def bounds(weight):
        found = convnorm.l2(weight, case.in_shape, **case.keywords)
        return found.lower, found.upper, circle_norm(weight, case.in_shape, **case.keywords)

    assert torch.compile(bounds, backend="eager")(weight) == bounds(weight)


def test_where_the_circle_exceeds_the_level_another_search_begins(monkeypatch):
    """One that finds too little at first."""

    def poor_at_first(layer, rtol, steps, start, look_back):
        if start is not None:
            return search(layer, rtol, steps, start, look_back)
        process = Lanczos(layer)
        process.extend()
        return process

    def refuse(*anything):
        raise AssertionError("the second search is enough")

    weight = torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(bracket, "search", poor_at_first)
    monkeypatch.setattr(bracket.Search, "run", refuse)
    for options in ({}, {"transposed": True}, {"groups": 2}, {"stride": 2}):
        found = convnorm.l2(weight, [48, 48], padding=1, **options)
        assert (found.certificate, found.stopped) == ("circle", ""), options


def test_only_groups_above_the_level_are_decomposed(monkeypatch):
    """Though nothing is found that would raise it."""
    weight = torch.randn(12, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    weight[5:] /= 2
    for name in ("begin_with", "run"):
        monkeypatch.setattr(bracket.Search, name, lambda *anything: None)
    decomposed = []
    monkeypatch.setattr(
        bracket, "groups_of", lambda layer, groups: decomposed.extend(groups) or groups_of(layer, groups)
    )
    found = convnorm.l2(weight, [10, 10], padding=3, groups=12)
    assert found.certificate == "explicit matrix"
    assert 0 < len(decomposed) <= 5


def test_searches_go_on_where_the_norm_is_known():
    """Both would rest on another singular value, within some thousandths of the largest."""
    kernel = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(9))
    found = convnorm.l2(kernel, [40], padding=3, dilation=5, rtol=1e-3)
    assert (found.certificate, found.stopped) == ("explicit matrix", "")
    values = torch.linspace(0.5, 0.9985, 100, dtype=torch.float64)
    values[0] = 1
    turn, _ = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found = convnorm.l2(turn * values, rtol=1e-3, start=torch.eye(100)[-1:])
    assert (found.certificate, found.stopped) == ("circle", "")


@pytest.mark.parametrize("size", [9.5e307, 1.0, 3e-309])  # float64 has no power of two that brings the first below 1
def test_a_poor_search_proves_nothing_false(monkeypatch, size):
    layer = as_layer(torch.tensor([[[1.0, 0.0, -1.0]]], dtype=torch.float64) * size, [600], padding=1)
    search = bracket.Search(layer, 1e-2, None)
    truth = 2 * math.cos(math.pi / 601) * (size / search.size)
    assert search.lower == pytest.approx(truth, rel=1e-2)
    search.lower /= 1.5
    monkeypatch.setattr(search, "keep", lambda right: None)
    circle = circle_of(search.layer)
    of_circle = circle_upper(circle, search.level, search.rtol)[0].item()
    assert truth <= of_circle <= 1.02 * truth
    assert truth <= modes_upper(circle, search.level, of_circle) <= 1.02 * truth
    assert truth <= bracket.prove(search).upper <= 1.02 * truth


@pytest.mark.parametrize("huge", [10.0, 1e100, 1e200, 1e300])
def test_weights_that_see_only_padding_hide_no_others(huge):
    weight = torch.randn(4, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = torch.linalg.matrix_norm(weight[..., 1], ord=2).item()
    weight[..., 0] = weight[..., 2] = huge
    found = convnorm.l2(weight.requires_grad_(), [1], padding=1)
    assert truth * (1 - 1e-2) <= found.lower <= truth * (1 + ROUNDING)
    assert truth * (1 - ROUNDING) <= found.upper <= truth * (1 + 1e-2)
    found.lower.backward()
    assert (weight.grad[..., 1] != 0).all()
    assert (weight.grad[..., ::2] == 0).all()
    weight = weight.detach()
    assert math.isclose(singular_values(weight, [1], padding=1)[0], truth, rel_tol=1e-12)
    assert frobenius(weight, [1], padding=1) >= truth
    assert lanczos(weight, [1], padding=1).value >= truth * (1 - 1e-2)
    assert power_iteration(weight, [1], padding=1).value >= truth * (1 - 1e-1)
    assert truth <= circle_norm(weight, [1], padding=1) <= 10 * truth
    upper, _ = rescale._upper(as_layer(weight, [1], padding=1), 0.0, None, rtol=1e-2, search=1e-3)
    assert truth * (1 - ROUNDING) <= upper <= truth * (1 + 2e-2)


@pytest.mark.parametrize("layout", ["channels_last", "reversed", "sliced"])
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_any_layout_have_gradients(layout, transposed):
    rng = np.random.default_rng(0)
    plain = torch.from_numpy(rng.standard_normal((4, 3, 3, 3)))
    weight = cases.lay_out(plain, layout).requires_grad_()
    found = convnorm.l2(weight, [5, 5], padding=1, stride=2, transposed=transposed)
    found.lower.backward()
    torch.testing.assert_close((weight.detach() * weight.grad).sum(), found.lower.detach())  # of degree 1


BAD = {
    "rtol": (lambda: convnorm.l2(torch.ones(2, 2), rtol=0), "rtol 0 must be at least"),
    "nan rtol": (lambda: convnorm.l2(torch.ones(2, 2), rtol=math.nan), "rtol nan must be"),
    "failure": (lambda: convnorm.l2(torch.ones(2, 2), failure=1.0), "failure 1.0 must be a probability"),
    "nan": (lambda: convnorm.l2(torch.full((2, 2), math.nan)), "weight holds NaN or inf"),
    "inf": (lambda: singular_values(torch.full((2, 2), math.inf)), "weight holds NaN or inf"),
    "scale": (lambda: convnorm.l2(torch.ones(2, 2), scale=torch.tensor([1, math.nan])), "scale holds NaN or inf"),
    "meta": (lambda: convnorm.l2(torch.ones(2, 2, device="meta")), "on device meta has no values"),
    "small input": (lambda: convnorm.l2(torch.ones(2, 2, 3), [2]), "smaller than the kernel"),
    "steps": (lambda: lanczos(torch.ones(2, 2), steps=0), "steps 0 must be at least 1"),
    "start": (lambda: lanczos(torch.ones(2, 2), start=torch.ones(1, 3)), r"start of shape \[1, 3\] must have"),
    "start of l2": (lambda: convnorm.l2(torch.ones(2, 2), start=torch.ones(2, 2)), r"start of shape \[2, 2\] must"),
    "zero start": (lambda: lanczos(torch.ones(2, 2), start=torch.zeros(1, 2)), "start holds NaN or inf, or nothing"),
    "nan start": (lambda: convnorm.l2(torch.ones(2, 2), start=torch.full((1, 2), math.nan)), "start holds NaN or inf"),
    "spectrum": (lambda: singular_values(torch.ones(9, 9, 3, 3), [99, 99]), "too large to decompose"),
    "layer": (lambda: convnorm.l2(nn.ReLU()), "layer of type ReLU must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    call, message = BAD[name]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


@pytest.mark.parametrize("name", ["circular", "replicate", "reflect", "conv3d_circular"])
def test_repeated_padding_works_in_inference_mode(name):
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        inside = convnorm.l2(weight, case.in_shape, **case.keywords)
    outside = convnorm.l2(weight, case.in_shape, **case.keywords)
    assert (inside.lower, inside.upper) == (outside.lower, outside.upper)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", TABLE)
def test_every_method_runs_where_the_weight_is(name, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(2)).to(device)
    truth, how = true_norm(weight, case), case.keywords
    for found in (
        convnorm.l2(weight, case.in_shape, **how),
        convnorm.l2(weight, case.in_shape, rtol=1e-4, failure=1e-12, **how),
    ):
        assert found.lower.device == found.upper.device == found.right.device == weight.device
        assert_brackets(found, truth, 1, name)
    for below in (lanczos, spectral.power_iteration):
        assert below(weight, case.in_shape, **how).value.item() <= truth * (1 + ROUNDING)
    bounds = ("circle_norm", "gram_iteration", "four_reshapings", "frobenius", "sqrt_l1_linf")
    for above in (getattr(spectral, bound)(weight, case.in_shape, **how) for bound in bounds):
        assert above.device == weight.device
        assert above.item() >= truth * (1 - ROUNDING)
    torch.testing.assert_close(singular_values(weight, case.in_shape, **how)[0].item(), truth)
    within = convnorm.project(weight, case.in_shape, ord=2, bound=truth / 2, **how)
    assert within.device == weight.device
    assert true_norm(within, case) <= truth / 2 * (1 + ROUNDING)


@pytest.mark.parametrize("largest", [0, bracket.LARGEST])
@pytest.mark.parametrize("name", ["linear", "stride_2", "circular", "reflect", "transposed_grouped", "conv3d"])
def test_the_default_device_changes_nothing(monkeypatch, name, largest):
    """A notebook's is often a GPU; that of tensors without values stands for any."""
    monkeypatch.setattr(bracket, "LARGEST", largest)
    case = TABLE[name]
    weight = torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(2))

    def found():
        torch.manual_seed(0)
        arguments = {"in_shape": case.in_shape, **case.keywords}
        both = convnorm.l2(weight, rtol=1e-4, failure=1e-12, **arguments)
        clipped = convnorm.project(weight, ord=2, bound=1.0, method="clip", **arguments)
        return both.lower, both.upper, singular_values(weight, **arguments), circle_norm(weight, **arguments), clipped

    expected = found()
    with torch.device("meta"):
        assert all(map(torch.equal, found(), expected))


def test_what_a_layer_of_zeros_attains_is_an_input_to_start_from():
    conv = nn.Conv2d(4, 2, 1)
    nn.init.zeros_(conv.weight)
    found = convnorm.l2(conv, [4, 4])
    assert torch.linalg.vector_norm(found.right).item() == pytest.approx(1)
    assert convnorm.l2(conv, [4, 4], start=found.right).upper == 0


def test_a_warm_start_is_not_blind_to_another_group():
    torch.manual_seed(0)
    weight = torch.randn(2, 1, 3, 3)
    weight[0] *= 2
    start = convnorm.l2(weight, [8, 8], padding=1, groups=2).right
    weight[1] *= 5
    cold = convnorm.l2(weight, [8, 8], padding=1, groups=2, rtol=1e-3)
    warm = convnorm.l2(weight, [8, 8], padding=1, groups=2, rtol=1e-3, start=start)
    assert not warm.stopped
    assert warm.ratio <= 1.001
    assert math.isclose(warm.lower, cold.lower, rel_tol=1e-3)
