"""Reads the files of ``conf/comparison``: which runs, of what, and what they are held against."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fl_lightning.run.config import CONF
from fl_lightning.run.overrides import composed

COLUMNS = {
    "Local": "local",
    "Global": "global_others",
    "C-Std": "cstd_row",
    "Worst": "worst_row",
    "Average": "avg3",
}

SHARED = ("executor", "logger", "trust")
"""Nodes of a training that its personalization takes over."""


@dataclass
class Comparison:
    """A file of ``conf/comparison``: runs of ``train.py`` that differ in a few overrides.

    With ``personalize``, each of them is also personalized, and the table has a row for each strategy.

    A file may begin with others, named in ``defaults``: ``common`` and ``personalize`` are appended to theirs, ``runs``
    and ``grids`` added to theirs, all else takes the place of theirs.

    Attributes:
        name: Of the file.
        folder: Where the runs go, a folder for each seed and in it one for each run; ``{folder}`` in an override stands
            for that of the run's own seed.
        like: Name of a comparison with the same runs and grids, but for those that are given here.
        common: Overrides of all runs.
        runs: Overrides of each run, by its name in the table.
        grids: By run, values of keys; all combinations are tried with the first seed, and the one that validates best
            is run with all seeds. Every run has the same number of combinations: none is tuned more.
        seeds: Of partition, initial weights, cohorts, batches and personalization alike, unless others are asked for.
        personalize: Overrides of ``personalize.py``; empty: runs are only trained.
        columns: Of the table of strategies: what is measured, by its name there.
        published: Rows that stand beside: by strategy and column a mean and a standard deviation, in percent.
        source: Where they stand.
        order: Strategies, best first, as somebody has found; each pair is tested.
    """

    name: str = ""
    folder: str = ""
    like: str = ""
    common: list[str] = field(default_factory=list)
    runs: dict[str, list[str]] = field(default_factory=dict)
    grids: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1])
    personalize: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=lambda: dict(COLUMNS))
    published: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    source: str = ""
    order: list[str] = field(default_factory=list)

    @staticmethod
    def read(name: str) -> Comparison:
        """Read ``conf/comparison/<name>.yaml``, or the file of one's own that a name ending in ``.yaml`` is."""
        try:
            merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Comparison), _content(name)))
        except OmegaConfBaseException as error:
            raise ValueError(f"comparison {name}: {str(error).splitlines()[0]}") from error
        assert isinstance(merged, Comparison)
        merged.name = Path(name).name.removesuffix(".yaml")
        if merged.like:
            other = Comparison.read(merged.like)
            merged.runs, merged.grids = other.runs | merged.runs, other.grids | merged.grids
        return merged

    def configuration(self, run: str, overrides: Sequence[str] = (), seed: int = 1) -> DictConfig:
        """Compose what ``train.py`` would be given for one run.

        Another model (``model=timm``) takes the place of the run's with all that was set below it.
        """
        own = [*self.common, *self.runs[run]]
        if any(override.startswith("model=") for override in overrides):
            own = [override for override in own if not override.startswith("model.")]
        given = [*own, *overrides, f"seed={seed}"]
        return composed("train", [override.replace("{folder}", str(self.place(seed))) for override in given])

    def personalization(self, trained: DictConfig, checkpoint: Path, overrides: Sequence[str] = ()) -> DictConfig:
        """Compose what ``personalize.py`` would be given for a trained run.

        Args:
            trained: The configuration of the run; its executor, logger, trainer and seed are those of the other, too.
            checkpoint: The folder of the run.
            overrides: Further overrides.
        """
        own = composed("personalize", [*self.personalize, *overrides])
        own.checkpoint, own.seed = str(checkpoint), trained.seed
        for key in SHARED:
            own[key] = trained[key]
        own.trainer = OmegaConf.merge(trained.trainer, {"max_epochs": "${epochs}"})
        return own

    def place(self, seed: int) -> Path:
        """Return the folder of the runs with this seed."""
        return Path(self.folder) / f"seed_{seed}"

    @property
    def tables(self) -> Path:
        """The folder of the tables; of several comparisons that personalize the same runs each has its own."""
        return Path(self.folder) / self.name if self.personalize else Path(self.folder)

    def personalized(self, seed: int) -> Path:
        """Return the folder of the personalized runs with this seed."""
        return self.tables / f"seed_{seed}"

    def candidates(self, run: str) -> list[list[str]]:
        """Return the combinations of a run's grid, each as overrides; one without any where there is no grid."""
        grid = self.grids.get(run, {})
        return [
            [f"{key}={value}" for key, value in zip(grid, values, strict=True)]
            for values in itertools.product(*grid.values())
        ]

    def check(self) -> None:
        """Check what would fail only after hours of training."""
        if unknown := [name for name in self.grids if name not in self.runs]:
            raise ValueError(f"grids must be of runs, got {', '.join(unknown)}; there are {', '.join(self.runs)}")
        sizes = {name: len(self.candidates(name)) for name in self.runs}
        if len(set(sizes.values())) > 1:
            text = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"grids must give every run the same number of combinations, got {text}; make them equal")
        for strategy, row in self.published.items():
            if unknown := [column for column in row if column not in self.columns]:
                known = ", ".join(self.columns)
                raise ValueError(f"published.{strategy} must have columns of the table, {known}, got {unknown[0]}")


def _content(name: str) -> dict[str, Any]:
    """Return what a file holds, on top of those that it begins with."""
    root = CONF / "comparison"
    path = Path(name) if name.endswith(".yaml") else root / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(file.relative_to(root).with_suffix("")) for file in root.rglob("[!_]*.yaml"))
        close = get_close_matches(name, known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise FileNotFoundError(f"there is no comparison {name!r}; {hint}")
    merged: dict[str, Any] = {}
    own: Any = OmegaConf.to_container(OmegaConf.load(path))
    for content in (*map(_content, own.pop("defaults", [])), own):
        lists = {key: [*merged.get(key, []), *content.get(key, [])] for key in ("common", "personalize")}
        entries = {key: {**merged.get(key, {}), **content.get(key, {})} for key in ("runs", "grids")}
        merged = {**merged, **content, **lists, **entries}
    return merged
