"""The promise: layers whose true l2 norm is at most a bound, by rescaling or by clipping singular values.

Checked by the explicit matrix and its singular value decomposition, which know nothing of circles and of frequencies.
"""

import copy
import math
from functools import partial
from importlib import import_module

import cases
import numpy as np
import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from convnorm.constrain import Projection, constrain, project_
from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.project import project
from convnorm.spectral.clip import clip_singular_values
from convnorm.spectral.excess import Excess

METHODS = ("rescale", "clip")


def l2_norm(matrix):
    """Of matrices of any scale."""
    scale = matrix.abs().amax().item()
    return torch.linalg.matrix_norm(matrix / scale, ord=2).item() * scale if scale else 0.0


def case_norm(weight, case):
    return l2_norm(oracle.matrix(weight, *case.args, **case.options))


def module_norm(module, in_shape):
    layer = as_layer(module, in_shape)
    options = layer.options | {"dilation": list(layer.dilation), "output_padding": list(layer.output_padding)}
    return l2_norm(oracle.matrix(layer.weight, *map(list, layer.sizes), **options))


def project_case(weight, case, bound, method):
    return project(weight, case.in_shape, ord=2, bound=bound, method=method, **case.keywords)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_explicit_matrix_is_within_the_bound(seed, method, dtype):
    for number in range(45):
        rng = np.random.default_rng((seed, number, 30))
        case, values = cases.random_case(rng), str(rng.choice(["normal", *cases.VALUES]))
        layout = cases.LAYOUTS[number % len(cases.LAYOUTS)]
        weight = cases.random_weight(rng, case.weight_shape, dtype, values, layout)
        norm, again = case_norm(weight, case), f"{values}. {cases.replay(seed, number, case)}"
        bound, before = (norm or 1.0) * float(rng.uniform(0.02, 1.2)), weight.clone()
        projected = project_case(weight, case, bound, method)
        assert torch.equal(weight, before), f"The weight was written to. {again}"
        assert (projected.dtype, projected.shape) == (dtype, weight.shape), again
        after = case_norm(projected, case)
        assert after <= bound, f"{after} must be at most {bound}. {again}"
        assert torch.equal(project_case(projected, case, bound, method), projected), f"Not idempotent. {again}"
        if method == "rescale" and dtype.itemsize > 2 and values != "tiny":
            assert after >= min(norm, bound) / 1.011, f"Cut to {after}, for a bound of {bound}. {again}"
        assert torch.equal(project_case(weight, case, norm * 1.02, "rescale"), weight), f"Changed without need. {again}"


def test_cutting_to_the_kernel_breaks_the_bound_and_projecting_holds_it():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").double()
    bound = 0.5 * module_norm(conv, [6, 6])
    norms = []
    for weight in (
        clip_singular_values(conv, [6, 6], bound, cut=True),
        project(conv, [6, 6], ord=2, bound=bound, method="clip"),
    ):
        conv.weight.data.copy_(weight)
        norms.append(module_norm(conv, [6, 6]))
    assert norms[0] > 1.01 * bound
    assert bound * (1 - 1e-4) <= norms[1] <= bound


WHOLE = {
    "linear": cases.Case((5, 7)),
    "wide": cases.Case((7, 4)),
    "pointwise": cases.Case((4, 3, 1, 1), (1, 1), (0, 0), (3, 4)),
    "circular": cases.Case((2, 3, 3), padding=(1,), in_shape=(6,), options={"padding_mode": "circular"}),
    "strided": cases.Case((3, 2, 3), (2,), (1,), (6,), {"padding_mode": "circular"}),
    "dilated": cases.Case((2, 2, 3), (1,), (2,), (5,), {"padding_mode": "circular", "dilation": [2]}),
    "grouped": cases.Case((4, 2, 3), padding=(1,), in_shape=(5,), options={"padding_mode": "circular", "groups": 2}),
    "plane": cases.Case((2, 1, 2, 3), padding=(0, 1, 1, 1), in_shape=(3, 4), options={"padding_mode": "circular"}),
    "round_the_circle": cases.Case((2, 2, 5), padding=(2,), in_shape=(3,), options={"padding_mode": "circular"}),
}  # where the circle's convolution is the layer itself


def within(weight, case, cut):
    return cut * case_norm(weight, case)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("cut", [0.9, 0.5, 0.1])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_a_convex_solver_finds_the_same(name, cut):
    cp = pytest.importorskip("cvxpy")
    case = WHOLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bound = within(weight, case, cut)
    units = torch.eye(weight.numel(), dtype=torch.float64).reshape(-1, *weight.shape)
    entries = torch.stack([oracle.matrix(unit, *case.args, **case.options) for unit in units], -1).numpy()
    w = cp.Variable(weight.numel())
    matrix = cp.reshape(entries.reshape(-1, weight.numel()) @ w, entries.shape[:2], order="C")
    distance = cp.sum_squares(w - weight.reshape(-1).numpy())
    cp.Problem(cp.Minimize(distance), [cp.sigma_max(matrix) <= bound]).solve(solver=cp.CLARABEL)
    expected = torch.from_numpy(w.value).reshape(weight.shape)
    clipped = project_case(weight, case, bound, "clip")
    torch.testing.assert_close(clipped, expected, rtol=0, atol=2e-3 * weight.abs().amax().item())
    ours, best = (torch.linalg.vector_norm(one - weight).item() for one in (clipped, expected))
    assert ours == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("name", WHOLE)
def test_no_feasible_weight_lies_beyond_the_clipped(seed, name):
    """The condition that says which point is the nearest: <weight - p, y - p> <= 0 for all y within the bound."""
    case = WHOLE[name]
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, case.weight_shape, dtype=torch.float64, generator=generator)
    for cut in (0.9, 0.5, 0.1):
        weight = draw()
        bound = within(weight, case, cut)
        p = project_case(weight, case, bound, "clip")
        away = weight - p
        for y in (draw(), weight, away, p + 0.01 * draw(), p + 0.1 * away, torch.zeros_like(p)):
            y = y * min(1, bound / (case_norm(y, case) or 1))
            assert (away * (y - p)).sum() <= 2e-4 * away.norm() * weight.norm()
        rescaled = project_case(weight, case, bound, "rescale")
        assert away.norm() <= (rescaled - weight).norm() * (1 + 1e-4)


@pytest.mark.parametrize("bound", [3.5, 1.0, 1e-6])
@pytest.mark.parametrize("shape", [(3, 2, 5, 4), (3, 2, 4, 5)], ids=str)
def test_the_derivative_of_an_excess_is_that_of_its_differences(shape, bound):
    blocks, moved = torch.randn(2, *shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(3))
    excess, step = Excess(blocks, bound), 1e-6
    ahead, behind = torch.zeros(2, *shape, dtype=torch.complex128)
    for out, sign in ((ahead, 1), (behind, -1)):
        there = Excess(blocks + sign * step * moved, bound)
        out[there.at] = there.blocks
    expected = ((ahead - behind) / (2 * step))[excess.at]
    assert len(excess.at)
    found = excess.derivative(moved[excess.at].to(torch.complex64))
    torch.testing.assert_close(found.to(torch.complex128), expected, rtol=1e-4, atol=1e-4)


def test_a_clip_takes_few_decompositions(monkeypatch):
    """Alternating projections take over 100 of each block, and stop further from the bound."""
    torch.manual_seed(0)
    conv, decomposed, eigh = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular").double(), [], torch.linalg.eigh

    def counted(matrices):
        decomposed.append(matrices.shape[:-2].numel())
        return eigh(matrices)

    bound = 0.5 * module_norm(conv, [8, 8])
    monkeypatch.setattr(torch.linalg, "eigh", counted)
    conv.weight.data.copy_(project(conv, [8, 8], ord=2, bound=bound, method="clip"))
    assert sum(decomposed) <= 50 * 34  # of 64 frequencies, but for negatives
    assert bound * (1 - 1e-5) <= module_norm(conv, [8, 8]) <= bound


@pytest.mark.parametrize("name", ["linear", "wide", "pointwise"])
def test_clipping_a_matrix_is_clipping_its_singular_values(name):
    case = WHOLE[name]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    for cut in (0.7, 1e-3):
        bound = cut * s[0].item()
        expected = (u * s.clamp(max=bound) @ vh).view_as(weight)
        torch.testing.assert_close(project_case(weight, case, bound, "clip"), expected, rtol=1e-7, atol=1e-7 * bound)


@pytest.mark.parametrize("method", METHODS)
def test_bounds_of_0_and_inf(method):
    weight = torch.randn(3, 2, 3)
    for bound in (math.inf, 1e6):
        assert torch.equal(project(weight, [5], ord=2, bound=bound, method=method), weight)
    assert not project(weight, [5], ord=2, bound=0, method=method).any()
    assert not project(torch.zeros(2, 2), ord=2, bound=0, method=method).any()


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, padding_mode="reflect"),
        nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        nn.Flatten(), nn.Linear(256, 5),
    )  # fmt: skip


SHAPE = [1, 3, 8, 8]
SIZES = {"0": [8, 8], "3": [8, 8], "5": [4, 4], "6": [8, 8], "8": []}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_model_is_projected_in_place(method, dtype):
    model = small_net().to(dtype)
    norms = {name: module_norm(model[int(name)], size) for name, size in SIZES.items()}
    bounds = {name: norms[name] * (2 if name == "6" else 0.7) for name in SIZES if name != "8"}
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    assert project_(model, SHAPE, ord=2, bound=bounds, method=method) is model
    assert all(map(torch.Tensor.equal, parameters, model.parameters()))
    for name, bound in bounds.items():
        assert module_norm(model[int(name)], SIZES[name]) <= bound
        assert torch.equal(model[int(name)].weight, before[f"{name}.weight"]) == (name == "6")
    assert torch.equal(model[8].weight, before["8.weight"])
    after = copy.deepcopy(model.state_dict())
    project_(model, SHAPE, ord=2, bound=bounds, method=method)
    assert all(torch.equal(after[name], value) for name, value in model.state_dict().items())


class Reused(nn.Module):
    """One weight in two layers, at sizes of other norms."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(4, 4, 5, padding=2)
        self.second = nn.Conv1d(4, 4, 5, padding=3, padding_mode="circular", stride=2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x)[..., :4]) + self.first(x[..., :2]).sum()


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_is_bounded_wherever_it_is_used(method):
    torch.manual_seed(0)
    model = Reused().double()
    uses = [(model.first, [9]), (model.first, [2]), (model.second, [4])]
    norms = [module_norm(module, size) for module, size in uses]
    bound = 0.6 * min(norms)
    project_(model, [1, 4, 9], ord=2, bound=bound, method=method)
    assert max(module_norm(module, size) for module, size in uses) <= bound


def test_an_attached_projection_follows_each_step():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    handle = Projection(model, SHAPE, ord=2, bound=1.0).attach(optimizer)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        return max(module_norm(model[int(name)], size) for name, size in SIZES.items())

    assert all(step() <= 1 for _ in range(6))
    handle.remove()
    for module in model:
        if hasattr(module, "weight"):
            module.weight.data.mul_(1.5)
    assert step() > 1


def test_what_was_proved_lasts_until_the_weights_have_moved(monkeypatch):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)).double()
    norm = module_norm(model[0], [8, 8])
    projection = Projection(model, [1, 4, 8, 8], ord=2, bound=1.2 * norm)  # which sqrt(l1 linf) does not prove
    projection.step()
    module, proofs = import_module("convnorm.constrain"), []

    def counted(*args):
        proofs.append(1)
        return project_norm(*args)

    project_norm = module.project_norm
    monkeypatch.setattr(module, "project_norm", counted)
    with torch.no_grad():
        for _ in range(5):
            model[0].weight.add_(torch.randn_like(model[0].weight), alpha=1e-4)
            projection.step()
        assert not proofs
        model[0].weight.mul_(1.1)
        projection.step()
        assert len(proofs) == 1
        model[0].weight.mul_(1.1)
        projection.step()
    assert len(proofs) == 2
    assert module_norm(model[0], [8, 8]) == pytest.approx(1.2 * norm, rel=0.02)
    assert module_norm(model[0], [8, 8]) <= 1.2 * norm


@pytest.mark.parametrize("options", [{}, {"padding_mode": "reflect"}, {"stride": 2}, {"groups": 2}], ids=str)
def test_a_constrained_layer_trains_within_its_bound(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, **options)
    assert constrain(conv, [5, 5], ord=2, bound=0.4) is conv
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    x, losses = torch.randn(8, 4, 5, 5), []
    for _ in range(5):
        assert 0.4 / 1.011 <= module_norm(conv, [5, 5]) <= 0.4
        loss = (conv(x) - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


SMOOTH = ["linear", "circular", "strided", "grouped", "plane"]


@pytest.mark.parametrize(
    "case", [WHOLE[name] for name in SMOOTH] + [cases.TABLE["conv1d"], cases.TABLE["transposed_dilated"]]
)
def test_gradients_are_those_of_the_norm(case):
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for cut in (0.5, 1.3):
        bound = torch.tensor(within(weight, case, cut), dtype=torch.float64, requires_grad=True)
        call = partial(project_case, case=case, method="rescale")
        inputs = weight.clone().requires_grad_(), bound
        assert torch.autograd.gradcheck(lambda w, b, call=call: call(w, bound=b), inputs, atol=1e-4)


def test_the_gradient_is_that_of_the_explicit_matrix():
    case = cases.TABLE["reflect"]
    weight = torch.randn(case.weight_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    units = torch.eye(weight.numel(), dtype=torch.float64).reshape(-1, *weight.shape)
    entries = torch.stack([oracle.matrix(unit, *case.args, **case.options) for unit in units], -1)
    bound, direction = within(weight, case, 0.5), torch.randn(case.weight_shape, dtype=torch.float64)
    grads = []
    for rescale in (
        lambda w: project_case(w, case, bound, "rescale"),
        lambda w: w * bound / torch.linalg.matrix_norm(entries @ w.flatten(), ord=2),
    ):
        leaf = weight.clone().requires_grad_()
        grads.append(torch.autograd.grad((rescale(leaf) * direction).sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02 * grads[1].abs().amax().item())


def test_clipping_has_no_derivative_and_says_so():
    weight = torch.randn(3, 3, requires_grad=True)
    with pytest.raises(GeometryError, match="'clip' has no derivative"):
        project(weight, ord=2, bound=0.1, method="clip").sum().backward()


def test_gradients_reach_half_precision():
    weight = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    project(weight, ord=2, bound=0.5).sum().backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.any()


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_any_layout_has_a_gradient(layout):
    case = cases.TABLE["transposed_dilated"]
    weight = cases.lay_out(torch.randn(case.weight_shape, generator=torch.Generator().manual_seed(5)), layout)
    bound, grads = within(weight, case, 0.5), []
    for one in (weight, weight.contiguous()):
        leaf = one.clone().requires_grad_()
        grads.append(torch.autograd.grad(project_case(leaf, case, bound, "rescale").sin().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_a_parametrization_comes_and_goes():
    conv = nn.Conv2d(3, 4, 3, padding=1)
    weight = conv.weight.detach().clone()
    constrain(conv, [6, 6], ord=2, bound=0.1)
    assert list(conv.state_dict()) == ["bias", "parametrizations.weight.original"]
    assert torch.equal(conv.parametrizations.weight.original, weight)
    assert torch.equal(copy.deepcopy(conv).weight, conv.weight)
    with torch.inference_mode():
        assert torch.equal(conv.weight, project(weight, [6, 6], ord=2, bound=0.1, padding=1))
    bounded = conv.weight.detach()
    conv.half()
    assert conv.weight.dtype == torch.float16
    assert module_norm(conv, [6, 6]) <= 0.1
    assert conv.double().parametrizations.weight[0].bounds.item() == 0.1
    conv.float()
    conv.parametrizations.weight.original.data.copy_(weight)
    parametrize.remove_parametrizations(conv, "weight")
    assert isinstance(conv.weight, nn.Parameter)
    assert torch.equal(conv.weight, bounded)


@pytest.mark.parametrize("bound", [0.5, 50.0])
def test_the_operator_is_one(bound):
    layer = as_layer(torch.randn(3, 2, 3), [6], padding=1)
    bound = torch.tensor(bound, dtype=torch.float64)
    torch.library.opcheck(torch.ops.convnorm.rescale, (layer.weight, bound, *layer.sizes), layer.options)


CIRCULAR_ONLY = {"padding": 1, "padding_mode": "circular"}
ONES = torch.ones(2, 2, 3)


def poisoned(value):
    conv = nn.Conv2d(3, 4, 3, padding=1)
    conv.weight.data[1, 2, 0, 1] = value
    return conv


ERRORS = {
    "bound_negative": (lambda: project(torch.ones(2, 2), ord=2, bound=-1.5), "bound -1.5"),
    "bound_nan": (lambda: project(torch.ones(2, 2), ord=2, bound=math.nan), "bound nan"),
    "bound_of_channels": (lambda: project(torch.ones(2, 2), ord=2, bound=torch.ones(2)), r"bound of shape \[2\]"),
    "method": (lambda: project(torch.ones(2, 2), ord=2, bound=1.0, method="cut"), "method 'cut' must be"),
    "method_of_l1": (lambda: project(torch.ones(2, 2), bound=1.0, method="rescale"), "method 'rescale' is for ord 2"),
    "method_of_linf": (
        lambda: constrain(nn.Linear(2, 2), ord=math.inf, bound=1.0, method="clip"), "method 'clip' is for ord 2",
    ),
    "method_of_a_model": (lambda: project_(small_net(), SHAPE, bound=1.0, method="clip"), "method 'clip' is for ord 2"),
    "ord": (lambda: project(torch.ones(2, 2), ord=3, bound=1.0), "ord 3"),
    "constrain_clip": (lambda: constrain(nn.Linear(2, 2), ord=2, bound=1.0, method="clip"), "'clip' has no derivative"),
    "constrain_meta": (lambda: constrain(nn.Linear(2, 2, device="meta"), ord=2, bound=1.0), "meta"),
    "constrain_bound": (lambda: constrain(nn.Linear(2, 2), ord=2, bound=-1), "bound -1"),
    "constrain_nan": (lambda: constrain(poisoned(math.nan), [8, 8], ord=2, bound=1.0), "weight holds NaN"),
    "weight_nan": (lambda: project(poisoned(math.nan), [8, 8], ord=2, bound=1.0), "weight holds NaN"),
    "weight_inf": (lambda: project(poisoned(-math.inf), [8, 8], ord=2, bound=1.0), "weight holds NaN or inf"),
    "weight_of_integers": (lambda: project(torch.ones(2, 2).int(), ord=2, bound=1.0), "weight of torch.int32"),
    "in_shape": (lambda: project(nn.Conv2d(3, 3, 3), [8], ord=2, bound=1.0), r"in_shape \[8\]"),
    "model_bound": (lambda: project_(small_net(), SHAPE, ord=2, bound=-2.0), "layer '0': bound -2.0"),
    "model_bounds": (lambda: project_(small_net(), SHAPE, ord=2, bound={"5": torch.ones(3)}), "layer '5': bound of"),
    "model_nan": (lambda: project_(nn.Sequential(poisoned(math.nan)), SHAPE, ord=2, bound=1.0), "layer '0': weight"),
    "shared_of_two_bounds": (
        lambda: project_(Reused(), [1, 4, 9], ord=2, bound={"first": 1, "second": 2}), "1 and 2 differ",
    ),
    "published_bound": (lambda: clip_singular_values(ONES, [5], -1.0, **CIRCULAR_ONLY), "bound -1.0"),
    "published_zeros": (lambda: clip_singular_values(ONES, [5], 1.0, padding=1), "padding_mode 'zeros'"),
    "published_stride": (lambda: clip_singular_values(ONES, [6], 1.0, stride=2, **CIRCULAR_ONLY), r"stride \[2\]"),
    "published_dilation": (
        lambda: clip_singular_values(ONES, [6], 1.0, dilation=2, **CIRCULAR_ONLY), r"dilation \[2\]",
    ),
    "published_transposed": (lambda: clip_singular_values(ONES, [6], 1.0, transposed=True), "transposed True"),
    "published_padding": (
        lambda: clip_singular_values(ONES, [6], 1.0, padding=2, padding_mode="circular"), r"padding \[2\]",
    ),
    "published_small": (lambda: clip_singular_values(ONES, [2], 1.0, **CIRCULAR_ONLY), r"in_shape \[2\]"),
    "published_nan": (lambda: clip_singular_values(ONES * math.nan, [5], 1.0, **CIRCULAR_ONLY), "weight holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("what", ERRORS)
def test_what_cannot_be_is_refused_by_name_and_value(what):
    call, message = ERRORS[what]
    with pytest.raises((GeometryError, ValueError), match=message) as error:
        call()
    assert str(error.value).startswith("convnorm: ")


def test_singular_values_are_clipped_to_what_is_left_where_taps_cancel():
    """On two places the outer taps read the same: clipped they cancel, in float32, which the search is in."""
    conv = nn.Conv1d(2, 1, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[-0.54, -2.21, 2.113], [-0.004, 1.38, -1.3505]]))
    weight = project(conv, [2], ord=2, bound=1e-8, method="clip").detach()
    same, other = weight[0, :, 1], weight[0, :, 0] + weight[0, :, 2]
    assert max((same + other).norm(), (same - other).norm()) <= 1e-8


def test_transforms_see_the_first_derivative_of_rescaling():
    torch.manual_seed(0)
    weights, tangent = torch.randn(3, 4, 3, 3, dtype=torch.float64), torch.randn(4, 3, 3, dtype=torch.float64)

    def call(weight):
        return project(weight, [8], ord=2, bound=1.0, padding=1).pow(3).sum()

    grads = torch.stack([torch.autograd.functional.jacobian(call, weight) for weight in weights])
    torch.testing.assert_close(torch.func.grad(call)(weights[0]), grads[0])
    torch.testing.assert_close(torch.func.jvp(call, (weights[0],), (tangent,))[1], (grads[0] * tangent).sum())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(call))(weights), grads)
    with pytest.raises(GeometryError, match="no second"):
        torch.func.hessian(call)(weights[0])
    conv = constrain(nn.Conv2d(3, 4, 3), [6, 6], ord=2, bound=0.5)
    parameters = {name: parameter.detach() for name, parameter in conv.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(conv, parameters, (torch.ones(1, 3, 6, 6),)).square().sum()

    assert torch.func.grad(loss)(parameters)["parametrizations.weight.original"].isfinite().all()


def test_second_derivatives_of_rescaling_are_refused():
    """Also where other parameters have them: a Hessian times a vector went without those of the rescaled weight."""
    torch.manual_seed(0)
    model = nn.Sequential(constrain(nn.Linear(4, 4), ord=2, bound=0.3), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(3, 4, requires_grad=True)
    (penalty,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    penalty.square().sum().backward()  # first derivatives of the weight
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
    with pytest.raises(GeometryError, match="no second"):
        torch.autograd.grad(gradients, parameters, gradients)


def test_a_bound_of_inf_leaves_the_gradient_of_rescaling_as_it_is():
    grad = torch.func.grad(lambda weight: project(weight, ord=2, bound=math.inf).sum())(torch.randn(3, 4))
    assert torch.equal(grad, torch.ones(3, 4))
