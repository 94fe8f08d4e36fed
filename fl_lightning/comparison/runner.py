"""Makes the runs of a comparison, each once: trains, tunes and personalizes them, and goes on with what was stopped."""

from __future__ import annotations

import math
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig

from fl_lightning import personalization
from fl_lightning.comparison.definition import Comparison
from fl_lightning.comparison.table import row
from fl_lightning.evaluation.results import read_json
from fl_lightning.loop import DivergedError
from fl_lightning.run import training
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder


def answer(usage: str, work: Callable[[Sequence[str]], object], arguments: Sequence[str] | None) -> None:
    """Do what a command line says, or show its usage; errors and Ctrl-C end in a sentence.

    Args:
        usage: Shown where nothing, ``-h`` or ``--help`` is said.
        work: Takes the words of the command line.
        arguments: The words; None: those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(usage)
    try:
        work(arguments)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


def compare(
    comparison: Comparison,
    names: Sequence[str],
    overrides: Sequence[str] = (),
    seeds: Sequence[int] = (1,),
    personalize: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Make the runs that are not there yet, and go on with one that was stopped.

    Args:
        comparison: What to run.
        names: Which of its runs, in this order.
        overrides: Further overrides of all of them.
        seeds: Of partition, initial weights, cohorts and batches alike; the first one's runs come first.
        personalize: Further overrides of the personalizations, where the comparison has them.

    Returns:
        By name a row for each seed; fewer rows if a run was stopped.
    """
    if unknown := [name for name in names if name not in comparison.runs]:
        raise ValueError(f"there is no run {', '.join(unknown)}; there are {', '.join(comparison.runs)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected seeds that differ, as in seeds=1,2,3, got {','.join(map(str, seeds)) or 'none'}")
    comparison.check()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    chosen: dict[str, list[str]] = {}
    todo = deque((seed, name) for seed in seeds for name in names)
    done = 0
    while todo:
        seed, name = todo.popleft()
        print(f"[{done + 1}/{done + 1 + len(todo)}] {name}, seed {seed}", file=sys.stderr, flush=True)
        if name not in chosen:
            found = tune(comparison, name, overrides, seeds)
            if found is None:
                break
            chosen[name] = found
        cfg, folder = comparison.configuration(name, [*overrides, *chosen[name]], seed), comparison.place(seed) / name
        own = comparison.personalization(cfg, folder, personalize) if comparison.personalize else None
        try:
            results = run_once(cfg, folder)
        except DivergedError as error:
            if len(comparison.candidates(name)) == 1:
                raise
            print(f"  {' '.join(chosen[name])} is out for all seeds: {error}", file=sys.stderr, flush=True)
            leave_out(comparison, name, chosen.pop(name), seed, seeds)
            again = seeds[: seeds.index(seed) + 1]
            todo.extendleft((earlier, name) for earlier in reversed(again))
            rows[name], done = [], done - len(again) + 1
            continue
        if not results:
            break
        if own is not None:
            print(f"  personalizing {name}, seed {seed}", file=sys.stderr, flush=True)
            run_once(own, comparison.personalized(seed) / name, personalization)
        tuned = {"chosen": " ".join(short(chosen[name]))} if comparison.grids else {}
        rows[name].append(row(name, results) | tuned)
        done += 1
    return rows


def tune(comparison: Comparison, name: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[str] | None:
    """Return the combination of a run's grid that validates best in the first seed; None if a run was stopped.

    A personal method is chosen by its personal models, any other by its global one. A combination that diverges, in
    this seed or, when it was taken there, in another, is out.
    """
    candidates = comparison.candidates(name)
    if len(candidates) == 1:
        return candidates[0]
    scores: list[float] = []
    first = comparison.place(seeds[0])
    for candidate in candidates:
        if any(tuning(comparison, seed, name, candidate).exists() for seed in seeds[1:]):
            scores.append(math.nan)
            continue
        print(f"  tuning {name}: {' '.join(candidate)}", file=sys.stderr, flush=True)
        try:
            cfg = comparison.configuration(name, [*overrides, *candidate], seeds[0])
            results = run_once(cfg, tuning(comparison, seeds[0], name, candidate))
        except DivergedError:
            scores.append(math.nan)
            continue
        if not results:
            return None
        scores.append(validation_score(results))
    if all(math.isnan(score) for score in scores):
        raise ValueError(f"{name} has no validation score to choose by: all of its {len(scores)} combinations diverged")
    best = candidates[max(range(len(scores)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])]
    if not (kept := first / name).exists():
        shutil.copytree(tuning(comparison, seeds[0], name, best), kept)  # the chosen run is this seed's
    return best


def tuning(comparison: Comparison, seed: int, name: str, candidate: Sequence[str]) -> Path:
    """Return the folder of a combination; of later seeds only those that diverged have one."""
    return comparison.place(seed) / "tuning" / name / slug(candidate)


def leave_out(comparison: Comparison, name: str, candidate: Sequence[str], seed: int, seeds: Sequence[int]) -> None:
    """Put a run that diverged beside those of tuning, and remove what the seeds before made of the same combination."""
    kept = tuning(comparison, seed, name, candidate)
    kept.parent.mkdir(parents=True, exist_ok=True)
    (comparison.place(seed) / name).rename(kept)
    for earlier in seeds[: seeds.index(seed)]:
        shutil.rmtree(comparison.place(earlier) / name)
        shutil.rmtree(comparison.personalized(earlier) / name, ignore_errors=True)


def slug(candidate: Sequence[str]) -> str:
    """Return a combination as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "_", "_".join(candidate))


def short(words: Sequence[str]) -> list[str]:
    """Return ``lr=0.1`` for ``optimizer.lr=0.1``; keys that end alike are left whole."""
    ends = [word.partition("=")[0].rpartition(".")[2] for word in words]
    return [
        word if ends.count(end) > 1 else f"{end}={word.partition('=')[2]}"
        for word, end in zip(words, ends, strict=True)
    ]


def validation_score(results: Mapping[str, Any]) -> float:
    """Return what validation says of a run's own kind of model; larger is better."""
    found = results["validation"].get("personal") or results["validation"].get("global")
    if found is None:
        raise ValueError("grids need validation data, but the clients have none; set data.val_fraction")
    return float(found["value"]) * (1 if found["mode"] == "max" else -1)


def run_once(cfg: DictConfig, path: Path, work: ModuleType = training) -> Mapping[str, Any]:
    """Return the results of a run: read where it is finished, run to the end where it is not.

    Args:
        cfg: Its configuration.
        path: Its folder.
        work: What runs it: the module behind ``train.py`` or ``personalize.py``.
    """
    folder = RunFolder(path)
    if not folder.results.exists():
        folder.hold(wait=True)  # another comparison may be making the same run
    if folder.results.exists():
        if changed := folder.changed_config(plain(cfg)):
            raise ValueError(f"{path} was run with other settings: {'; '.join(changed[:4])}. Choose another folder=")
        say_if_made_elsewhere(folder)
        return read_json(folder.results)
    if folder.config.exists():
        cfg.resume = str(path)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "output.txt").open("a") as output, redirect_stdout(output):
        results: Mapping[str, Any] = work.run(cfg, path)
        return results


def say_if_made_elsewhere(folder: RunFolder) -> None:
    """Print what a finished run, about to be used again, was made with, where that is not what is here now."""
    if changed := folder.changed_environment():
        print(f"  finished before: {'; '.join(changed)}. Remove {folder.path} to make it again", file=sys.stderr)
