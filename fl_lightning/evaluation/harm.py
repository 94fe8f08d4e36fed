"""Who gains and who is harmed, client by client.

A better mean can hide clients that are served worse than before; Wu, Li, Charles, Xiao, Liu, Xu, Smith, Motley:
Benchmarking Heterogeneity and Personalization in Federated Learning, 2022, https://arxiv.org/abs/2206.09262, find that
fine-tuning does this to a sizeable share of them.

All functions take one value per client, higher being better unless said otherwise; NaN is a client without a value.
Such clients are left out wherever a number is made of several clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from fl_lightning.evaluation.summary import mean, present, worst, worst_k


def change(values: Sequence[float], baseline: Sequence[float]) -> NDArray[np.float64]:
    """What each client gains (positive) or loses (negative) against a baseline; NaN where either has no value."""
    first, second = np.asarray(values, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"values and baseline must be of the same clients, got {first.size} and {second.size}")
    return first - second


def jain_fairness(values: Sequence[float]) -> float:
    r"""Jain's index :math:`(\sum_i x_i)^2 / (n \sum_i x_i^2)`: 1 if all get the same, 1/n if one gets everything.

    Jain, Chiu, Hawe, A Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared Computer
    Systems, DEC Research Report TR-301, 1984, https://arxiv.org/abs/cs/9809099.

    Args:
        values: What each client gets, at least 0. If all get 0, all get the same: 1.
    """
    there = present(values)[0]
    if (there < 0).any():
        raise ValueError(f"values must be at least 0, got {there.min()}")
    if not there.size:
        return math.nan
    squares = float((there**2).sum())
    return 1.0 if squares == 0 else float(there.sum() ** 2 / (there.size * squares))


def harm(
    values: Sequence[float],
    baseline: Sequence[float],
    k: int | None = None,
    higher_is_better: bool = True,
) -> dict[str, float]:
    """Say what a strategy does to clients, against a baseline.

    Args:
        values: The strategy's.
        baseline: Of the same clients, such as the un-tuned global model's.
        k: How many clients ``worst_k`` looks at. Default: a tenth of them, at least one.
        higher_is_better: False for a loss: then a fall is a gain, and gains count positive all the same.

    Returns:
        ``mean_change``; ``share_worse``; ``worst_change`` of any client; ``worst_k_change``, the mean change of the
        ``k`` clients that lose most; ``worst_k``, the mean value of the ``k`` that are served worst; ``jain``.
    """
    sign = 1.0 if higher_is_better else -1.0
    changes = sign * present(change(values, baseline))[0]
    there = present(values)[0]
    if not changes.size:
        names = ("mean_change", "share_worse", "worst_change", "worst_k_change", "worst_k", "jain")
        return dict.fromkeys(names, math.nan)
    k = max(1, changes.size // 10) if k is None else k
    return {
        "mean_change": mean(changes),
        "share_worse": float((changes < 0).mean()),
        "worst_change": worst(changes),
        "worst_k_change": worst_k(changes, k),
        "worst_k": worst_k(there, k, higher_is_better),
        "jain": math.nan if (there < 0).any() else jain_fairness(values),
    }


class PairedComparison(NamedTuple):
    """Two strategies on the same clients.

    Attributes:
        wins: Clients that the first serves better.
        ties: Clients that both serve the same.
        losses: Clients that the second serves better.
        mean_change: Mean of first minus second.
        statistic: Wilcoxon's signed-rank statistic; 0 if all are ties.
        p_value: Its two-sided p-value: how likely so lopsided a result would be if neither were better. 1 if all are
            ties, when there is no evidence of a difference.
    """

    wins: int
    ties: int
    losses: int
    mean_change: float
    statistic: float
    p_value: float


def compare(first: Sequence[float], second: Sequence[float]) -> PairedComparison:
    """Compare two strategies client by client, with Wilcoxon's signed-rank test.

    Wilcoxon, Individual Comparisons by Ranking Methods, Biometrics Bulletin 1945, https://doi.org/10.2307/3001968.
    Ties are left out of the test, as there. The p-value is exact up to 50 clients, or up to 13 where changes are of
    equal size (all changes of sign); beyond it is the normal approximation.

    Args:
        first: Values of one strategy.
        second: Values of the other, of the same clients.
    """
    # Rounded, so that 0.9 - 0.8 and 0.5 - 0.4 are equally large.
    changes = present(change(first, second))[0].round(12)
    if not changes.size:
        raise ValueError("at least one client must have a value in both, got none")
    differing = changes[changes != 0]
    wins, losses = int((differing > 0).sum()), int((differing < 0).sum())
    statistic, p_value = 0.0, 1.0
    if differing.size:
        # Equal ranks are frequent with accuracies of small test sets; few of them are permuted, not approximated.
        test = wilcoxon(differing, method="auto")
        statistic, p_value = float(test.statistic), float(test.pvalue)
    return PairedComparison(
        wins=wins,
        ties=changes.size - differing.size,
        losses=losses,
        mean_change=float(changes.mean()),
        statistic=statistic,
        p_value=p_value,
    )
