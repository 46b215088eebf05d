"""The promise: tables, figures and verdicts say what the rows say.

The rows are made up: networks that are right on the easier images, and layers that have given norms.
"""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

AWAY = "away from the source tree"
cell = pytest.importorskip("train.cell", reason=AWAY)
models = pytest.importorskip("train.models", reason=AWAY)
published = pytest.importorskip("train.published", reason=AWAY)
storage = pytest.importorskip("train.rows", reason=AWAY)
Report = pytest.importorskip("train.report", reason=AWAY).Report
claims = pytest.importorskip("train.claims", reason=AWAY)
accuracy_claims = pytest.importorskip("train.accuracy_claims", reason=AWAY)
norm_claim = pytest.importorskip("train.norm_claim", reason=AWAY)
plots = pytest.importorskip("train.plots", reason=AWAY)
table2 = pytest.importorskip("train.table2", reason=AWAY)
figure2 = pytest.importorskip("train.figure2", reason=AWAY)
scipy_stats = pytest.importorskip("scipy.stats")

IMAGES = 500
LAYERS = {"vgg11": 9, "resnet18": 21, "senet18": 37, "regnetx200mf": 45}
MADE = {"commit": "0123abc", "torch": "2.13.0", "python": "3.11.7", "device": "a device", "processes": 1, "threads": 1}
NORMS = ("l1", "linf", "l2")


def made_up(experiment, clean=0.6, robust=0.4, norm=1.0, seeds=1, preset="smoke", **changes):
    """A row for each cell; ``clean``, ``robust`` and ``norm`` are numbers or functions of the cell."""
    protocol = replace(cell.protocol(experiment, preset), seeds=seeds, **changes)
    difficulty = np.random.default_rng(0).permutation(IMAGES) / IMAGES  # the same images for all networks

    def one(which):
        draw = np.random.default_rng([*which.name.encode()])
        count = LAYERS[which.model]

        def value(of):
            return of(which) if callable(of) else of

        def right(share):
            return storage.counted(difficulty + draw.normal(0, 0.1, IMAGES) < value(share) + draw.normal(0, 0.01))

        norms = value(norm) * np.exp(np.random.default_rng(count).normal(3, 0.7, (3, count)))
        norms *= np.exp(draw.normal(0, 0.03, (3, count)))

        def after(share):  # of the training
            l1, linf, l2 = norms**share
            return {"l1": [*l1], "linf": [*linf], "l2": [[low, 1.02 * low] for low in l2]}

        return {
            "cell": asdict(which),
            "protocol": storage.as_json(protocol),
            "clean": right(clean),
            "robust": right(robust),
            "layers": [f"layer{number}" for number in range(count)],
            "norms": after(1),
            "history": [
                {"epoch": epoch, "loss": 1.0, "test_accuracy": 0.5, **after(epoch / 4)} for epoch in (1, 2, 3, 4)
            ],
            "seconds": {"training": 60.0, "evaluation": 30.0},
            "made": {**MADE, "date": f"2026-01-0{1 + which.seed}"},
        }

    return json.loads(json.dumps([one(which) for which in protocol.cells()]))


def diverging(rows, epoch=2, **cells):
    """The same, but those whose cells have these values diverged in that epoch."""

    def lost(row):
        kept = {part: row[part] for part in storage.PARTS}
        return kept | {"diverged": {"epoch": epoch, "step": 7}, "history": row["history"][: epoch - 1]}

    chosen = [all(row["cell"][name] == value for name, value in cells.items()) for row in rows]
    return [lost(row) if is_one else row for row, is_one in zip(rows, chosen, strict=True)]


def by(**methods):
    """A function of a cell: the number of its method, or ``other``."""
    return lambda which: methods.get(which.method.replace("-", "_"), methods["other"])


def without(rows, **cells):
    return [row for row in rows if any(row["cell"][name] != value for name, value in cells.items())]


# The verdicts


def regularisation(rows):
    report = Report.of(rows, "table2")
    return [
        accuracy_claims.verdict(report, which)
        for which in (accuracy_claims.IMPROVES_CLEAN, accuracy_claims.COSTS_ROBUST)
    ]


def shifted(base, change):
    """An accuracy: ``base`` of the plain networks; of others ``change`` more, a number or one for each model."""
    changes = change if isinstance(change, dict) else dict.fromkeys(LAYERS, change)
    return lambda which: base + (which.method != "plain") * changes[which.model]


MIXED = {"vgg11": 0.1, "resnet18": -0.1, "senet18": 0.1, "regnetx200mf": -0.1}


@pytest.mark.parametrize(("change", "improves", "costs"), [
    (0.1, "holds", "does not hold"),
    (-0.1, "does not hold", "holds"),
    (MIXED, "undecided", "undecided"),
])  # fmt: skip
@pytest.mark.parametrize("seeds", [1, 2])
def test_claims_on_accuracies(change, improves, costs, seeds):
    rows = made_up("table2", clean=shifted(0.6, change), robust=shifted(0.4, change), seeds=seeds)
    clean, robust = regularisation(rows)
    assert (clean.here.word, robust.here.word) == (improves, costs)


def test_networks_that_differ_from_model_to_model_are_not_decided_by_their_many_images():
    """Over images the interval is far from zero; over networks it is not, and training anew may turn it."""
    change = {"vgg11": 0.3, "resnet18": 0.0, "senet18": 0.0, "regnetx200mf": 0.0}
    clean, _ = regularisation(made_up("table2", clean=shifted(0.5, change)))
    every = clean.details.splitlines()[-1].split("|")
    over_images, over_networks = ([float(end) for end in cell.strip(" []").split(",")] for cell in every[5:7])
    assert 0 < over_images[0] < over_images[1]
    assert over_networks[0] < 0 < over_networks[1]
    assert clean.here.word == "undecided"


def test_few_images_do_not_decide_however_alike_the_networks_are():
    """All regularised networks are right on 22 images more and on 20 fewer than the plain ones."""
    rows = made_up("table2")
    for row in rows:
        image = np.arange(IMAGES)
        right = image < 300 if row["cell"]["method"] == "plain" else (image >= 20) & (image < 322)
        row["clean"] = row["robust"] = storage.counted(right)
    clean, robust = regularisation(rows)
    assert clean.details.splitlines()[-1].split(" | ")[5] == "[+0.4, +0.4]"
    assert clean.here.word == robust.here.word == "undecided"


def test_the_numbers_of_a_verdict_are_those_of_the_rows():
    rows = made_up("table2", robust=shifted(0.4, -0.05), seeds=2)
    _, verdict = regularisation(rows)
    strongest = {"weight-decay": 1e-2, "l1-decay": 1e-2, "linf-decay": 1e-2, "clip": 0.5}
    plain = {(row["cell"]["model"], row["cell"]["seed"]): row for row in rows if row["cell"]["method"] == "plain"}
    changes = {key: [] for key in plain}
    for row in rows:
        if strongest.get(row["cell"]["method"]) == row["cell"]["strength"] is not None:
            key = row["cell"]["model"], row["cell"]["seed"]
            changes[key].append(100 * (row["robust"]["right"] - plain[key]["robust"]["right"]) / IMAGES)
    every = [change for each in changes.values() for change in each]
    assert len(every) == 4 * 4 * 2
    down = sum(change < 0 for change in every)
    assert f"{np.mean(every):+.1f} points on average, down in {down} of 32 networks" in verdict.here.because

    ps = []
    for key in changes:
        flags = storage.flags(plain[key]["robust"])
        for row in rows:
            setting = row["cell"]["method"], row["cell"]["strength"]
            if (row["cell"]["model"], row["cell"]["seed"]) == key and setting in strongest.items():
                only = int(np.sum(storage.flags(row["robust"]) & ~flags))
                ps.append(scipy_stats.binomtest(only, int(np.sum(storage.flags(row["robust"]) ^ flags))).pvalue)
    sure = 0
    while sure < 32 and sorted(ps)[sure] * (32 - sure) < 0.05:  # Holm's way down
        sure += 1
    assert 0 < sure < sum(p < 0.05 for p in ps)
    assert verdict.details.splitlines()[-1].split(" | ")[2] == f"0 / {sure}"

    means = [np.mean(each) for each in changes.values()]
    low, high = scipy_stats.t.interval(0.95, 7, np.mean(means), scipy_stats.sem(means))
    assert verdict.details.splitlines()[-1].split(" | ")[5] == f"[{low:+.1f}, {high:+.1f}]"
    assert [line.split(" | ")[1] for line in verdict.details.splitlines()[2:]] == [
        *(f"{sum(c > 0 for c in each)} / {sum(c < 0 for c in each)}"
          for model in LAYERS for each in [changes[model, 0] + changes[model, 1]]),
        f"{sum(change > 0 for change in every)} / {down}",
    ]  # fmt: skip


def test_the_papers_numbers_are_judged_by_the_same_rule():
    clean, robust = regularisation(made_up("table2"))
    for verdict, column, settings, images in (
        (clean, 0, accuracy_claims.REGULARISED, 10_000),
        (robust, 1, accuracy_claims.STRONGEST, 1_024),
    ):
        means, errors, every = [], [], []
        for model in LAYERS:
            plain = published.TABLE2[model, "plain", None][column]
            if plain is not None:
                printed = [published.TABLE2[model, method, strength][column] for method, strength in settings]
                every += [number - plain for number in printed]
                means.append(np.mean(printed) - plain)
                variances = [number * (100 - number) / images for number in (plain, *printed)]
                errors.append(variances[0] + sum(variances[1:]) / len(printed) ** 2)
        low, high = scipy_stats.t.interval(0.95, len(means) - 1, np.mean(means), scipy_stats.sem(means))
        half = 1.959964 * np.sqrt(sum(errors)) / len(errors)
        claim = accuracy_claims.IMPROVES_CLEAN if column == 0 else accuracy_claims.COSTS_ROBUST
        over_images = accuracy_claims.printed_over_images(claim, accuracy_claims.printed(claim))
        ends = [100 * end for end in over_images]
        assert ends == pytest.approx([np.mean(means) - half, np.mean(means) + half], abs=1e-4)
        assert low < ends[0] < ends[1] < high  # so it is Student's that decides
        assert verdict.paper.word == ("holds" if high < 0 else "undecided")
        assert f"{np.mean(every):+.1f} points" in verdict.paper.because
        assert f"of {len(every)} networks; 95% interval [{low:+.1f}, {high:+.1f}]" in verdict.paper.because


def test_one_plain_network_decides_nothing():
    rows = [row for row in made_up("table2", clean=shifted(0.6, 0.1)) if row["cell"]["model"] == "vgg11"]
    clean, _ = regularisation(rows)
    assert clean.here.word == "undecided"
    assert "one plain network" in clean.here.because


def test_claims_on_what_was_not_trained():
    plain = [row for row in made_up("table2") if row["cell"]["method"] == "plain"]
    assert [verdict.here.word for verdict in regularisation(plain)] == ["not measured"] * 2


def test_nothing_is_concluded_from_networks_that_guess():
    clean, robust = regularisation(made_up("table2", clean=0.05, robust=0.05))
    assert clean.here.word == robust.here.word == "not meaningful"
    assert "64 networks left out: the plain network of their model and seed may be guessing." in clean.here.because


def test_too_much_regularisation_counts_against_clean_accuracy_and_not_for_lost_robustness():
    def clean(which):
        return 0.05 if which.method == "l1-decay" and which.strength == 1e-2 else 0.6

    rows = made_up("table2", clean=clean, robust=lambda which: 0.05 if clean(which) < 0.2 else 0.4)
    improves, costs = regularisation(rows)
    assert improves.here.word != "holds"
    assert "4 networks may be guessing, and count" in improves.caveats[0]
    assert "4 networks left out: they may be guessing" in costs.caveats[0]
    assert "of 12 networks" in costs.here.because


def test_networks_without_their_plain_one_are_left_out():
    clean, _ = regularisation(without(made_up("table2"), model="vgg11", method="plain"))
    assert "16 networks left out: the plain network of their model and seed is missing." in clean.caveats
    assert clean.details.splitlines()[2].startswith("| VGG-11 | - | - |")


def test_networks_that_diverged_count_against_clean_accuracy_and_not_for_lost_robustness():
    rows = diverging(made_up("table2"), method="l1-decay", strength=1e-2)
    improves, costs = regularisation(rows)
    assert improves.caveats == ["4 networks diverged, and count as right about no image."]
    assert costs.caveats == ["4 networks left out: they diverged, and have no robustness to lose."]
    assert "of 64 networks" in improves.here.because
    assert "of 12 networks" in costs.here.because
    clean = {(row["cell"]["model"], row["cell"]["method"], row["cell"]["strength"]): row["clean"]["right"] / IMAGES
             for row in rows if "clean" in row}  # fmt: skip
    change = [100 * (clean.get((model, *setting), 0) - clean[model, "plain", None])
              for model in LAYERS for setting in accuracy_claims.REGULARISED]  # fmt: skip
    assert improves.here.because.startswith(f"{np.mean(change):+.1f} points on average")


def test_networks_whose_plain_one_diverged_are_left_out():
    clean, robust = regularisation(diverging(made_up("table2"), model="vgg11", method="plain"))
    assert clean.caveats == ["16 networks left out: the plain network of their model and seed diverged."]
    assert robust.caveats == ["4 networks left out: the plain network of their model and seed diverged."]
    assert clean.details.splitlines()[2].startswith("| VGG-11 | - | - |")


@pytest.mark.parametrize(("method", "count"), [("alp", 4), ("plain", 12)])
def test_norms_of_networks_that_diverged_are_left_out(method, count):
    rows = diverging(made_up("figure2", robust=ROBUST), method=method)
    verdict = norm_claim.verdict(Report.of(rows, "figure2"), "l1")
    assert verdict.caveats == [f"{count} networks left out: they or the plain one diverged."]


def test_rows_of_different_images_are_not_compared():
    rows = made_up("table2")
    rows[3]["clean"] = storage.counted(np.ones(IMAGES - 1, bool))
    with pytest.raises(ValueError, match="same images"):
        regularisation(rows)


ROBUST = by(plain=0.1, other=0.4)


@pytest.mark.parametrize(("norm", "word"), [
    (by(plain=1, other=1.5), "holds, larger"),
    (by(plain=1, other=0.97), "holds"),
    (by(plain=1, other=0.5), "does not hold"),
    (lambda which: 1 + (which.method != "plain") * 4 * MIXED[which.model], "undecided"),
], ids=["larger", "as large", "smaller", "mixed"])  # fmt: skip
@pytest.mark.parametrize("kind", NORMS)
def test_claim_on_norms(kind, norm, word):
    verdict = norm_claim.verdict(Report.of(made_up("figure2", robust=ROBUST, norm=norm), "figure2"), kind)
    assert verdict.here.word == word


def test_the_numbers_of_the_claim_on_norms_are_those_of_the_rows():
    rows = made_up("figure2", robust=ROBUST, norm=by(plain=1, other=1.2))
    verdict = norm_claim.verdict(Report.of(rows, "figure2"), "linf")
    norms = {(row["cell"]["model"], row["cell"]["method"]): np.array(row["norms"]["linf"]) for row in rows}
    keys = [(model, method) for model in LAYERS for method in ("pgd-at", "alp", "trades")]
    logarithms = [np.log(norms[key] / norms[key[0], "plain"]) for key in keys]
    lines = [line.strip("| ").split(" | ") for line in verdict.details.splitlines()[2:]]
    for line, each in zip(lines, logarithms, strict=True):
        low, high = np.exp(scipy_stats.t.interval(0.95, len(each) - 1, np.mean(each), scipy_stats.sem(each)))
        assert line[2] == f"{np.mean(each > 0):.0%}"
        assert line[4:] == [f"{np.exp(np.mean(each)):.2f}", f"[{low:.2f}, {high:.2f}]", "-"]
    smallest = min(scipy_stats.wilcoxon(each).pvalue for each in logarithms)
    assert min(float(line[3]) for line in lines) == float(f"{12 * smallest:.1g}")

    means = np.mean([[np.mean(each) for each in logarithms[i : i + 3]] for i in (0, 3, 6, 9)], axis=1)
    low, high = np.exp(scipy_stats.t.interval(0.95, 3, np.mean(means), scipy_stats.sem(means)))
    assert verdict.here.because.startswith(f"{np.exp(np.mean(means)):.2f} times")
    assert f"[{low:.2f}, {high:.2f}]" in verdict.here.because


def folded(rows, factor):
    """The same, with norms with batch norm: the others times ``factor`` of the cell."""

    def of(row):
        times = factor(cell.Cell(**row["cell"]))
        return {name: (times * np.array(norms)).tolist() for name, norms in row["norms"].items()}

    return [row | {"folded": of(row)} for row in rows]


@pytest.mark.parametrize("kind", NORMS)
def test_norms_with_batch_norm_are_judged_beside_those_of_the_weights(kind):
    rows = folded(made_up("figure2", robust=ROBUST, norm=by(plain=1, other=1.5)), by(plain=1, other=0.4))
    report = Report.of(rows, "figure2")
    weights, together = (norm_claim.verdict(report, kind, part) for part in ("norms", "folded"))
    assert (weights.here.word, together.here.word) == ("holds, larger", "does not hold")
    assert together.claim == f"adversarially trained networks have {kind} norms as large or larger, with batch norm"
    mean = float(weights.here.because.partition(" ")[0])
    assert float(together.here.because.partition(" ")[0]) == pytest.approx(0.4 * mean, abs=0.01)


def test_rows_without_norms_with_batch_norm_are_left_out():
    rows = folded(made_up("figure2", robust=ROBUST), by(other=1))
    for row in rows[:4]:  # those of VGG-11
        del row["folded"]
    verdict = norm_claim.verdict(Report.of(rows, "figure2"), "l1", "folded")
    assert verdict.caveats == ["3 networks left out: their rows or the plain ones are without these norms."]


def test_norms_of_networks_that_are_not_robust_say_nothing():
    verdict = norm_claim.verdict(Report.of(made_up("figure2", norm=by(plain=1, other=2)), "figure2"), "l1")
    assert verdict.here == claims.Judgement(
        "not meaningful", "12 networks left out: they were not seen to be more robust than the plain one."
    )


def test_norms_of_networks_that_guess_say_nothing():
    rows = made_up("figure2", clean=by(alp=0.05, other=0.6), robust=ROBUST, norm=by(plain=1, other=2))
    verdict = norm_claim.verdict(Report.of(rows, "figure2"), "l1")
    assert verdict.caveats == ["4 networks left out: they or the plain one may be guessing."]
    assert sum("| ALP | - |" in line for line in verdict.details.splitlines()) == 4


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_norms_without_a_logarithm_are_left_out(value):
    rows = made_up("figure2", robust=ROBUST)
    rows[1]["norms"]["l1"][2] = value
    verdict = norm_claim.verdict(Report.of(rows, "figure2"), "l1")
    assert verdict.caveats == ["1 network left out: an l1 norm is zero or not finite."]


def test_layers_of_other_networks_are_not_compared():
    rows = made_up("figure2", robust=ROBUST)
    rows[1]["layers"][0] = "another"
    with pytest.raises(ValueError, match="name different layers"):
        norm_claim.verdict(Report.of(rows, "figure2"), "l1")


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
