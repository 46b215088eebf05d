"""A step of norm decay as an operator: on every backend what a dense average of dense subgradients gives."""

import math

import numpy as np
import pytest
import torch
from cases import TABLE, Case, fuzz, random_weight, replay

import convnorm
from convnorm import library
from convnorm.momentum import Momentum, count_terms, largest_count, no_momentum
from convnorm.plan import read_plan

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


class Dense:
    """Algorithm 1 with whole tensors, in float64: h = γ h + (1 - γ) p, g += rate h."""

    def __init__(self, layers: list[Case], weights: list[torch.Tensor], linf: bool, momentum: float):
        self.layers, self.ord, self.momentum = layers, math.inf if linf else 1, momentum
        self.averages = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]

    def step(self, weights, grads, rates):
        expected = []
        for i, case in enumerate(self.layers):
            p = subgradient(case, weights[i], self.ord)
            self.averages[i] = self.momentum * self.averages[i] + (1 - self.momentum) * p
            expected.append(grads[i].double() + rates[i] * self.averages[i] if grads[i].numel() else grads[i])
        return expected


def subgradient(case, weight, ord):
    """By PyTorch's own differentiation of the norm, which tests/test_gradients.py compares with the explicit matrix."""
    leaf = weight.detach().clone().requires_grad_()
    operator = torch.ops.convnorm.l1 if ord == 1 else torch.ops.convnorm.linf
    operator(leaf, *case.args, **case.options).backward()
    return leaf.grad.double().cpu()


def walk(layers, weights, linf, momentum, steps, rng, absent=()):
    """Some steps of changing weights, compared with ``Dense``; returns the state."""
    plan = "".join(case.plan for case in layers)
    state = no_momentum(weights, plan, linf, momentum)
    rates = torch.tensor(rng.uniform(0.1, 1, len(layers)), dtype=torch.float64)
    dense = Dense(layers, [weight.cpu() for weight in weights], linf, momentum)
    for step in range(steps):
        layouts = rng.choice(["contiguous", "channels_last", "sliced", "reversed"], len(weights))
        grads = [
            random_weight(rng, w.shape, w.dtype, "normal", str(layout), w.device)
            for w, layout in zip(weights, layouts, strict=True)
        ]
        grads = [grad.new_empty(0) if i in absent else grad for i, grad in enumerate(grads)]
        expected = dense.step([w.cpu() for w in weights], [g.cpu() for g in grads], rates)
        library.decay(weights, grads, state, rates.to(weights[0].device), momentum, plan, linf)
        assert state.clock.item() == step + 1
        for case, grad, wanted, average in zip(layers, grads, expected, dense.averages, strict=True):
            close = 10 * TOLERANCE[grad.dtype] * (1 + average.abs().max().item())
            assert torch.allclose(grad.double().cpu(), wanted.double(), rtol=0, atol=close), case
        for weight in weights:  # so that now the same channel wins, now another
            weight.mul_(1 + 0.1 * torch.randn(weight.shape[1:2] + (1,) * (weight.dim() - 2), device=weight.device))
    return state


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("linf", [False, True], ids=["l1", "linf"])
def test_all_layers_of_the_table_as_one_network(linf, momentum, device):
    interpreted = library.backend_for(torch.device(device)) == "triton" and device == "cpu"
    if interpreted and momentum != 0.5:
        pytest.skip("Triton's interpreter takes long: one momentum will do")
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    layers = list(TABLE.values())
    weights = [random_weight(rng, case.weight_shape, torch.float32, "normal", "contiguous", device) for case in layers]
    state = walk(layers, weights, linf, momentum, 3 if interpreted else 40, rng, absent=(3, 7))
    plan = "".join(case.plan for case in layers)
    norms = library.read(weights, plan)[int(linf)]
    library.decay(weights, [w.new_empty(0) for w in weights], state, state.norms.double(), momentum, plan, linf)
    torch.testing.assert_close(state.norms, norms, rtol=0, atol=0)


def test_random_layers(numbers, seed, device):
    for number in numbers[: len(numbers) // 10]:
        case, weight = fuzz(seed, number, device)
        if weight.stride(0) == 0 or weight.abs().max() > 1e30 or (weight.abs().max() < 1e-3):
            continue  # written to below; and of what is squared out of range there is no gradient to compare
        rng = np.random.default_rng((seed, number))
        torch.manual_seed(number)
        try:
            walk([case], [weight], bool(rng.integers(2)), float(rng.choice([0, 0.3, 0.5])), 3, rng)
        except AssertionError as error:
            raise AssertionError(replay(seed, number, case)) from error


def test_autocast_changes_nothing(device):
    """It would round the products of plain PyTorch to half precision."""
    torch.manual_seed(0)
    weight = torch.randn(16, 8, 3, 3, device=device)
    with torch.autocast(weight.device.type, torch.bfloat16):
        walk([Case((16, 8, 3, 3), in_shape=(8, 8))], [weight], False, 0.5, 4, np.random.default_rng(0))


@pytest.mark.parametrize(("count", "dtype"), [(127, torch.int8), (128, torch.int32), (599, torch.int32)])
def test_counts_past_a_byte(device, count, dtype):
    """One weight that counts so often in one column: replicate padding of one input."""
    padding = (count // 2, count - count // 2)
    case = Case((2, 2, 2), padding=padding, in_shape=(1,), options={"padding_mode": "replicate"})
    assert largest_count(read_plan(case.plan)[0], column=True) == count
    rng = np.random.default_rng(0)
    weight = random_weight(rng, case.weight_shape, torch.float64, "normal", "contiguous", device)
    state = walk([case], [weight], False, 0.5, 4, rng)
    assert state.signs.dtype == dtype


def test_nan_counts_as_zero_and_inf_as_its_sign(device):
    weight = torch.tensor([[float("nan"), 2.0], [float("inf"), -3.0]], device=device)
    state, grad = no_momentum([weight], Case((2, 2)).plan, False, 0.0), torch.zeros_like(weight)
    library.decay(
        [weight], [grad], state, torch.ones(1, dtype=torch.float64, device=device), 0.0, Case((2, 2)).plan, False
    )
    assert state.norms.isnan().all()
    assert grad.tolist() == [[0, 0], [1, 0]]


def test_measured_winners_are_taken_from_the_state(device):
    weight, case = torch.randn(3, 4, device=device), Case((3, 4))
    rates, plan = torch.ones(1, dtype=torch.float64, device=device), case.plan
    state = no_momentum([weight], plan, True, 0.5)
    state.winners[0, 0], state.norms[0] = 1, 7.0
    grad = torch.zeros_like(weight)
    library.decay([weight], [grad], state, rates, 0.5, plan, True, measured=True)
    assert torch.equal(grad[1], 0.5 * weight[1].sign())
    assert not grad[[0, 2]].any()
    assert state.norms.tolist() == [7.0]


def test_what_is_dropped_is_below_rounding():
    for momentum in (0.1, 0.5, 0.9):
        for dtype in (torch.float32, torch.float64):
            terms = count_terms(momentum, dtype)
            half_an_ulp = torch.finfo(dtype).eps / 2
            assert momentum**terms <= half_an_ulp < momentum ** (terms - 1)


def test_same_bits_for_any_number_of_threads():
    if convnorm.backends()["cpu"]["native"] not in ("serves", "available"):
        pytest.skip("the extension was not built")
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        weights = [torch.randn(128, 128, 3, 3), torch.randn(300, 200), torch.randn(64, 1, 5, 5)]
        layers = [Case((128, 128, 3, 3), padding=(1,), in_shape=(8, 8)), Case((300, 200))]
        layers.append(Case((64, 1, 5, 5), in_shape=(7, 7), options={"groups": 64}))
        plan = "".join(case.plan for case in layers)
        state = no_momentum(weights, plan, False, 0.5)
        grads = [torch.randn_like(weight) for weight in weights]
        for _ in range(3):
            library.decay(weights, grads, state, torch.ones(3, dtype=torch.float64), 0.5, plan, False)
            weights = [weight + 0.1 * grad for weight, grad in zip(weights, grads, strict=True)]
        results.append([*grads, *state.tensors()])
    torch.set_num_threads(1)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


NATIVE = convnorm.backends()["cpu"]["native"] in ("serves", "available")


@pytest.mark.skipif(not NATIVE, reason="the extension was not built")
def test_layers_that_share_a_gradient_add_one_after_another():
    """Also where the elements of one lie between those of another."""
    torch.set_num_threads(2)
    case, rates = Case((128, 64, 3, 3), in_shape=(8, 8)), 2.0 ** torch.arange(6).double()
    for _ in range(20):
        weights, memory = [torch.randint(-9, 9, case.weight_shape).float()] * 6, torch.zeros(2, *case.weight_shape)
        between = memory.view(128, 64, 3, 3, 2).unbind(-1)
        results = []
        for decay in (torch.ops.convnorm.decay_reference, torch.ops.convnorm.decay_native):
            state = no_momentum(weights, 6 * case.plan, False, 0.5)
            memory.zero_()
            grads = [memory[0], memory[0], *between, memory[0], memory[1]]
            decay(weights, grads, *state.tensors(), rates, 0.5, 6 * case.plan, False, True)
            results.append(memory.clone())
        assert torch.equal(*results)
    torch.set_num_threads(1)


def test_operator_is_sound():
    weights = [torch.randn(4, 3, 3, 3), torch.randn(2, 2)]
    layers = [TABLE["conv2d"], Case((2, 2))]
    plan = "".join(case.plan for case in layers)
    state: Momentum = no_momentum(weights, plan, False, 0.5)
    arguments = (weights, [w.clone() for w in weights], *state.tensors(), torch.ones(2, dtype=torch.float64))
    for name in (
        "decay_reference",
        *["decay_native"] * (convnorm.backends()["cpu"]["native"] in ("serves", "available")),
    ):
        torch.library.opcheck(getattr(torch.ops.convnorm, name).default, (*arguments, 0.5, plan, False, False))


@pytest.mark.skipif(not NATIVE, reason="the extension was not built")
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("norms", lambda norms: norms.half()),
        ("norms", lambda norms: norms[:1]),
        ("winners", lambda winners: winners.int()),
        ("winners", lambda winners: winners.t()),
        ("signs", lambda signs: signs.short()),
        ("signs", lambda signs: signs[:, 1:].contiguous()),
        ("signs", lambda signs: signs[:0]),
        ("channels", lambda channels: channels[:1]),
        ("channels", lambda channels: channels + 9),
        ("clock", lambda clock: clock[:0]),
        ("clock", lambda clock: clock.int()),
        ("clock", lambda clock: clock - 1),
    ],
)
def test_a_state_of_other_weights_is_refused(name, other):
    """And no memory is written that is not its own."""
    weights, case = [torch.randn(3, 3), torch.randn(3, 3)], Case((3, 3))
    state = no_momentum(weights, 2 * case.plan, False, 0.5)
    setattr(state, name, other(getattr(state, name)))
    arguments = weights, weights, *state.tensors(), torch.ones(2, dtype=torch.float64), 0.5, 2 * case.plan, False
    for measured in (False, True):
        with pytest.raises(RuntimeError, match="the state of norm decay is of other weights"):
            torch.ops.convnorm.decay_native(*arguments, measured)
