from __future__ import annotations

import math

import numpy as np
import pytest

from fl_lightning.evaluation.summary import bottom_decile, mean, summarize, worst_k


def test_hand_computed() -> None:
    found = summarize([0.5, 0.9, 0.7, 0.9], weights=[10, 30, 20, 40])
    assert found == pytest.approx(
        {
            "mean": 0.75,
            "weighted_mean": (5 + 27 + 14 + 36) / 100,
            "std": np.std([0.5, 0.9, 0.7, 0.9]),
            "worst": 0.5,
            "bottom_decile": 0.5,
            "pooled": 0.82,
        }
    )


@pytest.mark.parametrize(("num_clients", "taken"), [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (25, 2), (100, 10)])
def test_bottom_decile_counts_clients(num_clients: int, taken: int) -> None:
    values = np.random.default_rng(0).permutation(num_clients) / 7
    assert bottom_decile(values) == pytest.approx(np.mean(np.arange(taken) / 7))


def test_worst_loss_is_the_highest() -> None:
    found = summarize([1.0, 3.0, 2.0], higher_is_better=False)
    assert (found["worst"], found["bottom_decile"]) == (3.0, 3.0)
    assert worst_k([1.0, 3.0, 2.0], 2, higher_is_better=False) == 2.5


def test_a_client_without_test_examples_is_left_out() -> None:
    assert summarize([0.5, math.nan, 1.0], weights=[1, 0, 3]) == summarize([0.5, 1.0], weights=[1, 3])


def test_no_test_examples_at_all() -> None:
    assert all(math.isnan(value) for value in summarize([math.nan], weights=[0]).values())


def test_a_diverged_client_is_not_hidden() -> None:
    assert all(math.isnan(value) for value in summarize([0.5, math.nan]).values())


def test_pooled_is_taken_as_given() -> None:
    assert summarize([0.0, 1.0], [1, 1], pooled=0.3)["pooled"] == 0.3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one client"):
        summarize([])
    with pytest.raises(ValueError, match="one for each of 2 clients, got 1"):
        summarize([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="numbers of at least 0"):
        mean([1.0, 2.0], [1, -1])
    with pytest.raises(ValueError, match=r"k must lie in \[1, 2\], the number of clients, got 3"):
        worst_k([1.0, 2.0], 3)
