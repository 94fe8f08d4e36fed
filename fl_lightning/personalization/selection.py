"""Which setting of a strategy, and which strategy, each client takes: chosen on validation data, never on test data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fl_lightning.checks import at_least, one_of
from fl_lightning.client import ClientInfo
from fl_lightning.evaluation.summary import mean
from fl_lightning.personalization.evidence import Evidence, Groups
from fl_lightning.personalization.outcome import Outcome
from fl_lightning.personalization.scoring import Scoring
from fl_lightning.personalization.strategy import Strategy

BY = ("val_metric", "val_loss", "val_elsewhere")
PER = ("client", "strategy", None)
BEST_OF = "best_of"

WHO = {
    "val_metric": "the score on the client's own validation data, which the client alone can know",
    "val_loss": "the loss on the client's own validation data, which the client alone can know",
    "val_elsewhere": "the mean score on the other clients' validation data, which no client can know by itself: "
    "its model must go to the others to be scored there",
}


@dataclass(frozen=True)
class Selection:
    """How choices are made.

    Attributes:
        by: The measure that decides, of :data:`BY`.
        per: ``client``: each takes its own value of the grid; ``strategy``: all take the one with the best mean over
            clients; None: none is chosen, each is a row of its own.
        best_of: Names of strategies of which each client keeps one; empty: no such row.
        margin: By how much one of ``best_of`` must be better than the first to take its place, at least 0.
        higher_is_better: Whether more of the metric is better.
    """

    by: str = "val_metric"
    per: str | None = None
    best_of: tuple[str, ...] = ()
    margin: float = 0.0
    higher_is_better: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], scoring: Scoring) -> Selection:
        """Read ``select`` and ``best_of``."""
        given = config["select"]
        one_of("select.by", given["by"], BY)
        one_of("select.per", given["per"], PER)
        at_least("select.margin", given["margin"], 0)
        names = tuple(config["best_of"] or ())
        if len(names) == 1 or len(set(names)) < len(names):
            raise ValueError(f"best_of must name at least two strategies, each once, got {list(names)}")
        return cls(given["by"], given["per"], names, float(given["margin"]), scoring.higher_is_better)

    def check(self, strategies: Sequence[Strategy], clients: Sequence[ClientInfo], others: int) -> None:
        """Check that there is something to choose from, and by.

        Args:
            strategies: All of the run.
            clients: All clients.
            others: On how many other clients' data a model is tried.
        """
        sizes = Counter(strategy.base for strategy in strategies if strategy.train)
        if self.per is not None:
            # A baseline that the grid does not reach is no candidate, and is not tuned.
            tuned = {name: size for name, size in sizes.items() if size > 1 or name != "local"}
            if not tuned or max(tuned.values()) == 1:
                raise ValueError(f"select.per={self.per} chooses from a grid, but there is none; set grid=...")
            if len(set(tuned.values())) > 1:
                words = ", ".join(f"{name} {size}" for name, size in tuned.items())
                raise ValueError(
                    f"select.per={self.per} needs as many settings of each strategy, got {words}; give each its own "
                    "list, as in grid={ft: {optimizer.lr: [0.003, 0.01]}, lp_ft: {...}}"
                )
        known = {strategy.name for strategy in strategies} | (set(sizes) if self.per else set())
        if missing := [name for name in self.best_of if name not in known]:
            raise ValueError(f"best_of: there is no row {missing[0]!r}; there are {', '.join(sorted(known))}")
        if self.per is None and not self.best_of:
            return
        what = "select" if self.per else "best_of"
        if without := [client.name for client in clients if not client.num_val]:
            raise ValueError(
                f"{what} chooses on validation data, but client {without[0]} has none; train with data.val_fraction "
                "above 0"
            )
        if self.by == "val_elsewhere" and not others:
            raise ValueError("select.by=val_elsewhere needs other clients to try models on; set matrix=true")
        if self.by == "val_elsewhere" and (staying := [client.name for client in clients if client.stays]):
            raise ValueError(
                f"select.by must be val_metric or val_loss, got val_elsewhere: the model of {staying[0]} stays at its "
                "site"
            )

    def value(self, outcome: Outcome) -> float:
        """Return what decides, more being better; a model without a value is never better."""
        found: float = getattr(outcome.measures, self.by)
        if math.isnan(found):
            return -math.inf
        return found if self.higher_is_better and self.by != "val_loss" else -found


@dataclass
class Choice:
    """What was chosen for one row.

    Attributes:
        candidates: What there was to choose from, by name.
        chosen: By seed and client, the name of what was taken.
    """

    candidates: list[str]
    chosen: list[list[str]] = field(default_factory=list)

    def words(self, base: str) -> str:
        """Say what was chosen, and how often where that differs."""
        counts = Counter(name.removeprefix(base).strip() or name for run in self.chosen for name in run)
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def select(groups: Groups, selection: Selection) -> tuple[dict[str, list[list[Outcome]]], dict[str, Choice]]:
    """Make the rows that are chosen: of each strategy with several settings one, and ``best_of``.

    Args:
        groups: Outcomes by strategy, seed and client.
        selection: How to choose.

    Returns:
        The new rows as outcomes by name, and what was chosen for each.
    """
    rows: dict[str, list[list[Outcome]]] = {}
    choices: dict[str, Choice] = {}
    by_base: dict[str, list[str]] = {}
    for name, runs in groups.items():
        by_base.setdefault(runs[0][0].strategy.base, []).append(name)
    for base, names in by_base.items():
        if selection.per is not None and len(names) > 1:
            rows[base], choices[base] = _chosen(base, names, groups, selection, selection.per)
    if selection.best_of:
        rows[BEST_OF], choices[BEST_OF] = _chosen(
            BEST_OF, selection.best_of, {**groups, **rows}, selection, "client", selection.margin
        )
    return rows, choices


def _chosen(
    row: str, names: Sequence[str], groups: Groups, selection: Selection, per: str, margin: float = 0.0
) -> tuple[list[list[Outcome]], Choice]:
    choice = Choice(list(names))
    first = groups[names[0]][0][0].strategy
    strategy = replace(first, name=row, base=row, values={}, settings={})
    if row == BEST_OF:
        strategy = replace(strategy, start="global", train=True)
    made = []
    for number in range(len(groups[names[0]])):
        runs = {name: groups[name][number] for name in names}
        if per == "strategy":
            best = _best({name: mean([selection.value(one) for one in run]) for name, run in runs.items()}, margin)
            taken = [best] * len(runs[best])
        else:
            taken = [
                _best({name: selection.value(run[index]) for name, run in runs.items()}, margin)
                for index in range(len(runs[names[0]]))
            ]
        choice.chosen.append(taken)
        ended = [replace(runs[name][index], strategy=strategy) for index, name in enumerate(taken)]
        # Models of different strategies are no points on one way.
        made.append([replace(one, curve={}) for one in ended] if row == BEST_OF else ended)
    return made, choice


def _best(values: Mapping[str, float], margin: float) -> str:
    """Return the name of the largest value; the first one stays unless another is better by more than the margin."""
    first = next(iter(values))
    best = max(values, key=lambda name: values[name])
    return best if values[best] > values[first] + margin else first


@dataclass(frozen=True)
class Wrong:
    """How often a choice by validation was not the best on test data, over clients and seeds.

    Attributes:
        beyond_chance: Share where another candidate is better by more than its paired interval.
        at_all: Share where another candidate scores higher.
        regret: Mean of the best candidate's score minus the chosen one's.
    """

    beyond_chance: float
    at_all: float
    regret: float


def wrong(choice: Choice, each: Sequence[Evidence]) -> Wrong:
    """Compare what was chosen with the other candidates on test data.

    Args:
        choice: What was chosen.
        each: The intervals of each seed.
    """
    beyond, at_all, regret = [], [], []
    for number, run in enumerate(choice.chosen):
        changes = {
            chosen: {name: each[number].changes(name, chosen) for name in choice.candidates} for chosen in set(run)
        }
        for index, chosen in enumerate(run):
            found = [one[index].interval for one in changes[chosen].values()]
            known = [one for one in found if not math.isnan(one.mean)]
            if known:
                beyond.append(float(any(one.above for one in known)))
                regret.append(max(one.mean for one in known))
                at_all.append(float(regret[-1] > 0))
    return Wrong(mean(beyond), mean(at_all), mean(regret))
