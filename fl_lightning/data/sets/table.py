"""Rows of numbers: a .csv of your own, or one of scikit-learn's tables, one client for each group of rows."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from fl_lightning.checks import whole
from fl_lightning.data.federated_data import Examples, FederatedData
from fl_lightning.data.pools import TablePool
from fl_lightning.data.readers import class_names_of
from fl_lightning.data.splits import hold_out, with_test

#: Tables that come with scikit-learn, and the name of their target.
BUNDLED = {"diabetes": "progression", "breast_cancer": "benign"}

Columns = dict[str, list[str]]


@dataclass(kw_only=True, eq=False, repr=False)
class Table(FederatedData):
    """Reads a table; the rows with one value of a column, or with a range of its values, are one client's.

    Args:
        root: A ``.csv`` whose first line names the columns; or ``diabetes`` or ``breast_cancer``, scikit-learn's.
        target: Columns that are predicted; None: the last one.
        classes: Number of classes, or their names, where the target is a class, a whole number from 0; None: numbers.
        client_by: Column that says whose a row is; it is no feature unless it is divided into ``groups``.
        groups: Ranges of the numbers of ``client_by``, each with about as many rows, which are the clients; None:
            each of its values is one.
        features: Columns that are given; None: all others.
        scale: Whether features and numbers to predict are given mean 0 and standard deviation 1 over the training rows
            of all clients that take part, as sums that they share would give.
        test_fraction: Share of a client's rows that is kept for testing, in (0, 1).
        unseen_clients: Names of clients that are held out of training.
    """

    root: str | None = None
    target: str | Sequence[str] | None = None
    classes: int | Sequence[str] | None = None
    client_by: str | None = None
    groups: int | None = None
    features: Sequence[str] | None = None
    scale: bool = True
    test_fraction: float = 0.2
    unseen_clients: Sequence[str] = ()

    @override
    def read(self) -> Examples:
        if self.augment:
            raise ValueError("data.augment must be null for a table")
        if self.root is None:
            raise ValueError(f"data.root must name a .csv or one of {', '.join(BUNDLED)}")
        if self.client_by is None:
            raise ValueError("data.client_by must name the column that says whose a row is")
        whole("groups", self.groups, 2, or_null=True)
        name, columns = self.root, _bundled(self.root) if self.root in BUNDLED else _read_csv(Path(self.root))
        targets = [self.target] if isinstance(self.target, str) else list(self.target or [list(columns)[-1]])
        whose = [self.client_by] if self.groups is None else []
        features = list(self.features or [one for one in columns if one not in (*targets, *whose)])
        for one in (*targets, self.client_by, *features):
            if one not in columns:
                raise ValueError(f"'{name}' has no column '{one}'; it has {', '.join(columns)}")
        x = np.stack([_numbers(columns, one, name) for one in features], axis=1)
        y = np.stack([_numbers(columns, one, name) for one in targets], axis=1)
        places = self._groups(columns, name)
        strata = np.zeros(len(y), dtype=np.int64)
        if self.classes is not None:
            strata = y[:, 0].astype(np.int64)
            if len(targets) > 1 or (y[:, 0] != strata).any() or (y < 0).any():
                raise ValueError(f"'{name}': data.target must be one column of whole numbers from 0 with data.classes")
        clients = [
            with_test(client, torch.from_numpy(rows), strata[rows], self.test_fraction, self.seed)
            for client, rows in places.items()
        ]
        clients = hold_out(clients, self.unseen_clients)
        if self.scale:
            taking_part = [client for client in clients if not client.unseen] or clients
            known = np.concatenate([client.train.numpy() for client in taking_part])
            x, y = _scaled(x, known), _scaled(y, known)
        labels = torch.from_numpy(strata if self.classes is not None else y.astype(np.float32))
        names = targets if self.classes is None else class_names_of(self.classes, [labels])
        return Examples(
            name=Path(name).stem,
            source=TablePool(torch.from_numpy(x.astype(np.float32)), labels),
            class_names=names,
            clients=clients,
            description={"clients": f"by {self.client_by}"},
        )

    def _groups(self, columns: Columns, name: str) -> dict[str, NDArray[np.int64]]:
        """Return the rows of each client by its name."""
        assert self.client_by is not None
        if self.groups is None:
            values = np.array(columns[self.client_by])
            return {f"{self.client_by} {value}": np.flatnonzero(values == value) for value in sorted(set(values))}
        numbers = _numbers(columns, self.client_by, name)
        order = np.argsort(numbers, kind="stable")
        parts = [np.sort(part) for part in np.array_split(order, self.groups)]
        edges = [f"{numbers[part].min():g} to {numbers[part].max():g}" for part in parts]
        if len(set(edges)) < len(edges):
            raise ValueError(f"data.groups must be fewer: the column '{self.client_by}' has too many equal values")
        return {f"{self.client_by} {edge}": part for edge, part in zip(edges, parts, strict=True)}


def _scaled(values: NDArray[np.float64], known: NDArray[np.int64]) -> NDArray[np.float64]:
    spread = values[known].std(0)
    scaled: NDArray[np.float64] = (values - values[known].mean(0)) / np.where(spread > 0, spread, 1)
    return scaled


def _numbers(columns: Columns, name: str, table: str) -> NDArray[np.float64]:
    found = np.empty(len(columns[name]))
    for row, cell in enumerate(columns[name]):
        try:
            found[row] = float(cell)
        except ValueError:
            found[row] = np.nan
        if not np.isfinite(found[row]):
            raise ValueError(f"'{table}', line {row + 2}: the column '{name}' must hold a number, got {cell!r}")
    return found


def _read_csv(path: Path) -> Columns:
    if not path.is_file():
        raise FileNotFoundError(f"data.root must name a .csv or one of {', '.join(BUNDLED)}; there is no file '{path}'")
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file))
    if len(rows) < 2 or len(set(rows[0])) < len(rows[0]):
        raise ValueError(f"'{path}' must have a first line of different names, and rows of numbers")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise ValueError(f"'{path}', line {number}: {len(row)} cells, but {len(rows[0])} columns")
    return {name: [row[place] for row in rows[1:]] for place, name in enumerate(rows[0])}


def _bundled(name: str) -> Columns:
    # Imported late: scikit-learn takes a second to import, and other data do not need it.
    from sklearn import datasets

    bunch = datasets.load_diabetes(scaled=False) if name == "diabetes" else datasets.load_breast_cancer()
    columns = {str(key): [repr(float(cell)) for cell in bunch.data[:, k]] for k, key in enumerate(bunch.feature_names)}
    return {**columns, BUNDLED[name]: [repr(float(cell)) for cell in bunch.target]}
