"""How sure the numbers of a personalization are: intervals and tests from the predictions on test data.

All of it is about the models as they are, on other test examples of the same clients: each client's examples are drawn
anew with replacement, the same ones for every model that is tried there, so that differences are paired. Of several
seeds a score is the mean over their models. What other seeds or another federation would give is not in it.

A metric that is a mean over examples of what is kept of predictions is resampled all at once; any other (F1, AUROC,
RMSE, …) model by model, from what each example adds to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fl_lightning.client import ClientInfo
from fl_lightning.evaluation.resampling import Resampled
from fl_lightning.evaluation.uncertainty import (
    LEVEL,
    NONE,
    RESAMPLES,
    Interval,
    bootstrap_mean,
    holm,
    interval,
    resampled_means,
    shares,
    sign_test,
)
from fl_lightning.personalization.outcome import Outcome
from fl_lightning.personalization.predictions import MEANS, PARTS, Examples, score_of
from fl_lightning.seeding import derive_seed

Groups = Mapping[str, Sequence[Sequence[Outcome]]]
Array = NDArray[np.float64]

LINEAR = ("local", "global_others", "global_all", "avg2")
"""Means over the matrix, which have intervals; others, such as the worst of a row, are no smooth function of it."""

MOST_PAIRS = 2000
"""Models on data of clients, from which on a metric that is no mean of predictions has intervals at home alone."""


class Change(NamedTuple):
    """What a client gains (positive) or loses (negative) at home against a baseline, on its own test data.

    Attributes:
        interval: The paired difference; in the direction in which more is better.
        p_value: Exact sign test over test examples (McNemar's test of one seed's right and wrong answers); of a metric
            that no example has by itself, twice the smaller share of resamples on either side of 0.
        p_holm: The same, corrected for there being several clients.
    """

    interval: Interval
    p_value: float
    p_holm: float


class Evidence:
    """The intervals of a run.

    Args:
        groups: Outcomes by strategy, seed and client. A strategy of which a model has diverged has no intervals.
        clients: All clients.
        metric: What the matrix is made of.
        higher_is_better: Whether more of it is better.
        seed: Of the draws.
        how: The metric as a function of weights of the examples; None: it is one of
            :data:`~fl_lightning.personalization.predictions.MEANS`, or has no intervals.
    """

    def __init__(
        self,
        groups: Groups,
        clients: Sequence[ClientInfo],
        metric: str,
        higher_is_better: bool = True,
        seed: int = 0,
        how: Resampled | None = None,
    ) -> None:
        self.sign = 1.0 if higher_is_better else -1.0
        self.clients = list(clients)
        self.metric = metric
        self._groups = groups
        self.names = [
            name
            for name, runs in groups.items()
            if not any(
                one.measures.diverged
                or (clients[one.client].num_test and not one.measures.examples)
                or not all(_is_known(examples, metric, how) for examples in one.measures.examples.values())
                for run in runs
                for one in run
            )
        ]
        self._seed = derive_seed(seed, "bootstrap")
        self._how = how
        self._own: dict[str, list[Array]] = {name: [] for name in self.names}
        self._own_value: dict[str, list[float]] = {name: [] for name in self.names}
        self._own_means: dict[str, list[Array]] = {name: [] for name in self.names}
        size = len(self.names) * len(LINEAR)
        resamples = RESAMPLES if how is None else how.resamples
        self._means, self._replicates = np.zeros(size), np.zeros((resamples, size))
        generator = np.random.default_rng(self._seed)
        if how is None:
            self._resample_means(generator, size)
        else:
            self._resample_metric(generator, how)

    def _resample_means(self, generator: np.random.Generator, size: int) -> None:
        """Resample a metric that is a mean over examples: all models at once."""
        groups, clients, metric = self._groups, self.clients, self.metric
        weights = {name: self._weights(self._tried(name)) for name in self.names}
        for data, client in enumerate(clients):
            parts, own = [], []
            for name in self.names:
                scores = self._scores(groups[name], data, metric)
                stack = np.stack(list(scores.values()), axis=1) if scores else np.zeros((client.num_test, 0))
                parts.append(stack @ weights[name][:, list(scores), data].T)
                own.append(scores.get(data, np.full(client.num_test, math.nan)))
            table = np.concatenate([*parts, np.stack(own, axis=1)], axis=1) if own else np.zeros((0, size))
            replicates = resampled_means(table, generator) if len(table) else np.zeros((RESAMPLES, table.shape[1]))
            self._means += table[:, :size].mean(0) if len(table) else 0
            self._replicates += replicates[:, :size]
            for column, name in enumerate(self.names):
                self._own[name].append(own[column])
                self._own_value[name].append(float(own[column].mean()) if own[column].size else math.nan)
                self._own_means[name].append(replicates[:, size + column])

    def _resample_metric(self, generator: np.random.Generator, how: Resampled) -> None:
        """Resample any other metric: model by model, on the same draws of a client's examples."""
        size = len(self.clients)
        values = {name: np.full((size, size), math.nan) for name in self.names}
        parts = {name: [self._parts(name, data) for data in range(size)] for name in self.names}
        for name in self.names:
            for data, by_model in enumerate(parts[name]):
                for model, several in by_model.items():
                    values[name][model, data] = np.mean([how.value(one) for one in several])
        self.only_at_home = sum(len(tried) for name in self.names for tried in parts[name]) > MOST_PAIRS
        weights = {name: self._weights(~np.isnan(values[name])) for name in self.names}
        known = np.zeros_like(self._replicates)
        for data, client in enumerate(self.clients):
            blocks = list(shares(client.num_test, generator, how.resamples)) if client.num_test else []
            for number, name in enumerate(self.names):
                columns = slice(number * len(LINEAR), (number + 1) * len(LINEAR))
                own = np.full(how.resamples, math.nan)
                for model, several in parts[name][data].items():
                    if math.isnan(values[name][model, data]) or (self.only_at_home and model != data):
                        continue
                    found = _of_blocks(how, blocks, several)
                    weight = weights[name][:, model, data]
                    self._means[columns] += weight * values[name][model, data]
                    # A resample in which the metric has no value counts less in the means over clients.
                    self._replicates[:, columns] += np.nan_to_num(found)[:, None] * weight
                    known[:, columns] += (~np.isnan(found))[:, None] * weight
                    own = found if model == data else own
                self._own[name].append(np.zeros(0))
                self._own_value[name].append(float(values[name][data, data]))
                self._own_means[name].append(own)
        with np.errstate(invalid="ignore", divide="ignore"):
            self._replicates /= known
        if self.only_at_home:  # there are no means over others
            elsewhere = [place % len(LINEAR) != LINEAR.index("local") for place in range(len(self._means))]
            self._means[elsewhere] = math.nan
            self._replicates[:, elsewhere] = math.nan

    only_at_home = False
    """Whether there were too many models on data of clients for intervals elsewhere."""

    def _parts(self, name: str, data: int) -> dict[int, list[Array]]:
        """Return by model what each example of a client adds to the metric, for each seed."""
        by_model: dict[int, list[Array]] = {}
        for run in self._groups[name]:
            for outcome in run:
                if data in outcome.measures.examples:
                    part = outcome.measures.examples[data][PARTS].double().numpy()
                    by_model.setdefault(outcome.client, []).append(part)
        return by_model

    def _tried(self, name: str) -> NDArray[np.bool_]:
        """Return which model of a strategy was tried on which data, (C, C)."""
        size = len(self.clients)
        tried = np.zeros((size, size), dtype=bool)
        for outcome in self._groups[name][0]:
            for data in outcome.measures.examples:
                tried[outcome.client, data] = bool(
                    self.clients[outcome.client].num_test and self.clients[data].num_test
                )
        return tried

    @staticmethod
    def _scores(runs: Sequence[Sequence[Outcome]], data: int, metric: str) -> dict[int, Array]:
        """Return each tried model's score of each example of a client, as a mean over seeds."""
        by_model: dict[int, list[Array]] = {}
        for run in runs:
            for outcome in run:
                if data in outcome.measures.examples:
                    by_model.setdefault(outcome.client, []).append(score_of(outcome.measures.examples[data], metric))
        return {model: np.mean(scores, axis=0) for model, scores in by_model.items()}

    @staticmethod
    def _weights(known: NDArray[np.bool_]) -> Array:
        """Return by how much the score of model i on data j counts in each of :data:`LINEAR`, (4, C, C)."""
        tried = known.astype(np.float64)
        at_home = tried * np.eye(len(tried))

        def rows(mask: Array) -> Array:
            counts = mask.sum(axis=1, keepdims=True)
            share = np.divide(mask, counts, out=np.zeros_like(mask), where=counts > 0)
            known = int((counts > 0).sum())
            return share / known if known else np.full_like(mask, math.nan)

        local, others = rows(at_home), rows(tried - at_home)
        return np.stack([local, others, rows(tried), (local + others) / 2])

    def has(self, name: str) -> bool:
        """Tell whether a strategy has intervals."""
        return name in self.names

    def _column(self, name: str, metric: str) -> int:
        return self.names.index(name) * len(LINEAR) + LINEAR.index(metric)

    def interval(self, name: str, metric: str) -> Interval:
        """Return a metric of :data:`LINEAR` with its interval over test examples."""
        if not self.has(name):
            return NONE
        column = self._column(name, metric)
        return interval(self._means[column], self._replicates[:, column])

    def difference(self, name: str, other: str, metric: str, level: float = LEVEL) -> Interval:
        """Return by how much a strategy is better than another (positive), in a metric of :data:`LINEAR`, paired."""
        if not self.has(name) or not self.has(other):
            return NONE
        first, second = self._column(name, metric), self._column(other, metric)
        replicates = self._replicates[:, first] - self._replicates[:, second]
        return interval(self.sign * (self._means[first] - self._means[second]), self.sign * replicates, level)

    def best(self, names: Sequence[str], metric: str) -> str | None:
        """Return the strategy that is better than every other beyond the paired intervals; None if none is.

        The intervals hold together (Bonferroni): each is at a level of 1 - 0.05 / (number of others).
        """
        if len(names) < 2 or not all(self.has(name) for name in names):
            return None
        first = max(names, key=lambda name: self.sign * self._means[self._column(name, metric)])
        level = 1 - (1 - LEVEL) / (len(names) - 1)
        beyond = (self.difference(first, other, metric, level).above for other in names if other != first)
        return first if all(beyond) else None

    def client(self, name: str, index: int) -> Interval:
        """Return what a client's own model scores at home, with its interval; without one where there are none."""
        if not self.has(name) or math.isnan(self._own_value[name][index]):
            return NONE
        return interval(self._own_value[name][index], self._own_means[name][index])

    def changes(self, name: str, baseline: str) -> list[Change]:
        """Return what each client gains or loses at home by a strategy, in the order of the clients."""
        if not self.has(name) or not self.has(baseline):
            return [Change(NONE, math.nan, math.nan)] * len(self.clients)
        found: list[tuple[Interval, float]] = []
        for index in range(len(self.clients)):
            gain = self.sign * (self._own_value[name][index] - self._own_value[baseline][index])
            if math.isnan(gain):
                found.append((NONE, math.nan))
                continue
            resampled = self.sign * (self._own_means[name][index] - self._own_means[baseline][index])
            if self._how is None:
                difference = self.sign * (self._own[name][index] - self._own[baseline][index])
                found.append((interval(float(difference.mean()), resampled), sign_test(difference)))
            else:
                found.append((interval(gain, resampled), share_beyond(resampled)))
        corrected = holm([p_value for _, p_value in found])
        return [Change(paired, p, p_holm) for (paired, p), p_holm in zip(found, corrected, strict=True)]

    def elsewhere(self, name: str, baseline: str) -> list[Interval]:
        """Return what each client's model scores more (positive) or less than a baseline's on the others' test data.

        The mean over the other clients on which it was tried, each counting the same; paired, and without an interval
        where there are none.
        """
        size = len(self.clients)
        if not self.has(name) or not self.has(baseline):
            return [NONE] * size
        generator = np.random.default_rng(derive_seed(self._seed, "elsewhere"))
        if self._how is not None:
            return self._metric_elsewhere(name, baseline, self._how, generator)
        means, replicates, tried = np.zeros(size), np.zeros((RESAMPLES, size)), np.zeros(size)
        for data in range(size):
            after, before = (self._scores(self._groups[one], data, self.metric) for one in (name, baseline))
            models = [model for model in after if model != data and model in before]
            if not models or not self.clients[data].num_test:
                continue
            differences = self.sign * np.stack([after[model] - before[model] for model in models], axis=1)
            means[models] += differences.mean(0)
            replicates[:, models] += resampled_means(differences, generator)
            tried[models] += 1
        return [
            interval(means[model] / count, replicates[:, model] / count) if count else NONE
            for model, count in enumerate(tried.tolist())
        ]

    def _metric_elsewhere(
        self, name: str, baseline: str, how: Resampled, generator: np.random.Generator
    ) -> list[Interval]:
        size = len(self.clients)
        if self.only_at_home:
            return [NONE] * size
        means, tried = np.zeros(size), np.zeros(size)
        replicates, known = np.zeros((how.resamples, size)), np.zeros((how.resamples, size))
        for data, client in enumerate(self.clients):
            after, before = self._parts(name, data), self._parts(baseline, data)
            blocks = list(shares(client.num_test, generator, how.resamples)) if client.num_test else []
            for model in [model for model in after if model != data and model in before and client.num_test]:
                own, theirs = (np.mean([how.value(one) for one in part[model]]) for part in (after, before))
                gain = self.sign * float(own - theirs)
                if math.isnan(gain):
                    continue
                found = self.sign * (_of_blocks(how, blocks, after[model]) - _of_blocks(how, blocks, before[model]))
                means[model] += gain
                tried[model] += 1
                replicates[:, model] += np.nan_to_num(found)
                known[:, model] += ~np.isnan(found)
        with np.errstate(invalid="ignore", divide="ignore"):
            replicates /= known
        return [
            interval(means[model] / count, replicates[:, model]) if count else NONE
            for model, count in enumerate(tried.tolist())
        ]

    def share_hurt(self, name: str, baseline: str) -> float:
        """Return the share of clients whose paired interval lies below 0, of those that have one."""
        known = [change.interval for change in self.changes(name, baseline) if not math.isnan(change.interval.low)]
        return float(np.mean([one.below for one in known])) if known else math.nan


def _is_known(examples: Examples, metric: str, how: Resampled | None) -> bool:
    """Tell whether what is kept of some examples gives the metric."""
    return PARTS in examples if how is not None else metric in MEANS and "prediction" in examples


def _of_blocks(how: Resampled, blocks: Sequence[Array], several: Sequence[Array]) -> Array:
    """Return the metric in each resample, as the mean over seeds."""
    by_seed = [np.concatenate([how.values(block, one) for block in blocks]) for one in several]
    found: Array = np.mean(by_seed, axis=0)
    return found


def share_beyond(differences: Array) -> float:
    """Return twice the smaller share of resampled differences on either side of 0, a two-sided bootstrap p-value.

    Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 15, https://doi.org/10.1007/978-1-4899-4541-9.
    The observed one counts among them, so that none is 0. NaN where more than half have no value.
    """
    known = differences[~np.isnan(differences)]
    if 2 * known.size < differences.size:
        return math.nan
    least = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * (least + 1) / (known.size + 1))


def over_clients(values: Sequence[float], seed: int = 0) -> Interval:
    """Return a mean over clients with the interval that drawing other clients alike would give."""
    return bootstrap_mean(values, derive_seed(seed, "bootstrap over clients"))
