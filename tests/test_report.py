"""The promise: a report has what the operators say of every layer a model uses, and says what it did not measure."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import convnorm
from convnorm import __main__ as command
from convnorm import loading
from convnorm.comparison import compare
from convnorm.geometry import GeometryError
from convnorm.layers import observe
from convnorm.report import Report, report
from convnorm.reporting import text

SHAPE = [1, 3, 8, 8]


def network():
    """Every kind of row: strides, groups, padding modes, a transposed layer, one without a batch norm."""
    torch.manual_seed(0)
    return trained(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Conv2d(8, 8, 3, padding="same", groups=4, dilation=2),
            nn.BatchNorm2d(8, affine=False),
            nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"),
            nn.ConvTranspose2d(4, 2, 3, 2, output_padding=1),
            nn.BatchNorm2d(2),
            nn.Flatten(),
            nn.Linear(200, 5),
            nn.BatchNorm1d(5),
        )
    )


def trained(model):
    """Batch norms that do something else to each channel."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_var.uniform_(0.3, 4)
            if module.affine:
                nn.init.normal_(module.weight)
    return model.eval()


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


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight / self.weight.norm())


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


def test_a_weight_that_is_computed_is_not_taken_for_the_parameter():
    found = report(nn.Sequential(Standardised(3, 4, 3), nn.Conv2d(4, 4, 1)), SHAPE, l2=False)
    assert [row.name for row in found.rows] == ["1"]
    assert found.unmeasured == ("0.weight",)


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


# --- ways out --------------------------------------------------------------------------------------------------------


def test_json_is_read_again(found, tmp_path):
    path = tmp_path / "report.json"
    assert path.write_text(found.to_json()) == len(found.to_json(path))
    assert Report.from_json(path) == Report.from_json(str(path)) == Report.from_json(found.to_json()) == found
    content = json.loads(path.read_text())
    assert [row["share"]["l1"] for row in content["layers"]] == found.shares(1)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"title": 3}', "no JSON"])
def test_what_is_no_report_is_refused(content, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^convnorm: file .* is no report"):
        Report.from_json(path)


def test_csv_has_every_number(found):
    read = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(read) == len(found.rows)
    for line, row, share in zip(read, found.rows, found.shares(2), strict=True):
        assert (line["name"], line["weight"]) == (row.name, "x".join(map(str, row.weight)))
        assert float(line["l1"]) == row.norms.l1
        assert float(line["l2_upper"]) == row.norms.l2_upper
        assert float(line["reshaped"]) == row.reshaped
        assert float(line["share_l2"]) == share
        assert line["folded_linf"] == (repr(row.folded.linf) if row.folded else "")


class Page(HTMLParser):
    """Well-formed, and all that it refers to."""

    VOID = ("meta", "link")

    def __init__(self, content):
        super().__init__()
        self.open, self.words, self.references = [], [], []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("l2", [True, False])
def test_html_is_whole_and_fetches_nothing(l2, tmp_path):
    model = network()
    model.add_module("<b>&", nn.Linear(5, 1))
    found = report(model, SHAPE, l2=l2, title="<script>")
    content = found.to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == content
    page = Page(content)
    assert page.references == ["data:,"]  # no icon is asked for
    assert not re.search(r"https?:|url\(|@import", content)
    assert "<b>&" in page.words
    assert "<script>" in page.words
    assert all(row.name in page.words for row in found.rows)
    for row in found.rows:
        assert text.number(row.norms.l1) in page.words
    assert content.count("<tbody>") == len(found.rows)
    assert "<script" not in found._repr_html_()
    Page(found._repr_html_())


NAMES = ["layer4.2.downsample.0", "trunk_output.block4.block4-0.f.a.0", "x" * 120]


@pytest.mark.parametrize("name", NAMES)
def test_the_table_fits_100_columns(name):
    pytest.importorskip("rich")
    wide, grouped = nn.Conv2d(3, 2048, 1, 2), nn.Conv2d(2048, 64, 3, padding=1, groups=32)
    model = nn.Sequential(wide, trained(nn.BatchNorm2d(2048)), grouped)
    for part in reversed(name.split(".")):
        outer = nn.Sequential()
        outer.add_module(part, model)
        model = outer
    lines = str(report(model, [1, 3, 28, 28])).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("2048x3x1x1" in line and "s2" in line and "28x28" in line for line in lines)
    assert any("p1 g32" in line for line in lines)
    assert any(line.startswith(name[:5]) and name[-5:] in line for line in lines)


def test_the_table_shows_every_layer(found):
    pytest.importorskip("rich")
    lines = str(found).splitlines()
    for row in found.rows:
        (line,) = [line for line in lines if line.startswith(f"{row.name} ")]
        assert [text.number(row.norms.l1), text.number(row.norms.linf), text.l2_text(row.norms)] == line.split()[-5:-2]
    assert sum(line.startswith(" + ") for line in lines) == 4


def test_brackets_are_rounded_outward(seed):
    rng = np.random.default_rng((seed, 77))
    for _ in range(2000):
        lower = float(10 ** rng.uniform(-9, 9))
        upper = lower * (1 + float(10 ** rng.uniform(-12, 1)))
        shown = text.bracket(lower, upper)
        mantissas, _, exponent = shown.partition("e")
        ends = [float(f"{end}e{exponent or 0}") for end in mantissas.split("-")]
        width = upper - lower
        assert ends[0] <= lower <= upper <= ends[-1], shown
        assert ends[-1] - ends[0] <= max(3.1 * width, 2.1e-5 * upper, 0) or ends[-1] < 2.1 * ends[0], shown


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("l2", [True, False])
def test_plots_are_drawn(suffix, l2, tmp_path):
    pytest.importorskip("matplotlib")
    one = report(network(), SHAPE, l2=l2)
    figure = one.plot(tmp_path / f"one{suffix}")
    assert len(figure.axes) == (6 if l2 else 4)
    heights = [bar.get_y() + bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx([row.norms.l1 for row in one.rows])
    both = compare({"one": one, "two": one}).plot(tmp_path / f"both{suffix}")
    assert [line.get_label() for line in both.axes[0].lines][:2] == ["one", "two"]
    assert (tmp_path / f"one{suffix}").stat().st_size > 5000
    assert (tmp_path / f"both{suffix}").stat().st_size > 5000


# --- side by side ----------------------------------------------------------------------------------------------------


def test_checkpoints_are_compared_layer_by_layer():
    pytest.importorskip("rich")
    models = {f"epoch {factor}": network() for factor in (1, 3)}
    with torch.no_grad():
        models["epoch 3"][7].weight *= 3
    both = compare(models, SHAPE, batch_norm=False)
    assert both.names == ["0.0", "1", "3", "4", "7"]
    ratios = [second / first for first, second in (row["norms"] for row in both.layers(1))]
    assert ratios == pytest.approx([1, 1, 1, 1, 3], rel=1e-6)
    assert " 3.00" in "".join(line for line in lines_of(both.layer_table(1)) if line.startswith("7 "))
    assert json.loads(both.to_json())["l1"] == both.layers(1)
    read = list(csv.DictReader(io.StringIO(both.to_csv())))
    assert [float(line["value"]) for line in read if (line["layer"], line["norm"]) == ("7", "linf")] == [
        row["norms"] for row in both.layers(math.inf)
    ][-1]


def lines_of(table):
    from convnorm.reporting.table import as_text

    return as_text(table).splitlines()


def test_different_models_are_compared_as_wholes():
    pytest.importorskip("rich")
    both = compare([report(network(), SHAPE, l2=False), nn.Conv2d(3, 4, 3)], SHAPE, l2=False)
    assert [one["layers"] for one in both.totals()] == [5, 1]
    assert both.layers(1) == []
    assert max(map(len, str(both).splitlines())) <= 100
    with pytest.raises(ValueError, match="at least two"):
        compare([network()], SHAPE)


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


# --- the command line ------------------------------------------------------------------------------------------------

NETWORKS = """
import torch
from torch import nn

def network(width=8):
    torch.manual_seed(0)
    return unseeded(width)

def unseeded(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(36 * width, 2))

def wide():
    return network(9)

def reads_values():
    for rate in torch.linspace(0, 1, 3):
        rate.item()
    return network()

def fails():
    raise RuntimeError("no such luck")

def unsaved_buffer():
    model = network()
    model.register_buffer("scale", torch.ones(1), persistent=False)
    return model

def number():
    return 3
"""
INPUT = ["--input", "3", "8", "8"]


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A module ``networks``, and its checkpoints and programs, in the working directory."""
    (tmp_path / "networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import networks

    torch.manual_seed(5)
    model = trained(networks.network())
    nn.init.normal_(model[3].weight)
    torch.save(model.state_dict(), "weights.pt")
    torch.save(model.state_dict(), "old.pt", _use_new_zipfile_serialization=False)
    nested = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": nested}, "nested.pt")
    torch.save({"epoch": 3}, "none.pt")
    Path("text.pt").write_text("no checkpoint")
    torch.export.save(torch.export.export(model, (torch.randn(SHAPE),)), "program.pt2")
    Path("text.pt2").write_text("no program")
    Path("text.json").write_text("no report")
    yield model
    sys.modules.pop("networks", None)


def test_the_command_shows_and_writes_a_report(networks, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    files = [f"--{kind}={kind}.{kind}" for kind in ("json", "csv", "html")]
    assert command.main(["report", "networks:network", *INPUT, "--plot=plot.svg", *files]) == 0
    printed = capsys.readouterr()
    found = Report.from_json("json.json")
    assert found.title == "networks:network"
    assert all(any(line.startswith(f"{row.name} ") for line in printed.out.splitlines()) for row in found.rows)
    assert printed.err == ""  # no progress bar where there is no terminal
    assert Path("csv.csv").read_text() == found.to_csv()
    assert Path("html.html").read_text() == found.to_html()
    assert Path("plot.svg").read_text().startswith("<?xml")


CHECKPOINTS = ("weights.pt=networks:network", "old.pt=networks:network", "nested.pt=networks:network")
MADE_TWICE = ("weights.pt=networks:reads_values", "weights.pt=networks:unsaved_buffer")


@pytest.mark.parametrize("name", [*CHECKPOINTS, *MADE_TWICE, "program.pt2"])
def test_the_command_takes_checkpoints_and_programs(networks, name, capsys):
    pytest.importorskip("rich")
    given = [] if name.endswith("pt2") else INPUT
    assert command.main(["report", name, *given, "--no-l2", "--json", "found.json"]) == 0
    expected = report(networks, SHAPE, l2=False)
    assert Report.from_json("found.json").rows == expected.rows


def test_a_checkpoint_stays_in_its_file(networks):
    """No weights are drawn, none are copied."""
    before = torch.get_rng_state()
    model = loading.load_model("weights.pt=networks:unseeded")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight, networks[0].weight)
    if (maps := Path("/proc/self/maps")).exists():
        assert "weights.pt" in maps.read_text()


def test_the_command_compares(networks, capsys):
    pytest.importorskip("rich")
    assert command.main(["report", "networks:wide", *INPUT, "--no-l2", "--json", "wide.json"]) == 0
    models = ["networks:network", "weights.pt=networks:network", "wide.json"]
    assert command.main(["compare", *models, *INPUT, "--no-l2", "--layers", "linf", "--csv", "all.csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for title in ("networks:network", "weights.pt", "networks:wide"):
        assert any(line.startswith(f"{title} ") for line in lines)
    read = list(csv.DictReader(io.StringIO(Path("all.csv").read_text())))
    assert {line["title"] for line in read} == {"networks:network", "weights.pt", "networks:wide"}


WRONG = {
    "unknown module": ["nowhere:network", *INPUT],
    "unknown factory": ["networks:nothing", *INPUT],
    "factory that fails": ["networks:fails", *INPUT],
    "no module": ["networks:number", *INPUT],
    "no input": ["networks:network"],
    "wrong channels": ["networks:network", "--input", "4", "8", "8"],
    "wrong size": ["networks:network", "--input", "3", "9", "8"],
    "too few sizes": ["networks:network", "--input", "3"],
    "no file": ["nothing.pt=networks:network", *INPUT],
    "no program file": ["nothing.pt2"],
    "checkpoint of another model": ["weights.pt=networks:wide", *INPUT],
    "no state dict": ["none.pt=networks:network", *INPUT],
    "no checkpoint": ["text.pt=networks:network", *INPUT],
    "no program": ["text.pt2"],
    "sizes for a program": ["program.pt2", *INPUT],
    "no report": ["text.json"],
    "no folder": ["networks:network", *INPUT, "--json", "nowhere/report.json"],
    "no picture": ["networks:network", *INPUT, "--plot", "plot.txt"],
    "rtol": ["networks:network", *INPUT, "--rtol", "0"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", WRONG)
def test_the_command_refuses_in_one_line(networks, what, capsys):
    pytest.importorskip("rich")
    assert command.main(["report", *WRONG[what]]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("convnorm: ")
    assert printed.out == ""


@pytest.mark.parametrize(("package", "name"), [("torchvision", "resnet18"), ("timm", "timm:resnet18")])
def test_a_missing_package_is_named(networks, package, name, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, package, None)
    assert command.main(["report", name, *INPUT]) == 2
    assert "is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_what_a_table_or_plot_needs_is_named(found, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'package {missing} is not installed: pip install "convnorm\[report\]"'):
        print(found) if missing == "rich" else found.plot()


def test_the_command_runs_from_a_shell(networks, tmp_path):
    pytest.importorskip("rich")
    paths = [tmp_path, Path(convnorm.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    line = [sys.executable, "-m", "convnorm", "report", "nothing.pt=networks:network", *INPUT]
    run = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "convnorm: file 'nothing.pt' is not there\n"
    line[4] = "weights.pt=networks:network"
    run = subprocess.run([*line, "--no-l2"], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18", "timm:resnet18"])
def test_models_by_their_names_elsewhere(name):
    for package in ("torchvision", "timm") if "timm" in name else ("torchvision",):
        if not find_spec(package):  # whether it can be imported is what is tested
            pytest.skip(f"{package} is not installed")
    found = report(loading.load_model(name), [1, 3, 64, 64], l2=False)
    assert len(found.rows) == 21
    assert sum(row.folded is not None for row in found.rows) == 20
    with pytest.raises(ValueError, match=r"is no model of \w+; there is .*resnet18"):
        loading.load_model(f"{name}x")


def test_bounds_are_those_of_the_network(found_with_bounds):
    """Or what has none."""
    model, found = found_with_bounds
    for name, ord in {"l1": 1, "linf": math.inf, "l2": 2}.items():
        bound = convnorm.lipschitz(model, [1, 3, 8, 8], ord=ord, rtol=0.1)
        assert (found.lipschitz[name].upper, found.lipschitz[name].product) == (bound.upper, bound.product)
    assert "Lipschitz constant at most: l1 " in str(found)
    assert Report.from_json(found.to_json()) == found


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
