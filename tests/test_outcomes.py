"""The promise: the committed table of what reports say of torchvision's and timm's models is whole, and true."""

import re
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from convnorm.loading import import_torchvision_models

outcomes = pytest.importorskip("benchmarks.outcomes", reason="away from the source tree")
HEAD, *SECTIONS = outcomes.PAGE.read_text().split("\n## ")
REPRESENTATIVE = (  # of every family, and of every way to fall short
    "torchvision:alexnet",
    "torchvision:googlenet",
    "torchvision:mobilenet_v3_small",
    "torchvision:squeezenet1_1",
    "torchvision:swin_t",
    "timm:convnext_atto",
    "timm:densenet121",
    "timm:efficientnet_cc_b0_4e",
    "timm:mobilenetv4_conv_small",
    "timm:regnetx_002",
    "timm:resnetv2_50x1_bit",
    "timm:repvgg_a0",
)


def rows_of(section):
    """The cells of each model; columns that are empty throughout a section are left out of it."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    names, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines)
    return [{"no bound": ""} | dict(zip(names, row, strict=True)) for row in rows]


def committed():
    """All rows, by the name for ``load_model``, in order."""
    rows = [
        (f"{section.split()[0].strip(',')}:{row['model']}", row) for section in SECTIONS for row in rows_of(section)
    ]
    assert len(rows) == len(dict(rows))
    return dict(rows)


def need(*packages):
    """As the table was made with: others have other models, or other weights."""
    for package in packages:
        if not find_spec(package):
            pytest.skip(f"pip install {package}")
        made_with = re.search(rf"^- {package}: (.+)", HEAD, re.MULTILINE)[1].partition("+")[0]
        if version(package).partition("+")[0] != made_with:
            pytest.skip(f"the table was made with {package} {made_with}")


def test_every_row_is_complete_or_says_what_is_missing():
    for name, row in committed().items():
        assert "error" not in str(row).lower(), name
        assert int(row["layers"]) > 0, name
        assert int(row["parameters"].replace(",", "")) > 0, name
        assert re.fullmatch(r"yes|no: [1-9]\d*, the first [\w.]+", row["complete"]), name
        if row["no bound"]:
            assert not row["l1"] + row["linf"], name
            assert re.match(r"node '\w+' \(\w+.*\) \w+", row["no bound"]), name
        else:
            assert all(re.fullmatch(r"-?\d+\.\d\d|-?inf", row[ord]) for ord in ("l1", "linf")), name


@pytest.mark.parametrize("which", range(-1, len(SECTIONS)))
def test_the_counts_are_those_of_the_rows(which):
    text, rows = (SECTIONS[which], rows_of(SECTIONS[which])) if which >= 0 else (HEAD, list(committed().values()))
    complete, bounded = sum(row["complete"] == "yes" for row in rows), sum(not row["no bound"] for row in rows)
    assert f"{len(rows)} models, {complete} with complete rows, {bounded} with bounds." in text


def test_every_model_of_torchvision_is_there():
    need("torchvision")
    zoo = import_torchvision_models()
    names = [name for name in committed() if name.startswith("torchvision:")]
    assert names == [f"torchvision:{name}" for name in zoo.list_models(module=zoo)]


def test_every_model_of_the_families_is_there():
    need("torchvision", "timm")
    assert list(committed()) == [name for names in outcomes.models().values() for name in names]


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_row_made_anew_is_the_committed_one(name):
    need("torch", "torchvision", *["timm"] * name.startswith("timm"))
    with torch.random.fork_rng():
        cells = outcomes.outcome(name).cells()
    row = committed()[name]
    assert cells | {"s": ""} == row | {"s": ""}
