"""Starts ``train.py`` and ``personalize.py``: composes configurations, prints errors as sentences."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fl_lightning.run.config import CONF
from fl_lightning.run.overrides import explain
from fl_lightning.run.trust import check_trusted

WORK = {
    "train": "fl_lightning.run.training",
    "personalize": "fl_lightning.personalization",
}

log = logging.getLogger(__name__)


def train() -> None:
    """``fl-train``: ``train.py`` from any folder."""
    main("train")


def personalize() -> None:
    """``fl-personalize``: ``personalize.py`` from any folder."""
    main("personalize")


class FailedJobError(Exception):
    """A job of a sweep failed, and its sentence was printed; the other jobs go on."""


def main(name: str) -> None:
    """Run a script.

    Args:
        name: ``train`` or ``personalize``: the configuration ``conf/<name>.yaml`` and the module behind it.
    """
    try:
        _check_options(sys.argv[1:])
        arguments = with_resume(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    replayed = arguments != sys.argv[1:]
    sys.argv[1:] = arguments

    full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)
    def run(cfg: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            results = run_work(name, cfg, folder, replayed)
        except Exception as error:
            # The sentence is for the user; the traceback, for whoever mends the program, goes to a file beside the run.
            if full_error:
                raise
            file = folder / "error.txt"
            with suppress(OSError):  # the disk may be full
                file.write_text(traceback.format_exc())
            print(f"error: {sentence(error)}\n(the traceback is in {file})", file=sys.stderr)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise FailedJobError from error
            sys.exit(1)
        except SystemExit as end:
            # So Lightning ends a fit on SIGTERM, without a code: to whoever waits for this process, that is success.
            sys.exit(143 if end.code is None else end.code)
        if not results:
            sys.exit(130)  # stopped before its end
        # What a sweeper, such as Optuna's, searches by: the personal models' score where there are any.
        scores = results.get("validation", {})
        return next((scores[view]["value"] for view in ("personal", "global") if view in scores), None)

    # Hydra then raises what it would otherwise print, over several lines and without the close names.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        run()
        sys.stdout.flush()
    except FailedJobError:
        sys.exit(1)
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:  # the last two: model=null, [3]
        if full_error:
            raise
        sys.exit(f"error: {explain(error, name, arguments)}")
    except BrokenPipeError:  # train.py --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # of Hydra, that makes the run folder
        if full_error:
            raise
        sys.exit(f"error: the run folder cannot be made: {error}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    finally:
        if not full_error:
            del os.environ["HYDRA_FULL_ERROR"]


def run_work(name: str, cfg: DictConfig, folder: Path, replayed: bool) -> dict[str, Any]:
    """Run what is behind a script.

    Args:
        name: As in :func:`main`.
        cfg: The composed configuration, without Hydra's own part.
        folder: The run folder.
        replayed: Whether the configuration is that of a run to resume, which may come from somebody else.

    Returns:
        The results; empty if it was stopped before its end.
    """
    if replayed:
        check_trusted(OmegaConf.to_container(cfg, resolve=True), "", cfg.trust, "the run to resume")
    # Not before: torch takes seconds to load, and a misspelt key should not.
    results: dict[str, Any] = import_work(name).run(cfg, folder)
    return results


def sentence(error: Exception) -> str:
    """Return what an error says to the user."""
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {str(error).splitlines()[0]}" if error.full_key else str(error).splitlines()[0]
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)):
        return str(error)
    return f"{type(error).__name__}: {error}; this may be a mistake of the program"


def _check_options(arguments: Sequence[str]) -> None:
    """Check Hydra's own options and the keys that name folders."""
    for key in ("resume", "hydra.run.dir", "hydra.sweep.dir"):
        if f"{key}=" in arguments:
            raise ValueError(f"{key} must be a folder, got nothing")
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--config-name", "-cn")
    options.add_argument("--config-path", "-cp")
    options.add_argument("--config-dir", "-cd")
    given = vars(options.parse_known_args(arguments)[0])
    for key in ("config_name", "config_path"):
        if given[key] is not None:
            option = f"--{key.replace('_', '-')}"
            raise ValueError(
                f"{option} must be left out, got {given[key]!r}; --config-dir adds a folder of your own files"
            )
    if given["config_dir"] is not None and not Path(given["config_dir"]).is_dir():
        raise ValueError(f"--config-dir must be a folder, got {given['config_dir']!r}")


def import_work(name: str) -> ModuleType:
    """Import the module behind a script.

    Raises:
        ImportError: If torch and torchvision do not fit together. A CPU build of one beside a CUDA build of the other
            fails deep inside torchvision, with no hint at why.
    """
    try:
        return importlib.import_module(WORK[name])
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise ImportError(
            "the installed torch and torchvision come from different builds; install the pair from one index in one "
            "command: pip install --force-reinstall torch torchvision"
        ) from error


def with_resume(arguments: list[str]) -> list[str]:
    """Put the overrides that a run was started with before the ones given now, where ``resume=<run folder>`` is given.

    Where another option of a group is chosen now (``executor=serial``), what was set below the group is left out: it
    belonged to the option of then (``executor.workers=2``).
    """
    given = [argument for argument in arguments if argument.startswith("resume=")]
    if not given or given[-1] == "resume=null":
        return arguments
    folder = Path(given[-1].removeprefix("resume=").strip("'\""))
    saved, choices = _started_with(folder)
    # Quoted, a path may hold what means something to Hydra, such as an equals sign.
    quoted = "'" + str(folder).replace("'", r"\'") + "'"
    rest = [argument for argument in arguments if argument not in given]
    groups = _chosen_anew(rest, choices)
    below = tuple(prefix for group in groups for prefix in (f"{group}/", group.replace("/", ".") + "."))
    now = {argument.partition("=")[0] for argument in arguments}
    # What the folder says about Hydra itself, or about whom to trust, is not for the folder to say.
    saved = [item for item in saved if not re.match(r"[+~]*(hydra[./@]|resume=|trust=)", item)]
    for item in saved:
        if re.search(r"\$\{.*:", item) and item.partition("=")[0] not in now:
            raise ValueError(f"{item.partition('=')[0]} must be given again, got {item!r} of {folder}")
    # .hydra keeps the overrides of the first start, so that a run can be resumed any number of times.
    return [
        *(item for item in saved if not item.lstrip("+~").startswith(below)),
        *rest,
        f"resume={quoted}",
        f"hydra.run.dir={quoted}",
        "hydra.output_subdir=null",
    ]


def _started_with(folder: Path) -> tuple[list[str], Mapping[str, Any]]:
    """Return the overrides that a run was started with, and the options that were chosen with them.

    They are the run's own notes: Hydra writes ``.hydra`` anew for every start in a folder, refused or not.
    """
    file = folder / "overrides.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"resume={folder}: there is no run in this folder (no {file})")
    try:
        noted: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        return [str(item) for item in noted["overrides"]], noted["choices"]
    except (OmegaConfBaseException, YAMLError, ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{file} is damaged: {(str(error).splitlines() or [''])[0]}") from error


def _chosen_anew(arguments: list[str], before: Mapping[str, Any]) -> list[str]:
    """Return the groups of which the arguments choose another option than a run had before."""
    pairs = [argument.partition("=")[::2] for argument in arguments if not argument.startswith("-")]
    return [group for group, option in pairs if group and (CONF / group).is_dir() and before.get(group) != option]
