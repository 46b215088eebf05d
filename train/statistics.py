"""Intervals and tests: of one accuracy, of two networks on the same images, of a few numbers, of many tests at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95


class Interval(NamedTuple):
    """From ``low`` to ``high``."""

    low: float
    high: float


def wilson(right: int, images: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of an accuracy, of which ``right`` of ``images`` were seen. It never leaves [0, 1].

    >>> low, high = wilson(379, 1024)
    >>> f"{low:.3f} {high:.3f}"
    '0.341 0.400'
    """
    if not 0 <= right <= images or images == 0:
        raise ValueError(f"right must be from 0 to images, and images at least 1, not {right} of {images}")
    z, share = _z(level), right / images
    centre = share + z * z / (2 * images)
    half = z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    scale = 1 + z * z / images
    low = 0.0 if right == 0 else (centre - half) / scale  # at the ends exactly, where rounding would miss them
    high = 1.0 if right == images else (centre + half) / scale
    return Interval(low, high)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """The exact two-sided p of two networks being right equally often, from boolean flags of the same images.

    Only images on which they disagree say anything: then each is the one that is right with probability 1/2.
    """
    _same_images(first, second)
    only_first, only_second = int(np.sum(first & ~second)), int(np.sum(second & ~first))
    if only_first + only_second == 0:
        return 1.0
    return float(scipy_stats().binomtest(only_first, only_first + only_second).pvalue)


def over_images(differences: np.ndarray, level: float = LEVEL) -> Interval:
    """Of the mean of one number for each image, such as how much more often one set of networks is right on it.

    Normal, from the deviation over the images, which carries that all networks saw the same ones. Between two networks
    it is Agresti & Min's interval of paired proportions (2005), which adds half an image to each of right and wrong,
    right and right, ...: networks that never disagreed are not known to be equal.
    """
    if len(differences) == 0:
        raise ValueError("differences must hold one number for each image, not none")
    images = len(differences) + 2
    mean = float(np.sum(differences)) / images
    square = (float(np.sum(np.square(differences, dtype=float))) + 1) / images
    return normal(mean, math.sqrt((square - mean**2) / images), level)


def students_t(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval | None:
    """Of the mean of independent numbers, such as one for each seed. None for fewer than two, which cannot vary."""
    if len(values) < 2:
        return None
    half = float(scipy_stats().t.ppf((1 + level) / 2, len(values) - 1)) * float(np.std(values, ddof=1))
    return _around(float(np.mean(values)), half / math.sqrt(len(values)))


def normal(mean: float, error: float, level: float = LEVEL) -> Interval:
    """Of a mean whose standard error is known."""
    return _around(mean, _z(level) * error)


def signed_rank(values: Sequence[float] | np.ndarray) -> float:
    """Wilcoxon's two-sided p of numbers being symmetric around zero; exact for up to 50 without ties."""
    if not np.any(values):
        return 1.0
    return float(scipy_stats().wilcoxon(np.asarray(values)).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """The p of each of several tests, so adjusted that below 5 % not one of them is wrong in 95 % of such families.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def geometric_mean(values: np.ndarray) -> float:
    """NaN if any is not positive and finite.

    >>> geometric_mean(np.array([1.0, 4.0])), geometric_mean(np.array([0.0, 4.0]))
    (2.0, nan)
    """
    return float(np.exp(np.log(values).mean())) if np.isfinite(values).all() and (values > 0).all() else math.nan


def hull(*intervals: Interval) -> Interval:
    """The smallest interval that holds all of these."""
    return Interval(min(each.low for each in intervals), max(each.high for each in intervals))


def scipy_stats() -> Any:
    """scipy.stats, imported where it is needed: training goes without."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('these statistics need scipy: pip install "convnorm[train]"') from error
    return stats


def _around(mean: float, half: float) -> Interval:
    return Interval(mean - half, mean + half)


def _z(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    return NormalDist().inv_cdf((1 + level) / 2)


def _same_images(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape or first.dtype != bool or second.dtype != bool:
        raise ValueError(
            f"first and second must be booleans for the same images, not {first.dtype} {list(first.shape)} and "
            f"{second.dtype} {list(second.shape)}"
        )
