"""The promise: the nearest weights whose norm is at most a bound, and nothing that need not change does.

Checked by the explicit matrix, which knows no window: its columns (l1) or rows (linf) are at most the bound, exactly,
in float64; and by a general convex solver that is given this matrix as a linear function of the weights.
"""

import copy
import itertools
import math
from functools import partial
from importlib import import_module

import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convnorm.ball import _by_interior_points, _by_pressures, ball_of, shrink
from convnorm.constrain import Projection, constrain, project_, project_batch_norms_
from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.project import IN_CACHE, changes_of, constraint_of, project

inf, nan = math.inf, math.nan
ORDS = (1, inf)


def channel_norms(weight, case, ord):
    """[channels]: the largest absolute sum of the explicit matrix's columns (l1) or rows (linf) in each channel."""
    return sums_of(oracle.matrix(weight, *case.args, **case.options), case, ord)


def sums_of(matrix, case, ord):
    sizes = case.geometry.in_shape if ord == 1 else case.geometry.out_shape
    return matrix.abs().sum(0 if ord == 1 else 1).reshape(-1, math.prod(sizes)).amax(1)


def project_case(weight, case, ord, bound):
    stride, padding, in_shape = case.args
    return project(weight, in_shape, ord=ord, bound=bound, stride=stride, padding=padding, **case.options)


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


def test_transforms_see_the_derivative():
    torch.manual_seed(0)
    weights, tangent = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)

    def call(weight):
        return project(weight, [8], ord=1, bound=1.0, padding=1).pow(3).sum()

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


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, padding_mode="reflect"),
        nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Flatten(),
        nn.Linear(256, 5),
    )  # fmt: skip


def norm_of(module, in_shape, ord):
    layer = as_layer(module, in_shape)
    options = layer.options | {"dilation": list(layer.dilation), "output_padding": list(layer.output_padding)}
    return oracle.norms(oracle.matrix(layer.weight, *map(list, layer.sizes), **options))[ORDS.index(ord)].item()


SIZES = {"0": [8, 8], "3": [8, 8], "5": [4, 4], "6": [8, 8], "8": []}


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_projected_in_place(ord, dtype):
    model = small_net().to(dtype)
    norms = {name: norm_of(model[int(name)], size, ord) for name, size in SIZES.items()}
    bounds = {name: norms[name] * (2 if name == "6" else 0.5) for name in SIZES if name != "8"}
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    expected = {
        name: project(model[int(name)], SIZES[name], ord=ord, bound=bound).detach() for name, bound in bounds.items()
    }
    assert project_(model, [1, 3, 8, 8], ord=ord, bound=bounds) is model
    assert all(map(torch.Tensor.equal, parameters, model.parameters()))
    for name, bound in bounds.items():
        weight = model[int(name)].weight
        assert norm_of(model[int(name)], SIZES[name], ord) <= bound
        assert torch.equal(weight, expected[name])
        assert torch.equal(weight, before[f"{name}.weight"]) == (name == "6")
    assert torch.equal(model[8].weight, before["8.weight"])
    assert all(
        torch.equal(model.state_dict()[name], before[name]) for name in before if name.endswith(("bias", "1.weight"))
    )


def test_channels_of_a_model_have_bounds_of_their_own():
    model = nn.Sequential(nn.Linear(5, 3))
    bound = torch.tensor([100.0, 0.1, 100.0])
    before = model[0].weight.detach().clone()
    project_(model, [1, 5], ord=inf, bound={"0": bound})
    assert (model[0].weight.double().abs().sum(1) <= bound.double()).all()
    assert (model[0].weight == before).all(1).tolist() == [True, False, True]


class Reused(nn.Module):
    """One weight in two layers, at sizes whose windows overlap and differ."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 4, 5, padding=2)
        self.second = nn.Conv1d(4, 4, 5, padding=3, padding_mode="circular")
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x)[..., :3]) + self.first(x[..., :2]).sum()


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_weight_is_bounded_wherever_it_is_used(ord, everywhere):
    torch.manual_seed(0)
    model = Reused().double()
    before = model.first.weight.detach().clone()
    uses = [(model.first, [9]), (model.first, [2]), (model.second, [3])]
    norms = sorted(norm_of(module, size, ord) for module, size in uses)
    bound = 0.6 * norms[0] if everywhere else (norms[0] + 2 * norms[-1]) / 3  # exceeded in one use at least
    project_(model, [1, 4, 9], ord=ord, bound=bound)
    norms = [norm_of(module, size, ord) for module, size in uses]
    assert max(norms) <= bound
    assert max(norms) == pytest.approx(bound, rel=1e-9)
    # nearest: no feasible weight lies beyond
    p, away = model.first.weight.detach().clone(), before - model.first.weight.detach()
    for _ in range(50):
        y = p + 10.0 ** float(torch.empty(()).uniform_(-5, 0)) * torch.randn_like(p)
        model.first.weight.data.copy_(y)
        y = y * min(1, bound / max(norm_of(module, size, ord) for module, size in uses))
        assert (away * (y - p)).sum() <= 1e-9


def test_an_attached_projection_follows_each_step():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    bound = 3.0
    handle = Projection(model, [1, 3, 8, 8], ord=inf, bound=bound).attach(optimizer)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        return max(norm_of(model[int(name)], size, inf) for name, size in SIZES.items())

    assert all(step() <= bound for _ in range(4))
    handle.remove()
    assert max(step() for _ in range(4)) > bound


def test_a_step_within_the_bounds_reads_and_writes_nothing_else(monkeypatch):
    model = small_net()
    projection = Projection(model, [1, 3, 8, 8], ord=1, bound=1e6)
    constraining = import_module("convnorm.constrain")  # convnorm.constrain may be the function
    monkeypatch.setattr(constraining, "changes_of", lambda *_: pytest.fail("Read more than once."))
    monkeypatch.setattr(constraining, "observe", lambda *_: pytest.fail("Ran the model again."))
    versions = [p._version for p in model.parameters()]
    projection.step()
    assert [p._version for p in model.parameters()] == versions


@pytest.mark.parametrize("layout", [name for name in cases.LAYOUTS if name != "expanded"])
def test_any_layout_is_written_in_place(layout):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    weight = conv.weight.detach().clone()
    conv.weight.data = cases.lay_out(conv.weight.data, layout)
    place = conv.weight.data_ptr()
    project_(conv, [1, 3, 6, 6], ord=inf, bound=0.5)
    assert conv.weight.data_ptr() == place
    assert torch.equal(conv.weight, project(weight, [6, 6], ord=inf, bound=0.5, padding=1))


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect"}, {"stride": 2}, {"groups": 2}], ids=str)
def test_a_constrained_layer_trains_within_its_bound(ord, options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, **options)
    channels = 4 if ord == 1 else 6
    bound = torch.linspace(0.2, 1.5, channels)
    assert constrain(conv, [5, 5], ord=ord, bound=bound) is conv
    case = cases.Case(
        tuple(conv.weight.shape),
        conv.stride,
        conv.padding,
        (5, 5),
        {"padding_mode": conv.padding_mode, "groups": conv.groups},
    )
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    x, losses = torch.randn(8, 4, 5, 5), []
    for _ in range(5):
        assert (channel_norms(conv.weight, case, ord) <= bound.double()).all()
        loss = (conv(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_parametrization_comes_and_goes():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    weight = conv.weight.detach().clone()
    constrain(conv, [6, 6], ord=inf, bound=0.1)
    assert list(conv.state_dict()) == ["bias", "parametrizations.weight.original"]
    assert torch.equal(conv.parametrizations.weight.original, weight)
    other = constrain(nn.Conv2d(3, 4, 3, padding=1), [6, 6], ord=inf, bound=0.1)
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other.weight, conv.weight)
    assert torch.equal(copy.deepcopy(conv).weight, conv.weight)
    nn.init.ones_(conv.weight)  # of a computed weight: as with any parametrization, it is lost
    conv.weight = torch.ones_like(weight)
    torch.testing.assert_close(conv.weight, torch.full_like(weight, 0.1 / 27))
    bounded = conv.weight.detach()
    parametrize.remove_parametrizations(conv, "weight")
    assert isinstance(conv.weight, nn.Parameter)
    assert torch.equal(conv.weight, bounded)


def test_another_precision_does_not_change_the_bound():
    conv = constrain(nn.Conv1d(3, 4, 3), [6], ord=inf, bound=0.1).half()
    assert conv.weight.dtype == torch.float16
    assert (conv.weight.double().abs().sum((1, 2)) <= 0.1).all()
    assert conv.double().parametrizations.weight[0].bounds.tolist() == [0.1] * 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mode", "in_shape", "ord"),
    [("zeros", [8], 1), ("zeros", [8], inf), ("zeros", [2], 1), *((mode, [8], 2) for mode in cases.MODES)],
)
def test_a_constrained_layer_compiles(mode, in_shape, ord, training):
    torch._dynamo.reset()
    conv = constrain(nn.Conv1d(3, 4, 3, padding=1, padding_mode=mode), in_shape, ord=ord, bound=0.3)
    x = torch.randn(2, 3, *in_shape)
    compiled = torch.compile(lambda x: conv(x).square().sum(), fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, lambda x: conv(x).square().sum()):
        conv.zero_grad()
        with torch.set_grad_enabled(training):
            value = call(x)
        if training:
            value.backward()
            results.append(conv.parametrizations.weight.original.grad.clone())
        results.append(value.detach())
    torch.testing.assert_close(results[: len(results) // 2], results[len(results) // 2 :])


@pytest.mark.parametrize("number", range(4))
def test_the_operator_is_one(number):
    case, weight, bound, _ = random_layer(0, number, 1, torch.float32)
    torch.library.opcheck(torch.ops.convnorm.project, (weight, bound, case.plan, not case.transposed))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_batch_norms_scale_by_at_most_the_bound(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 50, 1), nn.BatchNorm2d(50), nn.Sequential(nn.BatchNorm1d(50))).to(dtype)
    for norm in (model[1], model[2][0]):
        norm.weight.data.normal_()
        norm.running_var.uniform_(0, 2)
        norm.running_var[0] = 0
    before = copy.deepcopy(model)
    bound = torch.linspace(0, 2, 50)
    assert project_batch_norms_(model, bound=bound) is model
    for norm, old in ((model[1], before[1]), (model[2][0], before[2][0])):
        root = (norm.running_var.double() + norm.eps).sqrt()
        assert (norm.weight.double().abs() / root <= bound.double()).all()
        expected = old.weight.double().clamp(-bound * root, bound * root)
        torch.testing.assert_close(
            norm.weight.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-7 if dtype == torch.float16 else 0
        )
        within = old.weight.double().abs() <= bound * root * (1 - 1e-9)
        assert torch.equal(norm.weight[within], old.weight[within])
        assert 0 < within.sum() < 50


def poisoned(value):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.weight.data[1, 2, 0, 1] = value
    return conv


def unused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.add_module("spare", nn.Linear(2, 2))
    model.forward = lambda x: model[0](x)
    return model


class Tied(nn.Module):
    """A convolution and its transpose, which bound columns and rows of one weight."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3)
        self.up.weight = self.down.weight

    def forward(self, x):
        return self.up(self.down(x))


def in_float(dtype):
    return partial(project, torch.ones(4, 3).to(dtype), bound=1.0)


SHAPE = [1, 3, 8, 8]
ERRORS = {
    "bound_negative": (lambda: project(torch.ones(2, 2), bound=-1.5), "bound -1.5"),
    "bound_nan": (lambda: project(torch.ones(2, 2), bound=nan), "bound nan"),
    "bound_of_a_channel": (lambda: project(torch.ones(2, 2), bound=torch.tensor([1.0, -2.0])), "bound -2.0"),
    "bound_of_a_wrong_shape": (lambda: project(torch.ones(2, 3), bound=torch.ones(2)), r"bound .*\[2\].* 3 "),
    "bound_of_the_other_side": (lambda: project(torch.ones(2, 3), ord=inf, bound=torch.ones(3)), r"bound .*\[3\].* 2 "),
    "ord": (lambda: project(torch.ones(2, 2), ord=3, bound=1.0), "ord 3"),
    "weight_of_integers": (in_float(torch.int32), "weight of torch.int32"),
    "weight_on_meta": (lambda: project(torch.ones(2, 2, device="meta"), bound=1.0), "meta"),
    "weight_nan": (lambda: project(poisoned(nan), [8, 8], bound=1.0), "weight holds nan"),
    "weight_inf": (lambda: project(poisoned(-inf), [8, 8], bound=1.0), "weight holds -inf"),
    "weight_lazy": (lambda: project(nn.LazyConv2d(3, 3), [8, 8], bound=1.0), "not initialised"),
    "in_shape": (lambda: project(nn.Conv2d(3, 3, 3), [8], bound=1.0), r"in_shape \[8\]"),
    "constrain_bound": (lambda: constrain(nn.Linear(2, 2), bound=-1), "bound -1"),
    "constrain_nan": (lambda: constrain(poisoned(nan), [8, 8], bound=1.0), "weight holds nan"),
    "constrain_meta": (lambda: constrain(nn.Linear(2, 2, device="meta"), bound=1.0), "meta"),
    "constrain_lazy": (lambda: constrain(nn.LazyLinear(2), bound=1.0), "not initialised"),
    "model_bound": (lambda: project_(small_net(), SHAPE, bound=-2.0), "layer '0': bound -2.0"),
    "model_bound_by_name": (lambda: project_(small_net(), SHAPE, bound={"3": nan}), "layer '3': bound nan"),
    "model_bound_shape": (lambda: project_(small_net(), SHAPE, bound={"5": torch.ones(3)}), r"'5': bound of .*\[3\]"),
    "model_unknown_name": (lambda: project_(small_net(), SHAPE, bound={"7": 1.0}), "'7'.* there are 0, 3, 5, 6, 8"),
    "model_without_layers": (lambda: project_(nn.ReLU(), SHAPE, bound=1.0), "no layer to bound in ReLU"),
    "model_unused": (lambda: project_(unused(), SHAPE, bound=1.0), "'spare' is never run"),
    "model_lazy": (lambda: project_(nn.Sequential(nn.LazyConv2d(2, 3)), SHAPE, bound=1.0), "layer '0' is not init"),
    "model_nan": (lambda: project_(nn.Sequential(poisoned(nan)), SHAPE, bound=1.0), "layer '0': weight holds nan"),
    "model_inf": (lambda: project_(nn.Sequential(poisoned(inf)), SHAPE, bound=1.0), "layer '0': weight holds inf"),
    "model_constrained": (
        lambda: project_(constrain(nn.Conv2d(3, 4, 3), [8, 8], bound=1.0), SHAPE, bound=1.0), "layer '' is computed",
    ),
    "model_ord": (lambda: project_(small_net(), SHAPE, ord=0, bound=1.0), "ord 0"),
    "tied_of_both_sides": (lambda: project_(Tied(), [1, 4, 8], bound=1.0), "'down' and 'up' share a weight"),
    "shared_of_two_bounds": (lambda: project_(Reused(), [1, 4, 9], bound={"first": 1, "second": 2}), "1 and 2 differ"),
    "batch_norm_none": (lambda: project_batch_norms_(nn.ReLU(), bound=1.0), "ReLU has no batch norm"),
    "batch_norm_bound": (lambda: project_batch_norms_(nn.BatchNorm1d(2), bound=-1.0), "bound -1.0"),
    "batch_norm_shape": (lambda: project_batch_norms_(nn.BatchNorm1d(2), bound=torch.ones(3)), r"bound of shape \[3\]"),
    "batch_norm_plain": (
        lambda: project_batch_norms_(nn.Sequential(nn.BatchNorm1d(2, affine=False)), bound=1.0), "'0' has no weight",
    ),
    "batch_norm_untracked": (
        lambda: project_batch_norms_(nn.BatchNorm1d(2, track_running_stats=False), bound=1.0), "no running_var",
    ),
    "batch_norm_computed": (
        lambda: project_batch_norms_(parametrizations.weight_norm(nn.BatchNorm1d(2)), bound=1.0), "is computed",
    ),
    "batch_norm_lazy": (lambda: project_batch_norms_(nn.LazyBatchNorm1d(), bound=1.0), "not initialised"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_is_refused_by_name_and_value(what):
    call, message = ERRORS[what]
    with pytest.raises((GeometryError, ValueError), match=message) as error:
        call()
    assert str(error.value).startswith("convnorm: ")


def test_batch_norms_that_hold_nan_are_refused():
    norm = nn.BatchNorm1d(3)
    norm.running_var[1] = nan
    with pytest.raises(GeometryError, match="batch norm '0' holds NaN"):
        project_batch_norms_(nn.Sequential(norm), bound=1.0)


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


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
def test_averages_of_a_constrained_model_are_within_its_bounds(average):
    """Also where buffers are averaged, of which some bounds are inf."""
    bounds = torch.tensor([0.5, math.inf] * 3)
    model = nn.Sequential(constrain(nn.Conv2d(4, 6, 3), [8, 8], ord=math.inf, bound=bounds))
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    for _ in range(3):
        model[0].weight = torch.randn(6, 4, 3, 3)
        averaged.update_parameters(model)
    sums = averaged.module[0].weight.double().abs().sum((1, 2, 3))
    assert (sums[::2] <= 0.5).all()
    original = averaged.module[0].parametrizations.weight.original
    assert torch.equal(averaged.module[0].weight[1::2], original[1::2])


@pytest.mark.parametrize("ord", ORDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("mode", "size"), [("zeros", 8), ("zeros", 2), ("reflect", 8), ("circular", 8)])
def test_autocast_changes_neither_weight_nor_gradient(mode, size, dtype, ord):
    torch.manual_seed(0)
    conv = constrain(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), [size, size], ord=ord, bound=0.3)
    conv.parametrizations.weight.original.data *= 1e5  # whose sums are beyond float16
    towards = torch.randn(6, 4, 3, 3)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype, enabled=enabled):
            weight = conv.weight
        (gradient,) = torch.autograd.grad((weight * towards).sum(), conv.parametrizations.weight.original)
        results += [weight.detach(), gradient]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_batch_norms_may_be_unbounded():
    norm = nn.BatchNorm1d(3)
    nn.init.constant_(norm.weight, 10.0)
    project_batch_norms_(norm, bound=torch.tensor([1.0, inf, 20.0]))
    assert norm.weight[0] <= 1.00001
    assert norm.weight[1:].tolist() == [10.0, 10.0]


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
    linear = constrain(nn.Linear(3, 2), ord=ord, bound=inf)
    assert torch.equal(linear.weight, linear.parametrizations.weight.original)


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("ord", [1, 2, inf])
def test_weights_that_are_not_shared_any_more_are_bounded_each(ord):
    model = two()
    model[1].weight = model[0].weight
    projection = Projection(model, [1, 4], ord=ord, bound=0.1)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert model[0].weight is not model[1].weight
    projection.step()
    for layer in model:
        assert torch.linalg.matrix_norm(layer.weight.detach().double(), ord) <= 0.1


@pytest.mark.parametrize("ord", [1, 2, inf])
def test_a_weight_that_is_computed_by_now_is_refused_by_name(ord):
    model = two()
    projection = Projection(model, [1, 4], ord=ord, bound=0.1)
    parametrizations.weight_norm(model[1])
    with pytest.raises(GeometryError, match="weight of layer '1' is computed from others"):
        projection.step()
