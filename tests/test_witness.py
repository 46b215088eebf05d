"""The promise: every norm can be checked by one pass of an input through the layer itself."""

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, replay
from torch import nn

import convnorm

inf = float("inf")
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def witness(weight, case, ord):
    stride, padding, in_shape = case.args
    options = {"stride": stride, "padding": padding} if case.in_shape else {}
    return convnorm.witness(weight, in_shape, ord=ord, **options, **case.options)


def attained(x, y, ord):
    return (torch.linalg.vector_norm(y, ord) / torch.linalg.vector_norm(x, ord)).item()


def assert_attains(weight, case, message=""):
    norms = torch.ops.convnorm.norms(weight, *case.args, **case.options)
    for ord, norm in zip((1, inf), norms, strict=True):
        x = witness(weight, case, ord)
        assert (x.dtype, x.device) == (weight.dtype, weight.device)
        x = x.double().cpu()
        y = oracle.forward(x, weight.double().cpu(), *case.args, **case.options)
        tolerance = {"rel": DTYPES[weight.dtype], "abs": 1e-14 * weight.double().abs().amax().item()}
        assert attained(x, y, ord) == pytest.approx(norm.item(), **tolerance), f"ord {ord}. {message}"
        if ord == 1:
            assert sorted(x.unique().tolist()) in ([0, 1], [1]), message
            assert x.sum() == 1, message
        else:
            assert x.abs().eq(1).all(), message


def test_witnesses_attain_the_norms_of_random_layers(device, seed, numbers):
    for number in numbers[::8]:
        rng = np.random.default_rng((seed, number, 12))
        case = cases.random_case(rng)
        values = str(rng.choice(["normal", "integers", "sparse", "zeros", "constant", "uneven"]))
        dtype = cases.DTYPES[int(rng.integers(4))]
        weight = cases.random_weight(rng, case.weight_shape, dtype, values, device=device)
        assert_attains(weight, case, replay(seed, number, case))


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if cases.has_module(case)])
def test_witnesses_attain_the_norms_through_the_module(device, name):
    case = TABLE[name]
    weight = cases.random_values(np.random.default_rng(0), case.weight_shape, torch.float64, "normal").to(device)
    module = cases.module(case, weight)
    norms = convnorm.norms(module, case.in_shape)
    for ord, norm in ((1, norms.l1), (inf, norms.linf)):
        x = convnorm.witness(module, case.in_shape, ord=ord)
        assert not x.requires_grad
        assert x.shape[0] == 1
        assert x.shape[2:] == case.in_shape
        assert attained(x, module(x), ord) == pytest.approx(norm.item(), rel=1e-9)


def test_witnesses_stand_in_large_inputs(device):
    """Windows are found on a short axis: their place on the long one is counted from its nearer end."""
    for options in ({}, {"padding_mode": "replicate"}, {"padding_mode": "reflect"}, {"stride": 3, "dilation": 2}):
        conv = nn.Conv2d(3, 4, (5, 3), padding=(2, 1), bias=False, **options).double().to(device)
        nn.init.uniform_(conv.weight, 0, 1)
        norms = convnorm.norms(conv, [200, 301])
        for ord, norm in ((1, norms.l1), (inf, norms.linf)):
            x = convnorm.witness(conv, [200, 301], ord=ord)
            assert attained(x, conv(x), ord) == pytest.approx(norm.item(), rel=1e-9)


def test_signs_are_those_of_exact_sums(device):
    """What a float32 sum of merged taps would round away decides the sign of an entry."""
    tiny = 2.0**-30
    weight = torch.tensor([[[1, -tiny, -1], [0, tiny, 0]]], device=device)
    assert_attains(weight, cases.Case((1, 2, 3), (1,), (1,), (1,), {"padding_mode": "replicate"}))


def test_another_norm_has_no_witness():
    for function in (convnorm.witness, convnorm.subgradient):
        with pytest.raises(ValueError, match=r"convnorm: ord 2 must be 1 or inf"):
            function(torch.ones(1, 1, 3), [8], ord=2)
