from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fl_lightning.data.partitioners import Dirichlet, Iid, LabelCount, Partitioner, Quantity, Shards, divide_alike

LABELS = np.random.default_rng(0).permutation(np.arange(2000) % 10)

ALL: list[Callable[[], Partitioner]] = [
    Iid,
    Dirichlet,
    lambda: Dirichlet(equal_sizes=True),
    Shards,
    LabelCount,
    Quantity,
]


def counts(parts: list[np.ndarray], labels: np.ndarray = LABELS, num_classes: int = 10) -> np.ndarray:
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


@pytest.mark.parametrize("make", ALL)
def test_parts_are_disjoint_large_enough_and_follow_from_the_seed(make: Callable[[], Partitioner]) -> None:
    parts = make()(LABELS, 12, seed=3)
    assert len(parts) == 12
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together)
    assert together.min() >= 0
    assert together.max() < len(LABELS)
    assert min(len(part) for part in parts) >= 10
    assert all((np.diff(part) > 0).all() for part in parts)
    again, other = make()(LABELS, 12, seed=3), make()(LABELS, 12, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("make", [Iid, Dirichlet, Shards, Quantity, lambda: LabelCount(5)])
def test_nothing_is_left_out(make: Callable[[], Partitioner]) -> None:
    assert sum(len(part) for part in make()(LABELS, 7, seed=0)) == len(LABELS)


def test_iid_is_even_in_size_and_labels() -> None:
    parts = Iid()(LABELS, 8, seed=0)
    assert {len(part) for part in parts} == {250}
    # Hypergeometric: 250 of 2000, 200 of a class. Mean 25, standard deviation 4.4.
    assert (np.abs(counts(parts) - 25) < 4.5 * 4.4).all()


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_dirichlet_proportions_have_the_moments_of_the_distribution(alpha: float) -> None:
    """A share of Dir(alpha, …, alpha) over n clients is Beta(alpha, (n-1) alpha): mean 1/n, known variance."""
    num_clients = 5
    shares = np.concatenate(
        [counts(Dirichlet(alpha, min_size=1)(LABELS, num_clients, seed=seed)).ravel() / 200 for seed in range(40)]
    )
    variance = (num_clients - 1) / (num_clients**2 * (num_clients * alpha + 1))
    assert shares.mean() == pytest.approx(1 / num_clients, abs=1e-9)
    assert shares.var() == pytest.approx(variance, rel=0.15)


def test_dirichlet_of_high_concentration_is_even() -> None:
    assert (np.abs(counts(Dirichlet(1e6)(LABELS, 8, seed=0)) - 25) <= 1).all()


@pytest.mark.parametrize("alpha", [0.05, 1e6])
def test_dirichlet_of_equal_sizes(alpha: float) -> None:
    parts = Dirichlet(alpha, equal_sizes=True)(LABELS, 40, seed=0)
    assert {len(part) for part in parts} == {50}
    if alpha > 1:
        # Even but for rounding, which adds up over the clients dealt to first.
        assert (np.abs(counts(parts) - 5) <= 2).mean() > 0.9
    else:
        assert np.median(counts(parts).max(axis=1)) > 35  # most have nearly one class only


def test_dirichlet_of_equal_sizes_draws_class_proportions_of_known_variance() -> None:
    """While no class runs out, a share is Beta(alpha K p, alpha K (1 - p)) with p = 1/K."""
    labels = np.arange(100_000) % 4
    alpha = 0.5
    parts = Dirichlet(alpha, equal_sizes=True)(labels, 500, seed=1)
    shares = counts(parts, labels, 4) / 200
    assert shares.mean() == pytest.approx(0.25)
    assert shares.var() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.1)


def test_shards_are_of_one_size_and_few_classes() -> None:
    parts = Shards(shards_per_client=2)(LABELS, 20, seed=0)
    assert {len(part) for part in parts} == {100}
    assert ((counts(parts) > 0).sum(axis=1) <= 2).all()  # 40 shards of 50, 200 examples a class: no shard has two


@pytest.mark.parametrize(("num_clients", "classes"), [(20, 2), (7, 3), (3, 10)])
def test_label_count_is_exact_and_shares_classes_equally(num_clients: int, classes: int) -> None:
    table = counts(LabelCount(classes)(LABELS, num_clients, seed=0))
    assert ((table > 0).sum(axis=1) == classes).all()
    owners = (table > 0).sum(axis=0)
    assert owners.max() - owners.min() <= 1
    for column in table.T:
        held = column[column > 0]
        assert held.max() - held.min() <= 1
        assert held.sum() == 200


def test_label_count_leaves_classes_out_where_there_are_too_few_places() -> None:
    table = counts(LabelCount(2)(LABELS, 3, seed=0))
    assert (table.sum(axis=0) > 0).sum() == 6


def test_quantity_is_uneven_in_size_and_even_in_labels() -> None:
    parts = Quantity(0.5)(LABELS, 5, seed=0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.max() > 3 * sizes.min()
    for part, row in zip(parts, counts(parts), strict=True):
        if len(part) >= 50:
            expected = len(part) / 10
            assert ((row - expected) ** 2 / expected).sum() < 30  # 0.04 % point of chi-square, nine degrees


def test_no_place_is_special() -> None:
    """Under equal sizes the clients dealt to last take what is left; which those are must be random."""
    labels, partitioner = np.arange(600) % 10, Dirichlet(0.02, equal_sizes=True)

    def largest_class(divide: Callable[[int], list[np.ndarray]]) -> np.ndarray:
        return np.mean([counts(divide(seed), labels).max(axis=1) for seed in range(60)], axis=0)

    dealt = largest_class(lambda seed: partitioner.draw(labels, 10, np.random.default_rng(seed)))
    given = largest_class(lambda seed: partitioner(labels, 10, seed))
    # Standard errors are 1.6: the last hand is mixed more than the first, and no client always gets it.
    assert dealt[0] - dealt[-1] > 8
    assert abs(given[0] - given[-1]) < 6


@pytest.mark.parametrize("make", ALL)
def test_too_few_examples_is_said_at_once(make: Callable[[], Partitioner]) -> None:
    with pytest.raises(ValueError, match="201 clients of at least 10 examples need 2010, and there are 2000"):
        make()(LABELS, 201, seed=0)


def test_a_minimum_that_does_not_come_up_ends_in_an_error() -> None:
    partitioner = Dirichlet(0.01, min_size=150, max_tries=3)
    with pytest.raises(ValueError, match=r"Dirichlet\(min_size=150, alpha=0.01, .* fewer than 150 .* 3 tries"):
        partitioner(LABELS, 10, seed=0)


def test_a_minimum_is_had_by_drawing_again() -> None:
    unlucky = [
        seed
        for seed in range(30)
        if min(len(part) for part in Dirichlet(0.1, min_size=1, max_tries=200)(LABELS, 10, seed)) < 40
    ]
    assert unlucky
    parts = Dirichlet(0.1, min_size=40)(LABELS, 10, unlucky[0])
    assert min(len(part) for part in parts) >= 40


def test_separate_test_examples_follow_the_training_labels() -> None:
    test_labels = np.random.default_rng(1).permutation(np.arange(600) % 10)
    train = counts(Dirichlet(0.3)(LABELS, 6, seed=0))
    parts = divide_alike(test_labels, train, np.random.default_rng(0))
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together) == 600
    assert (np.abs(counts(parts, test_labels) - train * 60 / 200) < 1).all()


@pytest.mark.parametrize("step", [1, -1])
def test_no_client_is_left_without_a_test_example(step: int) -> None:
    """Twenty clients share forty test examples of two classes; by proportion, small clients would get none."""
    train = np.array([[100, 0]] * 10 + [[1, 1]] * 9 + [[0, 100]])[::step]
    parts = divide_alike(np.arange(40) % 2, train, np.random.default_rng(0))
    assert min(len(part) for part in parts) == 1
    together = np.concatenate(parts)
    assert len(np.unique(together)) == len(together) == 40
    table = counts(parts, np.arange(40) % 2, 2)
    assert not table[train == 0].any()


def test_a_class_that_nobody_trains_on_is_not_tested() -> None:
    train = np.array([[5, 0], [5, 0]])
    parts = divide_alike(np.array([0, 1, 0, 1]), train, np.random.default_rng(0))
    assert sorted(np.concatenate(parts).tolist()) == [0, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dirichlet(0.0), "alpha must be above 0, got 0.0"),
        (lambda: Quantity(-1.0), "alpha must be above 0, got -1.0"),
        (lambda: Shards(0), "shards_per_client must be at least 1, got 0"),
        (lambda: LabelCount(0), "classes_per_client must be at least 1, got 0"),
        (lambda: Iid(min_size=0), "min_size must be at least 1, got 0"),
        (lambda: Iid(max_tries=0), "max_tries must be at least 1, got 0"),
        (lambda: LabelCount(11)(LABELS, 2, 0), "`classes_per_client` is 11, and the data have 10 classes"),
        (lambda: Iid()(LABELS, 0, 0), "num_clients must be at least 1, got 0"),
    ],
)
def test_bad_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
