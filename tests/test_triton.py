"""The Triton backend gives what the reference gives, winners and all, in two launches, and compiles for every GPU.

Without a GPU the kernels run in Triton's interpreter. Most weights here are small multiples of 1/8, whose sums are
exact in every order: values and winners must then be equal, and ties are common.
"""

import os
import random
import subprocess
import sys

import pytest
import torch

import convnorm
from convnorm.geometry import PADDING_MODES, GeometryError, geometry
from convnorm.kernels import triton_measure, triton_schedule
from convnorm.plan import layer_plan, read_plan

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, for inf - inf
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def exact(*shape, dtype=torch.float32):
    return torch.randint(-9, 10, shape, device=DEVICE).to(dtype) / 8


def measure(backend, weights, plan):
    return getattr(torch.ops.convnorm, f"measure_{backend}")(weights, plan)


def assert_same(weights, plan, **tolerance):
    """Equal values and winners; within a tolerance where one is given."""
    found, expected = (measure(backend, weights, plan) for backend in ("triton", "reference"))
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(found[:2], expected[:2], **(exactly | tolerance))
    if not tolerance:
        torch.testing.assert_close(found[2], expected[2])


# (what, shape, stride, padding, in_shape, options): one for each way through the kernels
LAYERS = [
    ("aligned tiles", (130, 40, 3, 3), 1, 1, 8, {}),
    ("rows of no multiple of 16 bytes", (70, 33, 3), 2, 1, 8, {}),
    ("output windows, input smaller than the kernel", (20, 36, 3, 3), 1, 1, 2, {}),
    ("more output windows than a dense tile takes", (20, 18, 5, 5), 1, 2, 3, {}),
    ("merged taps", (67, 30, 3, 3), 1, 1, 8, {"padding_mode": "reflect"}),
    ("merged taps counted twice", (20, 17, 5), 2, 4, 4, {"padding_mode": "circular"}),
    ("groups in tiles", (66, 20, 3), 2, 1, 9, {"groups": 3}),
    ("depthwise", (40, 1, 3, 3), 2, 1, 8, {"groups": 40}),
    ("small groups with merged taps", (12, 3, 3, 3), 1, 1, 6, {"groups": 4, "padding_mode": "replicate"}),
    ("transposed", (24, 10, 3, 3), 2, 1, 5, {"groups": 2, "transposed": True, "output_padding": [1]}),
    ("three axes", (18, 5, 2, 3, 2), 2, 1, 4, {"dilation": [2]}),
    ("fully connected", (100, 300), (), (), (), {}),
    ("one weight", (1, 1, 1), 1, 0, 1, {}),
    ("a window without taps", (3, 2, 1), 7, 3, 1, {}),
    ("one row", (1, 200, 3), 1, 1, 5, {}),
    ("one column of a tile", (80, 1), (), (), (), {}),
]


def plan_of(weight, stride, padding, in_shape, options):
    """The plan of one layer; a number stands for the same on every axis."""
    axes = weight.dim() - 2
    each = ((entry,) * axes if isinstance(entry, int) else tuple(entry) for entry in (stride, padding, in_shape))
    return layer_plan(geometry(tuple(weight.shape), *each, **options)).text


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("what", "shape", "layer"), [(what, shape, layer) for what, shape, *layer in LAYERS])
def test_triton_equals_reference(what, shape, layer, dtype):
    weight = exact(*shape, dtype=dtype)
    assert_same([weight], plan_of(weight, *layer))


VIEWS = {
    "channels last": lambda w: w.to(memory_format=torch.channels_last),
    "rows and columns exchanged": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "taps exchanged": lambda w: w.transpose(2, 3).contiguous().transpose(2, 3),
    "taps outermost": lambda w: w.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0),
    "every second column": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    "every second tap": lambda w: w.repeat_interleave(2, 3)[..., ::2],
    "a slice of wider rows": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "not aligned": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w),
    "expanded": lambda w: w[:, :1].expand_as(w),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect"}, {"transposed": True}], ids=str)
@pytest.mark.parametrize("channels", [(20, 24), (3, 2)], ids=["tiles", "direct"])
def test_triton_reads_any_strides(view, options, channels):
    weight = view(exact(*channels, 3, 3))
    assert_same([weight], plan_of(weight, 1, 1, 8, options))
    assert_same([weight], plan_of(weight, 2, 1, 2, options))


def random_layer(choose):
    """A weight and its plan; tried again where no such convolution exists."""
    while True:
        axes, groups = choose.choice([0, 1, 1, 2, 2, 3]), choose.choice([1, 1, 2, 3])
        groups = groups if axes else 1
        limit = {0: 150, 1: 90, 2: 40, 3: 20}[axes]
        rows, columns = (choose.randint(1, choose.choice([4, limit])) for _ in range(2))
        transposed = axes > 0 and choose.random() < 0.3
        options = {
            "groups": groups,
            "dilation": [choose.randint(1, 2) for _ in range(axes)] or None,
            "padding_mode": "zeros" if transposed else choose.choice(PADDING_MODES),
            "transposed": transposed,
            "output_padding": [choose.randint(0, 1) for _ in range(axes)] if transposed and axes else None,
        }
        weight = exact(rows * groups, columns, *(choose.randint(1, 4) for _ in range(axes)))
        weight = weight.to(choose.choice(DTYPES))
        order = choose.sample(range(weight.dim()), weight.dim())
        if choose.random() < 0.4:
            weight = weight.permute(order).contiguous().permute([order.index(i) for i in range(weight.dim())])
        stride, padding, in_shape = ([choose.randint(*ends) for _ in range(axes)] for ends in ((1, 3), (0, 3), (1, 9)))
        try:
            return weight, plan_of(weight, stride, padding, in_shape, options)
        except GeometryError:
            continue


@pytest.mark.parametrize("seed", range(12))
def test_triton_equals_reference_on_random_networks(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    layers = [random_layer(choose) for _ in range(choose.randint(1, 6))]
    weights, plan = [weight for weight, _ in layers], "".join(plan for _, plan in layers)
    assert_same(weights, plan)
    noisy = [weight + 0.01 * torch.randn_like(weight) for weight in weights]
    assert_same(noisy, plan, rtol=1e-5, atol=1e-6)
    for weight in weights:  # where a value that is not finite reaches a norm, it reaches the same one
        poisoned = weight.clone()  # keeps strides
        for bad in (float("inf"), -float("inf"), float("nan")):
            if choose.random() < 0.6:
                poisoned[tuple(choose.randrange(n) for n in weight.shape)] = bad
        weights = [poisoned if other is weight else other for other in weights]
    assert_same(weights, plan)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [(40, 20), (4, 3)], ids=["tiles", "direct"])
def test_triton_ignores_taps_that_no_window_counts(bad, channels):
    weight = exact(*channels, 3, 3)
    weight[:, :, 0, 2] = bad
    plan = plan_of(weight, 1, 1, 1, {})
    assert_same([weight], plan)
    assert measure("triton", [weight], plan)[0].isfinite().all()


@pytest.mark.parametrize("value", [0.0, 0.125])
@pytest.mark.parametrize(("what", "shape", "layer"), [(what, shape, layer) for what, shape, *layer in LAYERS])
def test_triton_gives_the_first_of_equals(what, shape, layer, value):
    weight = torch.full(shape, value, device=DEVICE)
    assert_same([weight], plan_of(weight, *layer))


@pytest.mark.parametrize("shape", [(130, 40, 3, 3), (70, 33, 3), (40, 1, 3, 3), (100, 300)], ids=str)
def test_triton_sums_equals_in_the_same_order(shape):
    """So that channels whose weights are the same tie, and the first of them wins, whatever the rounding."""
    groups = 40 if shape[1] == 1 else 1
    plan = plan_of(torch.empty(shape), 2, 1, 9, {"groups": groups})
    exactly, rounded = (measure("triton", [torch.full(shape, v, device=DEVICE)], plan)[2] for v in (0.125, 0.1))
    assert rounded.equal(exactly)


def test_triton_gives_the_first_nan():
    weight = exact(40, 20, 3, 3)
    weight[7, 11, 0, 0] = weight[30, 4, 2, 2] = float("nan")
    l1, linf, winners = measure("triton", [weight], plan_of(weight, 2, 1, 8, {}))
    assert l1.isnan()
    assert linf.isnan()
    assert winners[0, 0, 0] == 4
    assert winners[0, 1, 0] == 7


def test_triton_serves_the_operators():
    weight = exact(24, 18, 3, 3).requires_grad_()
    with convnorm.use_backend("triton"):
        found = torch.ops.convnorm.norms(weight, 1, 1, [8, 8])
        found[0].backward()
    expected = torch.ops.convnorm.norms(weight, 1, 1, [8, 8])
    assert found[0].shape == ()
    assert (found[0], found[1]) == (expected[0], expected[1])
    assert weight.grad.norm(1) == 24 * 9 - (weight[:, weight.grad.abs().sum((0, 2, 3)).argmax()] == 0).sum()


def noted_launches(monkeypatch):
    """The grids of the launches from now on, a list that grows."""
    from convnorm.kernels import triton_decay_kernels, triton_kernels

    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(grid)
            return self.kernel[grid]

    for module in (triton_kernels, triton_decay_kernels):
        for name in ("sum_tiles_kernel", "find_largest_kernel", "add_terms_kernel"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    return launches


def network(layers=LAYERS):
    """The weights of all layers, and their plan."""
    weights = [exact(*shape) for _, shape, *_ in layers]
    plan = "".join(plan_of(weight, *layer) for weight, (_, _, *layer) in zip(weights, layers, strict=True))
    return weights, plan


def test_triton_measures_a_network_in_two_launches(monkeypatch):
    launches = noted_launches(monkeypatch)
    measure("triton", *network())
    assert len(launches) == 2


def test_triton_keeps_its_records_between_calls():
    weight = exact(20, 24, 3, 3)
    plan = plan_of(weight, 1, 1, 8, {})
    measure("triton", [weight], plan)
    before = triton_schedule.schedules.cache_info().misses, triton_measure._addresses.cache_info().misses
    weight.mul_(2)
    assert_same([weight], plan)
    assert before == (triton_schedule.schedules.cache_info().misses, triton_measure._addresses.cache_info().misses)


@pytest.mark.parametrize(
    ("shape", "groups", "share"), [((512, 512, 3, 3), 1, 0.03), ((64, 64, 1, 1), 1, 0.04), ((96, 1, 3, 3), 96, 0)]
)
def test_triton_tables_are_small(shape, groups, share):
    weight = torch.empty(shape, device="meta")
    (layer,) = read_plan(plan_of(weight, 1, 1, 8, {"groups": groups}))
    records = triton_schedule.Records()
    records.add(0, layer, triton_schedule.Layout(weight.dtype, weight.shape, weight.stride(), True))
    assert records.table_size <= share * weight.numel()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_triton_is_captured_in_a_graph():
    weights = [exact(130, 40, 3, 3), exact(40, 1, 3, 3)]
    plan = plan_of(weights[0], 1, 1, 8, {}) + plan_of(weights[1], 1, 1, 8, {"groups": 40})
    measure("triton", weights, plan)  # compiles, and puts the records on the device
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = measure("triton", weights, plan)
    for weight in weights:
        weight.copy_(exact(*weight.shape))
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(found, measure("reference", weights, plan), rtol=0, atol=0)


AHEAD_OF_TIME = """
import sys
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature
from convnorm.kernels import triton_decay_kernels, triton_kernels as kernels
from convnorm.kernels.triton_decay import hidden_address
from convnorm.kernels.triton_decay_schedule import AGES, BLOCK, CHUNK, LAYERS
from convnorm.kernels.triton_schedule import CHANNELS, ROWS, SEGMENT, TERMS, WIDE

def compiled(kernel, pointers, numbers, constants, num_warps):
    signature = pointers | numbers | dict.fromkeys(constants, "constexpr")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps}).asm

arch = int(sys.argv[1])
common = dict.fromkeys(("weights", "records", "owners"), "*i64")
for name, size in (("float64", 8), ("float32", 4), ("float16", 2), ("bfloat16", 2)):
    dtype, value = getattr(tl, name), "*fp64" if size == 8 else "*fp32"
    for gathers in (False, True):
        pointers = common | {"tables": value, "tickets": "*i64"}
        constants = {"WEIGHT": dtype, "GATHERS": gathers, "ROWS": ROWS, "COLUMNS": SEGMENT // size, "WIDE": WIDE}
        asm = compiled(kernels.sum_tiles_kernel, pointers, {"norms": "i32"}, constants, 8)
        assert asm["cubin"][:4] == b"\\x7fELF"
        wide = {8: ".v2.b64", 4: ".v4.b32", 2: ".v4.b32"}[size]
        found = asm["ptx"].count("ld.global" + wide)
        assert found == ROWS * SEGMENT // 16 // 256, f"{found} 16-byte loads: where aligned, and only there"
    pointers = common | dict.fromkeys(("tickets", "candidates", "winners"), "*i64")
    pointers |= {"tables": value, "l1": value, "linf": value}
    constants = {"WEIGHT": dtype, "CHANNELS": CHANNELS, "TERMS": TERMS}
    assert compiled(kernels.find_largest_kernel, pointers, {}, constants, 4)["cubin"][:4] == b"\\x7fELF"

    for terms, sign, grad in ((24, "*i8", name), (1, "*i32", "float64" if size < 8 else "bfloat16")):
        pointers = common | dict.fromkeys(("found", "winners", "channels", "clock"), "*i64")
        pointers |= {"values": value, "norms": value, "signs": sign, "rates": "*fp64"}
        numbers = {"grads": ("i64",) * (LAYERS if name == "float32" else 3), "momentum": "fp64"}
        numbers |= dict.fromkeys(("found_step", "terms", "length", "layers"), "i32")
        constants = {"WEIGHT": dtype, "GRAD": getattr(tl, grad), "COPIES": terms > 1, "ADVANCES": terms > 1}
        constants |= {"SUM": tl.float64 if grad == "float64" else tl.float32, "BITS": (terms - 1).bit_length()}
        constants |= {"BLOCK": BLOCK, "AGES": AGES, "CHUNK": CHUNK}
        asm = compiled(triton_decay_kernels.add_terms_kernel, pointers, numbers, constants, 4)
        assert asm["cubin"][:4] == b"\\x7fELF"
        assert asm["ptx"].count("atom.") == (terms > 1), "the ticket, and no other atomic operation"

kernel = triton_decay_kernels.add_terms_kernel
specialised = create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", arch, 32)))

def signature(grad, number):  # as a launch finds it
    arguments = dict.fromkeys(kernel.arg_names, torch.zeros(9))
    arguments |= {"grads": (hidden_address(grad), hidden_address(torch.empty(0))), "momentum": 0.5}
    arguments |= dict.fromkeys(("found_step", "terms", "length", "layers"), number)
    return str(specialised(**arguments)[1])

assert "fp64" in signature(torch.zeros(9), 1)
grads = torch.empty(65).split([1] * 60 + [5, 0])
assert len({signature(grad, number) for grad in grads for number in (1, 2, 16)}) == 1, "one kernel serves all"
print("compiled")
"""


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_compiles_ahead_of_time(arch, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    script = tmp_path / "compile.py"  # a kernel's source is read from its file
    script.write_text(AHEAD_OF_TIME)
    run = subprocess.run([sys.executable, script, str(arch)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "compiled\n"
