"""How much of a number is luck, and of what: partition, training or fine-tuning.

``python -m fl_lightning.deviations`` trains on several partitions with several seeds each, fine-tunes every global
model with several seeds, and prints the deviation that each of the three adds. Given finished runs of
``personalize.py``, it reads those.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fl_lightning.run.config  # noqa: F401 - registers the schema before Hydra composes
from fl_lightning import files, personalization
from fl_lightning.audit import read, refuse_mixed
from fl_lightning.comparison.runner import answer, run_once
from fl_lightning.evaluation.nested import Components, components
from fl_lightning.evaluation.results import write_json
from fl_lightning.evaluation.tables import markdown_table
from fl_lightning.run.overrides import composed

USAGE = """usage: python -m fl_lightning.deviations folder=DIR [partitions=1,2,3] [trainings=1,2] [tunings=2]
       [overrides of train.py] [personalize.KEY=VALUE ..., overrides of personalize.py]
       python -m fl_lightning.deviations RUN ... of personalize.py"""

METRICS = ("local", "global_others")

NOTE = """mean [low, high]: over partitions, by Student's t: what other partitions, trainings and fine-tunings give.
partition, training, fine-tuning: the standard deviation that each adds to those after it (nested analysis of variance;
0: none beyond them; -: one case only). A partition is data.seed: who holds which examples, to train and to test on.
<strategy> - none: the same of the difference from the un-tuned model of the same run; what they share falls out."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the runs, or read finished ones, and print the table."""
    answer(USAGE, _work, arguments)


def _work(arguments: Sequence[str]) -> None:
    if all(Path(argument).is_dir() for argument in arguments):
        print(table(read_runs([Path(argument) for argument in arguments])))
    else:
        run(arguments)


def run(arguments: Sequence[str]) -> str:
    """Make the runs that are not there yet, print the table, and write ``deviations.md`` and ``deviations.json``.

    Args:
        arguments: The words of the command line.
    """
    options = {"folder": "", "partitions": "1,2,3", "trainings": "1,2", "tunings": "2"}
    overrides, tuned = [], []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in options:
            options[key] = value
        elif argument.startswith("personalize."):
            tuned.append(argument.removeprefix("personalize."))
        elif key in ("seed", "data.seed", "resume") or not value:
            raise ValueError(f"{argument} must be left out; partitions=, trainings= and tunings= say which seeds run")
        else:
            overrides.append(argument)
    if not options["folder"]:
        raise ValueError("folder must say where the runs go; add folder=logs/deviations")
    partitions, trainings = (_seeds(key, options[key]) for key in ("partitions", "trainings"))
    [tunings] = _seeds("tunings", options["tunings"], 1)
    folders = []
    for partition in partitions:
        for seed in trainings:
            place = Path(options["folder"]) / f"partition_{partition}" / f"training_{seed}"
            print(f"partition {partition}, training {seed}", file=sys.stderr, flush=True)
            cfg = composed("train", [*overrides, f"data.seed={partition}", f"seed={seed}"])
            # Fine-tunings of different models draw different random numbers.
            own = [f"checkpoint={place / 'trained'}", f"seeds={tunings}", f"seed={1000 * partition + seed}", *tuned]
            personal = composed("personalize", own)
            if not run_once(cfg, place / "trained"):
                raise KeyboardInterrupt
            run_once(personal, place / "personalized", personalization)
            folders.append(place / "personalized")
    found = read_runs(folders)
    text = table(found)
    files.write_text(Path(options["folder"]) / "deviations.md", text)
    write_json(Path(options["folder"]) / "deviations.json", to_dict(found))
    print(text)
    return text


def _seeds(key: str, text: str, number: int = 0) -> list[int]:
    words = text.split(",")
    if not all(word.isdigit() for word in words) or len(set(words)) < len(words) or (number and len(words) != number):
        raise ValueError(f"{key} must be {'a whole number' if number else 'whole numbers, as in 1,2,3'}, got {text!r}")
    found = [int(word) for word in words]
    if number and found[0] < 1:
        raise ValueError(f"{key} must be at least 1, got {text}")
    return found


def read_runs(folders: Sequence[Path]) -> dict[str, dict[str, Components]]:
    """Read finished runs of ``personalize.py``, as many on each partition.

    Returns:
        By strategy, and by ``<strategy> - none``, the components of each of :data:`METRICS`.
    """
    runs = [read(folder) for folder in folders]
    refuse_mixed_personalizations(folders)
    cells: dict[str, dict[str, Any]] = {}
    for one in runs:
        if not one.personalizes:
            raise ValueError(f"{one.path} is no run of personalize.py; give those, or a folder= to make them in")
        source = one.results["source"]
        if "training_seed" not in source:
            raise ValueError(f"{one.path} began with a file; how its model was trained is not known")
        by_seed = cells.setdefault(one.results["partition_hash"], {})
        seed = str(source["training_seed"])
        if seed in by_seed:
            raise ValueError(f"{one.path}: there are two runs of training seed {seed} on its partition; leave one out")
        by_seed[seed] = one.results["methods"]
    sizes = {len(by_seed) for by_seed in cells.values()}
    if len(sizes) > 1:
        raise ValueError(f"partitions must have as many trainings each, got {', '.join(map(str, sorted(sizes)))}")
    tables = [[methods for _, methods in sorted(by_seed.items())] for by_seed in cells.values()]
    names = [name for name in tables[0][0] if all(name in methods for row in tables for methods in row)]
    found: dict[str, dict[str, Components]] = {}
    for name in names:
        for against in (None, "none") if name != "none" and "none" in names else (None,):
            label = name if against is None else f"{name} - {against}"
            found[label] = {
                metric: components([[_values(methods, name, against, metric) for methods in row] for row in tables])
                for metric in METRICS
            }
    return found


def refuse_mixed_personalizations(folders: Sequence[Path]) -> None:
    """Refuse runs that do not compare, but for what is meant to differ: who holds which examples."""
    by_partition: dict[str, list[Path]] = {}
    for folder in folders:
        by_partition.setdefault(str(read(folder).results.get("partition_hash")), []).append(folder)
    for same in by_partition.values():
        if len(same) > 1:
            refuse_mixed(same)


def _values(methods: Mapping[str, Any], name: str, against: str | None, metric: str) -> list[float]:
    own = [math.nan if one[metric] is None else one[metric] for one in methods[name]["per_seed"]]
    if against is None:
        return own
    return [a - b[metric] for a, b in zip(own, methods[against]["per_seed"], strict=True)]


def table(found: Mapping[str, Mapping[str, Components]]) -> str:
    """Return the components as a table."""
    rows = []
    for name, by_metric in found.items():
        row: dict[str, Any] = {"strategy": name}
        for metric, one in by_metric.items():
            row[metric] = one.mean
            row |= {f"{metric}: {key}": getattr(one, key) for key in ("partition", "training")}
            row[f"{metric}: fine-tuning"] = one.tuning
        rows.append(row)
    rows.sort(key=lambda row: " - " in row["strategy"])
    return f"{markdown_table(rows)}\n{NOTE}\n"


def to_dict(found: Mapping[str, Mapping[str, Components]]) -> dict[str, Any]:
    """Return the components as ``deviations.json`` has them."""
    return {
        name: {metric: {**one._asdict(), "mean": one.mean._asdict()} for metric, one in by_metric.items()}
        for name, by_metric in found.items()
    }


if __name__ == "__main__":
    main()
