"""What came of personalizing clients, and the numbers that are read off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fl_lightning.evaluation.matrix import AccuracyMatrix
from fl_lightning.evaluation.summary import mean
from fl_lightning.personalization.measurement import SCALARS, Measures

if TYPE_CHECKING:
    from fl_lightning.data.client_data import ClientData
    from fl_lightning.personalization.strategy import Strategy


@dataclass
class Outcome:
    """One client's model by one strategy and seed.

    Attributes:
        strategy: How it was made.
        client: Whose it is.
        number: Which of the seeds, from 0.
        measures: Of the model.
        curve: Of the model after epochs on the way, by epoch from 1; may be empty.
    """

    strategy: Strategy
    client: int
    number: int
    measures: Measures
    curve: dict[int, Measures]


def matrix_of(measures: Sequence[Measures], datas: Sequence[ClientData]) -> AccuracyMatrix:
    """Return the matrix of the models of all clients, in the order of the clients."""
    rows = np.stack([one.accuracies.numpy() for one in measures])
    return AccuracyMatrix(rows, [data.num_test for data in datas], [str(data.name) for data in datas])


def summary_of(measures: Sequence[Measures], datas: Sequence[ClientData]) -> dict[str, float]:
    """Return every named metric of the matrix, and the mean over clients of every other measure."""
    others = {name: mean([getattr(one, name) for one in measures]) for name in SCALARS}
    return matrix_of(measures, datas).metrics() | others


def by_strategy(outcomes: Sequence[Outcome]) -> dict[str, list[list[Outcome]]]:
    """Group outcomes: by the strategy's name, then by seed, then in the order of the clients."""
    groups: dict[str, dict[int, list[Outcome]]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.strategy.name, {}).setdefault(outcome.number, []).append(outcome)
    return {
        name: [sorted(seeds[number], key=lambda outcome: outcome.client) for number in sorted(seeds)]
        for name, seeds in groups.items()
    }
