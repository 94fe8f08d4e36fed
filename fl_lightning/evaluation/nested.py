"""Where the deviation of a number comes from: nested variance components of repeated runs."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import t as student

from fl_lightning.evaluation.uncertainty import LEVEL, Interval


class Components(NamedTuple):
    """A mean over partitions, trainings and fine-tunings, and the standard deviation that each of them adds.

    Attributes:
        mean: With its interval over partitions, by Student's t: of other partitions, trainings and fine-tunings alike.
        partition: Deviation between partitions beyond what trainings on one partition differ by.
        training: Deviation between trainings on one partition beyond what fine-tunings of one model differ by.
        tuning: Deviation between fine-tunings of one model.

    A component of which there is one case only is NaN, and is part of the one before it.
    """

    mean: Interval
    partition: float
    training: float
    tuning: float


def components(values: ArrayLike) -> Components:
    """Split the variance of values (P, T, F): by partition, training within it, fine-tuning within that.

    The estimator of the analysis of variance for balanced nested designs: each mean square minus the one below it, over
    the number of values that it is a mean of, and 0 where that is negative. Searle, Casella, McCulloch, Variance
    Components, 1992, section 3.5, https://doi.org/10.1002/9780470316856.
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 3 or not table.size:
        raise ValueError(f"values must be (partitions, trainings, fine-tunings), got shape {table.shape}")
    partitions, trainings, tunings = table.shape
    by_training, by_partition, mean = table.mean(2), table.mean((1, 2)), float(table.mean())
    tuning = _mean_square(table - by_training[..., None], partitions * trainings * (tunings - 1))
    training = tunings * _mean_square(by_training - by_partition[:, None], partitions * (trainings - 1))
    partition = trainings * tunings * _mean_square(by_partition - mean, partitions - 1)
    # What has one case only adds nothing of its own to the mean square above it.
    below_training = 0.0 if math.isnan(tuning) else tuning
    below_partition = below_training if math.isnan(training) else training
    half = math.nan
    if partitions > 1:
        half = float(student.ppf((1 + LEVEL) / 2, partitions - 1)) * math.sqrt(partition / table.size)
    return Components(
        Interval(mean, mean - half, mean + half),
        _deviation(partition - below_partition, trainings * tunings),
        _deviation(training - below_training, tunings),
        math.sqrt(tuning) if not math.isnan(tuning) else math.nan,
    )


def _mean_square(deviations: np.ndarray, freedom: int) -> float:
    return float((deviations**2).sum()) / freedom if freedom else math.nan


def _deviation(difference: float, number: int) -> float:
    return difference if math.isnan(difference) else math.sqrt(max(0.0, difference) / number)
