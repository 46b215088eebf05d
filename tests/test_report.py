"""The promise: a report has what the operators say of every layer a model uses, and says what it did not measure."""

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from reported import SHAPE, network, trained
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import convnorm
from convnorm.geometry import GeometryError
from convnorm.report import Report, report
from convnorm.uses import observe


@pytest.fixture(scope="module")
def found():
    return report(network(), SHAPE)


def rows(model, *shape, **options):
    return report(model, list(shape) or SHAPE, l2=False, **options).rows


# --- what is measured ------------------------------------------------------------------------------------------------


def test_every_row_is_what_the_operators_say(found):
    model = network()
    for row, use in zip(found.rows, observe(model, SHAPE), strict=True):
        norms, bracket = convnorm.norms(use.layer), convnorm.l2(use.layer)
        assert (row.name, row.in_shape, row.out_shape) == (use.name, use.in_shape, use.out_shape)
        assert (row.norms.l1, row.norms.linf) == (norms.l1.item(), norms.linf.item())
        assert (row.norms.l2_lower, row.norms.l2_upper) == (bracket.lower.item(), bracket.upper.item())
        assert row.norms.l2_certificate == bracket.certificate
        assert row.reshaped == convnorm.spectral.reshaped_estimate(use.layer).item()
    assert [row.kind for row in found.rows] == ["Conv2d", "Conv2d", "Conv2d", "ConvTranspose2d", "Linear"]
    assert found.rows[1].padding == ((2, 2), (2, 2))
    assert found.rows[3].output_padding == (1, 1)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_folded_norms_are_those_of_the_composed_matrix(found):
    model = network()
    names = [row.batch_norm for row in found.rows]
    assert names == ["0.1", "2", "", "5", "8"]
    for row, use in zip(found.rows, observe(model, SHAPE), strict=True):
        if not row.batch_norm:
            assert row.folded is None
            continue
        layer, norm = use.layer, model.get_submodule(row.batch_norm)
        matrix = oracle.matrix(layer.weight, *layer.sizes, **layer.options)
        size = [layer.out_channels, *row.out_shape]
        rows_of = matrix.T.reshape(-1, *size)  # what each unit input becomes, through the batch norm itself
        with torch.no_grad():
            norm = norm.double()
            composed = (norm(rows_of) - norm(torch.zeros_like(rows_of))).flatten(1).T
        assert row.folded.l1 == pytest.approx(composed.abs().sum(0).max().item(), rel=1e-12)
        assert row.folded.linf == pytest.approx(composed.abs().sum(1).max().item(), rel=1e-12)
        exact = torch.linalg.matrix_norm(composed, 2).item()
        assert row.folded.l2_lower <= exact * (1 + 1e-12)
        assert exact <= row.folded.l2_upper * (1 + 1e-12) <= 1.0101 * row.folded.l2_lower


def test_a_batch_norm_before_training_multiplies_the_bracket():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=3.0))
    (row,) = report(model, SHAPE).rows
    assert row.folded.l2_lower < row.norms.l2_lower / 2 < row.norms.l2_upper / 2 < row.folded.l2_upper
    assert row.folded.l2_upper == pytest.approx(row.norms.l2_upper / 2, rel=1e-14)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x


class Between(nn.Module):
    """A convolution and a batch norm, with something else done to what passes."""

    def __init__(self, then):
        super().__init__()
        self.conv, self.norm, self.then = nn.Conv2d(3, 3, 3, padding=1), trained(nn.BatchNorm2d(3)), then

    def forward(self, x):
        return self.then(self, self.conv(x))


@pytest.mark.parametrize(
    "then",
    [
        lambda self, y: self.norm(y) + y,
        lambda self, y: self.norm(y.relu()),
        lambda self, y: self.norm(y.relu_()),
        lambda self, y: self.norm(self.norm(y)) + self.norm(y),
        lambda self, y: F.batch_norm(y, None, None, training=True),
        lambda self, y: self.norm(self.conv(y)),
        lambda self, y: torch.cat([self.norm(y), y]),
        lambda self, y: {"out": self.norm(y), "features": [y]},
        lambda self, y: self.norm(y) + Twice.apply(y),
        lambda self, y: y,
    ],
)
def test_a_batch_norm_that_does_not_take_all_is_not_folded(then):
    (row,) = rows(Between(then))
    assert (row.batch_norm, row.folded) == ("", None)


def test_a_batch_norm_of_what_a_hook_makes_of_a_layer_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda conv, args, y: y.relu())
    (row,) = rows(model)
    assert (row.batch_norm, row.folded) == ("", None)


def test_a_batch_norm_is_folded_whatever_module_calls_it():
    (row,) = rows(Between(lambda self, y: (y.shape, self.norm(input=y))[1]))
    assert row.batch_norm == "norm"
    model = Between(lambda self, y: F.batch_norm(y, self.norm.running_mean, self.norm.running_var, eps=0.0))
    (row,) = rows(model)
    expected = convnorm.norms(model.conv, [8, 8], scale=model.norm.running_var.rsqrt())
    assert row.folded.linf == pytest.approx(expected.linf.item(), rel=1e-6)


def test_a_batch_norm_of_another_axis_is_not_folded():
    """After a linear layer on sequences it counts positions, as many as channels here."""
    (row,) = rows(nn.Sequential(nn.Linear(8, 8), trained(nn.BatchNorm1d(8))), 1, 8, 8)
    assert row.folded is None


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_batch_norm_with_a_computed_weight_is_folded_as_it_runs():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    parametrize.register_parametrization(model[1], "weight", Doubled())
    (row,) = rows(model)
    scale = model[1].weight.double() * (model[1].running_var.double() + 1e-5).rsqrt()
    assert row.folded.l1 == convnorm.norms(model[0], [8, 8], scale=scale).l1.item()
    (row,) = report(torch.export.export(model, (torch.randn(SHAPE),)), l2=False).rows
    assert (row.batch_norm, row.folded) == ("", None)  # there its weight is a result like any other


@pytest.mark.parametrize("gain", [lambda x: x.mean((0, 2, 3)), lambda x: torch.rand(3)])
def test_a_batch_norm_whose_weight_is_no_function_of_parameters_is_not_folded(gain):
    class Gained(Between):
        def forward(self, x):
            return F.batch_norm(self.conv(x), self.norm.running_mean, self.norm.running_var, gain(x))

    (row,) = rows(Gained(None))
    assert (row.batch_norm, row.folded) == ("", None)


def test_a_layer_without_its_batch_norm():
    assert all(row.folded is None for row in rows(network(), batch_norm=False))


def test_repeated_calls_are_counted():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    one, two = report(nn.Sequential(conv), SHAPE, l2=False), report(nn.Sequential(conv, conv), SHAPE, l2=False)
    assert [row.calls for row in two.rows] == [2]
    assert two.log10_product(1) == pytest.approx(2 * one.log10_product(1))


class OwnForward(nn.Conv2d):
    """As other libraries have them: pads by itself."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 2, 1, 2)), self.weight, self.bias, self.stride)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(2, 4))
        self.transposed = nn.Parameter(torch.randn(4, 4, 2, 2))
        self.words = nn.Embedding(5, 6)

    def forward(self, x):
        y = F.conv2d(x, self.kernel, padding="same", groups=1)
        y = F.conv_transpose2d(y, weight=self.transposed, stride=2, output_padding=1)
        return F.linear(y.mean((2, 3)), self.matrix)


def test_a_module_with_a_forward_of_its_own_is_measured_as_it_runs():
    """Not by its padding of 0 on the 8 x 8 input, which would be another linear map."""
    model = OwnForward(3, 4, 4, stride=2)
    (row,) = rows(model)
    norms = convnorm.norms(model.weight, [11, 11], stride=2)
    assert (row.kind, row.in_shape, row.norms.l1) == ("OwnForward", (11, 11), norms.l1.item())


def test_functions_are_measured_and_what_is_not_is_named():
    model = Functional()
    found = report(model, SHAPE, l2=False)
    assert [(row.name, row.kind) for row in found.rows] == [
        ("kernel", "conv2d"),
        ("transposed", "conv_transpose2d"),
        ("matrix", "linear"),
    ]
    expected = [
        convnorm.norms(model.kernel, [8, 8], padding=1),
        convnorm.norms(model.transposed, [8, 8], transposed=True, stride=2, output_padding=1),
        convnorm.norms(model.matrix),
    ]
    assert [row.norms.linf for row in found.rows] == [norms.linf.item() for norms in expected]
    assert found.unmeasured == ("words.weight",)
    assert "not measured" in str(found)


def test_a_parametrized_weight_is_that_of_evaluation_and_stays():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (row,) = rows(model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()
    assert row.kind == "Conv2d"
    assert row.norms.l1 == convnorm.norms(model[0].weight, [8, 8]).l1.item()


def test_layers_in_several_precisions_and_sizes():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Conv2d(3, 3, 3).half(), nn.Conv2d(3, 3, 3).double()

        def forward(self, x):
            return self.high(self.low(self.low(x)).double())

    model = Mixed()
    found = rows(model)
    assert [(row.name, row.in_shape) for row in found] == [("low", (8, 8)), ("low", (6, 6)), ("high", (4, 4))]
    for row in found:
        layer = getattr(model, row.name)
        assert row.norms.l1 == convnorm.norms(layer, row.in_shape).l1.item()


def test_without_l2_nothing_is_computed_but_the_norms():
    """The input has room nowhere."""
    (row,) = rows(nn.Conv2d(3, 4, 3, padding=1), 1, 3, 10**6, 10**6)
    assert (row.norms.l2_upper, row.reshaped) == (None, None)


def test_weights_that_are_not_finite_have_no_l2_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    found = report(model, SHAPE)
    first, second = (row.norms for row in found.rows)
    assert math.isnan(first.l1)
    assert first.l2_upper is None
    assert "NaN" in first.l2_stopped
    assert second.l2_upper <= 1.01 * second.l2_lower
    assert found.shares(2) == [None, None]
    assert Report.from_json(found.to_json()).to_json() == found.to_json()
    assert str(found)
    assert found.to_html()


def test_progress_is_told_of_every_layer():
    calls = []
    report(network(), SHAPE, progress=lambda done, total, name: calls.append((done, total, name)))
    assert [done for done, *_ in calls] == list(range(1, 10))
    assert {total for _, total, _ in calls} == {9}  # five layers, four of them again with a batch norm
    assert {name for *_, name in calls} == {"0.0", "1", "3", "4", "7"}


def test_threads_change_nothing(found):
    torch.set_num_threads(3)
    try:
        assert report(network(), SHAPE) == found
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


# --- the network as a whole ------------------------------------------------------------------------------------------


def test_products_and_shares():
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(3)))
    for layer, factor in zip(model, (10.0, 100.0, 0.1), strict=True):
        layer.weight.data = factor * torch.eye(2)
    found = report(model, [1, 2])
    for ord in (1, 2, math.inf):
        assert found.log10_product(ord) == pytest.approx(2, abs=0.01)
        assert found.shares(ord) == pytest.approx([0.25, 0.5, -0.25], abs=0.01)
    model[0].weight.data.zero_()
    assert report(model, [1, 2]).shares(1) == [None] * 3
    assert report(model, [1, 2]).log10_product(1) == -math.inf


def test_bounds_are_those_of_the_network(found_with_bounds):
    """Or what has none."""
    model, found = found_with_bounds
    for name, ord in {"l1": 1, "linf": math.inf, "l2": 2}.items():
        bound = convnorm.lipschitz(model, [1, 3, 8, 8], ord=ord, rtol=0.1)
        assert (found.lipschitz[name].upper, found.lipschitz[name].product) == (bound.upper, bound.product)
    assert "Lipschitz constant at most: l1 " in str(found)
    assert Report.from_json(found.to_json()) == found


def test_a_bound_beyond_float64_has_a_logarithm():
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(1, 1, bias=False), nn.ReLU())))
    for weight in model.double().parameters():
        weight.data.fill_(1e200)
    found = convnorm.report(model, [1, 1], l2=False, bounds=True)
    assert found.lipschitz["l1"].upper == math.inf
    assert "l1 10^600.00 (not composed 10^600.00)" in " ".join(str(found).split())
    assert str(Report.from_json(found.to_json())) == str(found)


@pytest.fixture
def found_with_bounds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    return model, convnorm.report(model, [1, 3, 8, 8], bounds=True)


def test_a_network_without_a_bound_says_what_has_none():
    class Square(nn.Module):
        def forward(self, x):
            return x * x

    found = convnorm.report(nn.Sequential(nn.Conv2d(3, 4, 3), Square()), [1, 3, 8, 8], bounds=True)
    assert found.lipschitz["l1"].upper is None
    assert "no Lipschitz bound: node 'mul'" in str(found)
    assert Report.from_json(found.to_json()) == found


# --- exported programs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_has_the_rows_of_its_model(decomposed, found):
    model = network()
    model[3] = nn.Conv2d(8, 4, 3, padding=1)  # a circular padding is a node of its own
    program = torch.export.export(model, (torch.randn(SHAPE),))
    if decomposed:
        program = program.run_decompositions()
    expected = report(model, SHAPE, l2=False)
    rows_found = report(program, l2=False).rows
    if decomposed:  # a linear layer is a product of matrices there
        assert report(program, l2=False).unmeasured == ("7.weight",)
    shown = [(row.name, row.kind, row.norms, row.batch_norm, row.folded) for row in rows_found]
    wanted = [(row.name, row.kind, row.norms, row.batch_norm, row.folded) for row in expected.rows]
    assert shown == wanted[: len(shown)]
    assert len(shown) == (4 if decomposed else 5)


def test_an_exported_padding_leaves_the_convolution_on_the_padded_input():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"))
    (row,) = report(torch.export.export(model, (torch.randn(SHAPE),)), l2=False).rows
    assert row.in_shape == (10, 10)
    assert row.norms.l1 == convnorm.norms(model[0].weight, [10, 10]).l1.item()


def test_an_exported_parameter_under_two_names_is_one(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = model[1].weight
    expected = report(model, [1, 8], l2=False)
    program = torch.export.export(model, (torch.randn(1, 8),))
    torch.export.save(program, tmp_path / "tied.pt2")
    for one in (program, torch.export.load(tmp_path / "tied.pt2")):
        found = report(one, l2=False)
        assert (found.parameters, found.unmeasured) == (expected.parameters, ())
        assert found.log10_product(1) == pytest.approx(expected.log10_product(1))


def test_an_exported_program_of_free_sizes_is_refused():
    sizes = ({2: torch.export.Dim("height", min=4, max=64)},)
    program = torch.export.export(nn.Conv2d(3, 4, 3), (torch.randn(SHAPE),), dynamic_shapes=sizes)
    with pytest.raises(GeometryError, match="is not fixed"):
        report(program)


# --- refusals --------------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.error, self.conv = error, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        raise self.error


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (nn.Conv2d(3, 4, 3), [1, 4, 8, 8], "does not run on an input of"),
        (nn.Conv2d(3, 4, 3), [1, 3, 2, 2], "does not run on an input of"),
        (Branches(), SHAPE, "does not run on an input of"),
        (Fails(AssertionError("224 only")), SHAPE, "AssertionError: 224 only"),
        (Fails(IndexError("beyond")), SHAPE, "IndexError: beyond"),
        (nn.ReLU(), SHAPE, "model ReLU uses no"),
        (nn.Conv2d(3, 4, 3), None, "example is missing"),
        (nn.Conv2d(3, 4, 3, device="meta"), SHAPE, "on device meta"),
        (nn.LazyConv2d(3, 4), SHAPE, "not initialised"),
    ],
)
def test_what_cannot_be_reported_is_refused(model, shape, words):
    with pytest.raises(GeometryError, match=r"^convnorm: ") as error:
        report(model, shape)
    assert words in str(error.value)
    assert not [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)
                if not isinstance(model, nn.LazyConv2d)]  # fmt: skip


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"^convnorm: model of type dict"):
        report({})
