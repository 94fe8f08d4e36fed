"""Compares several methods in one table: ``python -m fl_lightning.compare fedftha/two_cores``."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import fl_lightning.run.config  # noqa: F401 - registers the schema before Hydra composes
from fl_lightning import files
from fl_lightning.audit import refuse_mixed
from fl_lightning.evaluation.results import read_json
from fl_lightning.evaluation.tables import Best, latex_table, markdown_table, mean_std
from fl_lightning.loop import DivergedError
from fl_lightning.run import training
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import CONF, composed

TOLD = ("method=", "seed=", "resume=", "hydra.")
"""Overrides that the name of a run leaves out: the method is its first word, and seeds are averaged over."""

BEST: Best = dict.fromkeys(("global", "personal", "worst personal", "worst global", "unseen", "everyone"), "max")


@dataclass
class Comparison:
    """A file of ``conf/comparison``: runs of ``train.py`` that differ in a few overrides.

    Attributes:
        folder: Where the runs go, a folder for each seed and in it one for each run; ``{folder}`` in an override stands
            for that of the run's own seed.
        common: Overrides of all runs.
        runs: Overrides of each run, by its name in the table.
        grids: By run, values of keys; all combinations are tried with the first seed, and the one that validates best
            is run with all seeds. Every run has the same number of combinations: none is tuned more.
        like: Name of a comparison with the same runs and grids, but for those that are given here.
    """

    folder: str
    common: list[str]
    runs: dict[str, list[str]] = field(default_factory=dict)
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    like: str = ""

    @staticmethod
    def read(name: str) -> Comparison:
        """Read ``conf/comparison/<name>.yaml``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it holds anything but the attributes above.
        """
        path = CONF / "comparison" / f"{name}.yaml"
        if not path.is_file():
            root = CONF / "comparison"
            known = sorted(str(file.relative_to(root).with_suffix("")) for file in root.rglob("*.yaml"))
            raise FileNotFoundError(f"there is no comparison {name!r}; there are {', '.join(known)}")
        try:
            merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Comparison), OmegaConf.load(path)))
        except OmegaConfBaseException as error:
            raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
        assert isinstance(merged, Comparison)
        if merged.like:
            other = Comparison.read(merged.like)
            merged.runs, merged.grids = other.runs | merged.runs, other.grids | merged.grids
        return merged

    def configuration(self, run: str, overrides: Sequence[str] = (), seed: int = 1) -> DictConfig:
        """Compose what ``train.py`` would be given for one run."""
        given = [*self.common, *self.runs[run], *overrides, f"seed={seed}"]
        return composed("train", [override.replace("{folder}", str(self.place(seed))) for override in given])

    def place(self, seed: int) -> Path:
        """Return the folder of the runs with this seed."""
        return Path(self.folder) / f"seed_{seed}"

    def candidates(self, run: str) -> list[list[str]]:
        """Return the combinations of a run's grid, each as overrides; one without any where there is no grid."""
        grid = self.grids.get(run, {})
        return [
            [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            for values in itertools.product(*grid.values())
        ]

    def check_grids(self) -> None:
        """Refuse grids of unequal size.

        Raises:
            ValueError: If a grid is of a run that is not there, or runs have unlike numbers of combinations.
        """
        if unknown := [name for name in self.grids if name not in self.runs]:
            raise ValueError(f"grids must be of runs, got {', '.join(unknown)}; there are {', '.join(self.runs)}")
        sizes = {name: len(self.candidates(name)) for name in self.runs}
        if len(set(sizes.values())) > 1:
            text = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"grids must give every run the same number of combinations, got {text}; make them equal")


def compare(
    comparison: Comparison, names: Sequence[str], overrides: Sequence[str] = (), seeds: Sequence[int] = (1,)
) -> dict[str, list[dict[str, Any]]]:
    """Make the runs that are not there yet, and go on with one that was stopped.

    Args:
        comparison: What to run.
        names: Which of its runs, in this order.
        overrides: Further overrides of all of them.
        seeds: Of partition, initial weights, cohorts and batches alike; the first one's runs come first.

    Returns:
        By name a row for each seed; fewer rows if a run was stopped.

    Raises:
        ValueError: If a name is none of the runs, no seed or a seed twice is given, or a folder holds a run with other
            settings.
    """
    if unknown := [name for name in names if name not in comparison.runs]:
        raise ValueError(f"there is no run {', '.join(unknown)}; there are {', '.join(comparison.runs)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"expected seeds that differ, as in seeds=1,2,3, got {','.join(map(str, seeds)) or 'none'}")
    comparison.check_grids()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    chosen: dict[str, list[str]] = {}
    todo = [(seed, name) for seed in seeds for name in names]
    for number, (seed, name) in enumerate(todo):
        print(f"[{number + 1}/{len(todo)}] {name}, seed {seed}", file=sys.stderr, flush=True)
        if name not in chosen:
            found = tune(comparison, name, overrides, seeds[0])
            if found is None:
                break
            chosen[name] = found
        given = [*overrides, *chosen[name]]
        results = run_once(comparison.configuration(name, given, seed), comparison.place(seed) / name)
        if not results:
            break
        tuned = {"chosen": " ".join(short(chosen[name]))} if comparison.grids else {}
        rows[name].append(row(name, results) | tuned)
    return rows


def tune(comparison: Comparison, name: str, overrides: Sequence[str], seed: int) -> list[str] | None:
    """Return the combination of a run's grid that validates best; None if a run was stopped.

    A personal method is chosen by its personal models, any other by its global one. A combination that diverges is out.

    Raises:
        ValueError: If no combination has a validation score.
    """
    candidates = comparison.candidates(name)
    if len(candidates) == 1:
        return candidates[0]
    scores: list[float] = []
    folders = [comparison.place(seed) / "tuning" / name / slug(candidate) for candidate in candidates]
    for candidate, folder in zip(candidates, folders, strict=True):
        print(f"  tuning {name}: {' '.join(candidate)}", file=sys.stderr, flush=True)
        try:
            results = run_once(comparison.configuration(name, [*overrides, *candidate], seed), folder)
        except DivergedError:
            scores.append(math.nan)
            continue
        if not results:
            return None
        scores.append(validation_score(results))
    if all(math.isnan(score) for score in scores):
        raise ValueError(f"{name} has no validation score to choose by: all of its {len(scores)} combinations diverged")
    best = max(range(len(scores)), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
    if not (kept := comparison.place(seed) / name).exists():
        shutil.copytree(folders[best], kept)  # the chosen run is this seed's
    return candidates[best]


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
    """Return what validation says of a run's own kind of model; larger is better.

    Raises:
        ValueError: If the clients have no validation data.
    """
    found = results["validation"].get("personal") or results["validation"].get("global")
    if found is None:
        raise ValueError("grids need validation data, but the clients have none; set data.val_fraction")
    return float(found["value"]) * (1 if found["mode"] == "max" else -1)


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
        By name a row for each seed. The name is the method with the overrides that not all of the runs have.

    Raises:
        FileNotFoundError: If a folder holds no finished run.
        ValueError: If two runs differ in nothing, or their metrics differ.
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
    rows: dict[str, list[dict[str, Any]]] = {}
    seen: dict[tuple[str, int], Path] = {}
    for own, (run, config, results) in zip(words, found, strict=True):
        name = " ".join(
            [config["method"]["name"], *(word for word in own if any(word not in other for other in words))]
        )
        before = seen.setdefault((name, config["seed"]), run.path)
        if before != run.path:
            raise ValueError(f"{before} and {run.path} are both {name} with seed {config['seed']}; leave one out")
        rows.setdefault(name, []).append(row(name, results))
    return rows


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put the rows of one method into one: mean and standard deviation of what differs between seeds."""

    def merged(values: Sequence[Any]) -> Any:
        if len(set(values)) == 1:
            return values[0]
        # A model that one seed did not keep has no mean over seeds.
        return None if None in values else mean_std(values)

    return {column: merged([row[column] for row in rows]) for column in rows[0]}


def run_once(cfg: DictConfig, path: Path) -> Mapping[str, Any]:
    """Return the results of a run: read where it is finished, trained to the end where it is not.

    Raises:
        ValueError: If the folder holds a run with other settings.
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
        return training.run(cfg, path)


def say_if_made_elsewhere(folder: RunFolder) -> None:
    """Print what a finished run, about to be used again, was made with, where that is not what is here now."""
    if changed := folder.changed_environment():
        print(f"  finished before: {'; '.join(changed)}. Remove {folder.path} to make it again", file=sys.stderr)


def row(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the table says about a run. Accuracies are over test examples; worst is the worst client's."""
    views = {view: results[view] or {} for view in ("global", "personal")}
    number = len(results["clients"])
    scored = results.get("clients_scored", number)
    before = results["in_round"].get(f"test/personal/{results['metric']}/weighted_mean")
    after = views["personal"].get("weighted_mean")
    return {
        "method": name,
        "global": views["global"].get("weighted_mean"),
        "personal": after,
        "worst global": views["global"].get("worst"),
        "worst personal": views["personal"].get("worst"),
        "unseen": (results.get("unseen_personal") or results.get("unseen") or {}).get("weighted_mean"),
        "before tuning": before if before != after else None,
        **({"everyone": results["personal_on"]["mean"]["everyone"]} if "personal_on" in results else {}),
        "after fit": results.get("after_fit", {}).get("weighted_mean"),
        "MB up": results["bytes_up"] / 1e6,
        "MB down": results["bytes_down"] / 1e6,
        "rounds": results["rounds"],
        "seconds": round(results["seconds"]),
        **({"scored": f"{scored} of {number}"} if scored < number else {}),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """``COMPARISON [runs=NAME,NAME] [seeds=1,2,3] [folder=DIR] [overrides of train.py]``, or ``RUN ... [--mixed]``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(f"usage: python -m fl_lightning.compare {main.__doc__}")
    try:
        if folders := [Path(argument) for argument in arguments if Path(argument).is_dir()]:
            if "--mixed" not in arguments:
                refuse_mixed(folders)
            finished = read_runs(folders)
            print(markdown_table([over_seeds(found) for found in finished.values()], best=BEST))
            return
        comparison = Comparison.read(arguments[0])
        options = {"runs": ",".join(comparison.runs), "seeds": "1", "folder": comparison.folder}
        overrides = []
        for argument in arguments[1:]:
            key, _, value = argument.partition("=")
            key = "seeds" if key == "seed" else key
            if key in options:
                options[key] = value
            else:
                overrides.append(argument)
        comparison.folder = options["folder"]
        if not all(seed.strip().isdigit() for seed in options["seeds"].split(",")):
            raise ValueError(f"expected whole numbers, as in seeds=1,2,3, got seeds={options['seeds']}")
        seeds = [int(seed) for seed in options["seeds"].split(",")]
        finished = compare(comparison, options["runs"].split(","), overrides, seeds)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    rows = [over_seeds(found) for found in finished.values() if found]
    table = markdown_table(rows, best=BEST) if rows else ""
    print(table)
    if any(len(found) < len(seeds) for found in finished.values()):
        sys.exit("stopped; the table is of the runs that are finished; the same command goes on from here")
    if len(seeds) > 1:
        table += f"\nWhat clients would use (personal, else global), in every seed of {options['seeds']}:\n\n"
        table += in_every_seed(finished)
        print(table[table.index("\nWhat") :])
    for name, text in (("table.md", table), ("table.tex", latex_table(rows, best=BEST))):
        files.write_text(Path(comparison.folder) / name, text)
