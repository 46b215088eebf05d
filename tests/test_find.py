"""The promise: the rows of a report are the layers of a model, each once, by names that tell them apart; and a model is
after it what it was before.
"""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from as_matrix import is_map_of
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

import convnorm
from convnorm import report
from convnorm.geometry import GeometryError
from convnorm.loading import load_model
from convnorm.uses import observe

SHAPE = [1, 3, 6, 6]


class Branches(nn.Module):
    """As RepVGG's are merged."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return F.conv2d(x, self.wide.weight + F.pad(self.narrow.weight, [1, 1, 1, 1]), padding=1)


class LowRank(nn.Linear):
    """W + B A, of A as a map of B's rows."""

    def __init__(self):
        super().__init__(6, 6)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return F.linear(x, self.weight + F.linear(self.b, self.a.T), self.bias)


class Halves(nn.Module):
    """Two layers of one shape, from one parameter."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(6, 3, 1, 1))

    def forward(self, x):
        one, other = self.both.chunk(2)
        return F.conv2d(F.conv2d(x, one), other)


class Shared(nn.Module):
    """One weight for three calls, made anew for the last."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(self, x):
        weight = self.conv.weight.tanh()
        x = F.conv2d(x, weight, padding=1)
        return F.conv2d(F.conv2d(x, weight, padding=1), self.conv.weight.tanh(), padding=1)


@pytest.mark.parametrize(
    ("part", "name", "kind"),
    [(Branches, "0", "Conv2d"), (LowRank, "0", "LowRank"), (Shared, "0.conv", "Conv2d")],
    ids=["branches", "low_rank", "shared"],
)
def test_the_name_is_what_the_parameters_have_in_common(part, name, kind):
    torch.manual_seed(0)
    model = nn.Sequential(part()).double()
    found = report(model, SHAPE, l2=False)
    (row,) = found.rows
    assert (row.name, row.kind, row.calls) == (name, kind, 3 if part is Shared else 1)
    assert found.unmeasured == ()
    if part is Branches:
        assert is_map_of(row, model, SHAPE[1:])


def test_a_kernel_that_no_model_holds_makes_no_row():
    class Blur(nn.Module):
        def forward(self, x):
            return F.conv2d(x, torch.ones(3, 1, 2, 2, dtype=x.dtype) / 4, groups=3)

    found = report(nn.Sequential(Blur(), nn.Conv2d(3, 4, 3)), SHAPE, l2=False)
    assert [row.name for row in found.rows] == ["1"]


class Batches(nn.Module):
    """Layers that are called with several numbers of inputs, by arguments written in several ways."""

    def __init__(self):
        super().__init__()
        self.taps, self.linear = nn.Parameter(torch.randn(3, 3, 3, 3)), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        convolved = F.conv2d(x, self.taps, padding=1), F.conv2d(x[0], self.taps, None, (1, 1), (1, 1))
        return [F.linear(y, self.linear) for y in convolved]


@pytest.mark.parametrize("exported", [False, True])
def test_numbers_of_inputs_make_no_layers(exported):
    model = torch.export.export(Batches(), (torch.ones(SHAPE),)) if exported else Batches()
    found = report(model, None if exported else SHAPE, l2=False)
    assert [(row.name, row.in_shape, row.calls) for row in found.rows] == [("taps", (6, 6), 2), ("linear", (), 2)]


def test_parts_of_one_parameter_are_layers_of_their_own():
    model = Halves()
    one, other = report(model, SHAPE, l2=False).rows
    halves = [convnorm.norms(half, [6, 6]).l1.item() for half in model.both.chunk(2)]
    assert [one.norms.l1, other.norms.l1] == halves
    assert one.norms.l1 != other.norms.l1
    assert one.name == other.name == "both"


class Bank(nn.Module):
    """One module, run with one weight after another."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bank = nn.ParameterList(torch.randn(3, 3, 3, 3) for _ in range(2))

    def weights(self):
        return [*self.bank, 2 * self.bank[0], self.conv.weight]

    def forward(self, x):
        for weight in self.weights():
            x = torch.func.functional_call(self.conv, {"weight": weight}, (x,))
        return x


def test_a_module_that_runs_with_several_weights_is_several_layers():
    model = Bank()
    found = report(model, SHAPE, l2=False)
    expected = [convnorm.norms(weight, [6, 6], padding=1).l1.item() for weight in model.weights()]
    assert [(row.name, row.calls, row.norms.l1) for row in found.rows] == [("conv", 1, l1) for l1 in expected]
    assert found.unmeasured == ()


HOOKED = {
    "weight_norm": nn.utils.weight_norm,
    "pruned": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    "weight_norm_and_bias_pruned": lambda conv: nn.utils.weight_norm(prune.random_unstructured(conv, "bias", 0.5)),
    "pruned_and_bias_norm": lambda conv: prune.random_unstructured(nn.utils.weight_norm(conv, "bias"), "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("name", HOOKED)
def test_a_weight_that_a_hook_makes_is_not_that_of_the_last_run(name):
    torch.manual_seed(0)
    model = nn.Sequential(HOOKED[name](nn.Conv2d(3, 4, 3))).double()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(3)
    (row,) = report(model, SHAPE, l2=False).rows
    assert (row.name, row.kind) == ("0", "Conv2d")
    assert is_map_of(row, model, SHAPE[1:])


def test_a_layer_within_a_parametrization_leaves_one_row_for_the_layer():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(27, 27, bias=False).double()

        def forward(self, weight):
            return self.linear(weight.flatten(1)).reshape_as(weight)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).double()
    parametrize.register_parametrization(model[0], "weight", Mixed())
    within, row = report(model, SHAPE, l2=False).rows
    assert (within.kind, row.kind, row.name) == ("Linear", "Conv2d", "0")
    assert is_map_of(row, model, SHAPE[1:])


class Counting(nn.Conv2d):
    """Writes what it holds, by operations that PyTorch runs on true tensors among fake ones too."""

    def __init__(self, fails):
        super().__init__(3, 4, 3)
        self.fails = fails
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("runs", torch.zeros((), dtype=torch.long))
        self.register_buffer("ranges", torch.ones(4))
        self.register_buffer("totals", torch.zeros(4))

    def forward(self, x):
        self.runs += 1
        self.ranges.mul_(0.9).add_(self.weight.abs().amax((1, 2, 3)))
        self.ranges.div_(3)
        torch.add(self.totals, 1, out=self.totals)
        self.bias.mul_(2)
        self.gain.data = self.gain.data.clamp(max=0.5)
        if self.fails:
            raise ValueError("too late")
        return super().forward(x)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_writes_what_it_holds_is_as_before(fails):
    model = nn.Sequential(Counting(fails))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if fails:
        with pytest.raises(GeometryError, match="too late"):
            report(model, SHAPE, l2=False)
    else:
        report(model, SHAPE, l2=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)[:, None]
        return flex_attention(x, x, x)


@pytest.mark.filterwarnings("ignore")
def test_an_operator_of_operators_is_passed_through():
    model = Attending()
    assert [row.name for row in report(model, SHAPE, l2=False).rows] == ["conv"]
    assert [use.name for use in observe(model, SHAPE)] == ["conv"]


def test_what_goes_through_all_modules_is_not_done_for_each_layer():
    class Counted(nn.Sequential):
        asked = 0

        def modules(self):
            self.asked += 1
            return super().modules()

    few, many = (Counted(*(nn.Linear(2, 2) for _ in range(n))) for n in (2, 20))
    for model in (few, many):
        report(model, [1, 2], l2=False)
    assert few.asked == many.asked


# --- networks that others wrote ---------------------------------------------------------------------------------------


class Weights(TorchFunctionMode):
    """Of a true run, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, F.linear):
            self.found.append(args[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["resnetv2_50x1_bit", "nf_resnet26", "nf_regnet_b0"])
def test_weight_standardised_networks_have_a_row_for_every_layer(name):
    if not (find_spec("timm") and find_spec("torchvision")):
        pytest.skip("pip install timm torchvision")
    model = load_model(f"timm:{name}").eval()
    found = report(model, [1, 3, 64, 64], l2=False)
    assert found.unmeasured == ()
    with torch.no_grad(), Weights() as weights:
        model(torch.zeros(1, 3, 64, 64))
    for row, weight in zip(found.rows, weights.found, strict=True):
        options = {"stride": row.stride, "padding": sum(row.padding, ()), "dilation": row.dilation}
        options = options | {"groups": row.groups} if row.in_shape else {}
        norms = convnorm.norms(weight, row.in_shape, **options)
        assert [row.norms.l1, row.norms.linf] == pytest.approx([norms.l1.item(), norms.linf.item()], rel=1e-5)
