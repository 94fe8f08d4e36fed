"""Ways to divide one data set among clients so that they differ."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from fl_lightning.checks import above, at_least
from fl_lightning.data.splits import IntArray, apportion
from fl_lightning.seeding import derive_seed


class Partitioner(ABC):
    """Deals the examples of a data set out to clients.

    No example goes to two clients. A random division that leaves a client with fewer than ``min_size`` examples is
    drawn again, up to ``max_tries`` times.

    Args:
        min_size: Fewest examples of a client (training, validation and, if these are not separate, test together).
        max_tries: Divisions to draw before giving up, at least 1.
    """

    def __init__(self, min_size: int = 10, max_tries: int = 100) -> None:
        at_least("min_size", min_size, 1)
        at_least("max_tries", max_tries, 1)
        self.min_size = min_size
        self.max_tries = max_tries

    def __call__(self, labels: IntArray, num_clients: int, seed: int) -> list[IntArray]:
        """Divide examples among clients.

        Args:
            labels: (N,), each in [0, number of classes).
            num_clients: At least 1. No client is special, so any of them may be held out as unseen.
            seed: Of the run.

        Returns:
            One array of positions per client, ascending, pairwise disjoint.
        """
        at_least("num_clients", num_clients, 1)
        if num_clients * self.min_size > len(labels):
            raise ValueError(
                f"{num_clients} clients of at least {self.min_size} examples need {num_clients * self.min_size}, and "
                f"there are {len(labels)}; take fewer clients or lower `min_size`."
            )
        smallest = 0
        for attempt in range(self.max_tries):
            rng = np.random.default_rng(derive_seed(seed, "partition", attempt))
            parts = self.draw(labels, num_clients, rng)
            fewest = min(len(part) for part in parts)
            if fewest >= self.min_size:
                order = rng.permutation(num_clients)
                return [np.sort(parts[position]) for position in order]
            smallest = max(smallest, fewest)
        raise ValueError(
            f"{self.describe()} gave some client fewer than {self.min_size} examples in all of {self.max_tries} tries "
            f"(at best the smallest had {smallest}); lower `min_size`, take fewer clients, or divide less unevenly."
        )

    @abstractmethod
    def draw(self, labels: IntArray, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
        """Draw one division: disjoint arrays of positions, one per client."""

    def describe(self) -> str:
        """Name and arguments, for people."""
        arguments = ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "max_tries")
        return f"{type(self).__name__}({arguments})"


class Iid(Partitioner):
    """Deals all examples out at random, equally many to each client: no heterogeneity, the reference."""

    @override
    def draw(self, labels: IntArray, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
        return np.array_split(rng.permutation(len(labels)), num_clients)


class Dirichlet(Partitioner):
    r"""Divides each class among the clients in proportions drawn from a Dirichlet distribution.

    Clients differ in their labels and, unless ``equal_sizes``, in how many examples they have. The proportions of class
    *k* are :math:`p_k \sim \mathrm{Dir}(\alpha, \dots, \alpha)` over the clients, as in Yurochkin et al., Bayesian
    Nonparametric Federated Learning of Neural Networks, ICML 2019, https://arxiv.org/abs/1905.12022.

    With ``equal_sizes`` each client draws its own class proportions instead,
    :math:`q_i \sim \mathrm{Dir}(\alpha K p)` with *p* the proportions in the data and *K* classes, and takes equally
    many examples, as in Hsu et al., Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification, 2019, https://arxiv.org/abs/1909.06335. (Their concentration is :math:`\alpha K` here, so that both
    forms agree for balanced classes.) Examples run out class by class; the last clients dealt to take what is left.

    Args:
        alpha: Concentration, above 0: at 0.1 most clients have few classes, at 100 all are nearly alike.
        equal_sizes: Whether every client gets equally many examples.
        min_size: See :class:`Partitioner`.
        max_tries: See :class:`Partitioner`.
    """

    def __init__(self, alpha: float = 0.5, equal_sizes: bool = False, min_size: int = 10, max_tries: int = 100) -> None:
        super().__init__(min_size, max_tries)
        above("alpha", alpha, 0)
        self.alpha = alpha
        self.equal_sizes = equal_sizes

    @override
    def draw(self, labels: IntArray, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
        pools = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
        draw_counts = self._equal_counts if self.equal_sizes else self._counts
        return _deal(pools, draw_counts(np.array([len(pool) for pool in pools]), num_clients, rng))

    def _counts(self, available: IntArray, num_clients: int, rng: np.random.Generator) -> IntArray:
        """How many of each class each client gets: (clients, classes)."""
        proportions = rng.dirichlet(np.full(num_clients, self.alpha), size=len(available))
        return np.stack([apportion(p, n, rng) for p, n in zip(proportions, available.tolist(), strict=True)], axis=1)

    def _equal_counts(self, available: IntArray, num_clients: int, rng: np.random.Generator) -> IntArray:
        size = int(available.sum()) // num_clients
        prior = self.alpha * len(available) * available / available.sum()
        left = available.copy()
        counts = np.zeros((num_clients, len(available)), dtype=np.int64)
        for client in range(num_clients):
            wanted = rng.dirichlet(prior)
            while (missing := size - int(counts[client].sum())) > 0:
                weights = np.where(left > 0, wanted, 0.0)
                if weights.sum() < 1e-12:  # every class that it wants is used up
                    weights = left.astype(np.float64)
                more = np.minimum(apportion(weights, missing, rng), left)
                counts[client] += more
                left -= more
        return counts


class Shards(Partitioner):
    """Sorts the examples by label, cuts them into equal shards, and deals each client a few.

    McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, AISTATS 2017, section 3,
    https://arxiv.org/abs/1602.05629, with two shards per client.

    Args:
        shards_per_client: At least 1; a client sees at most about so many classes.
        min_size: See :class:`Partitioner`.
        max_tries: See :class:`Partitioner`.
    """

    def __init__(self, shards_per_client: int = 2, min_size: int = 10, max_tries: int = 100) -> None:
        super().__init__(min_size, max_tries)
        at_least("shards_per_client", shards_per_client, 1)
        self.shards_per_client = shards_per_client

    @override
    def draw(self, labels: IntArray, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
        by_label = np.lexsort((rng.random(len(labels)), labels))
        shards = np.array_split(by_label, num_clients * self.shards_per_client)
        dealt = rng.permutation(len(shards)).reshape(num_clients, self.shards_per_client)
        return [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]


class LabelCount(Partitioner):
    """Gives each client exactly so many classes, and divides each class equally among those that have it.

    Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, ICDE 2022, "quantity-based label
    imbalance", https://arxiv.org/abs/2102.02079. Classes are given out so that all have equally many owners, as far as
    numbers allow. Where there are fewer places than classes, some classes are left out.

    Args:
        classes_per_client: At least 1.
        min_size: See :class:`Partitioner`.
        max_tries: See :class:`Partitioner`.
    """

    def __init__(self, classes_per_client: int = 2, min_size: int = 10, max_tries: int = 100) -> None:
        super().__init__(min_size, max_tries)
        at_least("classes_per_client", classes_per_client, 1)
        self.classes_per_client = classes_per_client

    @override
    def draw(self, labels: IntArray, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
        classes = np.unique(labels)
        if self.classes_per_client > len(classes):
            raise ValueError(
                f"`classes_per_client` is {self.classes_per_client}, and the data have {len(classes)} classes."
            )
        owners = np.zeros((num_clients, len(classes)), dtype=bool)
        for client in range(num_clients):
            scarcest_first = np.lexsort((rng.random(len(classes)), owners.sum(axis=0)))
            owners[client, scarcest_first[: self.classes_per_client]] = True
        pools = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
        counts = np.zeros((num_clients, len(classes)), dtype=np.int64)
        for column, pool in enumerate(pools):
            if owners[:, column].any():
                counts[:, column] = apportion(owners[:, column].astype(np.float64), len(pool), rng)
        return _deal(pools, counts)


class Quantity(Partitioner):
    """Divides examples at random, but unequally: clients differ in how many they have, not in what they are.

    Li et al., Federated Learning on Non-IID Data Silos: An Experimental Study, ICDE 2022, "quantity skew",
    https://arxiv.org/abs/2102.02079: sizes are in proportion to a draw from Dir(alpha).

    Args:
        alpha: Concentration, above 0; the lower, the more unequal.
        min_size: See :class:`Partitioner`.
        max_tries: See :class:`Partitioner`.
    """

    def __init__(self, alpha: float = 0.5, min_size: int = 10, max_tries: int = 100) -> None:
        super().__init__(min_size, max_tries)
        above("alpha", alpha, 0)
        self.alpha = alpha

    @override
    def draw(self, labels: IntArray, num_clients: int, rng: np.random.Generator) -> list[IntArray]:
        sizes = apportion(rng.dirichlet(np.full(num_clients, self.alpha)), len(labels), rng)
        return np.split(rng.permutation(len(labels)), np.cumsum(sizes)[:-1])


def _deal(pools: list[IntArray], counts: IntArray) -> list[IntArray]:
    """Take ``counts[client, k]`` examples out of each (shuffled) pool *k*."""
    pieces = [np.split(pool, np.cumsum(column))[:-1] for pool, column in zip(pools, counts.T, strict=True)]
    return [np.concatenate(hand) for hand in zip(*pieces, strict=True)]


def divide_alike(labels: IntArray, num_train: NDArray[np.int64], rng: np.random.Generator) -> list[IntArray]:
    """Divide separate test examples so that each client is tested on the labels it trains on.

    Each class is divided in proportion to the training examples that the clients have of it. A class that nobody trains
    on is left out. A client whose shares all round to nothing gets one example of a class that it trains on, from the
    client that has most of that class to spare.

    Args:
        labels: Of the test examples, (N,).
        num_train: Training examples of each class at each client, (clients, classes).
        rng: Chooses.

    Returns:
        One array of positions per client, ascending, pairwise disjoint; some may be empty.
    """
    pools = [rng.permutation(np.flatnonzero(labels == label)) for label in range(num_train.shape[1])]
    counts = np.zeros_like(num_train)
    for label, pool in enumerate(pools):
        if num_train[:, label].any():
            counts[:, label] = apportion(num_train[:, label].astype(np.float64), len(pool), rng)
    for client in np.flatnonzero(counts.sum(axis=1) == 0):
        to_spare = np.where((counts.sum(axis=1) > 1)[:, None] & (num_train[client] > 0), counts, 0)
        if to_spare.any():
            donor, spared = np.unravel_index(to_spare.argmax(), to_spare.shape)
            counts[donor, spared] -= 1
            counts[client, spared] += 1
    return [np.sort(part) for part in _deal(pools, counts)]
