"""What came of personalizing clients, kept on the disk as it comes, and the numbers that are read off it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fl_lightning import files
from fl_lightning.evaluation.matrix import AccuracyMatrix
from fl_lightning.evaluation.summary import mean
from fl_lightning.files import read_tensors
from fl_lightning.personalization.measurement import ACCURACY, SCALARS, Measures
from fl_lightning.personalization.predictions import read_predictions, write_predictions

if TYPE_CHECKING:
    from fl_lightning.client import ClientInfo
    from fl_lightning.personalization.strategy import Strategy
    from fl_lightning.state import State


VALIDATION = ("val_metric", "val_loss", "val_elsewhere")
"""Measures on validation data."""


@dataclass
class Outcome:
    """One client's model by one strategy and seed.

    Attributes:
        strategy: How it was made.
        client: Whose it is.
        number: Which of the seeds, from 0.
        measures: Of the model.
        curve: Of the model after epochs on the way, by epoch from 1; may be empty.
        epochs: How many it was trained for.
        steps: Its optimizer steps.
        models: How many models were trained for it.
    """

    strategy: Strategy
    client: int
    number: int
    measures: Measures
    curve: dict[int, Measures]
    epochs: float = 0.0
    steps: float = 0.0
    models: float = 0.0


class KeptOutcomes:
    """Keeps the outcomes of each strategy and seed as they end, so that a run which was stopped goes on behind them.

    Args:
        folder: Where; a file for each strategy and seed. Predictions go into ``predictions`` beside it.
        start: The global model, by which the outcomes are known to be of this run.
        metrics: Names of the metrics measured.
    """

    def __init__(self, folder: Path, start: State, metrics: Sequence[str]) -> None:
        self.folder = folder
        self.metrics = list(metrics)
        self._model = fingerprint(start)

    def __len__(self) -> int:
        return len(list(self.folder.glob("*/seed_*.pt")))

    def save(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the outcomes of all clients, of one strategy and seed."""
        # First the predictions: what stands in outcomes/ is whole.
        models = [one.measures.examples for one in sorted(outcomes, key=lambda one: one.client)]
        write_predictions(self._predictions(outcomes[0].strategy, outcomes[0].number), models)
        files.save(
            self._file(outcomes[0].strategy, outcomes[0].number),
            {"model": self._model, "metrics": self.metrics, "outcomes": [_plain(outcome) for outcome in outcomes]},
        )

    def load(self, strategy: Strategy, number: int) -> list[Outcome] | None:
        """Return what was kept, or None."""
        file, predictions = self._file(strategy, number), self._predictions(strategy, number)
        if not file.exists() or not predictions.exists():
            return None
        content = read_tensors(file)
        if content["model"] != self._model:
            raise ValueError(
                f"{file} was made from another global model than checkpoint= holds now; choose another hydra.run.dir"
            )
        outcomes = [self._outcome(strategy, number, item) for item in content["outcomes"]]
        by_client = {outcome.client: outcome for outcome in outcomes}
        for (model, data), examples in read_predictions(predictions).items():
            by_client[model].measures.examples[data] = examples
        return outcomes

    def _file(self, strategy: Strategy, number: int) -> Path:
        return self.folder / file_name(strategy.name) / f"seed_{number}.pt"

    def _predictions(self, strategy: Strategy, number: int) -> Path:
        return self.folder.with_name("predictions") / file_name(strategy.name) / f"seed_{number}.npz"

    def _outcome(self, strategy: Strategy, number: int, item: dict[str, Any]) -> Outcome:
        whole = torch.full((len(item["measures"]), len(item["known"])), math.nan, dtype=torch.float64)
        whole[:, item["known"]] = item["measures"]
        measures, *rows = (Measures.from_tensor(row, self.metrics) for row in whole)
        curve = dict(zip(item["curve"], rows, strict=True))
        trained = (item[key] for key in ("epochs", "steps", "models"))
        return Outcome(strategy, item["client"], number, measures, curve, *trained)


def _plain(outcome: Outcome) -> dict[str, Any]:
    whole = torch.stack([one.to_tensor() for one in (outcome.measures, *outcome.curve.values())])
    known = ~whole.isnan().all(0)  # of thousands of clients most models are tried on few
    return {
        "client": outcome.client,
        "epochs": outcome.epochs,
        "steps": outcome.steps,
        "models": outcome.models,
        "curve": list(outcome.curve),
        "known": known,
        "measures": whole[:, known],
    }


def fingerprint(state: State) -> str:
    """Return a digest of a model's tensors."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def file_name(strategy: str) -> str:
    """Return a strategy's name as part of a path."""
    return "".join(c if c.isalnum() or c in "._=-" else "_" for c in strategy)


def matrix_of(
    measures: Sequence[Measures], clients: Sequence[ClientInfo], metric: str = ACCURACY, higher_is_better: bool = True
) -> AccuracyMatrix:
    """Return the matrix of the models of all clients, in the order of the clients."""
    rows = np.stack([one.values[metric].numpy() for one in measures])
    names = [client.name for client in clients]
    return AccuracyMatrix(rows, [client.num_test for client in clients], names, higher_is_better)


def summary_of(
    measures: Sequence[Measures], clients: Sequence[ClientInfo], metric: str = ACCURACY, higher_is_better: bool = True
) -> dict[str, float]:
    """Return every named metric of the matrix, and the mean over clients of every other measure.

    All are NaN if a model has diverged: a mean over the other clients would look like a result.
    """
    others = {name: mean([getattr(one, name) for one in measures]) for name in SCALARS if name not in VALIDATION}
    for name in VALIDATION:  # which not every client has
        if known := [value for one in measures if not math.isnan(value := getattr(one, name))]:
            others[name] = mean(known)
    summary = matrix_of(measures, clients, metric, higher_is_better).metrics() | others
    return dict.fromkeys(summary, float("nan")) if any(one.diverged for one in measures) else summary


def by_strategy(outcomes: Sequence[Outcome]) -> dict[str, list[list[Outcome]]]:
    """Group outcomes: by the strategy's name, then by seed, then in the order of the clients."""
    groups: dict[str, dict[int, list[Outcome]]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.strategy.name, {}).setdefault(outcome.number, []).append(outcome)
    return {
        name: [sorted(seeds[number], key=lambda outcome: outcome.client) for number in sorted(seeds)]
        for name, seeds in groups.items()
    }
