"""Puts trained runs into one table: a row for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from fl_lightning.evaluation.results import read_json
from fl_lightning.evaluation.tables import Best, mean_std
from fl_lightning.run.folder import RunFolder

TOLD = ("method=", "seed=", "resume=", "hydra.")
"""Overrides that the name of a run leaves out: the method is its first word, and seeds are averaged over."""

SCORES = ("global", "personal", "worst personal", "worst global", "unseen", "own", "everyone")
"""Columns in which a row may be in bold."""

BOLD = """Bold: above every other row by the paired t-test over seeds at 0.05, corrected for their number (Bonferroni);
of one seed nothing is.
"""


def own(row: Mapping[str, Any]) -> float | None:
    """Return the test score of what clients would use: the personal models, or the global one where there are none."""
    value: float | None = row["global"] if row["personal"] is None else row["personal"]
    return value


def in_every_seed(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return, a line for each method, the methods that clients are worse off with in every seed.

    Args:
        rows: By name a row for each seed; all names have the same seeds.
    """
    scores = {name: [own(row) for row in found] for name, found in rows.items()}
    lines = []
    for name, values in scores.items():
        below = [
            other
            for other, theirs in scores.items()
            if all(a is not None and b is not None and a > b for a, b in zip(values, theirs, strict=True))
        ]
        lines.append(f"* {name}: above {', '.join(below) or 'none'}")
    return "\n".join(lines) + "\n"


def read_runs(folders: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Read finished runs, such as those of a sweep.

    Args:
        folders: Run folders of ``train.py``.

    Returns:
        By name a row for each seed, in the order of seeds. The name is the method with the overrides that not all of
        the runs have.
    """
    found = []
    for path in folders:
        run = RunFolder(path)
        config = run.read_config()
        if not run.results.exists():
            raise FileNotFoundError(f"{path} holds no finished run; continue it with resume={path}, or leave it out")
        found.append((run, config, read_json(run.results)))
    if len(metrics := sorted({str(results.get("metric")) for _, _, results in found})) > 1:
        raise ValueError(f"the runs have different metrics, {', '.join(metrics)}; compare those of one")
    words = [[word for word in run.started_with() if not word.startswith(TOLD)] for run, _, _ in found]
    rows: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    seen: dict[tuple[str, int], Path] = {}
    for own, (run, config, results) in zip(words, found, strict=True):
        name = " ".join(
            [config["method"]["name"], *(word for word in own if any(word not in other for other in words))]
        )
        before = seen.setdefault((name, config["seed"]), run.path)
        if before != run.path:
            raise ValueError(f"{before} and {run.path} are both {name} with seed {config['seed']}; leave one out")
        rows.setdefault(name, []).append((config["seed"], row(name, results)))
    return {name: [one for _, one in sorted(several, key=itemgetter(0))] for name, several in rows.items()}


def beyond_others(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Best:
    """Return by column the row that is above every other one beyond what seeds would give by chance, if one is.

    Args:
        rows: By name a row for each seed; all names have the same seeds, in the same order.
    """
    names = list(rows)
    found: dict[str, list[int]] = {}
    for column in SCORES:
        scores = {name: [row.get(column) for row in several] for name, several in rows.items()}
        known = {name: [one for one in values if one is not None] for name, values in scores.items()}
        known = {name: values for name, values in known.items() if len(values) == len(scores[name]) > 1}
        if len(known) < 2 or len({len(values) for values in known.values()}) > 1:
            continue
        from fl_lightning.comparison.study import paired  # scipy takes a second to import
        from fl_lightning.evaluation.uncertainty import LEVEL

        best = max(known, key=lambda name: sum(known[name]))
        tests = [paired("", known[best], values) for name, values in known.items() if name != best]
        if all(one.difference.mean > 0 and one.p * len(tests) < 1 - LEVEL for one in tests):
            found[column] = [names.index(best)]
    return found


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the rows of one method into one: mean and standard deviation of what differs between seeds."""

    def merged(values: Sequence[Any]) -> Any:
        if len(set(values)) == 1:
            return values[0]
        # A model that one seed did not keep has no mean over seeds.
        return None if None in values else mean_std(values)

    return {column: merged([row[column] for row in rows]) for column in rows[0]}


def row(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table says about a run. Accuracies are over test examples; worst is the worst client's."""
    views = {view: results[view] or {} for view in ("global", "personal")}
    number = len(results["clients"])
    scored = results.get("clients_scored", number)
    before = results["in_round"].get(f"test/personal/{results['metric']}/weighted_mean")
    after = views["personal"].get("weighted_mean")
    simulated = results.get("split", results).get("simulated_seconds")
    return {
        "method": name,
        "global": views["global"].get("weighted_mean"),
        "personal": after,
        "worst global": views["global"].get("worst"),
        "worst personal": views["personal"].get("worst"),
        "unseen": (results.get("unseen_personal") or results.get("unseen") or {}).get("weighted_mean"),
        "before tuning": before if before != after else None,
        **results.get("personal_on", {}).get("mean", {}),
        "after fit": results.get("after_fit", {}).get("weighted_mean"),
        "MB up": results["bytes_up"] / 1e6,
        "MB down": results["bytes_down"] / 1e6,
        "rounds": results["rounds"],
        "seconds": round(results["seconds"]),
        **({"simulated seconds": simulated} if simulated is not None else {}),
        **({"scored": f"{scored} of {number}"} if scored < number else {}),
    }
