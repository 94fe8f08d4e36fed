r"""How sure a number is: bootstrap intervals of means, exact paired tests, and Holm's correction for many tests.

Everything is paired where two models are compared: they are scored on the same examples, and each resample draws the
same examples for both. Intervals are of the percentile kind; Efron, Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13, https://doi.org/10.1007/978-1-4899-4541-9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

from fl_lightning.checks import ArgumentError, at_least

LEVEL = 0.95
RESAMPLES = 2000

_AT_ONCE = 4_000_000  # counts drawn at once; 32 MB

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A mean and the ends of its interval; NaN throughout where there is none."""

    mean: float
    low: float
    high: float

    @property
    def below(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high < 0

    @property
    def above(self) -> bool:
        """Whether the whole interval lies above 0."""
        return self.low > 0


NONE = Interval(math.nan, math.nan, math.nan)


def resampled_means(scores: ArrayLike, generator: np.random.Generator, resamples: int = RESAMPLES) -> Array:
    """Means of examples drawn with replacement.

    Args:
        scores: One row an example, one column for each thing that is scored, (n, K). Columns see the same draws.
        generator: Draws.
        resamples: How often n of the n examples are drawn.

    Returns:
        (resamples, K).
    """
    at_least("resamples", resamples, 1)
    table = np.asarray(scores, dtype=np.float64)
    return np.concatenate([counts @ table for counts in shares(len(table), generator, resamples)])


def shares(n: int, generator: np.random.Generator, resamples: int) -> Iterator[Array]:
    """Yield how large a share each of n examples has in each resample, some resamples at a time."""
    step = max(1, _AT_ONCE // max(n, 1))
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n) / n


def interval(mean: float, replicates: ArrayLike, level: float = LEVEL) -> Interval:
    """Return a mean with the percentile interval of its resampled values, (resamples,).

    Values that are NaN, for a resample may have none (AUROC of one class), are left out; where more than half are,
    there is no interval.
    """
    if not 0 < level < 1:
        raise ArgumentError(f"level must lie between 0 and 1, got {level}")
    tail = (1 - level) / 2
    array = np.asarray(replicates, dtype=np.float64)
    known = array[~np.isnan(array)]
    if 2 * known.size < array.size or math.isnan(mean):
        return Interval(mean, math.nan, math.nan)
    low, high = np.quantile(known, [tail, 1 - tail])
    # Rounded, so that sums which differ in the last bits alone are no difference.
    return Interval(*(round(float(value), 12) + 0.0 for value in (mean, low, high)))


def bootstrap_mean(
    values: Sequence[float] | Array, seed: int = 0, level: float = LEVEL, resamples: int = RESAMPLES
) -> Interval:
    """Return the mean of values and its interval; NaN are left out, and of fewer than two values there is none.

    Args:
        values: One for each example or client; for a paired interval their differences.
        seed: Of the draws.
        level: Share of intervals that would hold the true mean.
        resamples: How often as many values are drawn.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[~np.isnan(array)]
    if array.size < 2:
        return Interval(float(array.mean()), math.nan, math.nan) if array.size else NONE
    means = resampled_means(array[:, None], np.random.default_rng(seed), resamples)
    return interval(float(array.mean()), means[:, 0], level)


def sign_test(differences: ArrayLike) -> float:
    """Return the exact two-sided p-value of as many positive differences among those that are not 0, at odds of 1 to 1.

    Of two models' right and wrong answers to the same examples (differences of -1, 0, 1) this is McNemar's exact test:
    McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages, Psychometrika
    1947, https://doi.org/10.1007/BF02295996. 1 where all are 0.
    """
    array = np.asarray(differences, dtype=np.float64)
    better, worse = int((array > 0).sum()), int((array < 0).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for there being many of them, so that any of them is below 0.05 by chance with probability 0.05.

    Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 1979,
    https://www.jstor.org/stable/4615733. NaN stays NaN and counts for no test.

    Returns:
        In the order given, each at least the p-value and at most 1.
    """
    array = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(array))
    order = known[np.argsort(array[known], kind="stable")]
    adjusted = array.copy()
    adjusted[order] = np.minimum(1, np.maximum.accumulate(array[order] * np.arange(len(order), 0, -1)))
    return [float(p) for p in adjusted]
