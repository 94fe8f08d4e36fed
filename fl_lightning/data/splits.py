"""Which examples are a client's, and how they are split into training, validation and test, class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_lightning.checks import within
from fl_lightning.seeding import derive_seed

IntArray = NDArray[np.int64]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

#: Fewest training examples of a client: BatchNorm cannot train on one, and no model learns from it.
MIN_TRAIN = 2


@dataclass(frozen=True, eq=False)
class ClientIndices:
    """The examples of one client.

    Args:
        name: For people: a domain, a file, "client 3".
        train: int64 indices into the source.
        test: Likewise.
        val: Likewise; ``None`` where it is still to be taken out of ``train``.
        unseen: Whether the client never takes part in training.
    """

    name: str
    train: Tensor
    test: Tensor
    val: Tensor | None = None
    unseen: bool = False

    def indices(self, split: Split) -> Tensor:
        """The indices of one split; empty where there is no validation split."""
        if split == "train":
            return self.train
        if split == "test":
            return self.test
        if split == "val":
            return torch.zeros(0, dtype=torch.int64) if self.val is None else self.val
        raise ValueError(f"`split` must be 'train', 'val' or 'test', got {split!r}.")


def with_validation(client: ClientIndices, labels: IntArray, val_fraction: float, seed: int) -> ClientIndices:
    """Take a validation split out of the training examples, class by class, unless there is one.

    Args:
        client: The client; its split depends on its name and the seed, not on the other clients.
        labels: Of its training examples.
        val_fraction: In [0, 1). At least one example is taken, where two then remain to train on.
        seed: Of the data set.
    """
    if client.val is not None:
        return client
    rng = np.random.default_rng(derive_seed(seed, "val", client.name))
    rest, part = stratified_split(labels, part_size(len(labels), val_fraction, leave=MIN_TRAIN), rng)
    return replace(client, train=client.train[torch.from_numpy(rest)], val=client.train[torch.from_numpy(part)])


def with_test(
    name: str, indices: Tensor, labels: IntArray, test_fraction: float, seed: int, unseen: bool = False
) -> ClientIndices:
    """Make a client that keeps a part of its examples for testing, class by class.

    Args:
        name: Of the client; its split depends on it and the seed, not on the other clients.
        indices: All its examples.
        labels: Theirs.
        test_fraction: In (0, 1). At least one example is taken, where two then remain to train on.
        seed: Of the data set.
        unseen: Whether the client is held out of training.
    """
    within("test_fraction", test_fraction, "(0, 1)")
    rng = np.random.default_rng(derive_seed(seed, "test", name))
    rest, part = stratified_split(labels, part_size(len(labels), test_fraction, leave=MIN_TRAIN), rng)
    return ClientIndices(
        name=name, train=indices[torch.from_numpy(rest)], test=indices[torch.from_numpy(part)], unseen=unseen
    )


def hold_out(clients: Sequence[ClientIndices], names: Sequence[str]) -> list[ClientIndices]:
    """Mark clients as unseen.

    Args:
        clients: All clients.
        names: Of those to hold out.
    """
    known = [client.name for client in clients]
    for name in names:
        if name not in known:
            raise ValueError(f"`unseen_clients` names '{name}', but the clients are {', '.join(known)}.")
    return [replace(client, unseen=client.unseen or client.name in names) for client in clients]


def apportion(weights: NDArray[np.float64], total: int, rng: np.random.Generator) -> IntArray:
    """Divide a whole number in proportion to weights, by largest remainders with ties broken at random.

    Args:
        weights: (K,), none negative, not all 0 unless ``total`` is 0.
        total: What to divide.
        rng: Breaks ties.

    Returns:
        (K,) whole numbers that add up to ``total``, each within 1 of its exact share.
    """
    if total == 0:
        return np.zeros(len(weights), dtype=np.int64)
    exact = weights / weights.sum() * total
    shares: IntArray = np.floor(exact + 1e-9).astype(np.int64)
    missing = total - int(shares.sum())
    order = np.lexsort((rng.random(len(weights)), -(exact - shares)))
    shares[order[:missing]] += 1
    return shares


def stratified_split(labels: IntArray, num_part: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Take some positions out, with the classes in the same proportions as in the whole (within one example).

    Args:
        labels: (n,).
        num_part: How many to take, at most n.
        rng: Chooses.

    Returns:
        The remaining positions and the part taken, both ascending.
    """
    classes, counts = np.unique(labels, return_counts=True)
    shares = apportion(counts.astype(np.float64), num_part, rng) if len(classes) else np.zeros(0, dtype=np.int64)
    taken = [
        rng.permutation(np.flatnonzero(labels == label))[:share] for label, share in zip(classes, shares, strict=True)
    ]
    part = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *taken])).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(labels), dtype=np.int64), part, assume_unique=True)
    return rest, part


def part_size(num_examples: int, fraction: float, leave: int) -> int:
    """How many examples a fraction is: rounded, at least one, and at least ``leave`` stay. 0 where that cannot be."""
    if fraction == 0 or num_examples <= leave:
        return 0
    return min(max(1, round(fraction * num_examples)), num_examples - leave)
