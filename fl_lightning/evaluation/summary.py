"""A metric over clients in six numbers, each defined here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Values = Sequence[float] | Array


def present(values: Values, weights: Values | None = None) -> tuple[Array, Array]:
    """Return the values that are not NaN, and the weights of their clients (default: each the same)."""
    array = np.asarray(values, dtype=np.float64)
    shares = np.ones(array.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    there = ~np.isnan(array)
    return array[there], shares[there]


def mean(values: Values, weights: Values | None = None) -> float:
    """Mean over clients, each counting ``weights[i]`` (default: each the same); NaN without clients."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return math.nan
    if weights is None:
        return float(array.mean())
    shares = np.asarray(weights, dtype=np.float64)
    if shares.shape != array.shape or (shares < 0).any() or shares.sum() == 0:
        raise ValueError(
            f"weights must be {array.size} numbers of at least 0, not all 0, got {shares.size}: {shares.tolist()}"
        )
    return float((array * shares).sum() / shares.sum())


def std(values: Values, weights: Values | None = None) -> float:
    """Standard deviation over clients, of the population: divided by n, since these *are* all the clients."""
    array = np.asarray(values, dtype=np.float64)
    return math.sqrt(mean((array - mean(array, weights)) ** 2, weights)) if array.size else math.nan


def worst(values: Values, higher_is_better: bool = True) -> float:
    """The value of the client that is served worst; NaN without clients."""
    if not len(values):
        return math.nan
    return float(np.min(values) if higher_is_better else np.max(values))


def worst_k(values: Values, k: int, higher_is_better: bool = True) -> float:
    """Mean of the ``k`` clients that are served worst."""
    if not 1 <= k <= len(values):
        raise ValueError(f"k must lie in [1, {len(values)}], the number of clients, got {k}")
    ordered = np.sort(np.asarray(values, dtype=np.float64))  # NaN sorts last
    if np.isnan(ordered[-1]):
        return float("nan")
    return float((ordered[:k] if higher_is_better else ordered[-k:]).mean())


def bottom_decile(values: Values, higher_is_better: bool = True) -> float:
    """Mean of the tenth of the clients that is served worst: floor(n / 10) clients, at least one."""
    return worst_k(values, max(1, len(values) // 10), higher_is_better)


def summarize(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    pooled: float | None = None,
    higher_is_better: bool = True,
) -> dict[str, float]:
    """Say how one metric is spread over clients.

    * ``mean``: over clients, each counting the same;
    * ``weighted_mean``: over clients, each counting its number of test examples;
    * ``std``: :func:`std` over clients, unweighted;
    * ``worst``: :func:`worst`;
    * ``bottom_decile``: :func:`bottom_decile`;
    * ``pooled``: the metric over the test examples of all clients together. For a metric that is a mean over examples,
      such as accuracy or loss, this is ``weighted_mean``; for others (F1, AUROC, macro averages) it is not.

    Args:
        values: The metric of each client. NaN (a diverged loss) makes every number that depends on it NaN.
        weights: The number of test examples of each client. A client with 0 has no value and is left out.
            Default: all the same.
        pooled: The metric over all examples, from :meth:`fl_lightning.evaluation.predict.Metrics.pooled`. Default:
            ``weighted_mean``, which is right for means over examples only.
        higher_is_better: False for a loss: then the worst value is the highest.

    Returns:
        The six numbers; all NaN if no client has test examples.
    """
    if len(values) == 0:
        raise ValueError("values must be of at least one client, got none")
    counts = [1.0] * len(values) if weights is None else [float(weight) for weight in weights]
    if len(counts) != len(values):
        raise ValueError(f"weights must be one for each of {len(values)} clients, got {len(counts)}")
    kept = [(float(value), count) for value, count in zip(values, counts, strict=True) if count != 0]
    if not kept:
        return dict.fromkeys(("mean", "weighted_mean", "std", "worst", "bottom_decile", "pooled"), float("nan"))
    present, present_counts = [value for value, _ in kept], [count for _, count in kept]
    weighted = mean(present, present_counts)
    return {
        "mean": mean(present),
        "weighted_mean": weighted,
        "std": std(present),
        "worst": worst(present, higher_is_better),
        "bottom_decile": bottom_decile(present, higher_is_better),
        "pooled": weighted if pooled is None else float(pooled),
    }
