"""Draws accuracy against simulated time and bytes, from finished runs: ``python -m studies.split_figures``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from fl_lightning.evaluation.results import MetricsTable, read_json

LABELS = {
    "own": "mean accuracy on own test data",
    "everyone": "mean accuracy on everyone's test data",
}


@dataclass
class Curve:
    """One run: where it stood after each round that was evaluated.

    Attributes:
        name: The method.
        seconds: Simulated seconds since the start.
        megabytes: Traffic of all clients since the start, both ways.
        accuracy: By ``own`` and ``everyone``.
    """

    name: str
    seconds: list[float]
    megabytes: list[float]
    accuracy: dict[str, list[float]]


def read_curve(run: Path) -> Curve:
    """Read one run folder.

    Args:
        run: A run with the callback ``everyone`` and simulated time, which split methods have by themselves.

    Raises:
        FileNotFoundError: If it is no finished run.
        ValueError: If it lacks what is drawn.
    """
    table = MetricsTable(run / "metrics.csv")
    name = read_json(run / "results.json")["method"]
    needed = [
        "split/simulated_seconds",
        "traffic/bytes_up",
        "traffic/bytes_down",
        "personal_on/own",
        "personal_on/everyone",
    ]
    if missing := [column for column in needed if column not in table.columns]:
        raise ValueError(
            f"{run} has no {', '.join(missing)}; run it with +callbacks.everyone={{_target_: "
            "fl_lightning.callbacks.everyone_evaluation.EveryoneEvaluation}, "
            "a whole-model method also with a DeviceClock"
        )
    columns = {column: table.column(column) for column in needed}
    traffic = list(accumulate(up + down for up, down in zip(columns[needed[1]], columns[needed[2]], strict=True)))
    scored = [index for index, value in enumerate(columns["personal_on/own"]) if value is not None]
    return Curve(
        name,
        [columns[needed[0]][index] for index in scored],
        [traffic[index] / 1e6 for index in scored],
        {key: [columns[f"personal_on/{key}"][index] for index in scored] for key in LABELS},
    )


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Draw accuracy on own and on everyone's data (rows) against simulated time and bytes (columns), one line a run.

    Args:
        curves: The runs.
        path: The picture to write; its ending says how.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey="row", layout="constrained")
    for row, (key, label) in zip(axes, LABELS.items(), strict=True):
        for axis, quantity in zip(row, ("seconds", "megabytes"), strict=True):
            for curve in curves:
                axis.plot(getattr(curve, quantity), curve.accuracy[key], marker=".", label=curve.name)
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
        row[0].set_ylabel(label)
    axes[1][0].set_xlabel("simulated time in s")
    axes[1][1].set_xlabel("traffic of all clients, both ways, in MB")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the figure for some run folders."""
    options = argparse.ArgumentParser(description="Draw accuracy against simulated time and bytes.")
    options.add_argument("runs", nargs="+", type=Path, help="finished run folders")
    options.add_argument("--out", type=Path, required=True, help="the picture, such as split.png")
    chosen = options.parse_args(arguments)
    try:
        draw([read_curve(run) for run in chosen.runs], chosen.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(chosen.out)


if __name__ == "__main__":
    main()
