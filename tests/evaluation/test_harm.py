from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fl_lightning.evaluation.harm import change, compare, harm, jain_fairness


def test_hand_computed() -> None:
    found = harm([0.9, 0.6, 0.5, 0.8], [0.7, 0.7, 0.5, 0.9], k=2)
    assert found == pytest.approx(
        {
            "mean_change": 0.0,
            "share_worse": 0.5,
            "worst_change": -0.1,
            "worst_k_change": -0.1,
            "worst_k": 0.55,
            "jain": 2.8**2 / (4 * (0.81 + 0.36 + 0.25 + 0.64)),
        }
    )


def test_clients_without_a_value_are_left_out() -> None:
    values, baseline = [0.5, math.nan, 0.7], [0.6, 0.2, 0.6]
    assert harm(values, baseline) == harm([0.5, 0.7], [0.6, 0.6])
    assert all(math.isnan(value) for value in harm([math.nan], [0.5]).values())
    assert math.isnan(change(values, baseline)[1])


@pytest.mark.parametrize("number", [1, 4, 9])
def test_jain_lies_between_one_for_all_and_all_for_one(number: int) -> None:
    assert jain_fairness([0.3] * number) == pytest.approx(1)
    assert jain_fairness([0.7] + [0.0] * (number - 1)) == pytest.approx(1 / number)
    assert jain_fairness([0.0] * number) == 1
    with pytest.raises(ValueError, match="at least 0, got -1"):
        jain_fairness([-1.0, 1.0])


def exact_p_value(changes: np.ndarray) -> float:
    """Every sign is a coin toss: share of all sign patterns whose smaller rank sum is at most that found."""
    ranks = np.argsort(np.argsort(np.abs(changes))) + 1
    least = min(ranks[changes > 0].sum(), ranks[changes < 0].sum())
    sums = [ranks[np.array(signs, dtype=bool)].sum() for signs in itertools.product([0, 1], repeat=len(ranks))]
    return min(1.0, 2 * np.mean([total <= least for total in sums]))


@pytest.mark.parametrize("seed", range(3))
def test_wilcoxon_counts_sign_patterns(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.random(8) + 0.2, generator.random(8)
    found = compare([*first, 0.5, 0.5], [*second, 0.5, 0.5])  # two ties change nothing but the count of ties
    differences = first - second
    assert (found.wins, found.ties, found.losses) == ((differences > 0).sum(), 2, (differences < 0).sum())
    assert found.p_value == pytest.approx(exact_p_value(differences))
    assert found.mean_change == pytest.approx(differences.sum() / 10)
    assert compare([*second], [*first]).p_value == found.p_value


def test_all_ties_are_no_evidence() -> None:
    assert compare([0.5, 0.7], [0.5, 0.7]) == (0, 2, 0, 0.0, 0.0, 1.0)


def test_a_single_client_proves_nothing() -> None:
    found = compare([0.9], [0.5])
    assert (found.wins, found.p_value) == (1, 1.0)


def test_equal_differences_that_differ_in_the_last_bits() -> None:
    """They differ by rounding only, so they share a rank, without a warning."""
    first, second = [0.9, 0.4, 0.2], [0.8, 0.3, 0.1]
    assert len({x - y for x, y in zip(first, second, strict=True)}) == 3
    found = compare(first, second)
    assert found.wins == 3
    assert found.statistic == 0
    assert found.p_value == 2 / 2**3
    assert found.p_value == compare([1.0, 1.0, 1.0], [0.0, 0.0, 0.0]).p_value


@pytest.mark.parametrize("clients", [5, 9, 12])
def test_equal_ranks_are_permuted(clients: int) -> None:
    """All changes of sign, counted here by hand."""
    changes = np.random.default_rng(clients).integers(1, 4, clients) * np.random.default_rng(0).choice([-1, 1], clients)
    sizes = np.abs(changes)
    ranks = np.array([(sizes < size).sum() + ((sizes == size).sum() + 1) / 2 for size in sizes])
    sums = np.array([ranks[np.array(up, dtype=bool)].sum() for up in itertools.product([0, 1], repeat=clients)])
    smaller = min(ranks[changes > 0].sum(), ranks[changes < 0].sum())
    expected = min(1.0, 2 * (sums <= smaller).mean())
    assert compare(changes, np.zeros(clients)).p_value == pytest.approx(expected, abs=1e-12)


def test_many_clients() -> None:
    generator = np.random.default_rng(0)
    baseline = generator.random(200)
    assert compare(baseline + 0.05 + 0.01 * generator.random(200), baseline).p_value < 1e-20
    assert compare(baseline + 0.1 * generator.standard_normal(200), baseline).p_value > 1e-3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="same clients, got 2 and 1"):
        change([0.5, 0.6], [0.5])
    with pytest.raises(ValueError, match="at least one client must have a value in both"):
        compare([math.nan], [0.5])
