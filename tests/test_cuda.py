"""The CUDA kernels: they compile for every target; run by an emulator, or on a GPU, they equal the reference.

The emulator (``tests/emulation``) runs on the CPU the very code of the kernels and of the host around them, all but
the launch.
"""

import ctypes
import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import pytest
import torch

from convnorm.backends import why_not
from convnorm.momentum import Momentum, no_momentum
from convnorm.plan import read_plan
from convnorm.winners import as_matrix, slice_index, slice_norm

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
if not CUDA.exists():
    pytest.skip("away from the source tree there is no CUDA code to compile", allow_module_level=True)
TORCH = Path(torch.__file__).parent
COMMON = ["-isystem", str(TORCH / "include"), f"-I{CUDA.parent}", "-std=c++17", "-DUSE_CUDA"]
COMMON += re.findall(r"-DTORCH_TARGET_VERSION=\w+", (ROOT / "setup.py").read_text())
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CXX = os.environ.get("CXX", "c++")
H200 = (396, 1 << 15)  # the tiles that it holds at a time, and the terms of a part: see Cut in csrc/cuda/batch.h
CUTS = [H200, (1, 50), (20, 2000), (1 << 20, 1 << 30)]
H200_TERMS = (528, 8)  # the blocks that it holds at a time, and the terms of each: see TermCut in csrc/cuda/decay.h
TERM_CUTS = [H200_TERMS, (1, 1), (3, 5), (1 << 20, 1 << 20)]

reference = torch.ops.convnorm.measure_reference
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or bool(why_not("native", "cuda")), reason="needs a GPU")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not found")
def test_compiles_for_every_target_without_a_warning(tmp_path):
    targets = re.search(r"CUDA_TARGETS = \(([\d, ]+)\)", (ROOT / "setup.py").read_text())[1].split(", ")
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    flags = ["-O3", "-Werror", "all-warnings", "--threads", "0", f"-Xcompiler={','.join(WARNINGS)},-fvisibility=hidden"]
    for source in CUDA.glob("*.cu"):
        run([NVCC, *COMMON, *flags, *codes, "-c", source, "-o", tmp_path / "object.o"])


@pytest.fixture(scope="session")  # a process cannot load it twice, and may leave this module and come back
def emulated(tmp_path_factory):
    """``emulated(weights, plan, cut=...)``, as the operators measure_native and measure_reference."""
    if shutil.which(CXX) is None:
        pytest.skip(f"{CXX} is not found")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = [*COMMON, *WARNINGS, "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-fvisibility=hidden", "-shared"]
    source = Path(__file__).parent / "emulation" / "kernels_emulated.cpp"
    run([CXX, *flags, source, "-o", library, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"])
    torch.ops.load_library(library)

    def measure(weights, plan, cut=H200):
        return torch.ops.convnorm_emulated.measure(weights, plan, cut)

    return measure


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=needs_gpu)])
def measure(request):
    """``measure(weights, plan)`` by the kernels, with the results on the CPU."""
    if request.param == "emulated":
        return request.getfixturevalue("emulated")
    return lambda weights, plan: on_gpu([to_gpu(weight) for weight in weights], plan)


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=needs_gpu)])
def decay(request):
    """``decay(weights, grads, state, rates, momentum, plan, linf)`` by the kernels, of tensors on the CPU."""
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return decay_emulated
    return decay_on_gpu


def decay_emulated(weights, grads, state, *rest, measured=False, cut=H200, term_cut=H200_TERMS):
    torch.ops.convnorm_emulated.decay(weights, grads, *state.tensors(), *rest, measured, cut, term_cut)


def decay_on_gpu(weights, grads, state, rates, *rest, measured=False, **_):
    written = [*grads, *state.tensors()]
    there = [to_gpu(tensor) for tensor in written]
    grads_there, state_there = there[: len(grads)], there[len(grads) :]
    inputs = [to_gpu(weight) for weight in weights], grads_there, *state_there, rates.cuda()
    torch.ops.convnorm.decay_native(*inputs, *rest, measured)
    for tensor, result in zip(written, there, strict=True):
        tensor.untyped_storage().copy_(result.untyped_storage())


def run(command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def to_gpu(weight):
    """The weight with all the memory around it, so that it lies there as it lies here."""
    empty, memory = torch.empty(0, dtype=weight.dtype, device="cuda"), weight.untyped_storage().cuda()
    return empty.set_(memory, weight.storage_offset(), weight.shape, weight.stride())


def on_gpu(weights, plan):
    return tuple(result.cpu() for result in torch.ops.convnorm.measure_native(weights, plan))


def network(layers):
    return "".join(case.plan for case in layers)


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


def guarded(weight):
    """The same weight, ending where a page begins that nobody may read; None where it does not fill its memory."""
    if weight.numel() != weight.untyped_storage().nbytes() // weight.itemsize:
        return None
    page, size = mmap.PAGESIZE, weight.numel() * weight.itemsize
    start = -size % page
    memory = mmap.mmap(-1, start + size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + start + size), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=weight.dtype, count=weight.numel(), offset=start)
    return flat.as_strided(weight.shape, weight.stride()).copy_(weight)


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


def test_every_cut_has_the_same_winners(emulated, seed):
    for number, cut in itertools.product(range(40), CUTS):
        rng = np.random.default_rng((seed, number))
        case = cases.random_large_case(rng, elements=1 << 14) if number % 2 else cases.random_case(rng)
        weight = cases.random_values(rng, case.weight_shape, torch.float32, "integers")
        weight = cases.lay_out(weight, str(rng.choice(cases.LAYOUTS)))
        assert_equal(
            emulated([weight], case.plan, cut), [weight], case.plan, f"{cut}, {cases.replay(seed, number, case)}"
        )


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nothing_is_read_past_the_end(emulated, seed, dtype):
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
def test_networks_take_at_most_two_launches(emulated, seed, layers):
    rng = np.random.default_rng((seed, layers))
    drawn = [cases.random_case(rng, merging=bool(rng.random() < 0.1)) for _ in range(layers)]
    weights = [cases.random_values(rng, case.weight_shape, torch.float32, "integers") for case in drawn]
    torch.ops.convnorm_emulated.work()
    assert_equal(emulated(weights, network(drawn)), weights, network(drawn))
    launches, _ = torch.ops.convnorm_emulated.work()
    assert launches <= 2 if layers < 100 else 2 < launches <= 8  # more layers than fit into one kernel's argument
    weights = [weight.to(cases.DTYPES[int(rng.integers(4))]) for weight in weights]
    assert_same(emulated(weights, network(drawn)), weights, network(drawn))


def resnet18():
    shapes = [(64, 3, 7, 7)]
    for width, before in ((64, 64), (128, 64), (256, 128), (512, 256)):
        shapes += [(width, before, 3, 3), *[(width, width, 3, 3)] * 3, *[(width, before, 1, 1)] * (width != before)]
    layers = [cases.Case(s, (1 + (s[0] != s[1]),) * 2, (s[2] // 2,) * 2, (32, 32)) for s in shapes]
    return [*layers, cases.Case((1000, 512))]


def test_resnet18_takes_two_launches_and_little_memory(emulated):
    layers = resnet18()
    weights = [torch.randn(case.weight_shape) for case in layers]
    torch.ops.convnorm_emulated.work()
    assert_same(emulated(weights, network(layers)), weights, network(layers))
    launches, scratch = torch.ops.convnorm_emulated.work()
    assert launches == 2
    assert scratch < 0.03 * sum(weight.nbytes for weight in weights)


def test_depthwise_layers_leave_no_tables(emulated):
    case = cases.Case((3000, 1, 3, 3), (1, 1), (1, 1), (8, 8), {"groups": 3000})
    weight = torch.randint(-9, 9, case.weight_shape).float()
    torch.ops.convnorm_emulated.work()
    assert_equal(emulated([weight], case.plan), [weight], case.plan)
    _, scratch = torch.ops.convnorm_emulated.work()
    assert scratch < 0.01 * weight.nbytes


def test_windows_that_fit_into_no_argument_are_left_to_the_reference(emulated):
    launches = []
    for taps in (30, 300):
        case = cases.Case((3, 2, taps), (1,), (taps - 1,), (taps // 2,))
        weight = torch.randint(-9, 9, case.weight_shape).float()
        torch.ops.convnorm_emulated.work()
        assert_equal(emulated([weight, weight], case.plan + case.plan), [weight] * 2, case.plan + case.plan)
        launches.append(torch.ops.convnorm_emulated.work()[0])
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


def random_network(rng, layers, elements=1 << 12):
    """Cases, weights and gradients of all layouts and dtypes; some gradients are missing."""
    drawn = [
        cases.random_large_case(rng, elements) if rng.random() < 0.2 else cases.random_case(rng) for _ in range(layers)
    ]
    dtypes = [cases.DTYPES[int(rng.integers(4))] for _ in drawn]
    layouts = [str(rng.choice(cases.LAYOUTS)) for _ in drawn]
    grads = []
    for case, dtype in zip(drawn, dtypes, strict=True):
        dtype = dtype if rng.random() < 0.8 else cases.DTYPES[int(rng.integers(4))]
        shape = case.weight_shape if rng.random() < 0.8 else (0,)
        layout = str(rng.choice([layout for layout in cases.LAYOUTS if layout != "expanded"])) if len(shape) > 1 else ""
        grads.append(cases.lay_out(cases.random_values(rng, shape, dtype, "normal"), layout))
    return drawn, dtypes, layouts, grads


def random_state(rng, state, drawn, linf):
    """In the midst of training: some terms are there, channels come again."""
    terms = len(state.channels)
    state.signs.copy_(torch.from_numpy(rng.integers(-9, 10, state.signs.shape)))
    for layer, case in enumerate(drawn):
        rows, columns = case.weight_shape[0], case.weight_shape[1] * case.groups
        channels = columns if linf == case.transposed else rows
        few = rng.integers(0, channels, int(rng.integers(1, 6)))
        state.channels[:, layer] = torch.from_numpy(np.append(few, -1)[rng.integers(0, len(few) + 1, terms)])
    state.clock.fill_(int(rng.integers(0, 3 * terms)))


def copied(tensor):
    """With the memory around it."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def memory(tensor):
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_decays(decay, weights, grads, state, rates, momentum, plan, linf, message="", exact=False, **options):
    """One step, which leaves what the reference leaves: the state to the last bit, the gradients but for rounding. The
    norms are compared where they are ``exact``, else taken as they are.
    """
    want, copies = Momentum(*map(copied, state.tensors())), {id(grad): copied(grad) for grad in grads}
    want_grads = [copies[id(grad)] for grad in grads]
    decay(weights, grads, state, rates, momentum, plan, linf, **options)
    if not exact:
        want.norms.copy_(state.norms)
        want.winners.copy_(state.winners)
    reference = torch.ops.convnorm.decay_reference
    reference(weights, want_grads, *want.tensors(), rates, momentum, plan, linf, not exact)
    for name, got, expected in zip(Momentum.__annotations__, state.tensors(), want.tensors(), strict=True):
        assert torch.equal(memory(got), memory(expected)), f"{name}. {message}"
    for got, expected, rate in zip(grads, want_grads, rates, strict=True):
        tolerance = {"rtol": ROUNDING[got.dtype], "atol": ROUNDING[got.dtype] * (1 + rate.item()), "equal_nan": True}
        torch.testing.assert_close(memory(got), memory(expected), **tolerance, msg=lambda text: f"{text} {message}")


@pytest.mark.parametrize(("momentum", "numbers"), [(0.0, 25), (0.5, 40), (0.9, 5)])
def test_decay_of_random_networks(decay, seed, momentum, numbers):
    for number in range(numbers):
        rng = np.random.default_rng((seed, number))
        drawn, dtypes, layouts, grads = random_network(rng, int(rng.integers(1, 5)))
        plan, linf = network(drawn), bool(rng.integers(2))
        cuts = {"cut": CUTS[number % 4], "term_cut": TERM_CUTS[int(rng.integers(4))]}
        rates = torch.from_numpy(rng.uniform(0, 2, len(drawn)))
        state = None
        for values in ("integers", str(rng.choice(cases.VALUES)), "normal"):
            weights = [
                cases.lay_out(cases.random_values(rng, case.weight_shape, dtype, values), layout)
                for case, dtype, layout in zip(drawn, dtypes, layouts, strict=True)
            ]
            if state is None:
                state = no_momentum(weights, plan, linf, momentum)
                if rng.random() < 0.3:
                    state.signs = state.signs.int()
                if rng.random() < 0.7:
                    random_state(rng, state, drawn, linf)
            message = f"Again: --seed {seed}, number {number}, {values}, {layouts}, {drawn}"
            known = {"exact": values == "integers", "measured": values == "normal"}
            assert_decays(decay, weights, grads, state, rates, momentum, plan, linf, message, **known, **cuts)


def test_decay_reads_and_writes_nothing_past_the_end(emulated, seed):
    for number in range(30):
        rng = np.random.default_rng((seed, number))
        case = cases.random_large_case(rng, elements=1 << 12)
        weight, grad = (
            guarded(cases.lay_out(cases.random_values(rng, case.weight_shape, dtype, "normal"), layout))
            for dtype, layout in zip(rng.choice(cases.DTYPES, 2), rng.choice(cases.LAYOUTS[:3], 2), strict=True)
        )
        state = no_momentum([weight], case.plan, False, 0.5)
        random_state(rng, state, [case], False)
        state = Momentum(*map(guarded, state.tensors()))
        rates = guarded(torch.ones(1, dtype=torch.float64))
        message = cases.replay(seed, number, case)
        assert_decays(decay_emulated, [weight], [grad], state, rates, 0.5, case.plan, False, message)


def test_decay_nan_counts_nothing(decay):
    """And inf as any other number."""
    case = cases.Case((3, 2, 3, 3), (1, 1), (2, 2), (3, 4), {"padding_mode": "circular"})
    weight = torch.randint(-2, 3, case.weight_shape).float()
    for linf, value in itertools.product((False, True), (float("nan"), float("inf"))):
        weight[1, 1, 1, :2] = torch.tensor([value, -value])
        state = no_momentum([weight], case.plan, linf, 0.5)
        grads, rates = [torch.zeros_like(weight)], torch.ones(1, dtype=torch.float64)
        decay([weight], grads, state, rates, 0.5, case.plan, linf)
        assert state.winners[0, 0] == 1
        state.norms.zero_()
        assert_decays(decay, [weight], grads, state, rates, 0.5, case.plan, linf, measured=True)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)], ids=str)
def test_decay_follows_weights_that_were_cast_in_part(decay, dtypes):
    """The state keeps the dtype that it began with, as on a CPU."""
    case, (before, after) = cases.Case((4, 3, 3), (1,), (1,), (9,)), dtypes
    weights = [torch.randint(-9, 9, case.weight_shape).to(dtype) for dtype in (torch.float32, before)]
    state = no_momentum(weights, 2 * case.plan, False, 0.5)
    weights[1] = weights[1].to(after)
    grads, rates = [torch.zeros_like(weight) for weight in weights], torch.ones(2, dtype=torch.float64)
    assert_decays(decay, weights, grads, state, rates, 0.5, 2 * case.plan, False, exact=True)


def launches():
    """Since they were last asked for."""
    return torch.ops.convnorm_emulated.work()[0]


def test_decay_of_layers_that_share_a_gradient(emulated):
    """One weight at several input sizes: each adds its own, one launch after another."""
    layers = [cases.Case((4, 3, 3), (1,), (1,), (size,)) for size in (1, 2, 9, 9)]
    weight, grad, other = torch.randint(-9, 9, (4, 3, 3)).float(), torch.zeros(4, 3, 3), torch.zeros(4, 3, 3)
    plan, rates = network(layers), torch.tensor([1.0, 10, 100, 1000], dtype=torch.float64)
    state = no_momentum([weight] * 4, plan, False, 0.5)
    for _ in range(3):
        launches()
        assert_decays(
            decay_emulated, [weight] * 4, [grad, grad, other, grad], state, rates, 0.5, plan, False, exact=True
        )
        assert launches() == 2 + 3
    halves = torch.zeros(2, 4, 3, 3)  # of one memory, but not the same
    decay_emulated([weight] * 2, list(halves), no_momentum([weight] * 2, 2 * layers[0].plan, False, 0.5), rates[:2],
                   0.5, 2 * layers[0].plan, False)  # fmt: skip
    assert launches() == 2 + 1
    assert torch.equal(10 * halves[0], halves[1])


@pytest.mark.parametrize("linf", [False, True])
def test_decay_of_a_resnet18_takes_three_launches(emulated, linf):
    layers = resnet18()
    plan, rates = network(layers), torch.rand(len(layers), dtype=torch.float64)
    weights = [torch.randint(-9, 10, case.weight_shape).float() for case in layers]
    grads = [torch.zeros_like(weight) for weight in weights]
    state = no_momentum(weights, plan, linf, 0.5)
    random_state(np.random.default_rng(0), state, layers, linf)
    for measured in (False, True):
        launches()
        assert_decays(decay_emulated, weights, grads, state, rates, 0.5, plan, linf, measured=measured)
        assert launches() == (1 if measured else 3)


@pytest.mark.parametrize("layers", [24, 240])
def test_decay_of_deep_networks(emulated, seed, layers):
    """Of more layers than fit into one argument, the clock still goes on by one."""
    rng = np.random.default_rng((seed, layers))
    drawn, dtypes, _, grads = random_network(rng, layers, elements=1 << 8)
    weights = [
        cases.random_values(rng, case.weight_shape, dtype, "integers")
        for case, dtype in zip(drawn, dtypes, strict=True)
    ]
    plan, rates = network(drawn), torch.rand(layers, dtype=torch.float64)
    state = no_momentum(weights, plan, False, 0.5)
    launches()
    assert_decays(decay_emulated, weights, grads, state, rates, 0.5, plan, False, exact=True)
    assert_decays(decay_emulated, weights, grads, state, rates, 0.5, plan, False, measured=True)
    assert state.clock.item() == 2
    assert launches() <= 2 * 4 + 2 if layers == 24 else 2 * 4 + 2 < launches() <= 30


@pytest.mark.parametrize(
    ("case", "momentum"),
    [
        (cases.Case((3, 2, 3), (1,), (1,), (9,)), 0.995),  # thousands of terms
        (cases.Case((3, 2, 300), (1,), (299,), (200,)), 0.5),  # so many windows that they fit into no argument
        (cases.Case((3, 2, 1100), (1,), (0,), (1100,)), 0.5),  # so many taps
    ],
    ids=str,
)
def test_decay_that_is_too_much_is_left_to_the_reference(emulated, case, momentum):
    weight, rates = torch.randint(-9, 9, case.weight_shape).float(), torch.ones(1, dtype=torch.float64)
    state = no_momentum([weight], case.plan, False, momentum)
    launches()
    assert_decays(
        decay_emulated, [weight], [torch.zeros_like(weight)], state, rates, momentum, case.plan, False, exact=True
    )
    assert launches() == 0


@pytest.mark.parametrize("linf", [False, True])
def test_decay_takes_64_bit_offsets(emulated, tmp_path, linf):
    case = cases.Case((3, 2, 3), (1,), (1,), (2,))
    state = no_momentum([torch.empty(case.weight_shape)], case.plan, linf, 0.5)
    rates, tensors = torch.ones(1, dtype=torch.float64), []
    for name, strides in (("weight", (2**31 + 8, 2**29, 1)), ("grad", (2**28, 1, 2**31 + 5))):
        sparse = torch.from_file(str(tmp_path / name), shared=True, size=5 << 30, dtype=torch.bfloat16)  # in few blocks
        tensors.append(sparse.as_strided(case.weight_shape, strides).copy_(torch.randint(-9, 9, case.weight_shape)))
    weight, grad = tensors
    near, near_grad = weight.clone(), grad.clone()
    want = no_momentum([near], case.plan, linf, 0.5)
    for _ in range(2):
        decay_emulated([weight], [grad], state, rates, 0.5, case.plan, linf)
        torch.ops.convnorm.decay_reference([near], [near_grad], *want.tensors(), rates, 0.5, case.plan, linf, False)
        weight.copy_(near.neg_())
    assert all(map(torch.equal, state.tensors(), want.tensors()))
    assert torch.equal(grad, near_grad)


@needs_gpu
@pytest.mark.parametrize("linf", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_graphs_capture_decay(dtype, linf):
    """Replayed, each step is one step on, with what weights and gradients have become; capture allows no waiting."""
    layers = [*resnet18(), cases.TABLE["depthwise"], cases.TABLE["reflect"], cases.TABLE["small_input"]]
    plan, rates = network(layers), torch.rand(len(layers), dtype=torch.float64)
    weights = [torch.randint(-9, 9, case.weight_shape, device="cuda").to(dtype) for case in layers]
    grads = [torch.zeros_like(weight) for weight in weights]
    state = no_momentum(weights, plan, linf, 0.5)
    step = (weights, grads, *state.tensors(), rates.cuda(), 0.5, plan, linf, False)
    torch.ops.convnorm.decay_native(*step)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.convnorm.decay_native(*step)
    for _ in range(len(state.signs) + 3):
        for tensor in (*weights, *grads):
            tensor.copy_(torch.randint(-9, 9, tensor.shape))
        on_cpu = [weight.cpu() for weight in weights]
        want, want_grads = Momentum(*(one.cpu() for one in state.tensors())), [grad.cpu() for grad in grads]
        graph.replay()
        torch.ops.convnorm.decay_reference(on_cpu, want_grads, *want.tensors(), rates, 0.5, plan, linf, False)
        for name, got, expected in zip(Momentum.__annotations__, state.tensors(), want.tensors(), strict=True):
            assert torch.equal(got.cpu(), expected), name
        for got, expected in zip(grads, want_grads, strict=True):
            torch.testing.assert_close(got.cpu(), expected, rtol=ROUNDING[dtype], atol=2 * ROUNDING[dtype])


@needs_gpu
def test_decay_of_a_resnet18_is_three_kernels_and_no_copies():
    layers = resnet18()
    plan, rates = network(layers), torch.rand(len(layers), dtype=torch.float64, device="cuda")
    weights = [torch.randn(case.weight_shape, device="cuda") for case in layers]
    step = (weights, weights, *no_momentum(weights, plan, False, 0.5).tensors(), rates, 0.5, plan, False, False)
    torch.ops.convnorm.decay_native(*step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.ops.convnorm.decay_native(*step)
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 3, [event.name for event in on_device]


@needs_gpu
def test_decay_is_the_same_every_time():
    """To the last bit, whatever the order in which blocks run."""
    layers = resnet18()
    plan, rates = network(layers), torch.rand(len(layers), dtype=torch.float64, device="cuda")
    weights = [torch.randn(case.weight_shape, device="cuda") for case in layers]
    before = no_momentum(weights, plan, False, 0.9)
    random_state(np.random.default_rng(0), before, layers, False)
    results = []
    for _ in range(5):
        state, grads = [one.clone() for one in before.tensors()], [weight.clone() for weight in weights]
        torch.ops.convnorm.decay_native(weights, grads, *state, rates, 0.9, plan, False, False)
        results.append([*state, *grads])
    assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
