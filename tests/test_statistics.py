"""The promise: intervals and tests are those of the textbooks."""

import math

import numpy as np
import pytest

statistics = pytest.importorskip("train.statistics", reason="away from the source tree")
scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(
    ("right", "images"), [(0, 1), (1, 1), (0, 500), (500, 500), (3, 7), (379, 1024), (9_321, 10_000)]
)
def test_wilson(right, images, level):
    expected = scipy_stats.binomtest(right, images).proportion_ci(level, method="wilson")
    assert statistics.wilson(right, images, level) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("right", "images"), [(-1, 10), (11, 10), (0, 0)])
def test_wilson_names_what_cannot_be(right, images):
    with pytest.raises(ValueError, match=f"{right} of {images}"):
        statistics.wilson(right, images)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_that_is_none_is_named(level):
    with pytest.raises(ValueError, match=f"level must be between 0 and 1, not {level}"):
        statistics.wilson(1, 2, level)


def flags(both, only_first, only_second, neither):
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


@pytest.mark.parametrize(("only_first", "only_second"), [(9, 2), (2, 9), (0, 5), (7, 8), (4, 4)])
def test_mcnemar_is_a_coin_that_is_thrown_where_two_networks_disagree(only_first, only_second):
    thrown, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(thrown, heads) for heads in range(fewer + 1)) / 2**thrown
    p = statistics.mcnemar(*flags(30, only_first, only_second, 11))
    assert p == pytest.approx(min(1, 2 * tail))
    assert p == statistics.mcnemar(*flags(3000, only_first, only_second, 0))  # other images say nothing


def test_mcnemar_of_networks_that_agree():
    assert statistics.mcnemar(*flags(5, 0, 0, 5)) == 1


@pytest.mark.parametrize("second", [np.ones(4, bool), np.ones(5)], ids=["fewer", "numbers"])
def test_mcnemar_names_flags_of_other_images(second):
    with pytest.raises(ValueError, match=r"booleans for the same images, not bool \[5\] and"):
        statistics.mcnemar(np.ones(5, bool), second)


@pytest.mark.parametrize(("only_first", "only_second"), [(30, 12), (0, 0), (0, 5)])
def test_over_images_is_agresti_and_mins_interval_of_two_networks(only_first, only_second):
    first, second = flags(60, only_first, only_second, 20)
    images = len(first) + 2
    b, c = only_first + 0.5, only_second + 0.5
    error = math.sqrt(b + c - (b - c) ** 2 / images) / images
    expected = [(b - c) / images + sign * 1.959964 * error for sign in (-1, 1)]
    assert statistics.over_images(first.astype(int) - second.astype(int)) == pytest.approx(expected, abs=1e-6)


def test_over_images_covers_the_truth_as_often_as_it_says():
    """Of 16 networks against one, which share what is hard about an image."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        hard = random.random((200, 1))
        plain = random.random((200, 1)) < 0.9 - 0.8 * hard
        others = random.random((200, 16)) < 0.95 - 0.8 * hard
        low, high = statistics.over_images((others.astype(int) - plain).mean(1))
        covered += low <= 0.05 <= high
    assert 0.92 < covered / 400 < 0.98


def test_over_images_needs_one():
    with pytest.raises(ValueError, match="one number for each image"):
        statistics.over_images(np.empty(0))


def test_students_t():
    values = [0.3, -0.1, 0.4, 0.2]
    expected = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
    assert statistics.students_t(values) == pytest.approx(expected)
    assert statistics.students_t(values[:1]) is None


def test_normal():
    assert statistics.normal(1, 2) == pytest.approx((1 - 2 * 1.959964, 1 + 2 * 1.959964), abs=1e-5)


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3, 0.4, 0.5], [-0.5, -0.1, -0.2, -0.3, -0.4]])
def test_signed_rank_of_one_sign_has_two_of_all_signs_for_it(values):
    assert statistics.signed_rank(values) == pytest.approx(2 / 2**5)


def test_signed_rank_of_nothing():
    assert statistics.signed_rank([0.0, 0.0]) == 1


def test_holm():
    assert statistics.holm([0.04, 0.001, 0.5, 0.013]) == pytest.approx([0.08, 0.004, 0.5, 0.039])
    assert statistics.holm([0.6, 0.7]) == [1, 1]
    assert statistics.holm([]) == []


def test_hull():
    assert statistics.hull(statistics.Interval(0, 2), statistics.Interval(1, 3)) == (0, 3)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_geometric_mean_where_there_is_none(value):
    assert math.isnan(statistics.geometric_mean(np.array([1.0, value])))
