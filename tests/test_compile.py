"""The promise: whatever captures a PyTorch program captures the operators, whole, and gives the same values."""

import itertools
import shutil

import cases
import numpy as np
import pytest
import torch
from cases import TABLE
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import convnorm
from convnorm.geometry import geometry
from convnorm.winners import _window_table

ops = torch.ops.convnorm
MANY = ["conv2d", "transposed", "linear", "circular", "depthwise"]


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sample(name, device="cpu", dtype=torch.float64):
    case = TABLE[name]
    return case, cases.random_values(np.random.default_rng(0), case.weight_shape, dtype, "normal").to(device)


def calls(name, weight):
    """Each public operator on this layer, as (operator, args, options)."""
    args, options = TABLE[name].args, TABLE[name].options
    many_args, many_options = cases.columns([TABLE[name]] * 2)
    yield from ((op, (weight, *args), options) for op in (ops.l1, ops.linf, ops.norms))
    yield ops.norms_many, ([weight, weight], *many_args), many_options


def value_and_gradient(function, weight):
    weight = weight.detach().requires_grad_()
    norms = function(weight)
    (g,) = torch.autograd.grad(sum(norm.sum() * i for i, norm in enumerate(norms, 1)), weight)
    return *(norm.detach() for norm in norms), g


@pytest.mark.parametrize("name", MANY)
def test_compile_takes_the_whole_graph(device, name):
    case, weight = sample(name, device)

    def both(w):
        return ops.norms(w, *case.args, **case.options)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight), both(weight), rtol=0, atol=0)
    torch.testing.assert_close(value_and_gradient(compiled, weight), value_and_gradient(both, weight))


def test_compile_takes_norms_many(device):
    layers, weights = zip(*(sample(name, device) for name in MANY), strict=True)
    args, options = cases.columns(layers)

    def total(weights):
        l1s, linfs = ops.norms_many(weights, *args, **options)
        return (l1s * linfs).sum()

    def gradients(function):
        leaves = [weight.detach().requires_grad_() for weight in weights]
        return torch.autograd.grad(function(leaves), leaves)

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(list(weights)), total(list(weights)))
    torch.testing.assert_close(gradients(compiled), gradients(total))


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_values_and_gradients(backend, device):
    if backend != ("native" if device == "cpu" else "triton") and (backend, device) != ("reference", "cpu"):
        pytest.skip("slow: once for each device, and for the fallback")
    case, weight = sample("circular", device)

    def both(w):
        return ops.norms(2 * w, *case.args, **case.options)

    compiled = torch.compile(both, fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, weight), value_and_gradient(both, weight))


@pytest.fixture
def doubles_by_default():
    _window_table.cache_clear()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    _window_table.cache_clear()


@pytest.mark.usefixtures("doubles_by_default")
def test_what_compilers_are_told_holds_for_any_default_dtype(device):
    """Compiled code would read doubles as floats: wrong gradients, and no word of it."""
    winner = torch.zeros(2, dtype=torch.int64, device=device)
    torch.library.opcheck(ops.window_counts.default, (winner, TABLE["stride_2"].plan, True))


class Regularised(torch.nn.Module):
    """Takes the sizes from its input, as a network would. (PyTorch compiles the convolution itself anew by size.)"""

    def __init__(self, stride=2, padding=1):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, stride, padding)

    def forward(self, x):
        conv = self.conv
        return x.relu(), ops.norms(conv.weight, conv.stride, conv.padding, x.shape[2:])


@pytest.mark.parametrize("stride", [1, 2])
def test_large_inputs_of_one_residue_share_a_graph(device, stride):
    counter = CompileCounterWithBackend("aot_eager")
    model = Regularised(stride).to(device)
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    for n in (32, 34, 64, 1024):
        x = torch.randn(1, 1, n, n, device=device)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_dynamic_sizes_give_the_values_of_their_size(device):
    """Small inputs have windows of their own: they are compiled again rather than measured wrong."""
    model = Regularised(stride=2, padding=2).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (1, 2, 3, 5, 12, 40, 41):
        x = torch.randn(2, 3, n, n + 1, device=device)
        torch.testing.assert_close(compiled(x)[1], model(x)[1], rtol=0, atol=0)


def test_compile_takes_func_transforms(device):
    case, weight = sample("grouped", device)
    batch = torch.stack([weight, weight.flip(0)])

    def l1(w):
        return ops.l1(w, *case.args, **case.options)

    for function, argument in ((torch.func.grad(l1), weight), (torch.vmap(l1), batch)):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(argument), function(argument))


def test_what_operators_do_is_not_compiled_where_they_run_plainly(device):
    """As after a graph break."""
    counter = CompileCounterWithBackend("eager")

    @torch.compiler.disable(recursive=False)
    def plainly(weight, size):
        for _ in range(2):
            norms = ops.norms(weight, 2, 1, [size, size])
        ops.norms_many([weight], [[2]], [[1]], [[size, size]])
        geometry(weight.shape, (1,), (1,), (size, size))
        return sum(norms)

    compiled = torch.compile(lambda *arguments: plainly(*arguments), backend=counter)
    for size in (5, 6, 7):
        for weight in (torch.randn(2, 3, 3, 3, device=device), torch.randn(2, 3, 3, 3, device=device).requires_grad_()):
            assert compiled(weight, size) == plainly(weight, size)
    assert counter.frame_count == 0


def test_export_holds_the_operator(device):
    model, x = Regularised().to(device), torch.randn(1, 3, 9, 9, device=device)
    exported = torch.export.export(model, (x,))
    assert ops.norms.default in {node.target for node in exported.graph.nodes}
    torch.testing.assert_close(exported.module()(x), model(x))
    lowered = exported.run_decompositions()
    assert not [node for node in lowered.graph.nodes if node.target is ops.norms.default]
    torch.testing.assert_close(lowered.module()(x), model(x))


def test_export_takes_dynamic_sizes(device):
    model = Regularised().to(device)
    side = 2 * torch.export.Dim("half", min=16, max=256)  # stride 2: one residue class
    x = torch.randn(1, 3, 64, 64, device=device)
    exported = torch.export.export(model, (x,), dynamic_shapes={"x": {2: side, 3: side}})
    for n in (64, 100, 34):
        x = torch.randn(1, 3, n, n, device=device)
        torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_one_dynamic_size_for_all_axes(strict):
    class Measured(torch.nn.Conv2d):
        def forward(self, x):
            return x.sum() + convnorm.norms(self, x.shape[-1]).l1

    model, side = Measured(3, 4, 3), torch.export.Dim("side", min=32, max=256)
    sizes = {"x": {3: side}}
    exported = torch.export.export(model, (torch.ones(1, 3, 9, 64),), dynamic_shapes=sizes, strict=strict)
    x = torch.randn(1, 3, 9, 100)
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_values_and_gradients(backend, device, mode):
    case, weight = sample("transposed", device)

    def l1(w):
        return ops.l1(w, *case.args, **case.options)

    traced = make_fx(l1, tracing_mode=mode)(weight)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets.count(getattr(ops, f"measure_{backend}").default) == 1  # one read, by the backend in use
    torch.testing.assert_close(traced(2 * weight), l1(2 * weight))
    torch.testing.assert_close(
        make_fx(torch.func.grad(l1), tracing_mode=mode)(weight)(-weight), torch.func.grad(l1)(-weight)
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_passes_for_the_public_operators(device, requires_grad):
    weight = sample("transposed", device)[1].requires_grad_(requires_grad)
    for op, args, options in calls("transposed", weight):
        torch.library.opcheck(op, args, options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["linear", "circular"])
def test_opcheck_passes_for_the_operators_behind_them(backend, device, name, dtype):
    case, weight = sample(name, device, dtype)
    measure = getattr(ops, f"measure_{backend}")
    torch.library.opcheck(measure, ([weight], case.plan))
    torch.library.opcheck(measure, ([weight.requires_grad_()], case.plan))
    torch.library.opcheck(measure, ([weight, weight.detach().T if weight.dim() == 2 else weight], case.plan * 2))
    winner = torch.tensor([0, 0], device=device)
    for column in (False, True):
        torch.library.opcheck(ops.window_counts, (winner, case.plan, column))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_without_values_give_results_without_values(device, kind):
    for name, dtype in itertools.product(TABLE, cases.DTYPES):
        weight = sample(name, device, dtype)[1]
        weight = FakeTensorMode().from_tensor(weight) if kind == "fake" else weight.to("meta")
        result = torch.float64 if dtype == torch.float64 else torch.float32
        for op, args, options in calls(name, weight):
            norms = op(*args, **options)
            for norm in [norms] if isinstance(norms, torch.Tensor) else norms:
                assert (norm.dtype, norm.device) == (result, weight.device)
                assert norm.shape == ((2,) if op is ops.norms_many else ())


def test_meta_weights_have_meta_gradients():
    weight = torch.empty(1 << 20, 1 << 20, 3, 3, device="meta", requires_grad=True)
    ops.l1(weight, 1, 1, [8, 8]).backward()
    assert (weight.grad.device.type, weight.grad.shape) == ("meta", weight.shape)


def test_cuda_graphs_replay_values_and_gradients(device):
    if device != "cuda":
        pytest.skip("no CUDA graph on the CPU")
    layers, weights = zip(*(sample(name, device, torch.float32) for name in MANY), strict=True)
    weights = [weight.requires_grad_() for weight in weights]
    args, options = cases.columns(layers)

    def step():
        l1s, linfs = ops.norms_many(weights, *args, **options)
        return l1s, linfs, *torch.autograd.grad((l1s * linfs).sum(), weights)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the tables go to the device once, before the capture
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.flip(0) * 3)
    graph.replay()
    torch.testing.assert_close(captured, step())
