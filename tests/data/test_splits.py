from __future__ import annotations

import numpy as np
import pytest

from fl_lightning.data.splits import apportion, part_size, stratified_split


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(20))
def test_apportion_adds_up_and_is_within_one_of_the_exact_share(seed: int) -> None:
    weights = rng(seed).random(7)
    shares = apportion(weights, 23, rng(seed))
    assert shares.sum() == 23
    assert (np.abs(shares - weights / weights.sum() * 23) < 1).all()


def test_apportion_breaks_ties_at_random_and_leaves_zero_weights_out() -> None:
    winners = {int(np.argmax(apportion(np.ones(3), 1, rng(seed)))) for seed in range(30)}
    assert winners == {0, 1, 2}
    assert apportion(np.array([1.0, 0.0, 1.0]), 8, rng()).tolist() == [4, 0, 4]
    assert apportion(np.zeros(3), 0, rng()).tolist() == [0, 0, 0]


def test_stratified_split_divides_and_keeps_proportions() -> None:
    labels = rng().choice(4, size=101, p=[0.6, 0.25, 0.1, 0.05])
    rest, part = stratified_split(labels, 30, rng(1))
    assert len(part) == 30
    assert sorted([*rest, *part]) == list(range(101))
    exact = np.bincount(labels, minlength=4) * 30 / 101
    assert (np.abs(np.bincount(labels[part], minlength=4) - exact) < 1).all()
    again = stratified_split(labels, 30, rng(1))
    assert np.array_equal(part, again[1])
    assert not np.array_equal(part, stratified_split(labels, 30, rng(2))[1])


def test_stratified_split_of_nothing() -> None:
    rest, part = stratified_split(np.zeros(0, dtype=np.int64), 0, rng())
    assert len(rest) == len(part) == 0


@pytest.mark.parametrize(
    ("num_examples", "fraction", "expected"), [(10, 0.2, 2), (10, 0.0, 0), (4, 0.01, 1), (3, 0.9, 1), (2, 0.5, 0)]
)
def test_part_size(num_examples: int, fraction: float, expected: int) -> None:
    assert part_size(num_examples, fraction, leave=2) == expected
