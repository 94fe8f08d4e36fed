"""Which model each client should use: chosen on its validation data, judged by its test data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fl_lightning.evaluation.summary import mean
from fl_lightning.evaluation.uncertainty import LEVEL, NONE, Interval
from fl_lightning.personalization.evidence import Change, Evidence, Groups
from fl_lightning.personalization.selection import BEST_OF, Choice, Selection

Verdict = Literal["personal", "global", "undecided"]


@dataclass(frozen=True)
class Decision:
    """What one client is advised.

    Attributes:
        verdict: ``personal``: the candidate is better at home beyond chance; ``global``: it is worse beyond chance;
            ``undecided``: neither shows, or there is no validation data to choose a candidate by.
        candidate: The personal model that validates best; None without validation data.
        setting: Which value of the grid it was trained with; empty without a choice.
        change: What it changes at home against the global model, on test data.
        elsewhere: What it changes on the other clients' test data.
        global_score: The global model's score at home.
        score: The candidate's.
        examples: Test examples needed for a difference of this size to show, where it does not; None otherwise.
    """

    verdict: Verdict
    candidate: str | None
    setting: str
    change: Change
    elsewhere: Interval
    global_score: Interval
    score: Interval
    examples: int | None

    @property
    def certain(self) -> bool:
        """Whether the difference shows also after correction for there being several clients."""
        return self.change.p_holm < 1 - LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return it as ``results.json`` has it."""
        return {
            "verdict": self.verdict,
            "candidate": self.candidate,
            "setting": self.setting,
            "change": self.change.interval._asdict(),
            "p": self.change.p_value,
            "p_holm": self.change.p_holm,
            "elsewhere": self.elsewhere._asdict(),
            "global": self.global_score._asdict(),
            "personal": self.score._asdict(),
            "examples_needed": self.examples,
        }


def decide(
    groups: Groups,
    shown: Sequence[str],
    choices: Mapping[str, Choice],
    selection: Selection,
    evidence: Evidence,
    baseline: str = "none",
) -> list[Decision]:
    """Advise every client.

    A candidate is chosen on validation data and then held against the global model on test data once, so that the test
    is not spoiled by the choice.

    Args:
        groups: Outcomes by strategy, seed and client.
        shown: The rows of the table, of which those with a model for each client are candidates.
        choices: What was chosen from grids.
        selection: What decides on validation data.
        evidence: Intervals over test examples.
        baseline: The global model.

    Returns:
        In the order of the clients.
    """
    candidates = [name for name in shown if name != BEST_OF and groups[name][0][0].strategy.personal]
    taken: list[str | None] = []
    for index in range(len(evidence.clients)):
        values = {name: mean([selection.value(run[index]) for run in groups[name]]) for name in candidates}
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        taken.append(max(known, key=lambda name: known[name]) if known else None)
    names = {name for name in taken if name is not None}
    changes = {name: evidence.changes(name, baseline) for name in names}
    elsewhere = {name: evidence.elsewhere(name, baseline) for name in names}
    decisions = []
    for index, name in enumerate(taken):
        home = evidence.client(baseline, index)
        if name is None:
            unknown = Change(NONE, math.nan, math.nan)
            decisions.append(Decision("undecided", None, "", unknown, NONE, home, NONE, None))
            continue
        change = changes[name][index]
        found = change.interval
        verdict: Verdict = "personal" if found.above else "global" if found.below else "undecided"
        needed = None
        if verdict == "undecided" and not math.isnan(found.low) and found.mean:
            half = (found.high - found.low) / 2
            count = evidence.clients[index].num_test
            needed = max(count + 1, math.ceil(count * (half / abs(found.mean)) ** 2))
        setting = ""
        if name in choices:
            counts = Counter(run[index] for run in choices[name].chosen)
            setting = counts.most_common(1)[0][0].removeprefix(name).strip()
        score = evidence.client(name, index)
        decisions.append(Decision(verdict, name, setting, change, elsewhere[name][index], home, score, needed))
    return decisions
