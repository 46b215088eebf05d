"""The CUDA kernels of norm decay: run by an emulator, or on a GPU, they do what the reference does."""

import itertools

import cases
import numpy as np
import pytest
import torch
from cuda_kernels import CUTS, H200, emulator, guarded, needs_gpu, network, resnet18, to_gpu

from convnorm.momentum import Momentum, no_momentum

H200_TERMS = (528, 8)  # the blocks that it holds at a time, and the terms of each: see TermCut in csrc/cuda/decay.h
TERM_CUTS = [H200_TERMS, (1, 1), (3, 5), (1 << 20, 1 << 20)]


def decay_emulated(weights, grads, state, *rest, measured=False, cut=H200, term_cut=H200_TERMS):
    emulator().decay(weights, grads, *state.tensors(), *rest, measured, cut, term_cut)


def decay_on_gpu(weights, grads, state, rates, *rest, measured=False, **_):
    written = [*grads, *state.tensors()]
    there = [to_gpu(tensor) for tensor in written]
    grads_there, state_there = there[: len(grads)], there[len(grads) :]
    inputs = [to_gpu(weight) for weight in weights], grads_there, *state_there, rates.cuda()
    torch.ops.convnorm.decay_native(*inputs, *rest, measured)
    for tensor, result in zip(written, there, strict=True):
        tensor.untyped_storage().copy_(result.untyped_storage())


@pytest.fixture(params=[decay_emulated, pytest.param(decay_on_gpu, marks=needs_gpu)], ids=["emulated", "gpu"])
def decay(request):
    """``decay(weights, grads, state, rates, momentum, plan, linf)`` by the kernels, of tensors on the CPU."""
    return request.param


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


def test_decay_reads_and_writes_nothing_past_the_end(seed):
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
    return emulator().work()[0]


def test_decay_of_layers_that_share_a_gradient():
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
def test_decay_of_a_resnet18_takes_three_launches(linf):
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
def test_decay_of_deep_networks(seed, layers):
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
def test_decay_that_is_too_much_is_left_to_the_reference(case, momentum):
    weight, rates = torch.randint(-9, 9, case.weight_shape).float(), torch.ones(1, dtype=torch.float64)
    state = no_momentum([weight], case.plan, False, momentum)
    launches()
    assert_decays(
        decay_emulated, [weight], [torch.zeros_like(weight)], state, rates, momentum, case.plan, False, exact=True
    )
    assert launches() == 0


@pytest.mark.parametrize("linf", [False, True])
def test_decay_takes_64_bit_offsets(tmp_path, linf):
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
