"""The CUDA kernels: they compile for every target; run by an emulator, or on a GPU, they equal the reference."""

import itertools
import re
import shutil
import sys

import cases
import numpy as np
import pytest
import torch
from cuda_kernels import (
    COMMON,
    CUDA,
    CUTS,
    H200,
    ROOT,
    WARNINGS,
    emulator,
    guarded,
    needs_gpu,
    network,
    resnet18,
    run,
    to_gpu,
)

from convnorm.plan import read_plan
from convnorm.winners import as_matrix, slice_index, slice_norm

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

reference = torch.ops.convnorm.measure_reference


@pytest.mark.skipif(NVCC is None, reason="nvcc is not found")
def test_compiles_for_every_target_without_a_warning(tmp_path):
    targets = re.search(r"CUDA_TARGETS = \(([\d, ]+)\)", (ROOT / "setup.py").read_text())[1].split(", ")
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    flags = ["-O3", "-Werror", "all-warnings", "--threads", "0", f"-Xcompiler={','.join(WARNINGS)},-fvisibility=hidden"]
    for source in CUDA.glob("*.cu"):
        run([NVCC, *COMMON, *flags, *codes, "-c", source, "-o", tmp_path / "object.o"])


def emulated(weights, plan, cut=H200):
    return emulator().measure(weights, plan, cut)


def on_gpu(weights, plan):
    return tuple(result.cpu() for result in torch.ops.convnorm.measure_native(weights, plan))


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=needs_gpu)])
def measure(request):
    """``measure(weights, plan)`` by the kernels, of weights on the CPU, with the results there."""
    if request.param == "emulated":
        return emulated
    return lambda weights, plan: on_gpu([to_gpu(weight) for weight in weights], plan)


def assert_same(got, weights, plan, message=""):
    """The reference's values but for rounding, and winners that attain them."""
    layers = read_plan(plan)
    expected = reference([weight.double() for weight in weights], plan)
    for ord, (values, norms) in enumerate(zip(got[:2], expected[:2], strict=True)):
        for weight, layer, value, norm, winner in zip(weights, layers, values, norms, got[2][:, ord], strict=True):
            rtol = 1e-12 if weight.dtype == value.dtype == torch.float64 else 2e-6
            noise = 1e-13 * weight.double().abs().max().item() + 1e-44  # where merged taps cancel; the least float
            norm = norm.to(value.dtype).item()  # float32's inf is right where float32 cannot hold it
            column = (ord == 0) != layer.transposed
            part = as_matrix(weight.double(), layer)[slice_index(weight, layer, winner[:1], column)]
            attained = slice_norm(part, layer, winner, column).to(value.dtype)
            for number in (value.item(), attained.item()):
                assert number == norm or abs(number - norm) <= rtol * norm + noise, (
                    f"{('l1', 'linf')[ord]} is {value.item()!r}, at {winner.tolist()} {attained.item()!r}, "
                    f"but {norm!r} by the reference. {message}"
                )


def assert_equal(got, weights, plan, message=""):
    """For weights whose sums need no rounding: then equal sums are equal, and the first of them wins everywhere."""
    for result, want in zip(got, reference(weights, plan), strict=True):
        assert torch.equal(result, want), f"{result}, not {want}. {message}"


def test_random_small_layers(measure, seed):
    for number in range(600):
        case, weight = cases.fuzz(seed, number)
        assert_same(measure([weight], case.plan), [weight], case.plan, cases.replay(seed, number, case))


def test_random_large_layers(measure, seed):
    """Of all layouts, large enough for several tiles."""
    for number in range(60):
        rng = np.random.default_rng((seed, number))
        case = cases.random_large_case(rng, elements=1 << 17)
        dtype = cases.DTYPES[int(rng.integers(4))]
        weight = cases.random_values(rng, case.weight_shape, dtype, str(rng.choice(["normal", "integers"])))
        weight = cases.lay_out(weight, str(rng.choice(cases.LAYOUTS)))
        assert_same(measure([weight], case.plan), [weight], case.plan, cases.replay(seed, number, case))


def test_every_cut_has_the_same_winners(seed):
    for number, cut in itertools.product(range(40), CUTS):
        rng = np.random.default_rng((seed, number))
        case = cases.random_large_case(rng, elements=1 << 14) if number % 2 else cases.random_case(rng)
        weight = cases.random_values(rng, case.weight_shape, torch.float32, "integers")
        weight = cases.lay_out(weight, str(rng.choice(cases.LAYOUTS)))
        assert_equal(
            emulated([weight], case.plan, cut), [weight], case.plan, f"{cut}, {cases.replay(seed, number, case)}"
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nothing_is_read_past_the_end(seed, dtype):
    for number in range(40):
        rng = np.random.default_rng((seed, number))
        case = cases.random_large_case(rng, elements=1 << 12)
        weight = cases.random_values(rng, case.weight_shape, dtype, "normal")
        weight = guarded(cases.lay_out(weight, str(rng.choice(["contiguous", "channels_last", "reversed"]))))
        assert_same(emulated([weight], case.plan), [weight], case.plan, cases.replay(seed, number, case))


@pytest.mark.parametrize(
    ("shape", "strides"), [((3, 200), (2**31 + 8, 1)), ((3, 200), (2**31 + 5, 3)), ((200, 3), (2, 2**31 + 5))]
)
def test_offsets_take_64_bits(measure, tmp_path, shape, strides):
    sparse = torch.from_file(str(tmp_path / "weight"), shared=True, size=5 << 30, dtype=torch.bfloat16)  # in few blocks
    case = cases.Case(shape)
    weight = sparse.as_strided(shape, strides).copy_(torch.randint(-9, 9, shape))
    assert_equal(measure([weight], case.plan), [weight], case.plan)


@pytest.mark.parametrize("layers", [3, 40, 300])
def test_networks_take_at_most_two_launches(seed, layers):
    rng = np.random.default_rng((seed, layers))
    drawn = [cases.random_case(rng, merging=bool(rng.random() < 0.1)) for _ in range(layers)]
    weights = [cases.random_values(rng, case.weight_shape, torch.float32, "integers") for case in drawn]
    emulator().work()
    assert_equal(emulated(weights, network(drawn)), weights, network(drawn))
    launches, _ = emulator().work()
    assert launches <= 2 if layers < 100 else 2 < launches <= 8  # more layers than fit into one kernel's argument
    weights = [weight.to(cases.DTYPES[int(rng.integers(4))]) for weight in weights]
    assert_same(emulated(weights, network(drawn)), weights, network(drawn))


def test_resnet18_takes_two_launches_and_little_memory():
    layers = resnet18()
    weights = [torch.randn(case.weight_shape) for case in layers]
    emulator().work()
    assert_same(emulated(weights, network(layers)), weights, network(layers))
    launches, scratch = emulator().work()
    assert launches == 2
    assert scratch < 0.03 * sum(weight.nbytes for weight in weights)


def test_depthwise_layers_leave_no_tables():
    case = cases.Case((3000, 1, 3, 3), (1, 1), (1, 1), (8, 8), {"groups": 3000})
    weight = torch.randint(-9, 9, case.weight_shape).float()
    emulator().work()
    assert_equal(emulated([weight], case.plan), [weight], case.plan)
    _, scratch = emulator().work()
    assert scratch < 0.01 * weight.nbytes


def test_windows_that_fit_into_no_argument_are_left_to_the_reference():
    launches = []
    for taps in (30, 300):
        case = cases.Case((3, 2, taps), (1,), (taps - 1,), (taps // 2,))
        weight = torch.randint(-9, 9, case.weight_shape).float()
        emulator().work()
        assert_equal(emulated([weight, weight], case.plan + case.plan), [weight] * 2, case.plan + case.plan)
        launches.append(emulator().work()[0])
    assert launches == [2, 0]


@pytest.mark.parametrize(
    "case",
    [
        cases.Case((3000, 5)),  # taller than a tile
        cases.Case((5, 3000)),
        cases.Case((40, 70, 3, 3), (1, 1), (1, 1), (2, 2)),  # four windows of outputs
        cases.Case((9, 5, 11, 11), (1, 1), (5, 5), (6, 6)),  # 36 of them, more than a mask has bits
        cases.Case((1, 1, 1024), (512,), (0,), (4096,)),  # half a thousand windows of inputs
        cases.Case((3, 2, 300), (1,), (299,), (200,)),  # so many windows that they fit into no argument
        cases.Case((2, 2, 1), (2,), (1,), (1,)),  # every output reads nothing but padding
        cases.Case((64, 48, 3, 3), (1, 1), (1, 1), (4, 4), {"padding_mode": "reflect"}),
        cases.Case((48, 1, 31), (1,), (15,), (64,), {"groups": 48, "padding_mode": "replicate"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_unusual_layers(measure, case, dtype):
    for layout in cases.LAYOUTS:
        weight = cases.lay_out(torch.randint(-3, 4, case.weight_shape).to(dtype), layout)
        assert_equal(measure([weight], case.plan), [weight], case.plan, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_count_where_their_tap_counts(measure, seed, layout, value):
    for number in range(30):
        rng = np.random.default_rng((seed, number))
        case = cases.random_large_case(rng, elements=1 << 12) if number % 2 else cases.random_case(rng, merging=False)
        weight = cases.random_values(rng, case.weight_shape, torch.float32, "integers")
        weight[tuple(int(rng.integers(size)) for size in weight.shape)] = value
        weight = cases.lay_out(weight, layout)
        got, want = measure([weight], case.plan), reference([weight], case.plan)
        for result, expected in zip(got, want, strict=True):
            assert torch.equal(result.nan_to_num(-1), expected.nan_to_num(-1)), cases.replay(seed, number, case)


@needs_gpu
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_graphs_capture_the_kernels(dtype):
    """Replayed, they measure what the weights have become."""
    layers = [*resnet18(), cases.TABLE["depthwise"], cases.TABLE["reflect"], cases.TABLE["small_input"]]
    weights = [torch.randint(-9, 9, case.weight_shape, device="cuda").to(dtype) for case in layers]
    on_gpu(weights, network(layers))  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = torch.ops.convnorm.measure_native(weights, network(layers))
    for _ in range(3):
        for weight in weights:
            weight.copy_(torch.randint(-9, 9, weight.shape))
        graph.replay()
        on_cpu = [weight.cpu() for weight in weights]
        assert_same([result.cpu() for result in results], on_cpu, network(layers))
        for layer, winner in enumerate(results[2].cpu()):
            assert torch.equal(winner, reference([on_cpu[layer]], layers[layer].plan)[2][0])


@needs_gpu
def test_results_are_the_same_to_the_last_bit_every_time():
    layers = resnet18()
    weights = [torch.randn(case.weight_shape, device="cuda") for case in layers]
    first = on_gpu(weights, network(layers))
    for _ in range(20):
        assert all(map(torch.equal, on_gpu(weights, network(layers)), first))


@needs_gpu
def test_streams_and_devices_are_those_of_pytorch():
    weight, case = torch.zeros(512, 512, 3, 3, device="cuda"), resnet18()[-2]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        weight.fill_(1)
        assert torch.ops.convnorm.measure_native([weight], case.plan)[0].item() == 9 * 512
    if torch.cuda.device_count() > 1:
        assert torch.ops.convnorm.measure_native([weight.to("cuda:1")], case.plan)[0].item() == 9 * 512
        assert torch.cuda.current_device() == 0


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nothing_comes_to_be_on_other_gpus():
    """To make a GPU current makes a context on it: also to make one current again that was by default."""
    lines = [
        "import convnorm, torch",
        "weight = torch.ones(4, 3, 3, 3, device='cuda:1')",
        "assert torch.ops.convnorm.measure_native([weight], '1 0 2 3 0 0 0 3 0 0 0')[0].item() == 36",
        "assert not torch._C._cuda_hasPrimaryContext(0)",
    ]
    run([sys.executable, "-c", "\n".join(lines)])
