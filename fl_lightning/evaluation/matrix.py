r"""Every client's model on every client's test set, and the metrics that are read off that matrix.

Chen, Ghoukasian, Jin, Wang, Karimireddy, Li, A Closer Look at Personalized Fine-Tuning in Heterogeneous Federated
Learning, 2025, https://arxiv.org/abs/2511.12695, report Local, Global, C-Std, Worst and Average. The definitions in
their text (section 3.3) do not give the numbers of their Table 2: there, Average is the mean of *three* columns, and
C-Std and Worst fit the rows of the matrix, not the local accuracies. So each reading has a name of its own here.

``A[i, j]`` is the accuracy, or another score, of the model of client *i* on the test set of client *j*. Every metric
exists twice: client-equal, where each client counts the same, and weighted, where each counts its number of test
examples wherever a mean or deviation over clients is taken, over owners of models (rows) as over owners of test sets
(columns). A cell that is NaN, where a model was not tried or the score has no value, is left out of its row.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_lightning.checks import one_of
from fl_lightning.evaluation.results import write_json
from fl_lightning.evaluation.summary import mean, present, std, worst
from fl_lightning.files import write_text

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
            column of a client without test examples, and where a model was not tried.
        num_test: The number of test examples of each client, at least 0.
        names: The clients' names. Default: their numbers.
        higher_is_better: False for a loss: then the worst is the highest.
    """

    values: Matrix
    num_test: Sequence[int]
    names: Sequence[str] = field(default_factory=list)
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        size = len(self.num_test)
        names = list(self.names) or [str(index) for index in range(size)]
        if size == 0 or values.shape != (size, size) or len(names) != size:
            raise ValueError(
                "values must be square, with one test size and one name for each client, got shape "
                f"{values.shape}, {size} sizes and {len(names)} names"
            )
        for name, value in (("values", values), ("num_test", [int(n) for n in self.num_test]), ("names", names)):
            object.__setattr__(self, name, value)

    def metric(self, name: str, weighted: bool = False) -> float:
        """One of :data:`METRICS`.

        A client without test examples is left out, as owner of a test set and of a model alike.

        Args:
            name: The metric.
            weighted: Whether clients count their numbers of test examples, instead of each the same.
        """
        one_of("name", name, METRICS)
        sizes = np.asarray(self.num_test, dtype=np.float64)
        kept = sizes > 0
        if not kept.any():
            return math.nan
        weights = sizes[kept] if weighted else np.ones(int(kept.sum()))
        matrix = self.values[np.ix_(kept, kept)]
        sign = -1.0 if name.startswith("worst") and not self.higher_is_better else 1.0
        if name == "avg3":  # of which one part is a worst value
            parts = (self.metric(part, weighted) for part in ("local", "global_others", "worst_row"))
            return average3(*parts)
        return sign * METRICS[name](sign * matrix, weights)

    def metrics(self) -> dict[str, float]:
        """All of :data:`METRICS`, client-equal under their names and weighted under ``<name>_weighted``."""
        equal = {name: self.metric(name) for name in METRICS}
        return equal | {f"{name}_weighted": self.metric(name, weighted=True) for name in METRICS}

    def by_client(self) -> list[dict[str, float]]:
        """Return what every client's model scores at home, elsewhere, anywhere and at worst, and how uneven it is.

        Means over clients of these are the metrics of the same names, each client counting the same.
        """
        tested = np.asarray(self.num_test) > 0
        sign = 1.0 if self.higher_is_better else -1.0
        found = []
        for index, row in enumerate(self.values):
            everywhere, others = row[tested], row[tested & (np.arange(len(row)) != index)]
            ones = np.ones(len(row))
            found.append(
                {
                    "local": float(row[index]),
                    "global_others": _mean(others, ones[: len(others)]),
                    "global_all": _mean(everywhere, ones[: len(everywhere)]),
                    "worst_row": sign * _least(sign * everywhere, ones[: len(everywhere)]),
                    "cstd_row": _std(everywhere, ones[: len(everywhere)]),
                }
            )
        return found

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


def _by_row(matrix: Matrix, weights: Weights, reduce: Callable[[Matrix, Weights], float], own: bool) -> Matrix:
    """Reduce each row over its columns, with or without the diagonal."""
    kept = np.ones(matrix.shape, dtype=bool) if own else ~np.eye(len(matrix), dtype=bool)
    return np.array([reduce(row[use], weights[use]) for row, use in zip(matrix, kept, strict=True)])


def _mean(values: Matrix, weights: Weights) -> float:
    return mean(*present(values, weights))


def _std(values: Matrix, weights: Weights) -> float:
    return std(*present(values, weights))


def _least(values: Matrix, weights: Weights) -> float:
    return worst(present(values)[0])
