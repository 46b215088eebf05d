"""The promise: every norm is that of the explicit matrix, on every backend, whatever the weight holds and how it lies.

To float64's 1e-9 and float32's 1e-5 relative; half precision is summed in float32, so it is held to 1e-5 as well.
"""

import itertools
from functools import cache

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import TABLE, replay

ops = torch.ops.convnorm
inf, nan = float("inf"), float("nan")


@cache
def fuzz_norms(seed, number):
    """(l1, linf) of a random case, found once for all backends."""
    case, weight = cases.fuzz(seed, number)
    return expected_norms(weight, case)


def expected_norms(weight, case):
    return oracle.norms(oracle.matrix(weight, *case.args, **case.options))


def measure(backend, weight, case):
    """The operator behind the public ones, which also names the winners: l1, linf, winners[2, 2]."""
    return [result.squeeze(0) for result in getattr(ops, f"measure_{backend}")([weight], case.plan)]


def result_dtype(weight):
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def assert_norms(got, expected, weight, message=""):
    dtype = result_dtype(weight)
    for name, value, norm in zip(("l1", "linf"), got, expected, strict=True):
        assert value.dtype == dtype, f"{name} is of {value.dtype}. {message}"
        norm = norm.to(dtype).double().item()  # inf where float32 cannot hold it
        assert value.item() == pytest.approx(norm, **tolerance(weight), nan_ok=True), f"{name} is wrong. {message}"


def tolerance(weight):
    """Relative, but for what float64 loses where merged taps cancel and for the least float above 0."""
    info = torch.finfo(result_dtype(weight))
    largest = weight.double().abs().nan_to_num(0, 0, 0).amax().item()
    rtol = 1e-9 if info.bits == 64 else 1e-5
    return {"rel": rtol, "abs": 1e-14 * largest + info.smallest_normal * info.eps}


def test_norms_equal_the_explicit_matrix(device, seed, numbers):
    for number in numbers:
        case, weight = cases.fuzz(seed, number, device)
        before = weight.clone()
        got = ops.norms(weight, *case.args, **case.options)
        assert_norms(got, fuzz_norms(seed, number), weight, replay(seed, number, case))
        assert torch.equal(weight, before), f"The weight was written to. {replay(seed, number, case)}"


def test_l1_and_linf_equal_norms(device, seed, numbers):
    for number in numbers[::10]:
        case, weight = cases.fuzz(seed, number, device)
        alone = [op(weight, *case.args, **case.options) for op in (ops.l1, ops.linf)]
        assert all(map(torch.equal, alone, ops.norms(weight, *case.args, **case.options))), replay(seed, number, case)


@pytest.mark.parametrize("wide", [False, True], ids=["without_float64", "with_float64"])
def test_norms_many_equal_norms(device, seed, numbers, wide):
    pairs = [(case, weight) for case, weight in (cases.fuzz(seed, number, device) for number in numbers[::5])
             if wide or weight.dtype != torch.float64]  # fmt: skip
    for start in range(0, len(pairs), 13):
        layers, weights = zip(*pairs[start : start + 13], strict=True)
        args, options = cases.columns(layers)
        got = ops.norms_many(list(weights), *args, **options)
        assert {values.dtype for values in got} == {torch.float64 if wide else torch.float32}
        for case, weight, *norms in zip(layers, weights, *got, strict=True):
            alone = ops.norms(weight, *case.args, **case.options)
            near = {} if norms[0].dtype == alone[0].dtype else {"rtol": 1e-5, "atol": 0}
            torch.testing.assert_close(norms, [a.to(norms[0].dtype) for a in alone], **near)


def test_winners_attain_the_norms(backend, device, seed, numbers):
    for number in numbers[::3]:
        case, weight = cases.fuzz(seed, number, device)
        matrix = oracle.matrix(weight, *case.args, **case.options)
        winners = measure(backend, weight, case)[2]
        tables = [cases.window_sums(case, matrix, ord) for ord in (1, inf)]
        sums = [table[tuple(winner)] for table, winner in zip(tables, winners.tolist(), strict=True)]
        sums = torch.tensor(sums, dtype=result_dtype(weight))
        assert_norms(sums, fuzz_norms(seed, number), weight, replay(seed, number, case))


def test_ties_go_to_the_first_winner(backend, device, seed, numbers):
    """Integers sum without rounding, so equal sums are equal on every backend."""
    for number in numbers[::3]:
        rng = np.random.default_rng((seed, number, 1))
        case = cases.random_case(rng)
        values = str(rng.choice(["integers", "zeros", "constant"]))
        weight = cases.random_weight(rng, case.weight_shape, torch.float32, values, device=device)
        matrix = oracle.matrix(weight, *case.args, **case.options)
        winners = measure(backend, weight, case)[2]
        for ord, winner in zip((1, inf), winners.tolist(), strict=True):
            sums = cases.window_sums(case, matrix, ord)
            first = np.unravel_index(sums.argmax(), sums.shape)
            assert tuple(winner) == first, f"ord {ord}. {replay(seed, number, case)}"


@pytest.mark.parametrize("values", ["integers", "poisoned", "normal"])
def test_large_layers_equal_the_reference(backend, device, seed, numbers, values):
    """Integers add up without rounding: then norms and winners are equal, whichever blocks the weights are cut into."""
    for number in numbers[::40]:
        rng = np.random.default_rng((seed, number, 13))
        case, dtype = cases.random_large_case(rng), cases.DTYPES[int(rng.integers(4))]
        weight = cases.random_values(rng, case.weight_shape, dtype, "normal" if values == "normal" else "integers")
        if values == "poisoned":
            for poison in rng.choice([nan, inf, -inf], int(rng.integers(1, 4))):
                weight.view(-1)[int(rng.integers(weight.numel()))] = poison
        weight = cases.lay_out(weight.to(device), str(rng.choice(cases.LAYOUTS)))
        got, expected = measure(backend, weight, case), measure("reference", weight.double().cpu(), case)
        message = f"{dtype}, {weight.stride()}. {replay(seed, number, case)}"
        if values == "normal":
            assert_norms(got[:2], expected[:2], weight, message)
        else:
            same = [
                torch.equal(g.double().nan_to_num(-1).cpu(), e.double().nan_to_num(-1))
                for g, e in zip(got, expected, strict=True)
            ]
            assert all(same), f"l1, linf, winners: {same}. {message}"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", TABLE)
def test_each_layout_of_the_weight_gives_the_same_norms(server, device, name, dtype):
    if server == ("triton", "cpu") and dtype != torch.float32:
        pytest.skip("Triton's interpreter takes too long")
    case = TABLE[name]
    values = cases.random_values(np.random.default_rng(0), case.weight_shape, dtype, "normal")
    expected = expected_norms(values, case)
    for layout in set(cases.LAYOUTS) - {"expanded"}:
        weight = cases.lay_out(values.to(device), layout)
        assert_norms(ops.norms(weight, *case.args, **case.options), expected, weight, layout)


@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_nan_and_inf_count_exactly_where_a_tap_is_read(device, seed, numbers, poison):
    """A tap that no output reads may hold anything: the matrix does not have it."""
    for number in numbers[::10]:
        rng = np.random.default_rng((seed, number, 2))
        case, dtype = cases.random_case(rng), cases.DTYPES[int(rng.integers(4))]
        weight = cases.random_values(rng, case.weight_shape, dtype, "normal")
        at = tuple(int(rng.integers(size)) for size in case.weight_shape)
        weight[at] = 1
        alone = torch.zeros_like(weight)
        alone[at] = 1
        read = oracle.matrix(alone, *case.args, **case.options).any()
        expected = [torch.tensor(abs(poison))] * 2 if read else expected_norms(weight, case)
        weight[at] = poison
        weight = cases.lay_out(weight.to(device), str(rng.choice(cases.LAYOUTS[:-1])))
        assert_norms(ops.norms(weight, *case.args, **case.options), expected, weight, replay(seed, number, case))


def test_nan_wins_over_inf(device):
    for row in ([inf, nan], [nan, inf], [1, nan], [-inf, nan]):
        weight = torch.tensor(row, device=device)
        for shape in ((1, 1, 2), (2, 1, 1), (1, 2, 1)):  # in one sum for l1, for linf or for both
            assert all(norm.isnan() for norm in ops.norms(weight.reshape(shape), 1, 0, [8]))


def test_infinities_that_merge_cancel_to_nan(device):
    weight = torch.tensor([[[inf, -inf]]], device=device)
    assert ops.l1(weight, 1, [1, 0], [1], padding_mode="replicate").isnan()
    assert ops.l1(weight, 1, [1, 0], [1]).item() == inf


def test_merged_taps_sum_before_their_absolute_value(device):
    weight = torch.tensor([[[1.0, -1.0, 0.25]]], device=device)
    for mode, expected in (("zeros", 1.0), ("circular", 0.25), ("replicate", 0.25)):
        norms = ops.norms(weight, 1, 1, [1], padding_mode=mode)
        assert [norm.item() for norm in norms] == [expected] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merged_taps_may_cancel_but_for_a_little(device, dtype):
    """Summed in float32 they would cancel altogether."""
    little = 2.0**-30
    weight = torch.tensor([[[1, little, -1]], [[-1, -little, 1]]], dtype=dtype, device=device)
    l1, linf = ops.norms(weight, 1, 1, [1], padding_mode="replicate")
    assert (l1.item(), linf.item()) == (2 * little, little)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_denormals_count(server, device, dtype):
    if server == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter takes a denormal bfloat16 for 0")
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.full((2, 3, 3, 3), least, dtype=dtype, device=device)
    l1, linf = ops.norms(weight, 1, 1, [8, 8])
    assert (l1.item(), linf.item()) == (18 * least, 27 * least)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_zeros_have_norm_zero(device, dtype):
    for zero in (0.0, -0.0):
        for case in (TABLE["conv2d"], TABLE["replicate"], TABLE["linear"]):
            weight = torch.full(case.weight_shape, zero, dtype=dtype, device=device)
            assert [norm.item() for norm in ops.norms(weight, *case.args, **case.options)] == [0, 0]


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 60000.0), (torch.bfloat16, 1e38)])
def test_half_precision_is_summed_in_float32(device, dtype, largest):
    weight = torch.full((2, 3, 3, 3), largest, dtype=dtype, device=device)
    value = weight[0, 0, 0, 0].item()
    l1, linf = ops.norms(weight, 1, 1, [8, 8])
    assert l1.item() == pytest.approx(18 * value if dtype == torch.float16 else inf)  # past float32 as well: inf
    assert linf.item() == pytest.approx(27 * value if dtype == torch.float16 else inf)
    weight = torch.ones(1, 4097, 1, dtype=dtype, device=device)  # half precision cannot count so far
    assert ops.linf(weight, 1, 0, [4]).item() == 4097


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "strided"])
@pytest.mark.parametrize(
    "shape", [(1, 1 << 22), (1 << 22, 1), (1 << 20, 1, 3), (1, 1 << 20, 3), (64, 1 << 16)], ids=str
)
def test_long_sums_do_not_drift(device, shape, step):
    """One running sum in float32 over as many equal terms is off by a hundredth and more."""
    rows, columns, *kernel = shape
    axes = len(kernel)
    weight = torch.full((rows, columns * step, *kernel), 0.1, device=device)[:, ::step]
    term = weight[0, 0].double().sum().item()
    l1, linf = ops.norms(weight, [1] * axes, [0] * axes, [8] * axes)
    assert l1.item() == pytest.approx(rows * term, rel=1e-5)
    assert linf.item() == pytest.approx(columns * term, rel=1e-5)


def test_a_weight_may_change_dtype_between_calls(device):
    case = TABLE["conv2d"]
    master = cases.random_values(np.random.default_rng(0), case.weight_shape, torch.float64, "normal").to(device)
    for dtype in (*cases.DTYPES, *reversed(cases.DTYPES)):
        weight = master.to(dtype)
        assert_norms(ops.norms(weight, *case.args, **case.options), expected_norms(weight, case), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_a_weight_may_change_device_between_calls():
    case = TABLE["conv2d"]
    weight = cases.random_values(np.random.default_rng(0), case.weight_shape, torch.float64, "normal")
    for device in ("cpu", "cuda", "cpu", "cuda"):
        norms = ops.norms(weight.to(device), *case.args, **case.options)
        assert all(norm.device.type == device for norm in norms)
        assert_norms(norms, expected_norms(weight, case), weight)


def test_a_weight_may_change_in_place_between_calls(device):
    case = TABLE["conv2d"]
    weight = torch.ones(case.weight_shape, device=device)
    before = ops.l1(weight, *case.args)
    assert ops.l1(weight.mul_(2), *case.args) == 2 * before


def test_one_entry_serves_all_axes(device):
    weight = cases.random_values(np.random.default_rng(0), (4, 3, 3, 3), torch.float64, "normal").to(device)
    expected = ops.norms(weight, [2, 2], [1, 1], [7, 7], dilation=[2, 2])
    for two, one, seven in ((2, 1, [7, 7]), ([2], [1], [7, 7]), ([2, 2], [1, 1, 1, 1], [7, 7])):
        assert all(map(torch.equal, ops.norms(weight, two, one, seven, dilation=two), expected))


SPLIT = {
    "wide": (256, 256, 3, 3),
    "pointwise": (512, 384, 1, 1),
    "one_row": (1, 100_003),
    "one_column": (100_003, 1),
    "linear": (1000, 512),
    "stem": (64, 3, 7, 7),
    "depthwise": (512, 1, 3, 3),
    "conv1d": (300, 200, 5),
    "conv3d": (64, 48, 3, 3, 3),
}


@pytest.fixture
def threads(backend, device):
    """Sets how many threads there are, until the test is over."""
    if (backend, device) != ("native", "cpu"):
        pytest.skip("a promise of the C++ kernels")
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SPLIT.values(), ids=SPLIT)
def test_threads_do_not_change_a_bit(backend, threads, shape, dtype):
    axes, groups = len(shape) - 2, 512 if shape == SPLIT["depthwise"] else 1
    case = cases.Case(shape, (2,) * axes, (1,) * axes, (9,) * axes, {"groups": groups})
    weight = cases.random_values(np.random.default_rng(0), shape, dtype, "normal")
    weights = [weight, cases.lay_out(weight, "channels_last"), cases.lay_out(weight, "unaligned")]
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        many = ops.measure_native(weights, case.plan * 3)
        results.append([*many, *(value for weight in weights for value in measure(backend, weight, case))])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def test_threads_leave_each_others_sums_alone(backend, threads):
    """Where taps are summed apart, the vector that holds the last few columns reaches beyond the last tap."""
    case = cases.Case((30_000, 17, 2), padding=(1,), in_shape=(1,))
    weight = cases.random_values(np.random.default_rng(0), case.weight_shape, torch.float64, "normal")
    weight = cases.lay_out(weight, "channels_last")
    threads(1)
    alone = measure(backend, weight, case)
    threads(2)
    for _ in range(20):
        assert all(map(torch.equal, measure(backend, weight, case), alone))


def test_threads_do_not_change_a_bit_of_any_layer(backend, threads, seed, numbers):
    """Ten times each: threads that write where others do are not seen at every run."""
    for number in numbers[::40]:
        rng = np.random.default_rng((seed, number, 19))
        case, dtype = cases.random_large_case(rng), cases.DTYPES[int(rng.integers(4))]
        weight = cases.random_values(rng, case.weight_shape, dtype, "normal")
        weight = cases.lay_out(weight, str(rng.choice(cases.LAYOUTS)))
        threads(1)
        alone = measure(backend, weight, case)
        threads(2)
        for _ in range(10):
            assert all(map(torch.equal, measure(backend, weight, case), alone)), replay(seed, number, case)


def test_the_papers_theorem_holds_under_its_assumption(device):
    """Liang & Huang, Theorem 1: zero padding below the kernel's size, an input above it, no dilation, no groups."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        k, stride = rng.integers(1, 6, 2), rng.integers(1, 5, 2)
        padding = [int(rng.integers(0, size)) for size in k]
        in_shape = [int(2 * (size + s) + rng.integers(0, 9)) for size, s in zip(k, stride, strict=True)]
        weight = torch.from_numpy(rng.standard_normal((*rng.integers(1, 6, 2), *k))).to(device)
        taps = weight.abs().sum(0)  # [in, *k]
        residues = itertools.product(range(stride[0]), range(stride[1]))
        classes = [taps[:, a :: stride[0], b :: stride[1]].sum((1, 2)) for a, b in residues]
        l1, linf = ops.norms(weight, stride.tolist(), padding, in_shape)
        torch.testing.assert_close(l1, torch.stack(classes).amax(), rtol=1e-9, atol=0)
        torch.testing.assert_close(linf, weight.abs().sum((1, 2, 3)).amax(), rtol=1e-9, atol=0)
