"""Stratified splits: a part of some examples in which each class has its share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


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
    shares = np.floor(exact + 1e-9).astype(np.int64)
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
