"""Several runs under one evaluation, as one table: ``python -m fl_lightning.compare fedftha/two_cores``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import fl_lightning.run.config  # noqa: F401 - registers the schema before Hydra composes
from fl_lightning import files
from fl_lightning.audit import refuse_mixed
from fl_lightning.comparison.definition import Comparison
from fl_lightning.comparison.runner import answer, compare
from fl_lightning.comparison.table import BOLD, beyond_others, in_every_seed, over_seeds, read_runs
from fl_lightning.evaluation.tables import latex_table, markdown_table

USAGE = """usage: python -m fl_lightning.compare COMPARISON|FILE.yaml [runs=NAME,NAME] [seeds=1,2,3] [folder=DIR]
       [overrides of train.py] [personalize.KEY=VALUE ..., overrides of personalize.py, where runs are personalized]
       python -m fl_lightning.compare RUN ... [--mixed]"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a file of ``conf/comparison``, or put finished runs into one table."""
    answer(USAGE, _work, arguments)


def _work(arguments: Sequence[str]) -> None:
    # os.path, since of a long runs= pathlib says that the name is too long.
    if folders := [Path(argument) for argument in arguments if os.path.isdir(argument)]:
        mixed = "--mixed" in arguments
        if not mixed:
            refuse_mixed(folders)
        finished = read_runs(folders)
        best = {} if mixed else beyond_others(finished)
        print(markdown_table([over_seeds(found) for found in finished.values()], best=best))
        print("Mixed: these runs may not be comparable; nothing is in bold." if mixed else BOLD)
        return
    run(arguments)


def run(arguments: Sequence[str]) -> None:
    """Make the runs of a comparison, print its tables and write them.

    Args:
        arguments: The words of the command line.
    """
    comparison = Comparison.read(arguments[0])
    options = {
        "runs": ",".join(comparison.runs),
        "seeds": ",".join(map(str, comparison.seeds)),
        "folder": comparison.folder,
    }
    overrides, personalize = [], []
    for argument in arguments[1:]:
        key, _, value = argument.partition("=")
        key = "seeds" if key == "seed" else key
        if key in options:
            options[key] = value
        elif argument.startswith("personalize."):
            personalize.append(argument.removeprefix("personalize."))
        else:
            overrides.append(argument)
    if personalize and not comparison.personalize:
        raise ValueError(f"personalize.* must be left out, got {personalize[0]!r}; {arguments[0]} personalizes no run")
    comparison.folder = options["folder"]
    if not all(seed.strip().isdigit() for seed in options["seeds"].split(",")):
        raise ValueError(f"expected whole numbers, as in seeds=1,2,3, got seeds={options['seeds']}")
    seeds = [int(seed) for seed in options["seeds"].split(",")]
    finished = compare(comparison, options["runs"].split(","), overrides, seeds, personalize)
    rows = [over_seeds(found) for found in finished.values() if found]
    stopped = any(len(found) < len(seeds) for found in finished.values())
    best = {} if stopped else beyond_others(finished)
    table = f"{markdown_table(rows, best=best)}\n{BOLD}" if rows else ""
    if stopped or not comparison.personalize:
        print(table)
    if stopped:
        sys.exit("stopped; the table is of the runs that are finished; the same command goes on from here")
    if comparison.personalize:
        from fl_lightning.comparison import study  # scipy and matplotlib take a second to import

        made = [
            study.Federation(name, seed, comparison.place(seed) / name, comparison.personalized(seed) / name)
            for name in finished
            for seed in seeds
        ]
        command = f"python -m fl_lightning.compare {shlex.join(arguments)}"
        study.report(made, comparison, comparison.tables, command)
        return
    if len(seeds) > 1:
        table += f"\nWhat clients would use (personal, else global), in every seed of {options['seeds']}:\n\n"
        table += in_every_seed(finished)
        print(table[table.index("\nWhat") :])
    for name, text in (("table.md", table), ("table.tex", latex_table(rows, best=best))):
        files.write_text(comparison.tables / name, text)


if __name__ == "__main__":
    main()
