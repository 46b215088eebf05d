"""The promise: verdicts on the paper's claims say what the rows say."""

import numpy as np
import pytest
from made_up_rows import IMAGES, LAYERS, ROBUST, by, diverging, folded, made_up, shifted, without

from train import accuracy_claims, claims, norm_claim, published
from train import rows as storage
from train.report import Report

scipy_stats = pytest.importorskip("scipy.stats")

NORMS = ("l1", "linf", "l2")


def regularisation(rows):
    report = Report.of(rows, "table2")
    return [
        accuracy_claims.verdict(report, which)
        for which in (accuracy_claims.IMPROVES_CLEAN, accuracy_claims.COSTS_ROBUST)
    ]


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
