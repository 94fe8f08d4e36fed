"""One table of what came of personalizing clients: a row for each number, and the curves and figures that it gives."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fl_lightning.evaluation.tables import MeanStd, mean_std
from fl_lightning.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

END = "end"

Curves = Mapping[str, Mapping[int, Mapping[str, float]]]
"""By strategy and epoch: every measure, as a mean over clients and seeds."""


class Record(NamedTuple):
    """One number.

    Attributes:
        strategy: As in the configuration.
        grid: The values of the grid, such as ``lr=0.1 level=0.5``; empty without one.
        seed: Which of the seeds.
        client: The client's name.
        epoch: After how many epochs; ``end``: of the model that came out.
        measure: What was measured.
        value: NaN where it has no value.
    """

    strategy: str
    grid: str
    seed: int
    client: str
    epoch: int | str
    measure: str
    value: float

    @property
    def name(self) -> str:
        """The strategy as tables and figures name it."""
        return f"{self.strategy} {self.grid}".strip()


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Record._fields)
    writer.writerows((*record[:-1], "" if math.isnan(record.value) else record.value) for record in records)
    write_text(path, text.getvalue())


def read_records(path: Path) -> list[Record]:
    """Read what :func:`write_records` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            Record(
                row["strategy"],
                row["grid"],
                int(row["seed"]),
                row["client"],
                row["epoch"] if row["epoch"] == END else int(row["epoch"]),
                row["measure"],
                float(row["value"] or "nan"),
            )
            for row in csv.DictReader(file)
        ]


def curves_of(records: Iterable[Record]) -> dict[str, dict[int, dict[str, float]]]:
    """Return the means over clients, then seeds, by strategy, epoch and measure.

    A strategy that has no models on the way, such as a soup, has its end after the epochs that its models took. Where a
    model has diverged, the means of that epoch are NaN.
    """
    found: dict[str, dict[int | str, dict[str, dict[int, list[float]]]]] = {}
    for one in records:
        by_seed = found.setdefault(one.name, {}).setdefault(one.epoch, {}).setdefault(one.measure, {})
        by_seed.setdefault(one.seed, []).append(one.value)
    curves: dict[str, dict[int, dict[str, float]]] = {}
    for name, by_epoch in found.items():
        means = {epoch: {key: _mean(values) for key, values in row.items()} for epoch, row in by_epoch.items()}
        for epoch, row in by_epoch.items():
            if any(math.isnan(value) for values in row["head_norm"].values() for value in values):
                means[epoch] = dict.fromkeys(means[epoch], math.nan)
        points = {epoch: row for epoch, row in means.items() if isinstance(epoch, int)}
        if not any(points) and means[END].get("epochs"):
            points[round(means[END]["epochs"])] = means[END]
        if points:
            curves[name] = dict(sorted(points.items()))
    return curves


def _mean(by_seed: Mapping[int, Sequence[float]]) -> float:
    """Return the mean over seeds of the mean over those clients that have a value."""
    kept = [[value for value in values if not math.isnan(value)] for values in by_seed.values()]
    return float(np.mean([float(np.mean(values)) if values else math.nan for values in kept]))


def panels_of(curves: Curves) -> dict[str, list[str]]:
    """Return which curves share a figure: all strategies, or the settings of each (``ft lr=0.01``, ``ft lr=0.1``)."""
    found: dict[str, list[str]] = {}
    for name, points in curves.items():
        if 0 in points:
            found.setdefault(name.split(" ")[0] if " " in name else "strategies", []).append(name)
    return found


def levels_of(records: Iterable[Record], measure: str = "global_others") -> dict[str, dict[float, MeanStd]]:
    """Return a measure at the end by strategy and flooding level, where levels are what a grid varies."""
    found: dict[str, dict[float, dict[int, list[float]]]] = {}
    for one in records:
        settings = dict(part.split("=", 1) for part in one.grid.split(" ") if "=" in part)
        if one.epoch != END or one.measure != measure or "level" not in settings:
            continue
        level = float(settings.pop("level"))
        rest = " ".join(f"{key}={value}" for key, value in settings.items())
        by_level = found.setdefault(f"{one.strategy} {rest}".strip(), {})
        by_level.setdefault(level, {}).setdefault(one.seed, []).append(one.value)
    return {
        name: {level: mean_std([_mean({0: values}) for values in seeds.values()]) for level, seeds in by_level.items()}
        for name, by_level in found.items()
    }


def figures_of(
    records: Sequence[Record], place: str, metric: str = "accuracy", scale: float = 1, higher_is_better: bool = True
) -> dict[str, Figure]:
    """Draw curves over epochs, the drop against the distortion, and strategies at equal training loss, by name.

    Args:
        records: Of one federation, or of several that differ in the seed.
        place: Where they were made, for titles: data, model, seeds.
        metric: What the scores are.
        scale: What the scores are multiplied by, such as 100 for percent.
        higher_is_better: Whether more of the metric is better; a drop is what is lost either way.
    """
    from fl_lightning.evaluation import figures as draw  # matplotlib takes half a second to import

    curves = curves_of(records)
    unit = f"{metric} (%)" if scale == 100 else metric
    sign = scale if higher_is_better else -scale
    drawn: dict[str, Figure] = {}
    for title, members in panels_of(curves).items():
        lines = {
            name: draw.Curve(
                [scale * point["local"] for point in curves[name].values()],
                [scale * point["global_others"] for point in curves[name].values()],
                list(curves[name]),
            )
            for name in members
        }
        drawn[f"epochs/{title}"] = draw.draw_epochs(lines, title=f"{title}: {place}", label=unit)
    drops = {
        name: (
            [point["feature_distortion"] for point in points.values()],
            [sign * (points[0]["global_others"] - point["global_others"]) for point in points.values()],
        )
        for name, points in curves.items()
        if 0 in points
    }
    if drops:
        title = f"from epoch to epoch: {place}"
        drawn["drop_against_distortion"] = draw.draw_drop_against_distortion(drops, title, f"global {unit}")
    if levels := levels_of(records):
        shown = sorted(set.intersection(*(set(found) for found in levels.values())))
        drawn["equal_loss"] = draw.draw_equal_loss(
            shown,
            {name: [scale * found[level].mean for level in shown] for name, found in levels.items()},
            {
                name: [scale * float(np.nan_to_num(found[level].std)) for level in shown]
                for name, found in levels.items()
            },
            label=f"global {unit}",
            title=place,
        )
    return drawn
