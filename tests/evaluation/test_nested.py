"""Nested variance components: plain loops, known deviations, scipy's t interval, degenerate cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fl_lightning.evaluation.nested import components

RNG = np.random.default_rng(0)


def test_mean_squares_of_a_plain_loop() -> None:
    values = RNG.normal(size=(4, 3, 2)) + RNG.normal(size=(4, 3, 1)) * 2 + RNG.normal(size=(4, 1, 1)) * 9
    within = training = partition = 0.0
    for p in range(4):
        partition += 3 * 2 * (values[p].mean() - values.mean()) ** 2 / 3
        for t in range(3):
            training += 2 * (values[p, t].mean() - values[p].mean()) ** 2 / (4 * 2)
            within += sum((values[p, t, f] - values[p, t].mean()) ** 2 for f in range(2)) / (4 * 3 * 1)
    found = components(values)
    assert found.tuning**2 == pytest.approx(within)
    assert found.training**2 == pytest.approx(max(0, (training - within) / 2))
    assert found.partition**2 == pytest.approx(max(0, (partition - training) / 6))


def test_known_deviations_come_back() -> None:
    def draw() -> np.ndarray:
        return RNG.normal(size=(5, 3, 2)) * 1 + RNG.normal(size=(5, 3, 1)) * 2 + RNG.normal(size=(5, 1, 1)) * 3

    squares = np.mean([[one**2 for one in components(draw())[1:]] for _ in range(3000)], axis=0)
    assert squares == pytest.approx([9, 4, 1], rel=0.1)


def test_the_interval_is_students_over_partitions() -> None:
    values = RNG.normal(size=(4, 3, 2))
    expected = stats.t.interval(0.95, 3, values.mean((1, 2)).mean(), stats.sem(values.mean((1, 2))))
    assert components(values).mean == pytest.approx((values.mean(), *expected))


def test_what_has_one_case_is_part_of_the_one_before_it() -> None:
    values = RNG.normal(size=(4, 3, 1))
    found = components(values)
    assert math.isnan(found.tuning)
    assert found.training == pytest.approx(math.sqrt(values[..., 0].var(axis=1, ddof=1).mean()))
    alone = components(values[:, :1])
    assert math.isnan(alone.training)
    assert alone.partition == pytest.approx(values[:, 0, 0].std(ddof=1))
    assert math.isnan(components(values[:1]).mean.low)
    assert components(np.ones((2, 2, 2)))[1:] == (0, 0, 0)
    with pytest.raises(ValueError, match="partitions, trainings, fine-tunings"):
        components([1.0, 2.0])
