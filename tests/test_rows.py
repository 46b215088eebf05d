"""The promise: a row on disk is read as it was written, or refused by name."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("train.rows", reason="away from the source tree")
from train import rows
from train.cell import Cell, protocol

PROTOCOL = protocol("table2", "smoke")


def test_rows_are_sorted_and_missing_cells_found(tmp_path):
    plain, alp, trades = Cell("vgg11", "plain"), Cell("vgg11", "alp", 1.0), Cell("vgg11", "trades", 1.0)
    row = dict.fromkeys(rows.PARTS | rows.FOUND) | {"protocol": rows.as_json(PROTOCOL)}
    assert rows.read(tmp_path) == []
    wanted = [trades, plain, alp]
    assert rows.missing(tmp_path, wanted, PROTOCOL) == wanted
    for cell in (plain, alp):
        rows.write(tmp_path, cell, row | {"cell": dataclasses.asdict(cell)})
    assert [each["cell"]["method"] for each in rows.read(tmp_path)] == ["alp", "plain"]
    assert rows.missing(tmp_path, wanted, PROTOCOL) == [trades]
    with pytest.raises(ValueError, match=r"has rows of another protocol, with width 0.125 and not 0.25"):
        rows.missing(tmp_path, wanted, dataclasses.replace(PROTOCOL, width=0.25))


@pytest.mark.parametrize("text", ["", '{"cell": {"mod', "[]", "null", "\xff", '{"cell": {}, "protocol": {}}'])
def test_what_is_no_row_is_named(tmp_path, text):
    file = tmp_path / "rows" / "vgg11-plain-seed0.json"
    file.parent.mkdir()
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^row .*vgg11-plain-seed0.json' is [^\n]+$"):
        rows.read(tmp_path)


def test_flags_come_back():
    right = np.random.default_rng(0).random(77) < 0.4
    part = json.loads(json.dumps(rows.counted(right)))
    assert rows.flags(part).tolist() == right.tolist()
    assert (part["images"], part["right"]) == (77, int(right.sum()))


def test_a_file_takes_its_place_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "row.json"
    with rows.replacing(file) as new:
        new.write_text("first")
    with pytest.raises(ZeroDivisionError), rows.replacing(file) as new:
        1 / new.write_text("")
    assert [each.name for each in file.parent.iterdir()] == ["row.json"]
    assert file.read_text() == "first"
