"""The promise: the nearest weights whose norm is at most a bound, and nothing that need not change does.

Checked by the explicit matrix, which knows no window: its columns (l1) or rows (linf) are at most the bound, exactly,
in float64; and by a general convex solver that is given this matrix as a linear function of the weights.
"""

import itertools
import math
from functools import partial
from importlib import import_module

import cases
import numpy as np
import oracle
import pytest
import torch

from convnorm.ball import _by_interior_points, _by_pressures, ball_of, shrink
from convnorm.layers import as_layer
from convnorm.project import IN_CACHE, changes_of, constraint_of, project

inf = math.inf
ORDS = (1, inf)


def channel_norms(weight, case, ord):
    """[channels]: the largest absolute sum of the explicit matrix's columns (l1) or rows (linf) in each channel."""
    matrix = oracle.matrix(weight, *case.args, **case.options)
    sizes = case.geometry.in_shape if ord == 1 else case.geometry.out_shape
    return matrix.abs().sum(0 if ord == 1 else 1).reshape(-1, math.prod(sizes)).amax(1)


def project_case(weight, case, ord, bound):
    return project(weight, case.in_shape, ord=ord, bound=bound, **case.keywords)


def random_layer(seed, number, ord, dtype=torch.float64, values=None, layout="contiguous"):
    """A layer, and a bound for each channel: some above what the channel has, some far below."""
    rng = np.random.default_rng((seed, number, 20))
    case = cases.random_case(rng, merging=bool(number % 2))
    values = values or str(rng.choice(["normal", "normal", "normal", "integers", "sparse", "uneven", "constant"]))
    weight = cases.random_weight(rng, case.weight_shape, dtype, values, layout)
    norms = channel_norms(weight, case, ord)
    return case, weight, norms * torch.from_numpy(rng.uniform(0.02, 1.3, len(norms))), norms


def channels_of(weight, case, ord):
    """[channels, the rest]: what each bound concerns."""
    matrix = weight.unflatten(0, (case.groups, -1))
    matrix = matrix.transpose(1, 2) if (ord == 1) != case.transposed else matrix
    return matrix.reshape(matrix.shape[0] * matrix.shape[1], -1)


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_explicit_matrix_is_within_the_bound(seed, ord, dtype):
    for number in range(300):
        layout = cases.LAYOUTS[number % len(cases.LAYOUTS)]
        case, weight, bound, norms = random_layer(seed, number, ord, dtype, layout=layout)
        before, again = weight.clone(), cases.replay(seed, number, case)
        projected = project_case(weight, case, ord, bound)
        assert projected.dtype == dtype, again
        assert projected.shape == weight.shape, again
        after = channel_norms(projected, case, ord)
        assert (after <= bound).all(), f"{after} must be at most {bound}. {again}"
        within = norms <= bound * (1 - 1e-12)
        kept, changed = channels_of(weight, case, ord), channels_of(projected, case, ord)
        assert torch.equal(kept[within], changed[within]), f"Changed without need. {again}"
        slack = 4 * torch.finfo(dtype).eps * channel_norms(weight.abs(), case, ord)
        assert (after >= torch.minimum(norms, bound) - slack - 1e-9 * bound).all(), f"Cut too far. {again}"
        assert torch.equal(project_case(projected, case, ord, bound), projected), f"Not idempotent. {again}"
        assert torch.equal(weight, before), f"The weight was written to. {again}"


def matrix_map(case):
    """[entries of the matrix, weights]: the explicit matrix as a linear function of the weight, by its values there."""
    size = math.prod(case.weight_shape)
    units = torch.eye(size, dtype=torch.float64).reshape(size, *case.weight_shape)
    return torch.stack([oracle.matrix(unit, *case.args, **case.options) for unit in units], -1)


def written_down(case, ord, bound):
    """rows[sums, weights], constraints[number, sums], limits[number]: constraints @ abs(rows @ weight) <= limits.

    By the explicit matrix alone: entries that are the same sum of weights are one, and so are columns (l1) or rows
    (linf) of the same entries. None where that is too large.
    """
    size = math.prod(case.weight_shape)
    entries = matrix_map(case).numpy()
    if entries.size > 100_000:
        return None
    entries = entries if ord == 1 else entries.swapaxes(0, 1)
    rows, ids = np.unique(entries.reshape(-1, size), axis=0, return_inverse=True)
    counts = np.zeros((entries.shape[1], len(rows)))
    np.add.at(counts, (np.tile(np.arange(len(counts)), len(entries)), ids.reshape(-1)), 1)
    limits = np.repeat(bound.numpy(), len(counts) // len(bound))
    constraints = np.unique(np.column_stack([counts, limits]), axis=0)
    return rows, constraints[:, :-1], constraints[:, -1]


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_a_convex_solver_finds_the_same(seed, ord):
    cp = pytest.importorskip("cvxpy")
    solved = 0
    for number in range(130):
        case, weight, bound, _ = random_layer(seed, number, ord, values="normal")
        if (problem := written_down(case, ord, bound)) is None:
            continue
        rows, constraints, limits = problem
        w, sizes = cp.Variable(weight.numel()), cp.Variable(len(rows))
        distance = cp.sum_squares(w - weight.reshape(-1).numpy())
        exact = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-11}
        cp.Problem(cp.Minimize(distance), [cp.abs(rows @ w) <= sizes, constraints @ sizes <= limits]).solve(
            solver=cp.CLARABEL, **exact
        )
        expected = torch.from_numpy(w.value).reshape(weight.shape)
        projected, again = project_case(weight, case, ord, bound), cases.replay(seed, number, case)
        near = 1e-5 * weight.abs().amax()
        torch.testing.assert_close(projected, expected, rtol=0, atol=near, msg=again)
        distance, least = ((one - weight).square().sum() for one in (projected, expected))
        assert distance <= least * (1 + 1e-6) + 1e-9, f"The solver's is nearer. {again}"
        sums = np.abs(rows @ projected.reshape(-1).numpy()) / weight.abs().amax().item()
        assert ((sums <= 1e-13) | (sums >= 1e-8)).all(), f"Held at zero, but not to the last digits. {again}"
        solved += 1
    assert solved > 65


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("cut", [0.5, 1e-2, 1e-4])
def test_duality_certifies_the_projection(seed, ord, cut):
    """p is the projection if and only if p is where <weight - p, y> is largest, of all y within the bound: a linear
    programme, whose value one of its own kind of solver knows to many digits.
    """
    optimize = pytest.importorskip("scipy.optimize")
    certified = 0
    for number in range(60):
        case, weight, _, norms = random_layer(
            seed, number, ord, values=("normal", "integers", "sparse")[number // 2 % 3]
        )
        bound = norms * cut
        if weight.numel() > 60 or (problem := written_down(case, ord, bound)) is None:
            continue
        rows, constraints, limits = problem
        p, again = project_case(weight, case, ord, bound), cases.replay(seed, number, case)
        away = (weight - p).reshape(-1).numpy()
        scale = np.abs(away).max() or 1
        eye, none = np.eye(len(rows)), np.zeros((len(constraints), weight.numel()))
        result = optimize.linprog(
            np.concatenate([-away / scale, np.zeros(len(rows))]),
            A_ub=np.block([[rows, -eye], [-rows, -eye], [none, constraints]]),
            b_ub=np.concatenate([np.zeros(2 * len(rows)), limits / cut]),
            bounds=[(None, None)] * weight.numel() + [(0, None)] * len(rows),
        )
        assert result.status == 0, f"{result.message} {again}"
        most = -result.fun * scale * cut
        assert away @ p.reshape(-1).numpy() >= most * (1 - 1e-9) - 1e-15, again
        certified += 1
    assert certified > 20


@pytest.mark.parametrize("ord", ORDS)
def test_no_feasible_weight_lies_beyond_the_projection(seed, ord):
    """The condition that says which point is the projection: <weight - p, y - p> <= 0 for all y within the bound."""
    for number in range(150):
        case, weight, bound, _ = random_layer(seed, number, ord)
        rng = np.random.default_rng((seed, number, 21))
        p, again = project_case(weight, case, ord, bound), cases.replay(seed, number, case)
        away = weight - p
        spread = 10.0 ** float(rng.uniform(-6, 0)) * weight.abs().amax()
        noise = torch.from_numpy(rng.standard_normal(weight.shape))
        one = torch.zeros_like(weight).view(-1)
        one[int(away.abs().argmax())] = away.view(-1)[int(away.abs().argmax())].sign()
        for y in (
            torch.zeros_like(weight),
            noise,
            away,
            p + spread * noise,
            p + away,
            one.view_as(weight),
            p + spread * away.sign(),
        ):
            norms = channel_norms(y, case, ord)
            factor = torch.where(norms > bound, bound / norms, 1)
            channels = channels_of(y, case, ord) * factor[:, None]
            dots = (channels_of(away, case, ord) * (channels - channels_of(p, case, ord))).sum(1)
            scale = channels_of(weight, case, ord).square().sum(1)
            assert (dots <= 1e-8 * scale).all(), f"{dots} of {scale}. {again}"


def test_a_threshold_has_one_height(seed):
    """The l1 ball's own conditions, to the last digits: what stays falls by one number, what goes was below it."""
    for number in range(300):
        rng = np.random.default_rng((seed, number, 22))
        rows, entries = (int(n) for n in rng.integers(1, 60, 2))
        x = cases.random_weight(
            rng,
            (rows, entries),
            layout="contiguous",
            values=str(rng.choice(["normal", "integers", "uneven", "sparse"])),
        )
        x[:, 0] = 1.5
        bound = x.abs().sum(1) * torch.from_numpy(10.0 ** rng.uniform(-9, -0.001, rows))
        p = shrink(x, bound)
        torch.testing.assert_close(p.abs().sum(1), bound, rtol=1e-12, atol=0)
        fall = x.abs() - p.abs()
        height = fall.amax(1, keepdim=True)
        near = 1e-12 * x.abs().amax(1, keepdim=True)
        assert (torch.where(p != 0, (fall - height).abs(), 0) <= near).all()
        assert (x * p >= 0).all()


def test_where_windows_overlap_newtons_method_seldom_circles():
    """A constraint of speed: what it leaves is a hundred times as slow."""
    weight = torch.randn(60, 40, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    constraint = constraint_of([as_layer(weight, [2, 2], padding=1)], inf)
    ball = ball_of(constraint.plan, constraint.column, weight.device)
    x0 = weight.flatten(2) / weight.abs().amax()
    assert ball.disjoint is None
    for cut in (0.9, 0.5, 0.1):
        bound = cut * ball.sums(x0).amax(1)
        x, _, found = _by_pressures(x0, bound, ball)
        assert found.double().mean() > 0.95
        torch.testing.assert_close(x, _by_interior_points(x0, bound, ball)[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_layers_are_cut_as_small_ones(seed, column, dtype):
    """Each channel on its own, by sorting, however many of them fit into a cache."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(300, 200, 3, generator=generator).to(dtype)
    assert weight.numel() > 2 * IN_CACHE
    matrix = (weight.transpose(0, 1) if column else weight).flatten(1).double()
    bound = matrix.abs().sum(1) * torch.rand(len(matrix), generator=generator, dtype=torch.float64) * 1.2
    projected = project(weight, [9], ord=1 if column else inf, bound=bound, padding=1)
    ordered = matrix.abs().sort(1, descending=True).values
    levels = (ordered.cumsum(1) - bound[:, None]) / torch.arange(1, matrix.shape[1] + 1)
    last = (ordered > levels).sum(1, keepdim=True) - 1
    expected = matrix.sign() * (matrix.abs() - levels.gather(1, last).clamp(min=0)).relu()
    got = (projected.transpose(0, 1) if column else projected).flatten(1).double()
    torch.testing.assert_close(got, expected, rtol=torch.finfo(dtype).eps, atol=1e-12)
    assert (got.abs() <= expected.abs() * (1 + 1e-12)).all(), "Not rounded towards zero."


def test_channels_with_the_very_bound_stay_as_they_are():
    weight = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
    assert torch.equal(project(weight, ord=math.inf, bound=6.0)[0], weight[0])


@pytest.mark.parametrize("ord", ORDS)
def test_projections_never_part(seed, ord):
    for number in range(150):
        case, weight, bound, _ = random_layer(seed, number, ord)
        rng = np.random.default_rng((seed, number, 23))
        other = weight + torch.from_numpy(rng.standard_normal(weight.shape)) * 10.0 ** rng.uniform(-4, 1)
        near, far = (
            channels_of(a - b, case, ord).square().sum(1).sqrt()
            for a, b in [
                (project_case(weight, case, ord, bound), project_case(other, case, ord, bound)),
                (weight, other),
            ]
        )
        assert (near <= far * (1 + 1e-9) + 1e-7 * bound).all(), cases.replay(seed, number, case)


@pytest.mark.parametrize("ord", ORDS)
def test_bounds_of_0_and_inf(seed, ord):
    for number in range(60):
        case, weight, bound, norms = random_layer(seed, number, ord, torch.float32)
        assert torch.equal(project_case(weight, case, ord, inf), weight)
        none = project_case(weight, case, ord, 0)
        assert not channel_norms(none, case, ord).any()
        blind = matrix_map(case).abs().sum((0, 1)).reshape(case.weight_shape) == 0  # taps that read padding only
        assert torch.equal(none[blind], weight[blind])
        mixed = torch.where(torch.arange(len(bound)) % 2 == 0, 0.0, norms / 2)
        assert (channel_norms(project_case(weight, case, ord, mixed), case, ord) <= mixed).all()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("merging", [False, True])
def test_gradients_are_those_of_the_projection(seed, ord, merging):
    for number in range(merging, 30, 2):
        case, weight, bound, _ = random_layer(seed, number, ord, values="normal")
        if weight.numel() > 60:
            continue
        weight, bound = weight.requires_grad_(), bound.clamp(min=0.01).requires_grad_()
        again = cases.replay(seed, number, case)
        call = partial(project_case, case=case, ord=ord)
        assert torch.autograd.gradcheck(lambda w, b, call=call: call(w, bound=b), (weight, bound), atol=1e-4), again
        out = call(weight, bound=bound)
        (once,) = torch.autograd.grad(out, weight, torch.randn_like(out))
        (twice,) = torch.autograd.grad(call(weight, bound=bound), weight, once)
        torch.testing.assert_close(twice, once, msg=again)  # on a face, an orthogonal projection


@pytest.mark.parametrize("ord", ORDS)
def test_gradients_of_float32_are_those_of_float64(seed, ord):
    for number in range(120):
        case, weight, bound, _ = random_layer(seed, number, ord, torch.float32, values="normal")
        if weight.numel() > 300:
            continue
        towards = torch.from_numpy(np.random.default_rng((seed, number, 24)).standard_normal(weight.shape))
        near, far = (
            torch.autograd.grad((project_case(leaf, case, ord, bound) * towards).sum(), leaf)[0].double()
            for leaf in (weight.requires_grad_(), weight.detach().double().requires_grad_())
        )
        torch.testing.assert_close(near, far, rtol=1e-5, atol=1e-5, msg=cases.replay(seed, number, case))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_transforms_see_the_derivative(mode):
    torch.manual_seed(0)
    weights, tangent = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)

    def call(weight):
        return project(weight, [8], ord=1, bound=1.0, padding=1, padding_mode=mode).pow(3).sum()

    grads = torch.stack([torch.autograd.functional.jacobian(call, weight) for weight in weights])
    assert grads.any()
    torch.testing.assert_close(torch.func.grad(call)(weights[0]), grads[0])
    torch.testing.assert_close(torch.func.jvp(call, (weights[0],), (tangent,))[1], (grads[0] * tangent).sum())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(call))(weights), grads)
    batched = weights.clone().requires_grad_()
    torch.func.vmap(call)(batched).sum().backward()
    torch.testing.assert_close(batched.grad, grads)


def test_gradients_reach_half_precision():
    weight = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    projected = project(weight, ord=inf, bound=0.5)
    projected.sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert (weight.grad[projected == 0] == 0).all()


@pytest.mark.parametrize("number", range(4))
def test_the_operator_is_one(number):
    case, weight, bound, _ = random_layer(0, number, 1, torch.float32)
    torch.library.opcheck(torch.ops.convnorm.project, (weight, bound, case.plan, not case.transposed))


def test_merged_taps_that_cancel_stay_within_the_bound(seed):
    """Rounding each tap breaks a sum that is nearly 0: the bound holds all the same."""
    for number in range(6):
        weight = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(seed * 1000 + number))
        case = cases.Case((3, 2, 5), (1,), (2,), (2,), {"padding_mode": "circular"})
        for dtype, ord, bound in itertools.product(cases.DTYPES, ORDS, (1e-2, 1e-5, 1e-9)):
            projected = project_case(weight.to(dtype), case, ord, bound)
            assert (channel_norms(projected, case, ord) <= bound).all(), f"{dtype}, {ord}, {bound}, {number}"
            assert dtype == torch.bfloat16 or bound < 1e-2 or projected.any()


def test_channels_take_turns(monkeypatch):
    """However many at once, the values are the same to the last bit."""
    weight = torch.randn(9, 8, 3, generator=torch.Generator().manual_seed(0))
    whole = [project(weight, [n], ord=1, bound=2.0, padding=1) for n in (8, 2)]
    monkeypatch.setattr(import_module("convnorm.project"), "IN_CACHE", 30)
    assert all(map(torch.equal, [project(weight, [n], ord=1, bound=2.0, padding=1) for n in (8, 2)], whole))
    constraint = constraint_of([as_layer(weight, [8], padding=1)], 1)
    ball = ball_of(constraint.plan, constraint.column, weight.device)
    changes = list(changes_of(weight[None].transpose(1, 2), torch.full((8,), 2.0), ball))
    assert [len(change.channels) for change in changes] == [1] * 8


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("sizes", [[6], [2]])  # disjoint and overlapping windows
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_a_bound_of_inf_leaves_weights_and_their_gradients_as_they_are(ord, sizes, mode):
    torch.manual_seed(0)
    weight = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    bound = torch.tensor([inf, 0.5, inf, 0.3], dtype=torch.float64)
    options = {"ord": ord, "bound": bound, "padding": 1, "padding_mode": mode}
    projected = project(weight, sizes, **options)
    assert torch.equal(projected.detach(), project(weight.detach(), sizes, **options))
    projected.sum().backward()
    free = (slice(None), [0, 2]) if ord == 1 else ([0, 2],)
    assert torch.equal(projected.detach()[free], weight.detach()[free])
    assert weight.grad.isfinite().all()
    assert (weight.grad[free] == 1).all()
