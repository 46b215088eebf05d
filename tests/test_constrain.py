"""The promise: what projects one weight bounds the layers and batch norms of a model, and a layer while it trains.

Checked by the explicit matrix of each layer.
"""

import copy
import math
from functools import partial
from importlib import import_module

import cases
import oracle
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from convnorm.constrain import Projection, constrain, project_, project_batch_norms_
from convnorm.geometry import GeometryError
from convnorm.layers import as_layer
from convnorm.project import project

inf, nan = math.inf, math.nan
ORDS = (1, inf)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1, padding_mode="reflect"),
        nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, 2, 1, 1), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Flatten(),
        nn.Linear(256, 5),
    )  # fmt: skip


def matrix_of(module, in_shape):
    layer = as_layer(module, in_shape)
    options = layer.options | {"dilation": list(layer.dilation), "output_padding": list(layer.output_padding)}
    return oracle.matrix(layer.weight, *map(list, layer.sizes), **options)


def norm_of(module, in_shape, ord):
    return oracle.norms(matrix_of(module, in_shape))[ORDS.index(ord)].item()


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


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.conv(x[..., :1]) + self.conv(x)


@pytest.mark.parametrize(("ord", "bound"), [(1, 2.0), (2, 4.0), (inf, 8.0)])
def test_of_a_weight_in_several_uses_the_largest_norm_counts(ord, bound):
    """Also where it is that of a later one, and where l2 exceeds a bound that l1 does not."""
    model = Growing()
    nn.init.ones_(model.conv.weight)
    project_(model, [1, 4, 8], ord=ord, bound=bound)
    assert torch.linalg.matrix_norm(matrix_of(model.conv, [8]), ord) <= bound


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
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
    x, losses = torch.randn(8, 4, 5, 5), []
    for _ in range(5):
        sums = matrix_of(conv, [5, 5]).abs().sum(0 if ord == 1 else 1)
        assert (sums.view(channels, -1) <= bound.double()[:, None]).all()
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
    [
        ("zeros", [8], 1), ("zeros", [8], inf), ("zeros", [2], 1), ("reflect", [8], 1), ("replicate", [2], inf),
        *((mode, [8], 2) for mode in cases.MODES),
    ],
)  # fmt: skip
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
    torch.testing.assert_close(torch.export.export(conv, (x,)).module()(x), conv(x))


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
    "batch_norm_shape": (
        lambda: project_batch_norms_(nn.Sequential(nn.BatchNorm1d(2)), bound=torch.ones(3)), r"'0': bound of .* \[3\]",
    ),
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


@pytest.mark.parametrize("ord", ORDS)
def test_a_layer_may_be_unbounded(ord):
    linear = constrain(nn.Linear(3, 2), ord=ord, bound=inf)
    assert torch.equal(linear.weight, linear.parametrizations.weight.original)


def test_batch_norms_may_be_unbounded():
    norm = nn.BatchNorm1d(3)
    nn.init.constant_(norm.weight, 10.0)
    project_batch_norms_(norm, bound=torch.tensor([1.0, inf, 20.0]))
    assert norm.weight[0] <= 1.00001
    assert norm.weight[1:].tolist() == [10.0, 10.0]


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
