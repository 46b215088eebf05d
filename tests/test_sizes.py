"""The promise: no size is too large: not the channels, not the kernel, not the weight's place in memory."""

import cases
import numpy as np
import oracle
import pytest
import torch

ops = torch.ops.convnorm


def half_precision_room(size, device, folder):
    """Room for ``size`` float16 of which a few are ever touched: a sparse file, or most of a GPU's memory."""
    if device == "cpu":
        return torch.from_file(str(folder / "room"), shared=True, size=size, dtype=torch.float16)
    if torch.cuda.mem_get_info()[0] < 3 * size:
        pytest.skip("too little memory on the GPU")
    return torch.empty(size, dtype=torch.float16, device=device)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((2, 1, 3), (2**31 + 8, 3, 1)), ((3, 2, 3), (3, 2**31 + 1, 1)), ((2, 2, 3), (30, 7, 2**30 + 1))],
    ids=["rows", "columns", "taps"],
)
def test_weights_may_span_more_than_2_to_the_31_elements(device, tmp_path, shape, strides):
    room = half_precision_room(2**31 + 2**10, device, tmp_path)
    weight = room.as_strided(shape, strides)
    weight.copy_(torch.arange(1.0, weight.numel() + 1).reshape(shape))
    l1, linf = ops.norms(weight, 1, 1, [8])
    assert l1 == weight.float().sum((0, 2)).amax()
    assert linf == weight.float().sum((1, 2)).amax()


def test_weights_may_have_more_than_2_to_the_31_elements(backend, device):
    if backend != "native":
        pytest.skip("the others would take this one's copy in memory, or too long")
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float16, device=device).expand(2**14, 2**14, 3, 3)
    l1, linf = ops.norms(weight, 1, 1, [8, 8])
    assert (l1.item(), linf.item()) == (9 * 2**14, 9 * 2**14)


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("shape", [(1, 100_003, 3), (100_003, 1, 3), (100_003, 7), (7, 100_003)], ids=str)
def test_the_last_of_many_channels_can_win(backend, device, shape):
    axes = len(shape) - 2
    case = cases.Case(shape, (1,) * axes, (1,) * axes, (8,) * axes)
    weight = torch.zeros(shape, device=device)
    weight[-1, -1] = 2
    l1, linf, winners = getattr(ops, f"measure_{backend}")([weight], case.plan)
    assert l1 == linf == 2 * 3**axes
    assert winners[0, :, 0].tolist() == [shape[1] - 1, shape[0] - 1]


@pytest.mark.usefixtures("at_full_speed")
def test_the_last_of_many_groups_can_win(backend, device):
    groups = 30_011
    case = cases.Case((2 * groups, 1, 3), (1,), (1,), (8,), {"groups": groups})
    weight = torch.zeros(2 * groups, 1, 3, device=device)
    weight[-1] = -1
    l1, linf, winners = getattr(ops, f"measure_{backend}")([weight], case.plan)
    assert l1 == linf == 3
    assert winners[0, :, 0].tolist() == [groups - 1, 2 * groups - 1]


LARGE_KERNELS = {
    "larger_than_input": cases.Case((4, 1, 31, 31), (1, 1), (15, 15), (12, 12), {"groups": 4}),
    "strided": cases.Case((3, 2, 33, 5), (7, 3), (16, 2), (40, 9)),
    "long": cases.Case((2, 2, 400), (3,), (199, 150), (230,), {"padding_mode": "reflect"}),
    "often_around": cases.Case((2, 2, 31), (1,), (7, 7), (24,), {"padding_mode": "circular"}),
    "merged_often": cases.Case((2, 3, 9, 11), (1, 1), (4, 5), (4, 5), {"padding_mode": "circular"}),
    "clamped_often": cases.Case((2, 2, 3, 21), (2, 1), (1, 20), (3, 4), {"padding_mode": "replicate"}),
    "volume": cases.Case((1, 2, 7, 7, 7), (2, 1, 3), (3, 3, 3), (5, 4, 6)),
    "transposed": cases.Case((2, 2, 41), (16,), (12,), (20,), {"transposed": True, "output_padding": [3]}),
}


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("name", LARGE_KERNELS)
def test_large_kernels_equal_the_explicit_matrix(device, name):
    case = LARGE_KERNELS[name]
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(case.weight_shape))
    expected = oracle.norms(oracle.matrix(weight, *case.args, **case.options))
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        got = ops.norms(weight.to(device, dtype), *case.args, **case.options)
        torch.testing.assert_close([norm.double().cpu() for norm in got], list(expected), rtol=rtol, atol=0)


@pytest.mark.usefixtures("at_full_speed")
def test_a_large_network_is_measured_at_once(device):
    """More layers than any block of records in constant memory or on a stack would hold."""
    rng = np.random.default_rng(0)
    layers = [cases.random_case(rng) for _ in range(700)]
    weights = [cases.random_weight(rng, case.weight_shape, values="normal", device=device) for case in layers]
    args, options = cases.columns(layers)
    l1s, linfs = ops.norms_many(weights, *args, **options)
    alone = [ops.norms(weight, *case.args, **case.options) for case, weight in zip(layers, weights, strict=True)]
    torch.testing.assert_close(torch.stack([l1s, linfs], 1), torch.stack([torch.stack(pair) for pair in alone]))
