"""The promise: a report's files and tables have all that was found, in the room there is."""

import csv
import io
import json
import math
import sys

import numpy as np
import pytest
from reported import SHAPE, network, trained
from torch import nn

from convnorm.report import Report, report
from convnorm.reporting import text


@pytest.fixture(scope="module")
def found():
    return report(network(), SHAPE)


# --- files -----------------------------------------------------------------------------------------------------------


def test_json_is_read_again(found, tmp_path):
    path = tmp_path / "report.json"
    assert path.write_text(found.to_json()) == len(found.to_json(path))
    assert Report.from_json(path) == Report.from_json(str(path)) == Report.from_json(found.to_json()) == found
    content = json.loads(path.read_text())
    assert [row["share"]["l1"] for row in content["layers"]] == found.shares(1)


@pytest.mark.parametrize("shape", [np.array(SHAPE), [1, 3, np.int64(8), 8]], ids=["array", "list"])
def test_json_of_sizes_by_numpy(shape):
    found = report(network(), shape, l2=False)
    assert Report.from_json(found.to_json()) == found


def test_json_of_norms_beyond_float64():
    layer = nn.Linear(4, 4).double()
    nn.init.constant_(layer.weight, 1e308)
    found = report(layer, [1, 4])
    assert found.rows[0].reshaped == found.rows[0].norms.l1 == math.inf
    assert Report.from_json(found.to_json()) == found


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


# --- tables ----------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_what_a_table_or_plot_needs_is_named(found, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'package {missing} is not installed: pip install "convnorm\[report\]"'):
        print(found) if missing == "rich" else found.plot()
