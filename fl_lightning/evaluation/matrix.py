r"""Every client's model on every client's test set, and the metrics that are read off that matrix.

Chen, Ghoukasian, Jin, Wang, Karimireddy, Li, A Closer Look at Personalized Fine-Tuning in Heterogeneous Federated
Learning, 2025, https://arxiv.org/abs/2511.12695, report Local, Global, C-Std, Worst and Average. The definitions in
their text (section 3.3) do not give the numbers of their Table 2: there, Average is the mean of *three* columns, and
C-Std and Worst fit the rows of the matrix, not the local accuracies. So each reading has a name of its own here.

``A[i, j]`` is the accuracy of the model of client *i* on the test set of client *j*. Every metric exists twice: client-
equal, where each client counts the same, and weighted, where each counts its number of test examples wherever a mean or
deviation over clients is taken, over owners of models (rows) as over owners of test sets (columns).
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from fl_lightning.atomic import write_text
from fl_lightning.evaluation.predict import HasExamples, default_metrics, predict_clients, score_clients
from fl_lightning.evaluation.results import read_json, write_json
from fl_lightning.state import load, snapshot

Matrix = NDArray[np.float64]
Weights = NDArray[np.float64]


def local(matrix: Matrix, weights: Weights) -> float:
    """How each model does at home: mean of ``A[i, i]``. The paper's Local."""
    return _mean(np.diagonal(matrix), weights)


def global_others(matrix: Matrix, weights: Weights) -> float:
    """How each model does elsewhere: mean over i of the mean over j != i of ``A[i, j]``. Global, as the text has it.

    NaN for a single client.
    """
    return _mean(_by_row(matrix, weights, _mean, own=False), weights)


def global_all(matrix: Matrix, weights: Weights) -> float:
    """How each model does anywhere: mean over i of the mean over all j of ``A[i, j]``, the own test set included.

    The only reading that fits the paper's rows for CheXpert, with two clients.
    """
    return _mean(_by_row(matrix, weights, _mean, own=True), weights)


def worst_row(matrix: Matrix, weights: Weights) -> float:
    """Where each model does worst: mean over i of the least ``A[i, j]`` over all j. Worst, as Table 2 mostly has it."""
    return _mean(_by_row(matrix, weights, _least, own=True), weights)


def worst_row_others(matrix: Matrix, weights: Weights) -> float:
    """Where each model does worst abroad: mean over i of the least ``A[i, j]`` over j != i. NaN for a single client."""
    return _mean(_by_row(matrix, weights, _least, own=False), weights)


def worst_local(matrix: Matrix, weights: Weights) -> float:
    """The client whose own model serves it worst: least ``A[i, i]``. Worst, as the text has it; takes no weights."""
    return _least(np.diagonal(matrix), weights)


def cstd_row(matrix: Matrix, weights: Weights) -> float:
    """How uneven each model is: mean over i of the standard deviation over all j of ``A[i, j]``. C-Std in Table 2.

    Standard deviations here are of the population: the clients are all there are, not a sample.
    """
    return _mean(_by_row(matrix, weights, _std, own=True), weights)


def cstd_local(matrix: Matrix, weights: Weights) -> float:
    """How unevenly clients are served by their own models: standard deviation of ``A[i, i]``. C-Std in the text."""
    return _std(np.diagonal(matrix), weights)


def average2(at_home: float, elsewhere: float) -> float:
    """Average, as the paper's text has it: the mean of Local and Global."""
    return (at_home + elsewhere) / 2


def average3(at_home: float, elsewhere: float, at_worst: float) -> float:
    """Average, as the paper's Table 2 has it: the mean of Local, Global and Worst."""
    return (at_home + elsewhere + at_worst) / 3


def avg2(matrix: Matrix, weights: Weights) -> float:
    """:func:`average2` of :func:`local` and :func:`global_others`."""
    return average2(local(matrix, weights), global_others(matrix, weights))


def avg3(matrix: Matrix, weights: Weights) -> float:
    """:func:`average3` of :func:`local`, :func:`global_others` and :func:`worst_row`."""
    return average3(local(matrix, weights), global_others(matrix, weights), worst_row(matrix, weights))


METRICS: dict[str, Callable[[Matrix, Weights], float]] = {
    metric.__name__: metric
    for metric in (
        local,
        global_others,
        global_all,
        worst_row,
        worst_row_others,
        worst_local,
        cstd_row,
        cstd_local,
        avg2,
        avg3,
    )
}
"""All metrics of a matrix by name."""


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracies of all models on all test sets.

    Args:
        values: Row i, column j: the model of client i on the test set of client j; shape (C, C), in [0, 1]. NaN in the
            column of a client without test examples.
        num_test: The number of test examples of each client, at least 0.
        names: The clients' names. Default: their numbers.

    Raises:
        ValueError: If the shapes do not fit.
    """

    values: Matrix
    num_test: Sequence[int]
    names: Sequence[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        size = len(self.num_test)
        names = list(self.names) or [str(index) for index in range(size)]
        if size == 0 or values.shape != (size, size) or len(names) != size:
            raise ValueError(
                "Expected a square matrix with one test size and one name for each client, but got shape "
                f"{values.shape}, {size} sizes and {len(names)} names."
            )
        for name, value in (("values", values), ("num_test", [int(n) for n in self.num_test]), ("names", names)):
            object.__setattr__(self, name, value)

    def metric(self, name: str, weighted: bool = False) -> float:
        """One of :data:`METRICS`.

        A client without test examples is left out, as owner of a test set and of a model alike.

        Args:
            name: The metric.
            weighted: Whether clients count their numbers of test examples, instead of each the same.

        Raises:
            ValueError: If there is no such metric.
        """
        if name not in METRICS:
            raise ValueError(f"Expected one of the metrics {', '.join(METRICS)}, but got {name!r}.")
        sizes = np.asarray(self.num_test, dtype=np.float64)
        kept = sizes > 0
        if not kept.any():
            return math.nan
        weights = sizes[kept] if weighted else np.ones(int(kept.sum()))
        return METRICS[name](self.values[np.ix_(kept, kept)], weights)

    def metrics(self) -> dict[str, float]:
        """All of :data:`METRICS`, client-equal under their names and weighted under ``<name>_weighted``."""
        equal = {name: self.metric(name) for name in METRICS}
        return equal | {f"{name}_weighted": self.metric(name, weighted=True) for name in METRICS}

    def local_values(self) -> list[float]:
        """What each client gets from its own model: the diagonal."""
        return np.diagonal(self.values).tolist()

    def save(self, path: str | Path) -> None:
        """Write the matrix as CSV, models in rows, and the test sizes as ``num_test.json`` beside it.

        The sizes have a file of their own so that the CSV is the matrix and nothing else: the first column holds the
        names of the models' clients, the first row those of the test sets'.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["model", *self.names])
        for name, row in zip(self.names, self.values.tolist(), strict=True):
            writer.writerow([name, *("" if math.isnan(value) else value for value in row)])
        write_text(path, text.getvalue())
        sizes = [{"name": name, "num_test": size} for name, size in zip(self.names, self.num_test, strict=True)]
        write_json(Path(path).with_name("num_test.json"), sizes)

    @classmethod
    def load(cls, path: str | Path) -> AccuracyMatrix:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If the CSV or ``num_test.json`` is missing.
            ValueError: If they are damaged, or do not name the same clients.
        """
        path = Path(path)
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        sizes = read_json(path.with_name("num_test.json"))
        names = [entry["name"] for entry in sizes]
        if not rows or rows[0] != ["model", *names] or [row[0] for row in rows[1:] if row] != names:
            raise ValueError(f"Expected '{path}' to hold a row and a column for each client of num_test.json: {names}.")
        try:
            values = [[float(cell) if cell else math.nan for cell in row[1:]] for row in rows[1:]]
            return cls(np.asarray(values), [entry["num_test"] for entry in sizes], names)
        except ValueError as error:
            raise ValueError(f"'{path}' is not a whole matrix of numbers: {error}") from error


def score_matrix(
    module: nn.Module,
    models: Iterable[tuple[int, Mapping[str, Tensor]]],
    datas: Sequence[Any],
    metric: Metric | None = None,
    encode_once: bool = False,
) -> AccuracyMatrix:
    """Score every client's model on every client's test set.

    One module holds the models in turn, so memory does not grow with their number, and gets its own tensors back at the
    end. Each model sees each test example once.

    Args:
        module: A module that takes the models' states.
        models: Pairs of a client's position in ``datas`` and its model's whole state, in any order; consumed one at a
            time, so a generator may load them from disk.
        datas: The clients' data.
        metric: A torchmetrics metric of (logits, targets) that computes one number. Default: accuracy.
        encode_once: Where consecutive models agree in all tensors outside ``head.*`` (linear probing; methods with a
            shared backbone and personal heads), pass the images through the backbone only once. Needs
            ``module(x) == module.head(module.features(x))``, and memory for the features of all test examples.

    Returns:
        The matrix, with the clients' names and numbers of test examples.

    Raises:
        ValueError: If there is not exactly one model for each client.
    """
    values = np.full((len(datas), len(datas)), math.nan)
    seen: set[int] = set()
    before = snapshot(module.state_dict())
    # One metric alone: the others would cost more than a small model's forward pass.
    metrics = {"metric": default_metrics(datas[0].num_classes)["accuracy"] if metric is None else metric}
    features = _SharedFeatures(datas)
    try:
        for client, state in models:
            if client in seen or not 0 <= client < len(datas):
                raise ValueError(
                    f"Expected one model for each client 0 ... {len(datas) - 1}, but got "
                    f"{'a second one for' if client in seen else 'one for'} client {client}."
                )
            seen.add(client)
            load(module, state)
            if encode_once:
                scores = score_clients(module.head, features.of(module, state), metrics=metrics)  # type: ignore[arg-type]
            else:
                scores = score_clients(module, datas, metrics=metrics)
            values[client] = scores.values("metric")
    finally:
        load(module, before)
    if missing := sorted(set(range(len(datas))) - seen):
        raise ValueError(f"Expected one model for each of {len(datas)} clients, but got none for {missing}.")
    return AccuracyMatrix(values, [data.num_test for data in datas], [data.name for data in datas])


class _Features:
    """A client's test features in the place of its images."""

    def __init__(self, data: HasExamples, features: Tensor, targets: Tensor) -> None:
        self.num_classes = data.num_classes
        self.eval_batch_size = max(1, len(targets))
        self._batches = [(features, targets)] if len(targets) else []

    def val_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError("These are features of the test set alone.")

    def test_dataloader(self) -> list[tuple[Tensor, Tensor]]:
        return self._batches


class _SharedFeatures:
    """The features of all test sets, made anew only when a tensor outside the head has changed."""

    def __init__(self, datas: Sequence[HasExamples]) -> None:
        self._datas = datas
        self._body: dict[str, Tensor] | None = None
        self._features: list[_Features] = []

    def of(self, module: nn.Module, state: Mapping[str, Tensor]) -> list[_Features]:
        body = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        if self._body is None or not all(torch.equal(tensor, self._body[name]) for name, tensor in body.items()):
            encoded = predict_clients(module.features, self._datas)  # type: ignore[arg-type]
            self._features = [_Features(data, *pair) for data, pair in zip(self._datas, encoded, strict=True)]
            self._body = snapshot(body)
        return self._features


def _by_row(matrix: Matrix, weights: Weights, reduce: Callable[[Matrix, Weights], float], own: bool) -> Matrix:
    """Reduce each row over its columns, with or without the diagonal."""
    kept = np.ones(matrix.shape, dtype=bool) if own else ~np.eye(len(matrix), dtype=bool)
    return np.array([reduce(row[use], weights[use]) for row, use in zip(matrix, kept, strict=True)])


def _mean(values: Matrix, weights: Weights) -> float:
    return float(values @ weights / weights.sum()) if values.size else math.nan


def _std(values: Matrix, weights: Weights) -> float:
    return math.sqrt(_mean((values - _mean(values, weights)) ** 2, weights)) if values.size else math.nan


def _least(values: Matrix, weights: Weights) -> float:
    return float(values.min()) if values.size else math.nan
