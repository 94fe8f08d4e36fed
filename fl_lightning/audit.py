"""Whether finished runs may stand in one table: ``python -m fl_lightning.audit RUN [RUN ...]``.

Runs are comparable where whoever reads their numbers side by side is misled by nothing: the same examples at the same
clients, model, metric, length, seeds, tuning and way of choosing what is scored. What differs on purpose (method,
learning rate, callbacks) is not looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_lightning.evaluation.results import read_json
from fl_lightning.run.folder import RunFolder

VERSIONS = ("fl_lightning", "torch", "torchvision", "lightning", "numpy")
BITS = ("python", "machine", "cpu", "threads", "kernels", "variables", "accelerator")


@dataclass(frozen=True)
class Finding:
    """Something in which runs differ.

    Attributes:
        aspect: What, in words.
        values: By what it is, the runs of which it is so.
        grave: Whether the numbers then do not compare; otherwise their last digits may differ.
    """

    aspect: str
    values: Mapping[str, Sequence[str]]
    grave: bool = True

    def __str__(self) -> str:
        shown = "; ".join(f"{value} ({_few(runs)})" for value, runs in self.values.items())
        return f"{self.aspect}: {shown}"


def _few(runs: Sequence[str]) -> str:
    return ", ".join(runs) if len(runs) <= 3 else f"{', '.join(runs[:2])} and {len(runs) - 2} more"


@dataclass(frozen=True)
class Run:
    """What is known of a finished run."""

    path: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    environment: Mapping[str, str]
    command: Sequence[str]

    @property
    def personalizes(self) -> bool:
        """Whether it is a run of ``personalize.py``."""
        return "personalization" in self.config

    @property
    def name(self) -> str:
        """What the run is of, without its seed: runs of one name are seeds of one another."""
        words = [word for word in self.command if not word.startswith(("seed=", "resume=", "hydra.", "checkpoint="))]
        return " ".join(words) or ("personalize" if self.personalizes else str(self.config["method"]["name"]))


def read(folder: Path) -> Run:
    """Read a run."""
    run = RunFolder(folder)
    config = run.read_config()
    if not run.results.is_file():
        raise FileNotFoundError(f"{folder} holds no finished run; continue it with resume={folder}, or leave it out")
    made = run.environments()
    return Run(folder, config, read_json(run.results), made[-1] if made else {}, run.started_with())


def audit(runs: Sequence[Run]) -> list[Finding]:
    """Return in what runs differ that should not, the grave first."""
    found: list[Finding] = []

    def differ(aspect: str, values: Sequence[Any], among: Sequence[Run] = runs, grave: bool = True) -> None:
        groups: dict[str, list[str]] = {}
        for run, value in zip(among, values, strict=True):
            text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
            groups.setdefault(text, []).append(str(run.path))
        if len(groups) > 1:
            found.append(Finding(aspect, groups, grave))

    differ("script", ["personalize.py" if run.personalizes else "train.py" for run in runs])
    if found:
        return found
    for seed in sorted({run.config["seed"] for run in runs}):
        same = [run for run in runs if run.config["seed"] == seed]
        hashes = [str(run.results.get("partition_hash"))[:12] for run in same]
        differ(f"who holds which examples, at seed {seed}", hashes, same)
    for key in ("data", "model"):
        nodes = [_without_seed(run.config.get(key)) for run in runs]
        for name in sorted({name for node in nodes for name in node}):
            differ(f"{key}.{name}", [node.get(name) for node in nodes])
    differ("metric", [run.results.get("metric") for run in runs])
    differ("rounds", [run.results.get("rounds") for run in runs])
    epochs = [run.config["trainer"].get("max_epochs", 1) for run in runs]
    differ("epochs of a fit", epochs)
    if not runs[0].personalizes:
        differ("cohort", [_without_seed(run.config.get("cohort")) for run in runs])
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    seeds = {name: sorted(run.config["seed"] for run in members) for name, members in by_name.items()}
    differ("seeds", [seeds[run.name] for run in runs])
    differ("seeds of fine-tuning", [run.config.get("seeds", 1) for run in runs])
    differ("settings tried", [tried(run) for run in runs])
    differ("scored is", [chosen_on(run) for run in runs])
    for key in VERSIONS:
        differ(f"version of {key}", [run.environment.get(key, "unknown") for run in runs], grave=False)
    differ("commit", [run.environment.get("commit", "unknown") for run in runs], grave=False)
    for key in BITS:
        differ(key, [run.environment.get(key, "unknown") for run in runs], grave=False)
    return sorted(found, key=lambda finding: not finding.grave)


def _without_seed(node: Any) -> dict[str, Any]:
    return {key: value for key, value in node.items() if key != "seed"} if isinstance(node, Mapping) else {}


def tried(run: Run) -> int:
    """Return from how many settings the run's own was chosen: those beside it in ``tuning/``, or those of its grid."""
    if run.personalizes:
        sizes = [len(one["choice"]["candidates"]) for one in run.results["methods"].values() if "choice" in one]
        return max(sizes, default=1)
    return max(1, len(list((run.path.parent / "tuning" / run.path.name).glob("*/results.json"))))


def chosen_on(run: Run) -> str:
    """Say which model the run's numbers are of."""
    if run.personalizes:
        select = run.config.get("select") or {}
        if select.get("per") is None:
            return "every setting"
        return f"the setting by {select['by']}, per {select['per']}"
    rules = {f"{rule['metric']} ({rule['by']})" for rule in (run.results.get("validation") or {}).values()}
    metrics = ", ".join(sorted({rule.split(" ")[0] for rule in rules}))
    return f"the {run.results.get('kept', 'last model')}" + (f", {metrics}" if metrics else "")


def refuse_mixed(folders: Sequence[Path]) -> None:
    """Refuse runs that do not compare."""
    grave = [finding for finding in audit([read(folder) for folder in folders]) if finding.grave]
    if grave:
        words = "\n".join(f"  {finding}" for finding in grave)
        raise ValueError(f"these runs do not compare:\n{words}\npass --mixed for a table of them all the same")


def main(arguments: Sequence[str] | None = None) -> None:
    """``RUN [RUN ...]``: finished run folders of train.py, or of personalize.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(f"usage: python -m fl_lightning.audit {main.__doc__}")
    try:
        found = audit([read(Path(argument)) for argument in arguments])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    grave = [finding for finding in found if finding.grave]
    for finding in found:
        print(f"{'differs' if finding.grave else 'bits may differ'}: {finding}")
    runs = f"{len(arguments)} run{'s' if len(arguments) > 1 else ''}"
    if grave:
        sys.exit(f"{runs}: not comparable, in {len(grave)} thing{'s' if len(grave) > 1 else ''}")
    print(f"{runs}: comparable" + (", to the last digits at least" if found else ""))


if __name__ == "__main__":
    main()
