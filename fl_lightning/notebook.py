"""Runs from Python: the words, checks and files of the scripts, and objects to look at in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict
from PIL import Image

from fl_lightning.evaluation.results import read_json
from fl_lightning.run.command_line import run_work, with_resume
from fl_lightning.run.overrides import composed

if TYPE_CHECKING:
    import pandas

VIEWS = ("global", "personal", "unseen", "unseen_personal")


class Run:
    """A finished run: its folder, its numbers, its figures.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "results.json").is_file():
            raise FileNotFoundError(f"{folder} holds no finished run; go on with it by resume={folder}")

    @cached_property
    def results(self) -> dict[str, Any]:
        """What is in ``results.json``."""
        return dict(read_json(self.folder / "results.json"))

    @property
    def figures(self) -> dict[str, Image.Image]:
        """The figures, by name; a notebook shows one as it is."""
        root = self.folder / "figures"
        return {str(file.relative_to(root).with_suffix("")): Image.open(file) for file in sorted(root.rglob("*.png"))}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r})"


class TrainingRun(Run):
    """A finished run of ``train.py``."""

    @property
    def table(self) -> pandas.DataFrame:
        """The summaries over clients of the choosing metric: a row for each view, ``global``, ``personal``, …."""
        return _frame({view: self.results[view] for view in VIEWS if self.results.get(view)}, "view")

    @property
    def clients(self) -> pandas.DataFrame:
        """A row for each client: its numbers of examples and how the kept models serve it."""
        rows = [{key: value for key, value in one.items() if key != "metrics"} for one in self.results["clients"]]
        return _frame({one["name"]: one for one in rows}, "client").drop(columns="name")

    @property
    def metrics(self) -> pandas.DataFrame:
        """What was logged: a row for each round, a column for each name of ``metrics.csv``."""
        return _pandas().read_csv(self.folder / "metrics.csv")


class PersonalizationRun(Run):
    """A finished run of ``personalize.py``."""

    @property
    def table(self) -> pandas.DataFrame:
        """A row for each strategy, a column for each number of ``results.json``."""
        methods = self.results["methods"].items()
        scalars = {name: {k: v for k, v in one.items() if not isinstance(v, (Mapping, list))} for name, one in methods}
        return _frame(scalars, "strategy")

    def matrix(self, strategy: str) -> pandas.DataFrame:
        """Return the scores of a strategy: a row for each client's model, a column for whose test data it meets."""
        file = self.folder / "matrix" / f"{strategy}.csv"
        if not file.is_file():
            known = ", ".join(one.stem for one in sorted(file.parent.glob("*.csv")))
            raise KeyError(f"there is no matrix of {strategy}; there are {known or 'none'}")
        return _pandas().read_csv(file, index_col=0)


def train(*words: str, rounds: int | None = None, folder: str | Path | None = None, **settings: Any) -> TrainingRun:
    """Train a federation as ``train.py`` does.

    ``train("loop.on_bad_update=drop", method="fedper", data="digits", rounds=5, optimizer={"lr": 0.1})`` is
    ``python train.py loop.on_bad_update=drop method=fedper data=digits optimizer.lr=0.1 loop.rounds=5``.

    Args:
        words: Words of the command line.
        rounds: ``loop.rounds``.
        folder: The run folder. None: that of the command line, below ``logs/``.
        settings: Choices of a group and values of keys; of a dict, every entry by its dotted name.

    Returns:
        The finished run.

    Raises:
        ValueError: If anything that was given cannot work; before any training.
        KeyboardInterrupt: If it was stopped; ``train(resume=folder)`` goes on.
    """
    if rounds is not None:
        settings["loop"] = {**settings.get("loop", {}), "rounds": rounds}
    return TrainingRun(run_script("train", [*words, *_words(settings)], folder))


def personalize(
    checkpoint: Run | str | Path,
    strategies: Sequence[str] | None = None,
    *words: str,
    folder: str | Path | None = None,
    **settings: Any,
) -> PersonalizationRun:
    """Personalize a trained model at every client as ``personalize.py`` does.

    Args:
        checkpoint: A run of :func:`train`, a run folder or a file of weights.
        strategies: Files of ``conf/personalization``. None: those of the command line.
        words: Words of the command line.
        folder: The run folder. None: that of the command line, below ``logs/``.
        settings: As in :func:`train`.

    Returns:
        The finished run.

    Raises:
        ValueError: If anything that was given cannot work; before any training.
        KeyboardInterrupt: If it was stopped; ``personalize(checkpoint, resume=folder)`` goes on.
    """
    settings["checkpoint"] = checkpoint.folder if isinstance(checkpoint, Run) else checkpoint
    if strategies is not None:
        settings["personalization"] = list(strategies)
    return PersonalizationRun(run_script("personalize", [*words, *_words(settings)], folder))


def run_script(name: str, given: Sequence[str], folder: str | Path | None = None) -> Path:
    """Do what a script does with the words of a command line, within this process.

    Args:
        name: ``train`` or ``personalize``.
        given: The words.
        folder: The run folder. None: that of the command line, below ``logs/``.

    Returns:
        The run folder.
    """
    chosen = [*given, *([f"hydra.run.dir={_value(folder)}"] if folder is not None else [])]
    words = with_resume(chosen)
    cfg = composed(name, words, with_hydra=True)
    with _hydra(cfg):
        place = Path(cfg.hydra.run.dir)
        with open_dict(cfg):
            del cfg["hydra"]
        place.mkdir(parents=True, exist_ok=True)
        if not run_work(name, cfg, place, replayed=words != chosen):
            raise KeyboardInterrupt(f"stopped; resume={place} goes on")
    return place


@contextmanager
def _hydra(cfg: Any) -> Iterator[None]:
    """Let ``${hydra:…}`` and the run folder's notes find what was composed, as in a script."""
    holder = HydraConfig.instance()
    before = holder.cfg
    holder.set_config(cfg.copy())
    try:
        yield
    finally:
        holder.cfg = before


def _words(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _words(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_value(value)}"


def _value(value: Any) -> str:
    """Write a value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    text = str(value)
    if isinstance(value, (int, float)) or text.isidentifier():
        return text
    return "'" + text.replace("'", r"\'") + "'"


def _frame(rows: Mapping[str, Mapping[str, Any]], index: str) -> pandas.DataFrame:
    return _pandas().DataFrame.from_dict(rows, orient="index").rename_axis(index)


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas; pip install 'fl_lightning[notebook]'") from error
    return pandas
