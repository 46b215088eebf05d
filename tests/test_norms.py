"""The promise: what ``norms``, ``witness`` and ``subgradient`` say of a layer is true of its explicit matrix."""

import copy
import math
import re
from dataclasses import replace
from typing import get_type_hints

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, replay
from test_layers import MODULES, build, linear_part
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import convnorm
from convnorm import GeometryError, Norms, norms, subgradient, witness
from convnorm.winners import _window_table

inf = math.inf
BOUNDS = ("l2_bound", "frobenius", "frobenius_bound")


def random_layer(seed, number, device="cpu"):
    """A layer and a weight of which nothing under- or overflows: there are tests of that."""
    rng = np.random.default_rng((seed, number, 4))
    case, dtype = cases.random_case(rng), cases.DTYPES[int(rng.choice(4, p=[0.5, 0.3, 0.1, 0.1]))]
    values = str(rng.choice(["normal", "normal", "integers", "sparse", "constant", "uneven", "zeros"]))
    return case, cases.random_weight(rng, case.weight_shape, dtype, values, device=device)


def close(got, expected, weight):
    """Relative, but for what float64 loses where merged taps cancel."""
    rtol = 1e-9 if weight.dtype == torch.float64 else 1e-5
    atol = 1e-13 * weight.detach().abs().amax().item()
    return got.item() == pytest.approx(float(expected), rel=rtol, abs=atol, nan_ok=True)


def two_norm(matrix):
    small = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(small)[-1].clamp(0).sqrt().item()


def attained(x, y, ord):
    """||y|| / ||x||, of an ``x`` as the witness should be."""
    if ord == 1:
        assert (x.abs().sum(), x.max()) == (1, 1), "not a basis input"
    else:
        assert x.abs().eq(1).all(), "not ±1"
    return torch.linalg.vector_norm(y, ord) / torch.linalg.vector_norm(x, ord)


def attained_by_pytorch(weight, case, ord):
    x = witness(weight, case.in_shape, ord=ord, **case.keywords)
    assert (x.dtype, x.device, x.requires_grad) == (weight.dtype, weight.device, False)
    x, weight = x.double().cpu(), weight.double().cpu()
    return attained(x, oracle.forward(x, weight, case.stride, case.padding, **case.options), ord)


def test_norms_and_bounds_are_those_of_the_explicit_matrix(device, seed, numbers):
    for number in numbers[::3]:
        case, weight = random_layer(seed, number, device)
        again = replay(seed, number, case)
        matrix = oracle.matrix(weight, *case.args, **case.options)
        found = norms(weight, case.in_shape, **case.keywords)
        l1, linf = oracle.norms(matrix)
        assert close(found.l1, l1, weight), again
        assert close(found.linf, linf, weight), again
        assert close(found.frobenius, matrix.norm(), weight), again
        assert close(found.l2_bound, math.sqrt(l1 * linf), weight), again
        two = two_norm(matrix) * (1 - 1e-5) - 1e-12
        assert all(getattr(found, bound) >= two for bound in BOUNDS), again


def test_frobenius_bound_is_that_of_the_paper(device, seed, numbers):
    """Eq. (3), sqrt(h_out w_out sum K^2): a transposed layer's matrix has as many rows as the layer has inputs."""
    for number in numbers[::3]:
        case, weight = random_layer(seed, number, device)
        if case.mode == "zeros":
            found = norms(weight, case.in_shape, **case.keywords).frobenius_bound
            outputs = math.prod(case.in_shape if case.transposed else case.geometry.out_shape)
            assert close(found, math.sqrt(outputs * weight.double().square().sum()), weight), replay(seed, number, case)


def test_frobenius_norm_counts_every_place_of_a_long_axis(device, seed, numbers):
    for number in numbers[::5]:
        case, weight = random_layer(seed, number, device)
        if len(case.in_shape) == 1:
            long = replace(case, in_shape=(case.in_shape[0] + number % 61,))
            matrix = oracle.matrix(weight, *long.args, **long.options)
            found = norms(weight, long.in_shape, **long.keywords).frobenius
            assert close(found, matrix.norm(), weight), replay(seed, number, long)


def test_bounds_hold_where_squares_leave_the_numbers(device):
    for size, dtype in ((1e-30, torch.float32), (1e30, torch.float32), (1e-300, torch.float64), (1e300, torch.float64)):
        weight = torch.full((2, 3, 3), size, dtype=dtype, device=device)
        found = norms(weight, [4], padding=1)
        assert found.frobenius.item() == pytest.approx(size * math.sqrt(2 * 3 * 10))
        assert found.frobenius_bound.item() == pytest.approx(size * math.sqrt(2 * 3 * 12))
        assert found.l2_bound.item() == pytest.approx(size * math.sqrt(6 * 9))


def test_witnesses_attain_the_norms(device, seed, numbers):
    for number in numbers[::4]:
        case, weight = random_layer(seed, number, device)
        if number % 8 == 0:  # past what the borders touch, where positions are counted on a shorter axis
            case = replace(case, in_shape=tuple(size + 7 + number // 8 % 13 for size in case.in_shape))
        found = norms(weight, case.in_shape, **case.keywords)
        for ord, norm in ((1, found.l1), (inf, found.linf)):
            assert close(attained_by_pytorch(weight, case, ord), norm, weight), (
                f"ord {ord}. {replay(seed, number, case)}"
            )


HUGE = {
    "conv1d": ((3, 2, 5), (3,), (2,), {}),
    "dilated": ((2, 2, 3), (2,), (7,), {"dilation": [5]}),
    "circular": ((2, 2, 4), (3,), (5,), {"padding_mode": "circular"}),
    "reflect": ((2, 2, 4), (4,), (3, 0), {"padding_mode": "reflect"}),
    "replicate": ((2, 2, 4), (1,), (0, 9), {"padding_mode": "replicate"}),
    "transposed": ((2, 3, 3), (3,), (1,), {"transposed": True, "output_padding": [2]}),
}


@pytest.mark.parametrize("name", HUGE)
def test_witnesses_of_huge_inputs_attain_the_norms(device, name):
    shape, stride, padding, options = HUGE[name]
    for number, size in enumerate((99_999, 100_000, 100_001, 100_002)):
        case = cases.Case(shape, stride, padding, (size,), options)
        weight = cases.random_weight(np.random.default_rng(number), shape, values="normal", device=device)
        found = norms(weight, case.in_shape, **case.keywords)
        for ord, norm in ((1, found.l1), (inf, found.linf)):
            assert close(attained_by_pytorch(weight, case, ord), norm, weight)


def test_witness_knows_the_sign_of_what_almost_cancels(device):
    """The taps merge to 1 and -1, which their sum in float32 has lost."""
    weight = torch.tensor([[[1e8, 1, -1e8], [1e8, -1, -1e8]]], device=device)
    case = cases.Case((1, 2, 3), (1,), (1,), (1,), {"padding_mode": "replicate"})
    assert norms(weight, case.in_shape, **case.keywords).linf == 2
    assert attained_by_pytorch(weight, case, inf) == 2


def test_sparse_and_dense_subgradients_are_the_gradient(device, seed, numbers):
    for number in numbers[::5]:
        case, weight = random_layer(seed, number, device)
        again, leaf = replay(seed, number, case), weight.detach().requires_grad_()
        found = norms(leaf, case.in_shape, **case.keywords)
        for ord, norm in ((1, found.l1), (inf, found.linf)):
            (gradient,) = torch.autograd.grad(norm, leaf, retain_graph=True)
            dense = subgradient(weight, case.in_shape, ord=ord, layout="dense", **case.keywords)
            sparse = subgradient(weight, case.in_shape, ord=ord, **case.keywords)
            assert sparse.layout == torch.sparse_coo, again
            assert sparse.is_coalesced(), again
            assert (sparse.shape, sparse.dtype, sparse.device) == (weight.shape, weight.dtype, weight.device), again
            assert torch.equal(dense, gradient), f"ord {ord}. {again}"
            assert torch.equal(sparse.to_dense(), gradient), f"ord {ord}. {again}"
            assert sparse.values().ne(0).all(), again
            assert case.mode != "zeros" or sparse.values().abs().eq(1).all(), again
            assert close((dense.double() * weight.double()).sum(), norm.item(), weight), f"ord {ord}. {again}"
            assert not sparse.requires_grad, again
            assert not dense.requires_grad, again


def test_the_default_device_changes_no_subgradient(device):
    case = TABLE["stride_2"]
    weight = torch.randn(case.weight_shape, device=device)
    expected = subgradient(weight, case.in_shape, **case.keywords)
    _window_table.cache_clear()
    with torch.device("meta"):
        for layout in ("sparse", "dense"):
            g = subgradient(weight, case.in_shape, layout=layout, **case.keywords)
            assert torch.equal(g.to_dense(), expected.to_dense())


def test_a_subgradient_of_fake_tensors_is_fake(device):
    case = TABLE["stride_2"]
    with FakeTensorMode():
        weight = torch.randn(case.weight_shape, device=device)
        g = subgradient(weight, case.in_shape, layout="dense", **case.keywords)
    assert (g.shape, g.dtype, g.device) == (weight.shape, weight.dtype, weight.device)


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_the_norms_of_their_matrix(device, name):
    module, in_shape = build(name, device)
    matrix = matrix_of(module, module, in_shape)
    assert_norms(norms(module, in_shape), matrix)
    for ord, norm in zip((1, inf), oracle.norms(matrix), strict=True):
        x = witness(module, in_shape, ord=ord)
        assert close(attained(x, linear_part(module, x), ord), norm, module.weight)
        g = subgradient(module, in_shape, ord=ord).to_dense()
        assert close((g * module.weight).sum(), norm, module.weight)


@pytest.mark.parametrize("name", MODULES)
def test_scale_gives_the_norms_of_a_folded_batch_norm(device, name):
    module, in_shape = build(name, device)
    channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(in_shape)](channels)
    for tensor in (batch_norm.weight, batch_norm.bias, batch_norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(batch_norm.running_var, 0.1, 2)
    batch_norm = batch_norm.to(device, torch.float64).eval()
    scale = batch_norm.weight / (batch_norm.running_var + batch_norm.eps).sqrt()
    scale = scale * torch.arange(1, channels + 1, device=device).remainder(2).mul(2).sub(1)  # both signs, surely
    batch_norm.weight.data = scale.detach() * (batch_norm.running_var + batch_norm.eps).sqrt()
    matrix = matrix_of(nn.Sequential(module, batch_norm), module, in_shape)
    found = norms(module, in_shape, scale=scale)
    assert_norms(found, matrix)
    raw = [module.weight.detach(), in_shape, scale.detach()]
    if not in_shape:  # a raw matrix may be transposed
        assert_norms(norms(raw[0].T, scale=raw[2], transposed=True), matrix)


def matrix_of(composed, module, in_shape):
    """[outputs, inputs] of a module, or of one that begins with it, less its bias."""
    layer = convnorm.layers.as_layer(module, in_shape)
    size = torch.Size([layer.in_channels, *in_shape])
    basis = torch.eye(size.numel(), dtype=torch.float64, device=layer.weight.device).reshape(size.numel(), *size)
    return linear_part(composed, basis).flatten(1).T.detach().cpu()


def assert_norms(found, matrix):
    for got, expected in zip((found.l1, found.linf), oracle.norms(matrix), strict=True):
        assert close(got, expected, matrix)
    assert close(found.frobenius, matrix.norm(), matrix)
    assert all(getattr(found, bound) >= two_norm(matrix) * (1 - 1e-9) for bound in BOUNDS)


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("name", ["linear", "stride_2", "grouped", "circular", "conv3d", "transposed_grouped"])
def test_norms_are_differentiable_in_weight_and_scale(device, name):
    case = TABLE[name]
    rng = np.random.default_rng(0)
    weight = cases.random_values(rng, case.weight_shape, torch.float64, "normal").to(device).requires_grad_()
    channels = case.weight_shape[1] * case.groups if case.transposed else case.weight_shape[0]
    scale = cases.random_values(rng, (channels,), torch.float64, "normal").to(device).requires_grad_()

    def values(weight, scale):
        found = norms(weight, case.in_shape, scale=scale, **case.keywords)
        return tuple(getattr(found, name) for name in ("l1", "linf", *BOUNDS))

    assert torch.autograd.gradcheck(values, (weight, scale))


def test_gradients_at_zero_are_zero(device):
    for bound in ("l1", "linf", *BOUNDS):
        weight = torch.zeros(2, 3, 3, device=device, requires_grad=True)
        getattr(norms(weight, [8], padding=1), bound).backward()
        assert weight.grad.eq(0).all(), bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_modules_of_half_precision_have_norms_in_float32(device, dtype):
    module, in_shape = build("conv2d", device)
    module.to(dtype)
    found, exact = norms(module, in_shape), norms(copy.deepcopy(module).double(), in_shape)
    for name in ("l1", "linf", *BOUNDS):
        value = getattr(found, name)
        assert (value.dtype, value.shape) == (torch.float32, ())
        assert value.item() == pytest.approx(getattr(exact, name).item(), rel=1e-5)


def test_a_raw_weight_takes_what_its_operator_takes(device):
    weight = torch.randn(4, 4, 3, 3, device=device)
    expected = norms(weight, [8, 8], stride=(2, 2), padding=(1, 1, 1, 1), dilation=(1, 1), output_padding=(0, 0))
    for options in (
        {"stride": 2, "padding": 1},
        {"stride": [2], "padding": [1]},
        {"stride": 2, "padding": 1, "dilation": None, "groups": 1, "output_padding": None},
        {"stride": np.int64(2), "padding": torch.tensor(1)},
    ):
        for size in (8, np.int32(8), torch.tensor(8)):
            found = norms(weight, size, **options)
            assert (found.l1, found.linf) == (expected.l1, expected.linf)


def test_parametrized_modules_are_measured_as_they_compute(device):
    plain, in_shape = build("conv2d", device)
    module = nn.utils.parametrizations.weight_norm(copy.deepcopy(plain))
    assert_norms(norms(module, in_shape), matrix_of(plain, plain, in_shape))
    norms(module, in_shape).l1.backward()
    assert all(p.grad.ne(0).any() for p in module.parametrizations.weight.parameters())


def test_a_weight_that_changes_when_it_is_read_in_training_is_that_of_evaluation():
    """``spectral_norm`` goes on with its power iteration."""
    module = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)).train()
    before = copy.deepcopy(module.state_dict())
    decay = convnorm.NormDecay(nn.Sequential(module), [1, 3, 5, 5], beta=1.0)

    def found():
        bracket, projected = convnorm.l2(module, [5, 5]), convnorm.project(module, [5, 5], ord=1, bound=0.1)
        return norms(module, [5, 5]).l1, subgradient(module, [5, 5]), decay.penalty(), bracket.lower, projected

    in_training = found()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(one.training for one in module.modules())
    module.eval()
    torch.testing.assert_close(in_training, found(), rtol=0, atol=0)


def lazy_conv_that_has_run():
    module = nn.LazyConv2d(4, 3)
    module(torch.ones(1, 2, 5, 5))
    return module


def test_a_lazy_module_is_measured_once_it_has_run():
    module = lazy_conv_that_has_run()
    assert norms(module, [5, 5]).l1 == norms(module.weight, [5, 5]).l1


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_measuring_changes_nothing(device, mode):
    module, in_shape = build("conv2d", device)
    module.train()
    before = module.weight.detach().clone()
    with mode():
        for ord in (1, inf):
            for result in (witness(module, in_shape, ord=ord), subgradient(module, in_shape, ord=ord)):
                assert not result.requires_grad
        repr(norms(module, in_shape))
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert module.training
    assert module.weight.requires_grad
    assert module.weight.grad is None
    assert torch.equal(module.weight, before)


def test_type_checkers_know_what_the_norms_are():
    """They see no type in what an operator returns."""
    assert get_type_hints(Norms) == {"l1": Tensor, "linf": Tensor}


def test_repr_shows_every_number(device):
    found = norms(torch.ones(1, 1, 3, 3, device=device), [8, 8], stride=2, padding=1)
    assert isinstance(found, Norms)
    assert repr(found) == "Norms(l1=4, linf=9, l2_bound=6, frobenius=11, frobenius_bound=12)"


WEIGHT = torch.ones(4, 2, 3)
EVERY = (norms, witness, subgradient)
# What is wrong: who refuses it, the arguments, and what the message must say.
BAD = {
    "meta_weight": (EVERY, (WEIGHT.to("meta"), [8]), {}, "weight.*meta"),
    "meta_module": (EVERY, (nn.Conv1d(2, 4, 3, device="meta"), [8]), {}, "weight.*meta"),
    "complex_weight": (EVERY, (WEIGHT.to(torch.complex64), [8]), {}, "weight.*complex64"),
    "sparse_weight": (EVERY, (WEIGHT.to_sparse(), [8]), {}, "weight.*sparse_coo"),
    "uninitialised": (EVERY, (nn.LazyConv1d(4, 3), [8]), {}, "weight.*not initialised"),
    "batch_norm": (EVERY, (nn.BatchNorm1d(3), [8]), {}, "layer.*BatchNorm1d"),
    "network": (EVERY, (nn.Sequential(nn.Linear(2, 2)),), {}, "layer.*Sequential"),
    "no_layer": (EVERY, ("conv1", [8]), {}, "layer.*str"),
    "no_in_shape": (EVERY, (WEIGHT,), {}, r"in_shape \[\]"),
    "in_shape_with_channels": (EVERY, (nn.Conv1d(2, 4, 3), [2, 8]), {}, r"in_shape \[2, 8\]"),
    "in_shape_of_linear": (EVERY, (nn.Linear(2, 4), [8]), {}, r"in_shape \[8\]"),
    "in_shape_below_kernel": (EVERY, (nn.Conv1d(2, 4, 3), [2]), {}, r"in_shape \[2\]"),
    "stride_0": (EVERY, (WEIGHT, [8]), {"stride": 0}, r"stride \[0\]"),
    "unknown_option": (EVERY, (WEIGHT, [8]), {"strides": 2}, "unknown option strides"),
    "option_of_a_module": (EVERY, (nn.Conv1d(2, 4, 3), [8]), {"stride": 2}, "stride"),
    "ord_2": ((witness, subgradient), (WEIGHT, [8]), {"ord": 2}, "ord 2"),
    "ord_minus_inf": ((witness, subgradient), (WEIGHT, [8]), {"ord": -inf}, "ord -inf"),
    "ord_in_words": ((witness, subgradient), (WEIGHT, [8]), {"ord": "fro"}, "ord 'fro'"),
    "layout": ((subgradient,), (WEIGHT, [8]), {"layout": "csr"}, "layout 'csr'"),
    "scale_of_inputs": ((norms,), (WEIGHT, [8]), {"scale": torch.ones(2)}, r"scale of shape \[2\].*4"),
    "scale_of_one": ((norms,), (WEIGHT, [8]), {"scale": torch.ones(())}, r"scale of shape \[\].*4"),
    "scale_like_weight": ((norms,), (WEIGHT, [8]), {"scale": torch.ones(4, 1, 1)}, r"scale of shape \[4, 1, 1\].*4"),
    "scale_of_transposed": ((norms,), (WEIGHT, [8]), {"scale": torch.ones(4), "transposed": True}, "scale.*2"),
    "scale_and_bad_weight": ((norms,), (WEIGHT[0, 0],), {"scale": torch.ones(3), "transposed": True}, r"weight.*\[3\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    functions, args, options, message = BAD[name]
    for function in functions:
        with pytest.raises((GeometryError, ValueError, TypeError)) as error:
            function(*args, **options)
        assert re.match(f"convnorm: .*{message}", str(error.value)), str(error.value)
