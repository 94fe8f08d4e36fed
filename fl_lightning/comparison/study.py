"""Reports personalized runs: a row for each strategy, beside published ones, and which differences are sure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from fl_lightning import files
from fl_lightning.comparison.definition import Comparison
from fl_lightning.evaluation.frontier import area, points_of
from fl_lightning.evaluation.records import Record, figures_of, read_records
from fl_lightning.evaluation.results import read_json, write_json
from fl_lightning.evaluation.tables import MeanStd, markdown_table, mean_std, plain_table
from fl_lightning.evaluation.uncertainty import LEVEL, Interval, holm
from fl_lightning.personalization.outcome import file_name
from fl_lightning.personalization.report import DEFINITIONS, draw_fronts, settings_in
from fl_lightning.personalization.selection import BY
from fl_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BESIDE = {
    "avg2": 100,
    "worst_local": 100,
    "share_hurt": 100,
    "ece": 100,
    "feature_distortion": 1,
    "head_norm": 1,
    "train_loss": 1,
    "steps": 1,
}
"""What is reported besides the columns of the comparison, and by what it is multiplied."""

TESTED = ("Local", "Global")
"""Columns in which two strategies are compared, if the table has them."""

RULE = "---"
"""The line between the tables and the definitions in ``table.md``."""

VERDICTS = """A claim holds (does not) if the mean difference over federations lies above (below) 0 by the paired t-test
at 0.05, after Holm's correction for all claims beside it; else it is undecided. [low, high]: 95% interval of that mean,
by Student's t over federations, uncorrected. Front: area below the front over a strategy's settings, in hundredths."""


@dataclass
class Federation:
    """One trained and personalized federation.

    Attributes:
        run: Its name among the runs of the comparison.
        seed: Of training and personalization.
        trained: Run folder of the global model.
        personalized: Run folder of the personalization.
    """

    run: str
    seed: int
    trained: Path
    personalized: Path


Values = dict[str, dict[str, list[float]]]
"""By strategy, or its setting, and metric: a value for each federation."""


def report(federations: Sequence[Federation], comparison: Comparison, folder: Path, command: str) -> dict[str, Any]:
    """Write and print the tables, and draw the figures, as PNG files and for TensorBoard.

    Args:
        federations: All of the comparison.
        comparison: What they are held against.
        folder: Where everything goes.
        command: What made them, for the head of the table.

    Returns:
        What is written to ``results.json``: by run the values of each federation, and what was tested.
    """
    by_run: dict[str, list[Federation]] = {}
    for one in federations:
        by_run.setdefault(one.run, []).append(one)
    parts: list[tuple[str, list[Any]]] = []
    results: dict[str, Any] = {}
    settings: list[str] = []
    for run, members in by_run.items():
        values = values_of(members)
        shown = {name: row for name, row in values.items() if name not in settings_of(values)}
        seeds = ", ".join(str(one.seed) for one in members)
        over = "mean ± standard deviation over federations, seeds" if len(members) > 1 else "one federation, seed"
        title = f"{run}: {over} {seeds}; accuracies, share_hurt and ece in percent"
        claims = claims_of(shown, comparison, areas_of(members))
        tables = [rows_of(shown, comparison), other_rows(shown), [claim.row() for claim in claims], choice_rows(values)]
        parts.append((title, [table for table in tables if table]))
        if len(shown) < len(values):
            settings.append(f"{title}\n\n{markdown_table(rows_of(values, comparison), digits=2)}")
        results[run] = {
            "seeds": [one.seed for one in members],
            "per_seed": values,
            "claims": [claim.to_dict() for claim in claims],
            "personalized": [str(one.personalized) for one in members],
        }
    columns = "; ".join(f"{column} is {metric}" for column, metric in comparison.columns.items())
    source = f"Beside ours: {comparison.source}\n" if comparison.source else ""
    foot = f"{columns}.\n{source}{VERDICTS}\n{DEFINITIONS.format(metric='accuracy')}\n"
    head = made_by(federations, command)

    def text(table: Any, rule: str = "") -> str:
        blocks = [head]
        for title, tables in parts:
            blocks += [title, *(table(rows, digits=2).rstrip("\n") for rows in tables)]
        return "\n\n".join(blocks) + f"\n\n{rule}{foot}"

    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "table.md", text(markdown_table, f"{RULE}\n\n"))
    files.write_text(folder / "grid.md", "\n\n".join(settings))
    write_json(folder / "results.json", results)
    save(figures(by_run, comparison), folder)
    print(f"{text(plain_table)}\ntables and figures: {folder}\nlook at them:       tensorboard --logdir {folder}")
    return results


def made_by(federations: Sequence[Federation], command: str) -> str:
    """Say by what command, at which commit and on what machine the federations were made."""
    noted = [RunFolder(one.personalized).environments()[-1] for one in federations]
    kinds = {
        key: ", ".join(sorted({one.get(key, "unknown") for one in noted})) for key in ("commit", "machine", "torch")
    }
    return f"`{command}`, commit {kinds['commit']}, {kinds['machine']}, torch {kinds['torch']}"


def values_of(federations: Sequence[Federation]) -> Values:
    """Collect every summary of every strategy, one value for each federation; NaN where a model has diverged."""
    values: Values = {}
    for one in federations:
        for strategy, method in read_json(RunFolder(one.personalized).results)["methods"].items():
            for summary in method["per_seed"]:
                for metric, value in summary.items():
                    values.setdefault(strategy, {}).setdefault(metric, []).append(math.nan if value is None else value)
    return values


def settings_of(values: Values) -> dict[str, str]:
    """Return the settings of strategies of which one was chosen, and which strategy each is of."""
    bases = {name: name.partition(" ")[0] for name in values if " " in name}
    return {name: base for name, base in bases.items() if base in values}


def rows_of(values: Values, comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each strategy: each column as measured here and, where there is one, as published."""
    rows = []
    for strategy, by_metric in values.items():
        row: dict[str, Any] = {"strategy": strategy}
        published = comparison.published.get(strategy, {})
        for column, metric in comparison.columns.items():
            if metric not in by_metric:
                raise ValueError(f"columns.{column} must be one of {', '.join(by_metric)}, got {metric!r}")
            row[column] = scaled(by_metric[metric], 100)
            if comparison.published:
                row[f"{column}, published"] = MeanStd(*published[column]) if column in published else None
        rows.append(row)
    return rows


def other_rows(values: Values) -> list[dict[str, Any]]:
    """Return a row for each strategy of what the columns leave out."""
    return [
        {"strategy": name, **{key: scaled(row[key], factor) for key, factor in BESIDE.items() if key in row}}
        for name, row in values.items()
    ]


def choice_rows(values: Values) -> list[dict[str, Any]]:
    """Return what each strategy gives at home and elsewhere if one validation score or another chooses its setting.

    In every federation the setting with the best mean over clients is taken.
    """
    settings = settings_of(values)
    rows = []
    for base in dict.fromkeys(settings.values()):
        names = [name for name, owner in settings.items() if owner == base]
        for by in BY:
            scores = np.array([values[name][by] for name in names]) * (-1 if by == "val_loss" else 1)
            best = [names[i] for i in np.argmax(np.nan_to_num(scores, nan=-np.inf), axis=0)]
            counts = Counter(name.removeprefix(base).strip() for name in best)
            row: dict[str, Any] = {"strategy": base, "chosen by": by}
            row["settings"] = ", ".join(f"{setting} ({count})" for setting, count in counts.most_common())
            for column, metric in (("Local", "local"), ("Global", "global_others")):
                row[column] = scaled([values[name][metric][index] for index, name in enumerate(best)], 100)
            rows.append(row)
    return rows


def scaled(values: Sequence[float], factor: float) -> MeanStd:
    """Return mean and deviation of values times a factor."""
    return mean_std([factor * value for value in values])


@dataclass
class Claim:
    """Whether one strategy is above another, over federations.

    Attributes:
        words: Such as ``Global: lp_ft > ft``.
        difference: Mean of the first minus the second, with its interval.
        p: Of the two-sided paired t-test.
        p_holm: The same, corrected for all tests beside it.
    """

    words: str
    difference: Interval
    p: float
    p_holm: float = math.nan

    @property
    def verdict(self) -> str:
        """``holds``, ``does not`` or ``undecided``."""
        if not self.p_holm < 1 - LEVEL:
            return "undecided"
        return "holds" if self.difference.mean > 0 else "does not"

    def row(self) -> dict[str, Any]:
        """Return a row of the table."""
        return {"claim": self.words, "difference": self.difference, "p, Holm": self.p_holm, "verdict": self.verdict}

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for ``results.json``."""
        return {**vars(self), "difference": self.difference._asdict(), "verdict": self.verdict}


def paired(words: str, first: Sequence[float], second: Sequence[float]) -> Claim:
    """Compare two strategies over the same federations by Student's paired t; of a single one nothing is known."""
    gaps = np.array(first) - np.array(second)
    mean, n = float(gaps.mean()), len(gaps)
    if n < 2:
        return Claim(words, Interval(mean, math.nan, math.nan), math.nan)
    error = float(gaps.std(ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * error
    if error == 0:
        return Claim(words, Interval(mean, mean, mean), float(mean == 0))
    return Claim(words, Interval(mean, mean - half, mean + half), float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def claims_of(values: Values, comparison: Comparison, areas: Mapping[str, Sequence[float]]) -> list[Claim]:
    """Test every pair of strategies that somebody has put in an order.

    Under a grid without a choice, strategies are compared at equal settings.

    Args:
        values: Of the strategies.
        comparison: With ``order`` and ``columns``.
        areas: By strategy: the area below its front in each federation; empty where there are no fronts.
    """
    scores = {
        column: {name: [100 * value for value in row[comparison.columns[column]]] for name, row in values.items()}
        for column in TESTED
        if column in comparison.columns
    }
    if areas:
        scores["Front"] = {name: [100 * value for value in areas[name]] for name in values if name in areas}
    found = []
    for column, by_name in scores.items():
        for setting in dict.fromkeys(name.partition(" ")[2] for name in by_name):
            names = [f"{name} {setting}".strip() for name in comparison.order]
            for first, second in combinations([name for name in names if name in by_name], 2):
                found.append(paired(f"{column}: {first} > {second}", by_name[first], by_name[second]))
    for claim, corrected in zip(found, holm([claim.p for claim in found]), strict=True):
        claim.p_holm = corrected
    return found


def areas_of(federations: Sequence[Federation]) -> dict[str, list[float]]:
    """Return by strategy the area below its front over settings in each federation; empty without a grid."""
    areas: dict[str, list[float]] = {}
    for one in federations:
        records = settings_in(read_records(one.personalized / "records.csv"))
        if not any(record.grid for record in records):
            return {}
        for name, points in points_of(records).items():
            areas.setdefault(name, []).append(area(points))
    return areas


def figures(by_run: Mapping[str, Sequence[Federation]], comparison: Comparison) -> dict[str, Figure]:
    """Draw whatever the federations allow, by name."""
    from fl_lightning.comparison.figures import draw_beside_published, draw_runs

    drawn: dict[str, Figure] = {}
    over: dict[str, dict[str, tuple[MeanStd, MeanStd]]] = {}
    for run, members in by_run.items():
        prefix = f"{file_name(run)}/" if len(by_run) > 1 else ""
        place = f"{run}, seed{'s' if len(members) > 1 else ''} {', '.join(str(one.seed) for one in members)}"
        values = values_of(members)
        rows = {
            row["strategy"]: row for row in rows_of(values, comparison) if row["strategy"] not in settings_of(values)
        }
        if not any(" " in name for name in rows):  # not the many settings of a grid
            drawn[f"{prefix}table"] = draw_beside_published(rows, [one for one in TESTED if one in comparison.columns])
        records = records_of(members)
        found = figures_of(records, place, scale=100)
        if frontier := draw_fronts(records, place, "accuracy", True):
            found["frontier"] = frontier
        drawn |= {f"{prefix}{file_name(name.replace('/', '_'))}": figure for name, figure in found.items()}
        over[run] = {name: (row["Global"], row["Local"]) for name, row in rows.items() if {*TESTED} <= {*row}}
    if len(by_run) > 1:
        drawn["runs"] = draw_runs(over)
    return drawn


def records_of(federations: Sequence[Federation]) -> list[Record]:
    """Read the records of several federations; each seed of each is a seed of its own."""
    return [
        one._replace(seed=1000 * federation.seed + one.seed)
        for federation in federations
        for one in read_records(federation.personalized / "records.csv")
    ]


def save(drawn: Mapping[str, Figure], folder: Path) -> None:
    """Write figures as PNG files and for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    from fl_lightning.evaluation.figures import save_png

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for name, figure in drawn.items():
            writer.add_image(name, save_png(figure, folder / f"{name}.png"), dataformats="HWC")
