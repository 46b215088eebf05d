"""The promise: a comparison has each report's norms side by side, of the layers that all of them have."""

import csv
import io
import json
import math
from dataclasses import replace

import pytest
import torch
from reported import SHAPE, network
from torch import nn

from convnorm.comparison import compare
from convnorm.report import report


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


def test_the_largest_norm_of_a_layer_is_not_known_if_one_is_not():
    conv = nn.Conv2d(3, 3, 3)
    one = report(nn.Sequential(conv, conv, conv), SHAPE)
    assert [row.name for row in one.rows] == ["0", "0", "0"]
    assert compare([one, one]).layers(1)[0]["norms"] == [max(row.norms.l1 for row in one.rows)] * 2
    for i in range(3):
        rows = list(one.rows)
        rows[i] = replace(rows[i], norms=replace(rows[i].norms, l1=math.nan, l2_upper=None))
        two = compare([one, replace(one, rows=tuple(rows))])
        assert math.isnan(two.layers(1)[0]["norms"][1])
        assert two.layers(2)[0]["norms"][1] is None


def test_norms_of_a_comparison_are_those_that_all_reports_have():
    full, without = (report(network(), SHAPE, l2=l2) for l2 in (True, False))
    assert list(compare([full, full]).ords) == ["l1", "linf", "l2"]
    assert list(compare([full, without]).ords) == ["l1", "linf"]
