"""The promise: tables, figures and reports say what the rows say."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from made_up_rows import IMAGES, LAYERS, ROBUST, by, diverging, folded, made_up, shifted, without

from train import cell, figure2, models, norm_claim, plots, published, table2
from train import rows as storage
from train.report import Report

scipy_stats = pytest.importorskip("scipy.stats")


# What a report says of its rows


def test_rows_that_do_not_belong_together_are_refused():
    rows = made_up("table2")
    with pytest.raises(ValueError, match="none of figure2"):
        Report.of(rows, "figure2")
    with pytest.raises(ValueError, match="hold vgg11-plain-seed0 twice"):
        Report.of([*rows, rows[0]], "table2")
    rows[5]["protocol"]["epochs"] = 99
    with pytest.raises(ValueError, match="another protocol, with epochs 99 and not 4"):
        Report.of(rows, "table2")


def test_what_weakens_a_run_is_said():
    weak = " ".join(Report.of(without(made_up("table2", dataset="synthetic"), method="clip"), "table2").caveats())
    for words in (
        "Preset smoke: networks of 0.125",
        "16 of 68 cells are missing",
        "One seed.",
        "apgd-ce with 10 iterations only",
        "Synthetic",
    ):
        assert words in weak
    assert Report.of(made_up("table2", preset="full", seeds=2), "table2").caveats() == []


def test_what_a_run_says_of_itself_is_of_its_protocol_and_not_of_its_presets_name():
    def caveats(**changes):
        return " ".join(Report.of(made_up("table2", **changes), "table2").caveats())

    size = {"width": 1.0, "epochs": 120, "training_images": 50_000}
    assert "Preset paper: networks of 0.5 times the width, trained for 120 epochs" in caveats(preset="paper", width=0.5)
    assert "the paper's size" not in caveats(**size)
    attacked = "apgd-ce, apgd-t, fab-t, square with 10 iterations only"
    assert attacked in caveats(attacks=cell.STANDARD)
    assert "Attacked by" not in caveats(attacks=cell.STANDARD, attack_iterations=100)


def test_the_papers_table():
    assert list(published.MODELS) == list(models.PAPER)
    assert set(published.METHODS) == set(cell.METHODS) == set(plots.COLOURS)
    assert len(published.TABLE2) == 68
    assert published.TABLE2["vgg11", "plain", None] == (90.4, 60.2)
    assert published.TABLE2["regnetx200mf", "plain", None] == (91.8, None)
    assert published.TABLE2["resnet18", "clip", 1.5] == (94.2, 43.2)
    assert published.TABLE2["senet18", "weight-decay", 1e-5] == (92.4, 34.8)
    assert published.TABLE2["regnetx200mf", "linf-decay", 1e-2] == (93.4, 23.2)
    sums = {
        "vgg11": (1535.5, 987.7),
        "resnet18": (1588.7, 602.8),
        "senet18": (1587.9, 581.6),
        "regnetx200mf": (1574.7, 461.4),
    }
    for model, expected in sums.items():  # of the lines as the paper has them
        lines = zip(*(pair for key, pair in published.TABLE2.items() if key[0] == model), strict=True)
        assert [sum(number or 0 for number in line) for line in lines] == pytest.approx(expected)


def test_what_diverged_is_neither_missing_nor_forgotten():
    rows = diverging(made_up("table2"), model="vgg11", method="clip")
    report = Report.of(without(rows, model="vgg11", method="l1-decay", strength=1e-2), "table2")
    assert [each.name for each in report.missing] == ["vgg11-l1-decay-0.01-seed0"]
    caveats = " ".join(report.caveats())
    assert "1 of 68 cells are missing: not trained yet, or failed." in caveats
    assert (
        "4 of 67 networks diverged, and have no accuracy: vgg11-clip-0.5-seed0 (epoch 2), vgg11-clip-1-seed0 (epoch 2)"
        in caveats
    )
    head = "**cells**: 67 of 68; diverged: vgg11-clip-0.5-seed0, vgg11-clip-1-seed0,"
    assert head in report.header()
    assert report.written("vgg11", "clip", 0.5, "robust") == "diverged"
    assert report.written("vgg11", "l1-decay", 1e-2, "clean") == "missing"


def test_of_several_seeds_those_that_diverged_are_counted():
    rows = diverging(made_up("table2", seeds=3), model="vgg11", method="clip", seed=1)
    report = Report.of(rows, "table2")
    percent = [100 * row["clean"]["right"] / IMAGES for row in report.seeds("vgg11", "clip", 0.5)]
    assert len(percent) == 2
    expected = f"{np.mean(percent):.1f} ± {np.std(percent, ddof=1):.1f}, 1 diverged"
    assert report.written("vgg11", "clip", 0.5, "clean") == expected


def test_a_cell_that_no_table_shows_makes_no_second_seed():
    rows = made_up("table2")
    written = Report.of(rows, "table2").written("vgg11", "plain", None, "clean")
    beyond = {**rows[1], "cell": {**rows[1]["cell"], "strength": 0.5, "seed": 1}}
    report = Report.of([*rows, beyond], "table2")
    assert "±" in written
    assert report.written("vgg11", "plain", None, "clean") == written
    assert any(caveat.startswith("One seed.") for caveat in report.caveats())


# The pages


def lines_of(page, head):
    """A Markdown table: the text of each of its cells, below the header line that begins with ``head``."""
    lines = page.read_text().split("\n\n")
    table = next(part for part in lines if part.startswith(head)).splitlines()[2:]
    return [[text.strip() for text in line.strip("|").split(" | ")] for line in table]


@pytest.fixture(scope="module")
def table2_page(tmp_path_factory):
    pytest.importorskip("matplotlib")
    rows = made_up("table2", clean=shifted(0.6, 0.05), robust=shifted(0.4, -0.05))
    rows = without(rows, model="senet18", method="clip")
    return rows, table2.render(reversed(rows), tmp_path_factory.mktemp("table2"))


@pytest.fixture(scope="module")
def figure2_page(tmp_path_factory):
    pytest.importorskip("matplotlib")
    rows = made_up("figure2", robust=ROBUST, norm=by(plain=1, other=1.5), seeds=2)
    rows = without(rows, model="vgg11")
    return rows, figure2.render(rows, tmp_path_factory.mktemp("figure2"))


def test_every_number_of_table2_is_that_of_its_row(table2_page):
    rows, page = table2_page
    found = {(row["cell"]["model"], row["cell"]["method"], row["cell"]["strength"]): row for row in rows}
    settings = list(dict.fromkeys(key[1:] for key in published.TABLE2))
    lines = lines_of(page, "|  | VGG-11 clean |")
    assert len(lines) == 17
    for line, setting in zip(lines, settings, strict=True):
        assert line[0] == published.METHODS[setting[0]] + (f" {setting[1]:g}" if setting[1] else "")
        columns = [(model, which) for model in LAYERS for which in ("clean", "robust")]
        for text, (model, which) in zip(line[1:], columns, strict=True):
            ours, theirs = text.split("<br>")
            printed = dict(zip(("clean", "robust"), published.TABLE2[(model, *setting)], strict=True))[which]
            assert theirs == f"({'-' if printed is None else printed})"
            if (row := found.get((model, *setting))) is None:
                assert ours == "missing"
                continue
            low, high = scipy_stats.binomtest(row[which]["right"], IMAGES).proportion_ci(method="wilson")
            assert ours == f"{100 * row[which]['right'] / IMAGES:.1f} ± {50 * (high - low):.1f}"


def test_table2_counts_what_is_missing_and_says_how_it_was_made(table2_page):
    _, page = table2_page
    text = page.read_text()
    assert "**cells**: 64 of 68; missing: senet18-clip-0.5-seed0, senet18-clip-1-seed0," in text
    assert text.count("missing<br>") == 8
    assert "preset `smoke`" in text
    assert "**time**: 1.6 hours" in text
    assert "commit 0123abc, torch 2.13.0, Python 3.11.7, on a device, 2026-01-01" in text
    assert "regularisation improves clean accuracy | **holds**" in text
    assert "the strongest regularisation costs robust accuracy | **holds**" in text


def test_figure2_says_the_norms_of_its_rows(figure2_page):
    rows, page = figure2_page
    lines = lines_of(page, "|  |  | clean | robust |")
    assert [line[2:] for line in lines[:4]] == [["missing"] * 5] * 4  # VGG-11
    for line, key in zip(
        lines[4:], [(m, k) for m in list(LAYERS)[1:] for k in ("plain", "pgd-at", "alp", "trades")], strict=True
    ):
        mine, plain = ([row for row in rows if (row["cell"]["model"], row["cell"]["method"]) == which]
                       for which in (key, (key[0], "plain")))  # fmt: skip
        percent = [row["clean"]["right"] / IMAGES * 100 for row in mine]
        assert line[2] == f"{np.mean(percent):.1f} ± {np.std(percent, ddof=1):.1f}"
        means = [np.exp(np.mean([np.log(row["norms"]["linf"]) for row in some])) for some in (mine, plain)]
        ratio = "" if key[1] == "plain" else f" (x {means[0] / means[1]:.2f})"
        assert line[4] == f"{means[0]:.3g}{ratio}"
    assert "have linf norms as large or larger | **holds, larger**" in page.read_text()
    assert "2026-01-01 to 2026-01-02" in page.read_text()


@pytest.mark.parametrize("which", ["table2_page", "figure2_page"])
def test_every_figure_is_there_and_names_its_axes(which, request):
    _, page = request.getfixturevalue(which)
    files = re.findall(r"\((figures/[^)]+)\)", page.read_text())
    assert {page.parent / file for file in files} == set((page.parent / "figures").iterdir())
    for file in files:
        if file.endswith(".svg"):
            texts = {
                "".join(each.itertext())
                for each in ElementTree.parse(page.parent / file).iter()
                if each.tag.endswith("}text")
            }
            for start, labels in LABELS.items():
                assert not file.startswith(f"figures/{start}") or labels <= texts
        else:
            assert (page.parent / file).read_bytes().startswith(b"\x89PNG")


LABELS = {  # of the figures whose names begin so
    "table2-accuracy": {"clean accuracy in %", "here: robust accuracy in %", "VGG-11", "weight decay"},
    "table2-norms": {"epoch", "l1 norm", "linf norm", "l2 norm", "RegNetX-200MF", "singular value clipping"},
    "table2-layers": {"layer, in the order of use", "l1 norm", "linf norm", "linf norm decay 0.01; line: plain"},
    "table2-layers-senet18": {"missing"},
    "figure2-linf": {"linf norm of a layer", "density per decade"},
    "figure2-l1": {"l1 norm of a layer", "density per decade"},
    "figure2-norms": {"epoch", "l1 norm", "PGD-AT", "TRADES"},
    "figure2-layers": {"layer, in the order of use", "l1 norm", "linf norm", "ALP; line: plain"},
}


def test_the_same_rows_make_the_same_files_in_whatever_order_they_come(table2_page, tmp_path):
    rows, page = table2_page  # which was made of the reversed rows
    report = Report.of(rows, "table2")
    assert report.header() in page.read_text()
    assert table2.accuracies(report) in page.read_text()
    plots.accuracies(report, tmp_path / "table2-accuracy")
    for suffix in (".svg", ".png"):
        name = f"table2-accuracy{suffix}"
        assert (tmp_path / name).read_bytes() == (page.parent / "figures" / name).read_bytes()


def test_networks_that_guess_are_not_in_the_scatter_plot(tmp_path):
    pytest.importorskip("matplotlib")
    rows = made_up("table2", clean=lambda which: 0.05 if which.method == "clip" and which.model == "vgg11" else 0.6)
    plots.accuracies(Report.of(rows, "table2"), tmp_path / "plot")
    assert (tmp_path / "plot.svg").read_text().count("not shown: 4 that may be guessing") == 1


@pytest.mark.parametrize("module", [table2, figure2])
def test_the_committed_pages_are_those_of_the_committed_rows(module, tmp_path, monkeypatch):
    for figure in ("accuracies", "histories", "layers", "densities"):
        monkeypatch.setattr(plots, figure, lambda *_: None)
    name = module.__name__.rpartition(".")[2]
    committed = Path(module.__file__).parent / "results" / f"{name}-smoke"
    page = module.render(storage.read(committed), tmp_path)
    assert page.read_text() == (committed / page.name).read_text()


def test_the_page_has_norms_with_batch_norm_where_rows_do(tmp_path, monkeypatch):
    for figure in ("histories", "layers", "densities"):
        monkeypatch.setattr(plots, figure, lambda *_: None)
    rows = made_up("figure2", robust=ROBUST)
    pages = [figure2.render(each, tmp_path).read_text() for each in (rows, folded(rows, by(other=1)))]
    assert ["have linf norms as large or larger, with batch norm | " in page for page in pages] == [False, True]
    assert [norm_claim.CAVEATS["folded"] in page for page in pages] == [False, True]


@pytest.mark.parametrize("epoch", [1, 3])
def test_pages_of_networks_that_diverged(tmp_path, epoch):
    pytest.importorskip("matplotlib")
    pages = []
    for experiment, module, method in (("table2", table2, "clip"), ("figure2", figure2, "plain")):
        rows = diverging(made_up(experiment, robust=ROBUST), epoch, model="vgg11", method=method)
        pages.append(module.render(diverging(rows, epoch, model="senet18"), tmp_path))
    first, second = pages
    assert [line[1:3] for line in lines_of(first, "|  | VGG-11 clean |")][5] == [
        "diverged<br>(87.6)",
        "diverged<br>(48.8)",
    ]
    assert lines_of(second, "|  |  | clean | robust |")[0] == ["VGG-11", "plain", *["diverged"] * 5]
    ratios = [line[4] for line in lines_of(second, "|  |  | clean | robust |")]
    assert ["x" in ratio for ratio in ratios] == [False] * 4 + [False, True, True, True] + [False] * 4 + [
        False, True, True, True,
    ]  # fmt: skip
    for page in pages:
        assert f"(epoch {epoch})" in page.read_text()
    assert (tmp_path / "figures" / "table2-accuracy.svg").read_text().count("not shown: 4 that diverged") == 1
    for figure in ("table2-layers-senet18", "figure2-layers-senet18"):
        assert ">diverged<" in (tmp_path / "figures" / f"{figure}.svg").read_text()


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_a_package_that_is_missing_is_named(package, monkeypatch, tmp_path):
    report = Report.of(made_up("figure2"), "figure2")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'need {package}: pip install "convnorm\[train\]"'):
        plots.densities(report, "l1", tmp_path / "plot")
