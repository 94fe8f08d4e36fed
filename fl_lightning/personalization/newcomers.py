"""What clients that never took part would gain by each strategy, and with how many examples of their own.

A client that is held out of the federation gets the global model and some of its own labelled examples, drawn at
random; each strategy makes its model of these, and its whole test data judge it. The draws of a client are nested:
its 10 examples are among its 30.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fl_lightning.checks import whole
from fl_lightning.client import Client, ClientInfo
from fl_lightning.data.client_data import ClientData
from fl_lightning.data.splits import MIN_TRAIN
from fl_lightning.evaluation.summary import mean, present
from fl_lightning.evaluation.uncertainty import Interval
from fl_lightning.personalization.evidence import Change, Evidence, Groups
from fl_lightning.personalization.outcome import Outcome
from fl_lightning.personalization.scoring import Scoring
from fl_lightning.personalization.selection import Selection
from fl_lightning.personalization.strategy import Strategy
from fl_lightning.seeding import derive_seed

LEAST = MIN_TRAIN + 2
"""The fewest examples that a newcomer may have: two to train on, and some to choose by."""


@dataclass(frozen=True)
class Plan:
    """Who is tried with how many examples.

    Attributes:
        newcomers: The clients that were held out; at sites what is known of them.
        sizes: Numbers of labelled examples, for training and validation together; None, at the end: all.
        draws: How often examples are drawn.
        left_out: In words, sizes that cannot be had.
    """

    newcomers: Sequence[ClientData | ClientInfo]
    sizes: list[int | None]
    draws: int
    left_out: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any], unseen: Sequence[ClientData | ClientInfo]) -> Plan:
        """Read the node ``newcomers`` for the clients that are held out."""
        wanted = given["examples"] or []
        for size in wanted:
            whole("newcomers.examples", size, LEAST, or_null=True)
        whole("newcomers.draws", given["draws"], 1)
        newcomers = list(unseen) if wanted else []
        counted = sorted({size for size in wanted if size is not None})
        least = min((_labelled(data) for data in newcomers), default=0)
        sizes: list[int | None] = [size for size in counted if size < least]
        reason = f"the smallest of them has {least} examples"
        if any(isinstance(data, ClientInfo) for data in newcomers):
            sizes, reason = [], "a site trains on all that it has"
        elif any(not hasattr(data, "with_part") for data in newcomers):
            sizes, reason = [], "data modules of one's own cannot be cut"
        left = [str(size) for size in counted if size not in sizes]
        sizes += [None] if None in wanted or not sizes else []
        words = f"New clients are not tried with {', '.join(left)} examples: {reason}." if left and newcomers else ""
        return cls(newcomers, sizes, given["draws"], words)

    def places(self) -> list[tuple[int | None, int, int]]:
        """Return the size, the draw and the newcomer of every client that is tried; all examples are drawn once."""
        return [
            (size, draw, index)
            for size in self.sizes
            for draw in range(1 if size is None else self.draws)
            for index in range(len(self.newcomers))
        ]

    def clients(self, seed: int) -> list[Client]:
        """Return them, each with its part of the data and a number of its own; none of those at sites.

        Args:
            seed: Of the draws.
        """
        first = 1 + max((data.id for data in self.newcomers), default=0)
        made = []
        for number, (size, draw, index) in enumerate(self.places()):
            data = self.newcomers[index]
            if isinstance(data, ClientInfo):
                continue
            if size is not None:
                numbers = _numbers(data, size)
                data = data.with_part(*numbers, derive_seed(seed, "examples of a newcomer", draw, data.id))
            made.append(Client(first + number, data))
        return made

    def infos(self) -> list[ClientInfo]:
        """Return what is known of the newcomers, with all their examples."""
        return [one if isinstance(one, ClientInfo) else Client(one.id, one).describe() for one in self.newcomers]

    def numbers(self) -> list[float]:
        """Return the sizes as numbers: of all examples, the mean over newcomers."""
        every = mean([float(_labelled(data)) for data in self.newcomers])
        return [every if size is None else float(size) for size in self.sizes]

    def words(self, size: int | None) -> str:
        """Return a size as a column's head."""
        if size is not None:
            return str(size)
        counts = sorted(_labelled(data) for data in self.newcomers)
        return f"all ({counts[0]})" if counts[0] == counts[-1] else f"all ({counts[0]} to {counts[-1]})"


def _labelled(data: ClientData | ClientInfo) -> int:
    return data.num_train + data.num_val


def _numbers(data: ClientData | ClientInfo, size: int) -> tuple[int, int]:
    """Return how many of some examples are for training and how many for validation: in the client's own proportion."""
    share = data.num_val / _labelled(data)
    validation = min(max(1, round(size * share)), size - MIN_TRAIN) if data.num_val else 0
    return size - validation, validation


def settled(strategies: Sequence[Strategy], outcomes: Sequence[Outcome], selection: Selection) -> list[Strategy]:
    """Return what newcomers are given: each strategy in the setting that the federation's clients validate best.

    Args:
        strategies: All; personal models of runs are nobody else's.
        outcomes: Of the federation's clients.
        selection: What decides on validation data.
    """
    found: dict[str, list[Strategy]] = {}
    for strategy in strategies:
        if strategy.run is None:
            found.setdefault(strategy.base, []).append(strategy)
    values = {
        strategy.name: mean([selection.value(one) for one in outcomes if one.strategy.name == strategy.name])
        for several in found.values()
        for strategy in several
    }
    return [max(several, key=lambda one: values[one.name]) for several in found.values()]


@dataclass(frozen=True)
class Arrival:
    """What newcomers have by one strategy with so many examples.

    Attributes:
        score: The mean over newcomers of the metric on their own test data, with its interval over test examples.
        gain: By how much that is better (positive) than the global model, paired.
        changes: The same of each newcomer.
        spread: The standard deviation over draws and seeds; NaN of one.
    """

    score: Interval
    gain: Interval
    changes: list[Change]
    spread: float


@dataclass(frozen=True)
class Arrivals:
    """What newcomers would gain.

    Attributes:
        plan: Who was tried with how many examples.
        names: The newcomers'.
        found: By strategy, then by size.
        settings: By strategy the setting of a grid that was taken.
    """

    plan: Plan
    names: list[str]
    found: dict[str, dict[int | None, Arrival]]
    settings: dict[str, str]

    def enough(self, strategy: str) -> int | None | str:
        """Return the size from which on a strategy is better than the global model beyond chance; empty: none is."""
        reached: int | None | str = ""
        for size, one in reversed(self.found[strategy].items()):
            if not one.gain.above:
                break
            reached = size
        return reached

    def sentences(self) -> list[str]:
        """Say with how many examples each strategy is better, and worse, than the global model."""
        lines = []
        for name in [name for name in self.found if name != "none"]:
            size = self.enough(name)
            worse = [self.plan.words(one) for one, found in self.found[name].items() if found.gain.below]
            words = "no gain over the global model beyond chance"
            if size is None:
                words = f"better than the global model beyond chance with {self.plan.words(None)} examples"
            elif isinstance(size, int):
                words = f"better than the global model beyond chance from {size} examples on"
            lines.append(f"{name}: {words}" + (f"; worse with {', '.join(worse)}." if worse else "."))
        chosen = [f"{name} {setting}" for name, setting in self.settings.items() if setting]
        if chosen:
            lines.append(f"Settings that the federation's clients validate best: {', '.join(chosen)}.")
        return [*lines, self.plan.left_out] if self.plan.left_out else lines

    def rows(self, gains: bool) -> list[dict[str, Any]]:
        """Return a table: a row for each strategy, a column for each size, of scores or of gains."""
        return [
            {"strategy": name}
            | {self.plan.words(size): one.gain if gains else one.score for size, one in by_size.items()}
            for name, by_size in self.found.items()
            if not (gains and name == "none")
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as ``results.json`` has it."""
        return {
            "clients": self.names,
            "draws": self.plan.draws,
            "settings": self.settings,
            "methods": {
                name: [
                    {
                        "examples": size,
                        "score": one.score._asdict(),
                        "change_from_none": one.gain._asdict(),
                        "spread": one.spread,
                        "clients": [
                            {"name": who, "change_from_none": change.interval._asdict(), "p": change.p_value}
                            for who, change in zip(self.names, one.changes, strict=True)
                        ],
                    }
                    for size, one in by_size.items()
                ]
                for name, by_size in self.found.items()
            },
        }


def arrivals(plan: Plan, groups: Groups, newcomers: Sequence[ClientInfo], scoring: Scoring, seed: int) -> Arrivals:
    """Put together what newcomers would gain.

    Args:
        plan: Who was tried with how many examples.
        groups: Outcomes by strategy, seed and client of :meth:`Plan.clients`.
        newcomers: The newcomers themselves.
        scoring: The metrics.
        seed: Of the bootstrap's draws.
    """
    found: dict[str, dict[int | None, Arrival]] = {_base(runs): {} for runs in groups.values()}
    for size in plan.sizes:
        of_size = {_base(runs): _of_size(plan, runs, size, scoring.metric) for runs in groups.values()}
        evidence = Evidence(of_size, newcomers, scoring.metric, scoring.higher_is_better, seed, scoring.resampled)
        for name, runs in of_size.items():
            means = [
                present([float(one.measures.values[scoring.metric][one.client]) for one in run])[0] for run in runs
            ]
            values = [mean(one) for one in means]
            gain = evidence.difference(name, "none", "local") if "none" in of_size else Interval(*[math.nan] * 3)
            found[name][size] = Arrival(
                Interval(float(np.mean(values)), *evidence.interval(name, "local")[1:]),
                gain,
                evidence.changes(name, "none"),
                float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
            )
    settings = {_base(runs): runs[0][0].strategy.name.removeprefix(_base(runs)).strip() for runs in groups.values()}
    return Arrivals(plan, [one.name for one in newcomers], found, settings)


def _base(runs: Sequence[Sequence[Outcome]]) -> str:
    return runs[0][0].strategy.base


def _of_size(plan: Plan, runs: Sequence[Sequence[Outcome]], size: int | None, metric: str) -> list[list[Outcome]]:
    """Return the outcomes with so many examples: draws and seeds are runs, newcomers are the clients."""
    places = plan.places()
    made = []
    for run in runs:
        for draw in range(1 if size is None else plan.draws):
            members = [(index, one) for (s, d, index), one in zip(places, run, strict=True) if (s, d) == (size, draw)]
            made.append([_as_client(one, index, len(members), metric) for index, one in members])
    return made


def _as_client(outcome: Outcome, index: int, number: int, metric: str) -> Outcome:
    home = torch.full((number,), math.nan, dtype=torch.float64)
    home[index] = outcome.measures.values[metric][outcome.client]
    known = outcome.measures.examples
    examples = {index: known[outcome.client]} if outcome.client in known else {}
    return replace(outcome, client=index, measures=replace(outcome.measures, values={metric: home}, examples=examples))
