"""The promise: ``.backward()`` gives a subgradient of the norm, through every transform that PyTorch has.

A matrix ``g`` is a subgradient of a norm at W exactly where <g, W> = ||W|| and <g, V> <= ||V|| for every V.
"""

import cases
import numpy as np
import pytest
import torch
from cases import TABLE, replay
from torch import Tensor

ops = torch.ops.convnorm
inf = float("inf")


def gradients(weight: Tensor, case) -> tuple[list[Tensor], list[Tensor]]:
    weight = weight.detach().requires_grad_()
    norms = ops.norms(weight, *case.args, **case.options)
    return list(norms), [torch.autograd.grad(norm, weight, retain_graph=True)[0] for norm in norms]


def sample(name, dtype=torch.float64, seed=0, device="cpu"):
    case = TABLE[name]
    return case, cases.random_values(np.random.default_rng(seed), case.weight_shape, dtype, "normal").to(device)


def slices(case, ord: float, g: Tensor) -> Tensor:
    """How many input channels (l1) or output channels (linf) of the layer ``g`` is not zero in."""
    matrix = g.unflatten(0, (case.groups, -1)).flatten(3) if g.dim() > 2 else g[None, ..., None]
    column = (ord == 1) != case.transposed
    return matrix.ne(0).any(-1).any(1 if column else 2).sum()


def test_gradients_are_subgradients(device, seed, numbers):
    for number in numbers[::5]:
        rng = np.random.default_rng((seed, number, 3))
        case = cases.random_case(rng)
        values = str(rng.choice(["normal", "integers", "sparse", "constant", "zeros"]))
        weight = cases.random_weight(rng, case.weight_shape, values=values, device=device)
        again = replay(seed, number, case)
        others = [torch.from_numpy(rng.standard_normal(weight.shape)).to(device), -weight]
        others += [weight + 1e-3 * other for other in others]
        args, options = cases.columns([case] * len(others))
        all_norms = ops.norms_many(others, *args, **options)
        for ord, norm, g, of_others in zip((1, inf), *gradients(weight, case), all_norms, strict=True):
            torch.testing.assert_close((g * weight).sum(), norm.detach(), rtol=1e-9, atol=1e-12, msg=again)
            for other, bound in zip(others, of_others, strict=True):
                assert (g * other).sum() <= bound * (1 + 1e-9) + 1e-12, f"ord {ord}. {again}"
            assert g.equal(g.round()), f"not integers. {again}"
            if case.mode == "zeros":
                assert g.abs().amax() <= 1, f"not 0 and ±1. {again}"
                assert g[weight == 0].eq(0).all(), f"sign(0) is not 0. {again}"
            assert slices(case, ord, g) <= 1, f"not zero outside one channel. {again}"


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradients_are_dense_and_of_the_weights_dtype(device, dtype):
    case, weight = sample("conv2d", dtype, device=device)
    for g in gradients(weight, case)[1]:
        assert (g.layout, g.dtype, g.shape, g.device) == (torch.strided, dtype, weight.shape, weight.device)
        assert set(g.unique().tolist()) == {-1, 0, 1}


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("name", TABLE)
def test_gradients_are_the_same_for_every_layout_and_dtype(device, name):
    case, weight = sample(name, torch.bfloat16, device=device)  # exact in the wider ones
    expected = gradients(weight.double(), case)[1]
    for dtype in set(cases.DTYPES) - {torch.float16}:
        for layout in set(cases.LAYOUTS) - {"expanded"}:
            for g, wanted in zip(gradients(cases.lay_out(weight.to(dtype), layout), case)[1], expected, strict=True):
                assert torch.equal(g.double(), wanted), (dtype, layout)


def test_gradient_reaches_through_how_the_weight_was_made(device):
    """A weight is seldom a leaf: it may be scaled, masked or stored channels last."""
    case, leaf = sample("conv2d", device=device)
    leaf.requires_grad_()
    made = (2 * leaf).to(memory_format=torch.channels_last)
    ops.l1(made, *case.args).backward()
    assert torch.equal(leaf.grad, 2 * gradients(leaf, case)[1][0])


def test_gradients_accumulate_and_scale(device):
    case, weight = sample("conv2d", device=device)
    (_, (g1, ginf)) = gradients(weight, case)
    weight.requires_grad_()
    l1, linf = ops.norms(weight, *case.args)
    (3 * l1 - 0.5 * linf).backward()
    assert torch.equal(weight.grad, 3 * g1 - 0.5 * ginf)
    ops.l1(weight, *case.args).backward()
    assert torch.equal(weight.grad, 4 * g1 - 0.5 * ginf)


def test_norms_many_gives_each_weight_its_gradient(device):
    names = ["conv2d", "transposed", "linear", "grouped", "circular"]
    layers, weights = zip(*(sample(name, device=device) for name in names), strict=True)
    expected = [gradients(weight, case)[1] for case, weight in zip(layers, weights, strict=True)]
    weights = [weight.requires_grad_() for weight in weights]
    weights[1].requires_grad_(False)
    args, options = cases.columns(layers)
    l1s, linfs = ops.norms_many(list(weights), *args, **options)
    factors = torch.arange(1.0, 6, dtype=torch.float64, device=device)
    (l1s @ factors).backward(retain_graph=True)
    (linfs @ factors).backward()
    assert weights[1].grad is None
    for i, (weight, (g1, ginf)) in enumerate(zip(weights, expected, strict=True), 1):
        if weight.requires_grad:
            assert torch.equal(weight.grad, i * g1 + i * ginf)


def test_a_weight_listed_twice_gets_both_gradients(device):
    case, weight = sample("conv2d", device=device)
    wide = [[1, 1], [1, 1], [2, 2]]  # the same layer where it sees another input
    narrow = cases.Case(case.weight_shape, *map(tuple, wide))
    expected = gradients(weight, case)[1][0] + gradients(weight, narrow)[1][0]
    weight.requires_grad_()
    args = list(map(list, zip(case.args, wide, strict=True)))
    ops.norms_many([weight, weight], *args)[0].sum().backward()
    assert torch.equal(weight.grad, expected)


def test_no_gradient_where_none_is_asked_for(device):
    case, weight = sample("conv2d", device=device)
    assert not ops.l1(weight, *case.args).requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert not any(norm.requires_grad for norm in ops.norms(weight, *case.args))
    with torch.inference_mode():
        assert not any(norm.requires_grad for norm in ops.norms(weight, *case.args))
    assert all(norm.requires_grad for norm in ops.norms(weight, *case.args))


def test_values_do_not_depend_on_whether_a_gradient_is_asked_for(device, seed, numbers):
    for number in numbers[::20]:
        case, weight = cases.fuzz(seed, number, device)
        plain = ops.norms(weight, *case.args, **case.options)
        with_grad = ops.norms(weight.requires_grad_(), *case.args, **case.options)
        assert all(map(torch.equal, plain, with_grad)), replay(seed, number, case)


def test_transforms_of_torch_func_give_the_same_gradients(device, seed, numbers):
    for number in numbers[::20]:
        case, weight = cases.fuzz(seed, number, device)
        norms, pull = torch.func.vjp(lambda w, c=case: torch.stack(ops.norms(w, *c.args, **c.options)), weight)
        expected = torch.stack(ops.norms(weight.requires_grad_(), *case.args, **case.options))
        for given in torch.eye(2, dtype=norms.dtype, device=device):
            gradient = torch.autograd.grad(expected, weight, given, retain_graph=True)[0]
            assert torch.equal(pull(given)[0], gradient), replay(seed, number, case)
        assert torch.equal(norms, expected), replay(seed, number, case)


def test_gradient_at_zero_is_zero(device):
    for case in TABLE.values():
        for g in gradients(torch.zeros(case.weight_shape, device=device), case)[1]:
            assert g.eq(0).all()


def test_gradient_of_merged_taps_that_cancel(device):
    """Their sum is 1e-8, which float32 would make 0 of."""
    weight = torch.tensor([[[1.0, 1e-8, -1.0]]], device=device)
    norm, pull = torch.func.vjp(lambda w: ops.l1(w, [1], [1], [1], padding_mode="circular"), weight)
    assert norm.dtype == torch.float32
    assert torch.equal(pull(torch.ones_like(norm))[0], torch.ones_like(weight))
    ops.l1(weight.requires_grad_(), [1], [1], [1], padding_mode="circular").backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_gradient_does_not_see_what_no_output_reads(device):
    weight = torch.tensor([[[float("nan"), 2.0, inf]]], device=device)  # one input, one in the middle of the kernel
    case = cases.Case((1, 1, 3), (1,), (1,), (1,))
    norms, grads = gradients(weight, case)
    assert [norm.item() for norm in norms] == [2, 2]
    assert [g.flatten().tolist() for g in grads] == [[0, 1, 0]] * 2


def test_a_gradient_may_be_derived_again(device):
    """The norms are linear in pieces: second derivatives are zero."""
    case, weight = sample("conv2d", device=device)
    norms = torch.stack(ops.norms(weight.requires_grad_(), *case.args, **case.options))
    scale = torch.ones(2, dtype=norms.dtype, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(norms, weight, scale, create_graph=True)
    of_weight, of_scale = torch.autograd.grad((gradient * weight.detach()).sum(), [weight, scale])
    assert of_weight.eq(0).all()
    torch.testing.assert_close(of_scale, norms.detach())


def test_only_weights_that_ask_get_a_gradient(device):
    case, weight = sample("conv2d", device=device)
    frozen, free = weight.clone(), weight.clone().requires_grad_()
    args, options = cases.columns([case] * 2)
    ops.norms_many([frozen, free], *args, **options)[0].sum().backward()
    assert frozen.grad is None
    assert torch.equal(free.grad, gradients(weight, case)[1][0])


def test_gradient_of_an_infinite_norm_is_that_of_its_slice(device):
    weight = torch.tensor([[[-inf, 2.0]], [[1.0, 1.0]]], device=device)
    norms, (g1, ginf) = gradients(weight, cases.Case((2, 1, 2), (1,), (0,), (4,)))
    assert [norm.item() for norm in norms] == [inf, inf]
    assert g1.flatten().tolist() == [-1, 1, 1, 1]
    assert ginf.flatten().tolist() == [-1, 1, 0, 0]
    (norm, pull) = torch.func.vjp(lambda w: ops.l1(w, [1], [0], [4]), weight)
    assert (norm.item(), pull(torch.ones_like(norm))[0].flatten().tolist()) == (inf, [-1, 1, 1, 1])


def test_gradient_of_overflowing_half_precision_is_exact(device):
    weight = torch.full((2, 3, 3, 3), -60000.0, dtype=torch.float16, device=device)
    norms, (g1, _) = gradients(weight, TABLE["conv2d"])
    assert norms[0].item() == 18 * 60000
    assert g1[:, 0].eq(-1).all()


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("name", TABLE)
def test_gradcheck_away_from_ties(device, name):
    case, weight = sample(name, device=device)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.norms(w, *case.args, **case.options), weight, fast_mode=True)


def test_second_derivative_is_zero(device):
    """Piecewise linear: zero wherever there is one."""
    case, weight = sample("circular", device=device)
    weight.requires_grad_()
    (g,) = torch.autograd.grad(ops.l1(weight, *case.args, **case.options) ** 2, weight, create_graph=True)
    first = gradients(weight, case)[1][0]
    (second,) = torch.autograd.grad((g * first).sum(), weight)
    torch.testing.assert_close(second, 2 * (first * first).sum() * first)  # of the square; the norm adds nothing
    twice = torch.func.jacrev(torch.func.jacrev(lambda w: ops.l1(w, *case.args, **case.options)))
    assert twice(weight.detach()).eq(0).all()


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("name", TABLE)
def test_func_transforms_give_the_same_gradient(device, name):
    case, weight = sample(name, device=device)
    batch = torch.stack([weight, -2 * weight, weight.flip(0)], dim=1)
    norms, expected = gradients(weight, case)

    def both(w):
        return torch.stack(ops.norms(w, *case.args, **case.options))

    torch.testing.assert_close(torch.func.jacrev(both)(weight), torch.stack(expected))
    for op, norm, g in zip((ops.l1, ops.linf), norms, expected, strict=True):

        def alone(w, op=op):
            return op(w, *case.args, **case.options)

        torch.testing.assert_close(torch.func.grad(alone)(weight), g)
        value, pullback = torch.func.vjp(alone, weight)
        torch.testing.assert_close((value, pullback(torch.ones_like(value))[0]), (norm.detach(), g))
        members = batch.unbind(1)
        torch.testing.assert_close(torch.vmap(alone, in_dims=1)(batch), torch.stack([alone(m) for m in members]))
        torch.testing.assert_close(torch.vmap(torch.func.grad(alone), in_dims=1)(batch),
                                   torch.stack([torch.func.grad(alone)(m) for m in members]))  # fmt: skip


def test_vmap_takes_an_ensemble_through_norms_many(device):
    (case, weight), (flat, matrix) = sample("conv2d", device=device), sample("linear", device=device)
    args, options = cases.columns([case, flat])
    ensemble = torch.stack([weight, 3 * weight])
    l1s, linfs = torch.vmap(lambda w: ops.norms_many([w, matrix], *args, **options))(ensemble)
    for i, member in enumerate(ensemble):
        torch.testing.assert_close((l1s[i], linfs[i]), ops.norms_many([member, matrix], *args, **options))
    nested = torch.stack([ensemble, -ensemble])
    values = torch.vmap(torch.vmap(lambda w: ops.l1(w, *case.args)))(nested)
    torch.testing.assert_close(values, l1s[:, 0].expand(2, 2))


def test_gradient_reaches_through_vmap(device):
    case, weight = sample("conv2d", device=device)
    ensemble = torch.stack([weight, weight.flip(0)])
    expected = torch.stack([gradients(member, case)[1][0] for member in ensemble])

    def total(ensemble):
        return torch.vmap(lambda w: ops.l1(w, *case.args))(ensemble).sum()

    assert torch.equal(torch.func.grad(total)(ensemble), expected)
    total(ensemble.requires_grad_()).backward()
    assert torch.equal(ensemble.grad, expected)


def test_gradient_of_a_weight_that_an_inner_transform_does_not_differentiate(device):
    case, weight = sample("conv2d", device=device)
    expected = gradients(weight, case)[1][0]
    two = torch.tensor(2.0, dtype=weight.dtype, device=device)

    def slope(w, transform=torch.func.grad):
        """Of a factor of the norm: the norm itself."""
        return transform(lambda factor: factor * ops.l1(w, *case.args))(two)

    assert torch.equal(torch.func.grad(slope)(weight), expected)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd):
        assert torch.equal(torch.autograd.grad(slope(weight.requires_grad_(), transform), weight)[0], expected)


def test_forward_mode_is_right_or_refused(device):
    case, weight = sample("circular", device=device)
    expected = gradients(weight, case)[1][0]
    tangent = torch.ones_like(weight)
    try:
        value, slope = torch.func.jvp(lambda w: ops.l1(w, *case.args, **case.options), (weight,), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close((value, slope), (ops.l1(weight, *case.args, **case.options), expected.sum()))


def test_functional_call_regularises_a_module(device):
    """The way torch.func takes gradients of a whole network."""
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, device=device, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, device=device, dtype=torch.float64)

    def loss(params):
        return torch.func.functional_call(conv, params, x).square().sum() + ops.l1(params["weight"], 1, 1, [8, 8])

    params = {name: value.detach() for name, value in conv.named_parameters()}
    through_func = torch.func.grad(loss)(params)
    (conv(x).square().sum() + ops.l1(conv.weight, 1, 1, [8, 8])).backward()
    torch.testing.assert_close(through_func["weight"], conv.weight.grad)
