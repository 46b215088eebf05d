"""The promise: ``convnorm.norms`` takes PyTorch's layers as they are, and its bounds bound the layer itself.

Here the matrix is the identity pushed through the module, so that what is read off the module is tested as well.
"""

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, replay
from torch import nn

import convnorm
from convnorm import GeometryError

WITH_MODULE = [name for name, case in TABLE.items() if cases.has_module(case)]


def matrix_of(module, in_channels, in_shape):
    """[outputs, inputs] of a module without bias."""
    basis = torch.eye(in_channels * int(np.prod(in_shape)), dtype=torch.float64)
    with torch.no_grad():
        return module.double().cpu()(basis.reshape(-1, in_channels, *in_shape)).flatten(1).T


def sample(name, device="cpu"):
    case = TABLE[name]
    return case, cases.random_values(np.random.default_rng(0), case.weight_shape, torch.float64, "normal").to(device)


def assert_bounds(found, matrix, case, message=""):
    l1, linf = oracle.norms(matrix)
    singular, frobenius = torch.linalg.matrix_norm(matrix, 2), torch.linalg.matrix_norm(matrix)
    for value, expected in ((found.l1, l1), (found.linf, linf), (found.frobenius, frobenius)):
        torch.testing.assert_close(value.detach().cpu(), expected, rtol=1e-9, atol=1e-12, msg=message)
    torch.testing.assert_close(found.l2_bound.detach().cpu(), (l1 * linf).sqrt(), rtol=1e-9, atol=1e-12, msg=message)
    assert found.l2_bound.cpu() >= singular * (1 - 1e-9), message
    assert found.frobenius_bound.cpu() >= frobenius * (1 - 1e-9), message


def test_norms_of_random_modules_are_those_of_their_matrix(seed):
    for number in range(400):
        rng = np.random.default_rng((seed, number, 11))
        case = cases.random_case(rng)
        weight = cases.random_weight(rng, case.weight_shape, values="normal")
        if cases.has_module(case):
            module = cases.module(case, weight)
            channels = weight.shape[0] if case.transposed else weight.shape[1] * case.groups
            found, matrix = convnorm.norms(module, case.in_shape), matrix_of(module, channels, case.in_shape)
        else:
            stride, padding, in_shape = case.args
            found = convnorm.norms(weight, in_shape, stride=stride, padding=padding, **case.options)
            matrix = oracle.matrix(weight, *case.args, **case.options)
        assert_bounds(found, matrix, case, replay(seed, number, case))


@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", cases.MODES)
def test_padding_same_is_that_of_the_module(device, kernel, mode):
    for padding, dilation in (("same", 1), ("same", 2), ("valid", 2)):
        conv = nn.Conv2d(2, 3, (kernel, 3), padding=padding, dilation=dilation, padding_mode=mode, bias=False)
        found = convnorm.norms(conv.double().to(device), [9, 7])
        for value, expected in zip((found.l1, found.linf), oracle.norms(matrix_of(conv, 2, [9, 7])), strict=True):
            torch.testing.assert_close(value.detach().cpu(), expected)


@pytest.mark.parametrize("name", WITH_MODULE)
def test_a_module_and_its_weight_have_the_same_norms(device, name):
    case, weight = sample(name, device)
    stride, padding, in_shape = case.args
    options = {"stride": stride, "padding": padding} if case.in_shape else {}
    of_weight = convnorm.norms(weight, in_shape, **options, **case.options)
    of_module = convnorm.norms(cases.module(case, weight), in_shape)
    by_operator = torch.ops.convnorm.norms(weight, *case.args, **case.options)
    assert (of_weight.l1, of_weight.linf) == by_operator
    assert (of_module.l1, of_module.linf) == by_operator


def test_equation_3_of_the_paper_is_the_frobenius_bound(device):
    case, weight = sample("stride_2", device)
    found = convnorm.norms(cases.module(case, weight), case.in_shape)
    outputs = 4 * 4
    torch.testing.assert_close(found.frobenius_bound, (outputs * weight.square().sum()).sqrt())


def test_bounds_do_not_overflow_before_the_norms_do(device):
    found = convnorm.norms(torch.full((2, 2, 3), 1e37, device=device), [8], padding=1)
    assert found.l2_bound.item() == pytest.approx(6e37)
    found = convnorm.norms(torch.full((2, 2, 3), 60000.0, dtype=torch.float16, device=device), [8], padding=1)
    assert found.l2_bound.item() == pytest.approx(360000)
    assert found.frobenius.item() == pytest.approx(60000 * (4 * (3 * 8 - 2)) ** 0.5)


@pytest.mark.parametrize("name", TABLE)
def test_scale_multiplies_the_output_channels(device, name):
    case, weight = sample(name, device)
    out_channels = weight.shape[1] * case.groups if case.transposed else weight.shape[0]
    scale = torch.linspace(-2, 3, out_channels, dtype=torch.float64, device=device)
    matrix = oracle.matrix(weight, *case.args, **case.options).unflatten(0, (out_channels, -1))
    matrix = (matrix * scale.cpu()[:, None, None]).flatten(0, 1)
    stride, padding, in_shape = case.args
    options = {"stride": stride, "padding": padding} if case.in_shape else {}
    assert_bounds(convnorm.norms(weight, in_shape, scale=scale, **options, **case.options), matrix, case)


def test_scale_folds_a_batch_norm(device):
    conv, bn = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        bn.running_var.uniform_(0.5, 2)
        bn.weight.normal_()
    both = nn.Sequential(conv, bn).double()
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    found = convnorm.norms(conv, [5, 5], scale=scale)
    expected = oracle.norms(matrix_of(both, 3, [5, 5]))  # the batch norm's bias is 0
    torch.testing.assert_close((found.l1.detach(), found.linf.detach()), expected)
    (found.l1 + found.linf).backward()
    assert bn.weight.grad.abs().sum() > 0
    assert conv.weight.grad.abs().sum() > 0


def test_norms_are_differentiable(device):
    case, weight = sample("conv2d", device)
    conv = cases.module(case, weight)
    found = convnorm.norms(conv, case.in_shape)
    for value in (found.l1, found.linf, found.l2_bound, found.frobenius, found.frobenius_bound):
        conv.weight.grad = None
        value.backward(retain_graph=True)
        # homogeneous of degree 1, so by Euler's theorem:
        torch.testing.assert_close((conv.weight.grad * conv.weight).sum(), value)


def test_a_parametrised_weight_is_measured_and_trained(device):
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1)).to(device)
    l1 = convnorm.norms(conv, [8, 8]).l1
    torch.testing.assert_close(l1, convnorm.norms(conv.weight, [8, 8], padding=1).l1)
    l1.backward()
    assert all(part.grad.abs().sum() > 0 for part in conv.parametrizations.weight.parameters())


def test_the_bias_does_not_matter(device):
    conv = nn.Conv1d(2, 3, 3, bias=True).to(device)
    nn.init.constant_(conv.bias, 1e6)
    found = convnorm.norms(conv, [8])
    assert found.linf == torch.ops.convnorm.linf(conv.weight, 1, 0, [8])


def test_norms_print_their_values(device):
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).to(device)
    nn.init.ones_(conv.weight)
    found = convnorm.norms(conv, [8, 8])
    assert float(found.l1) == 9
    assert "l1=9" in repr(found)
    assert "linf=9" in repr(found)


BAD = {
    "another_module": (lambda: (nn.BatchNorm2d(3), [8, 8]), {}, "BatchNorm2d"),
    "no_module": (lambda: ("conv1", [8, 8]), {}, "str"),
    "lazy_module": (lambda: (nn.LazyConv2d(3, 3), [8, 8]), {}, "weight"),
    "options_of_a_module": (lambda: (nn.Conv2d(3, 3, 3), [8, 8]), {"stride": 2}, "stride"),
    "unknown_option": (lambda: (torch.ones(1, 1, 3), [8]), {"stide": 2}, "stide"),
    "no_in_shape": (lambda: (nn.Conv2d(3, 3, 3), ()), {}, "in_shape"),
    "in_shape_with_channels": (lambda: (nn.Conv2d(3, 3, 3), [3, 8, 8]), {}, "in_shape"),
    "input_below_kernel": (lambda: (nn.Conv2d(3, 3, 3), [8, 2]), {}, "in_shape"),
    "meta": (lambda: (nn.Conv2d(3, 3, 3, device="meta"), [8, 8]), {}, "meta"),
}


@pytest.mark.parametrize("function", ["norms", "subgradient", "witness"])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_layer_is_refused(name, function):
    make, options, named = BAD[name]
    with pytest.raises((GeometryError, TypeError), match=named) as error:
        getattr(convnorm, function)(*make(), **options)
    assert "convnorm: " in str(error.value)


def test_a_scale_of_another_length_is_refused():
    with pytest.raises(GeometryError, match=r"scale of shape \[3\]"):
        convnorm.norms(nn.Conv2d(3, 4, 3), [8, 8], scale=torch.ones(3))
