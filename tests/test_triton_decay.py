"""Norm decay by the Triton backend does what the reference does, in three launches.

Where winners are to be found, weights are small multiples of 1/8, whose sums are exact in every order.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from cases import LAYOUTS, VALUES, lay_out, random_case, random_weight
from test_triton import DEVICE, DTYPES, LAYERS, exact, measure, network, noted_launches, plan_of

from convnorm.geometry import GeometryError
from convnorm.kernels import triton_decay, triton_decay_schedule, triton_measure, triton_schedule
from convnorm.momentum import Momentum, no_momentum

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's, for inf - inf


def decay(backend, weights, grads, state, rates, momentum, plan, linf, measured=False):
    operator = getattr(torch.ops.convnorm, f"decay_{backend}")
    operator(weights, grads, *state.tensors(), rates, momentum, plan, linf, measured)


def copied(state):
    return Momentum(*(tensor.clone() for tensor in state.tensors()))


def whole(tensor):
    """All of the memory that a tensor is a view of."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)


def assert_same_step(weights, grads, states, *how, measured=False):
    """The same state, bit for bit, and the same gradients but for rounding; nothing is written beside them."""
    twins = [whole(grad).clone().as_strided(grad.shape, grad.stride(), grad.storage_offset()) for grad in grads]
    for backend, mine, state in zip(("triton", "reference"), (grads, twins), states, strict=True):
        decay(backend, weights, mine, state, *how, measured=measured)
    for name, found, expected in zip(vars(states[0]), *(state.tensors() for state in states), strict=True):
        tolerance = {"rtol": 1e-6, "atol": 0} if name == "norms" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found, expected, **tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    for grad, twin in zip(grads, twins, strict=True):
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(whole(grad), whole(twin), rtol=4 * eps, atol=16 * eps, equal_nan=True)


def any_weight(rng, case, dtype):
    """Of all values but the least of bfloat16, which the interpreter reads as 0."""
    values = [values for values in VALUES if (values, dtype) != ("tiny", torch.bfloat16)]
    return random_weight(rng, case.weight_shape, dtype, str(rng.choice(values)), device=DEVICE)


def random_decay(number):
    """A network from the shared random cases, and how it decays: arguments of ``assert_same_step`` but the weights."""
    rng = np.random.default_rng(number)
    torch.manual_seed(number)
    cases = [random_case(rng) for _ in range(rng.integers(1, 3))]
    weights = [any_weight(rng, case, DTYPES[rng.choice(4, p=[0.4, 0.3, 0.15, 0.15])]) for case in cases]
    plan, linf = "".join(case.plan for case in cases), bool(rng.integers(2))
    momentum, terms = [(0.0, 1), (0.5, 3), (0.5, 24), (0.9, 12), (0.9, 40)][rng.choice(5, p=[0.2, 0.3, 0.2, 0.2, 0.1])]
    state = no_momentum(weights, plan, linf, 0.0)
    state.signs = state.signs.repeat(terms, 1).to(torch.int32 if rng.random() < 0.3 else state.signs.dtype)
    state.channels = state.channels.repeat(terms, 1)
    state.clock.fill_(int(rng.choice([0, terms - 1, 10**6])))
    rates = torch.from_numpy(rng.uniform(-1, 1, len(weights))).to(DEVICE)
    return rng, cases, weights, [state, copied(state)], (rates, momentum, plan, linf)


def random_grad(rng, weight):
    """Now and then none, or one of another dtype than the weight's."""
    dtype = weight.dtype if rng.random() < 0.8 else DTYPES[rng.integers(4)]
    if rng.random() < 0.2:
        return torch.empty(0, dtype=dtype, device=DEVICE)
    layout = str(rng.choice([layout for layout in LAYOUTS if layout != "expanded"]))
    return random_weight(rng, tuple(weight.shape), dtype, "normal", layout, DEVICE)


def poisoned(rng, weight):
    weight = weight.clone()
    weight[tuple(rng.integers(n) for n in weight.shape)] = float(rng.choice([np.nan, np.inf, -np.inf]))
    return weight


@pytest.mark.parametrize("number", range(16))
def test_triton_decays_as_the_reference_does(number):
    """Any weights where the winners are given, sums that are exact in every order where they are to be found."""
    rng, cases, weights, states, how = random_decay(number)
    _, _, plan, linf = how
    for _ in range(3):
        measured = bool(rng.random() < 0.5)
        if not measured:
            weights = [
                lay_out(exact(*weight.shape, dtype=weight.dtype), str(rng.choice(LAYOUTS))) for weight in weights
            ]
        weights = [poisoned(rng, weight) if rng.random() < 0.4 else weight for weight in weights]
        if measured:
            values = measure("reference", weights, plan)
            for state in states:
                state.norms.copy_(values[linf])
                state.winners.copy_(values[2][:, int(linf)])
        assert_same_step(weights, [random_grad(rng, w) for w in weights], states, *how, measured=measured)
        weights = [
            any_weight(rng, case, weight.dtype) if rng.random() < 0.5 else weight
            for case, weight in zip(cases, weights, strict=True)
        ]


def test_triton_decays_merged_taps_that_all_but_cancel():
    """In float32 their sum would be 0."""
    weight = torch.tensor([[[1, 2**-30, -1]]], device=DEVICE)
    plan = plan_of(weight, 1, 1, 1, {"padding_mode": "replicate"})
    states = [no_momentum([weight], plan, False, 0.0) for _ in range(2)]
    rates = torch.ones(1, dtype=torch.float64, device=DEVICE)
    assert_same_step([weight], [torch.zeros_like(weight)], states, rates, 0.0, plan, False)
    assert states[0].signs.tolist() == [[1, 1, 1]]


def started(weights, plan, linf, terms):
    """A state whose ring is full of other terms, and whose clock wraps around at the next step."""
    state = no_momentum(weights, plan, linf, 0.0)
    state.signs = torch.randint(-3, 4, (terms, state.signs.shape[1]), dtype=torch.int8, device=DEVICE)
    state.channels = torch.randint(-1, 3, (terms, len(weights)), device=DEVICE)
    state.clock.fill_(2 * terms - 1)
    return state


SMALL = [layer for layer in LAYERS if layer[0] in ("merged taps", "small groups with merged taps", "three axes")]


@pytest.mark.parametrize("linf", [False, True], ids=["l1", "linf"])
def test_triton_decays_slices_of_many_blocks_and_terms(linf):
    weights = [exact(130, 66, 3, 3), exact(66, 20, 3), exact(300, 280)]
    plans = [
        plan_of(weights[0], 1, 1, 2, {}),
        plan_of(weights[1], 2, 1, 9, {"groups": 3}),
        plan_of(weights[2], (), (), (), {}),
    ]
    plan = "".join(plans)
    state = started(weights, plan, linf, 37)
    state.channels[:5] = 19  # the oldest, past the first 32 terms
    rates = torch.tensor([0.5, 2, -1], dtype=torch.float64, device=DEVICE)
    assert_same_step(weights, [exact(*w.shape) for w in weights], [state, copied(state)], rates, 0.9, plan, linf)


@pytest.mark.skipif(DEVICE == "cuda", reason="only the interpreter runs programs in an order of our choice")
@pytest.mark.parametrize("order", ["backwards", "at random"])
def test_triton_decays_the_same_in_every_order_of_programs(order, monkeypatch):
    """No program reads what another one writes."""
    from triton.runtime.interpreter import interpreter_builder

    weights, plan = network(SMALL)
    state, grads = started(weights, plan, False, 9), [exact(*w.shape) for w in weights]
    rates = torch.rand(len(weights), dtype=torch.float64)
    runs = [(copied(state), [grad.clone() for grad in grads]) for _ in range(2)]
    decay("triton", weights, runs[0][1], runs[0][0], rates, 0.5, plan, False)

    def set_grid_idx(*index, place=interpreter_builder.set_grid_idx):
        sizes = interpreter_builder.grid_dim
        if order == "backwards":
            return place(*(size - 1 - i for size, i in zip(sizes, index, strict=True)))
        if not any(index):
            programs = list(itertools.product(*map(range, sizes)))
            orders.append(iter(random.Random(0).sample(programs, len(programs))))
        return place(*next(orders[-1]))

    orders = []
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)
    decay("triton", weights, runs[1][1], runs[1][0], rates, 0.5, plan, False)
    for first, second in zip(*((*state.tensors(), *grads) for state, grads in runs), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_triton_decays_a_network_in_three_launches(monkeypatch):
    launches = noted_launches(monkeypatch)
    weights, plan = network(SMALL)
    state = no_momentum(weights, plan, False, 0.0)
    how = torch.ones(len(weights), dtype=torch.float64, device=DEVICE), 0.0, plan, False
    grads = [torch.zeros_like(weight) for weight in weights]
    decay("triton", weights, grads, state, *how)
    assert len(launches) == 3
    decay("triton", weights, grads, state, *how, measured=True)
    assert len(launches) == 4
    assert state.clock == 2


@pytest.mark.parametrize("elsewhere", ["weights", "grads", "state", "rates"])
def test_triton_decay_refuses_tensors_on_several_devices(elsewhere):
    """A model that was moved in part: what the kernels take are addresses."""
    weights, plan = network(SMALL[1:2] * 2)
    state, rates = no_momentum(weights, plan, False, 0.0), torch.ones(2, dtype=torch.float64, device=DEVICE)
    given = {"weights": weights, "grads": [exact(*w.shape) for w in weights], "state": list(state.tensors()),
             "rates": [rates]}  # fmt: skip
    given[elsewhere][-1] = given[elsewhere][-1].to("meta")
    weights, grads, state, (rates,) = given.values()
    with pytest.raises(GeometryError, match="and meta must be on one device"):
        triton_decay.decay_triton(weights, grads, *state, rates, 0.0, plan, False, False)


def test_triton_decays_in_more_launches_where_one_will_not_do(monkeypatch):
    """Of layers that share a gradient one comes after the other; parameters of a launch are few."""
    launches = noted_launches(monkeypatch)
    weight, grad = exact(6, 5, 3), exact(6, 5, 3)
    plan = plan_of(weight, 1, 1, 8, {})
    weights = [weight, weight, exact(6, 5, 3), weight, exact(6, 5, 3)]
    grads = [grad, grad, exact(6, 5, 3), grad, torch.empty(0, device=DEVICE)]
    states = [no_momentum(weights, plan * 5, False, 0.5) for _ in range(2)]
    rates = torch.rand(5, dtype=torch.float64, device=DEVICE)
    twin = grad.clone()
    twins = [twin, twin, grads[2].clone(), twin, grads[4]]
    monkeypatch.setattr(triton_decay_schedule, "LAYERS", 2)
    triton_decay_schedule.decay_schedules.cache_clear()
    for _ in range(2):
        launches.clear()
        decay("triton", weights, grads, states[0], rates, 0.5, plan * 5, False)
        decay("reference", weights, twins, states[1], rates, 0.5, plan * 5, False)
        assert len(launches) == 1 + 4  # these layers have no tables; two for three layers, then two of those that share
        torch.testing.assert_close(grads, twins)
        for found, wanted in zip(*(state.tensors() for state in states), strict=True):
            assert found.equal(wanted)
    triton_decay_schedule.decay_schedules.cache_clear()


def test_triton_decay_is_a_sound_operator():
    weights, plan = network(SMALL[1:2])
    state, rates = started(weights, plan, False, 3), torch.ones(len(weights), dtype=torch.float64, device=DEVICE)
    grads = [exact(*weight.shape) for weight in weights]
    arguments = (weights, grads, *state.tensors(), rates, 0.5, plan, False, False)
    torch.library.opcheck(torch.ops.convnorm.decay_triton.default, arguments)


def test_triton_keeps_its_records_between_steps():
    weights, plan = network(SMALL)
    state = no_momentum(weights, plan, False, 0.0)
    rates = torch.ones(len(weights), dtype=torch.float64, device=DEVICE)
    grads, misses = [], []
    for _ in range(2):
        grads.append([exact(*weight.shape) for weight in weights])  # all of them alive: at new addresses
        decay("triton", weights, grads[-1], state, rates, 0.0, plan, False)
        caches = (triton_decay_schedule.decay_schedules, triton_schedule.schedules, triton_measure._addresses)
        misses.append([cache.cache_info().misses for cache in caches])
    assert misses[0] == misses[1]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_triton_decay_is_captured_in_a_graph(monkeypatch):
    launches = noted_launches(monkeypatch)
    weights, plan = network()
    grads = [exact(*weight.shape) for weight in weights]
    states = [no_momentum(weights, plan, False, 0.5) for _ in range(2)]
    rates = torch.rand(len(weights), dtype=torch.float64, device=DEVICE)
    decay("triton", weights, [grad.clone() for grad in grads], copied(states[0]), rates, 0.5, plan, False)  # compiles
    launches.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decay("triton", weights, grads, states[0], rates, 0.5, plan, False)
    assert len(launches) == 3
    expected = [grad.clone() for grad in grads]
    for _ in range(30):  # the ring wraps around
        for weight in weights:
            weight.copy_(exact(*weight.shape))
        graph.replay()
        decay("reference", weights, expected, states[1], rates, 0.5, plan, False)
        for found, wanted in zip(*(state.tensors() for state in states), strict=True):
            assert found.equal(wanted)
    torch.testing.assert_close(grads, expected)
