"""Names the files of a run, and sees that no run is overwritten."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fl_lightning import files
from fl_lightning.callbacks.checkpoint import CLIENTS, read_checkpoint
from fl_lightning.data.partition import Partition
from fl_lightning.run.config import differences
from fl_lightning.run.environment import environment

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

NO_INFLUENCE = (
    *("resume", "trust", "executor", "progress", "paths", "checkpoint", "logger", "dashboard", "study", "figures"),
)
"""Keys that change no result: where a run happens, what it shows, what it is part of."""

OLDEST = "0.2.0"
"""The oldest version whose run folders are read: before it, classes that ``config.yaml`` names had other names."""


class RunFolder:
    """Names the files of a run.

    Args:
        path: The folder; made if need be.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.partition = self.path / "partition.json"
        self.metrics = self.path / "metrics.csv"
        self.results = self.path / "results.json"
        self.global_model = self.path / "global_model.pt"
        self.figures = self.path / "figures"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.overrides = self.path / "overrides.yaml"
        self._lock: IO[bytes] | None = None

    def hold(self, wait: bool = False) -> None:
        """Keep the folder to this process for as long as it lives: two at once would write over one another's files.

        The lock is the system's, so that none is left behind however a process ends; forked workers do not inherit it.

        Args:
            wait: Whether to wait, where another process has it, until that one ends.

        Raises:
            ValueError: If another process has it, and not ``wait``.
        """
        if self._lock is not None or fcntl is None:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = open(self.path / ".lock", "ab")  # noqa: SIM115 - open until this process ends
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                log.warning("%s cannot be locked (%s); see that no second process runs in it", self.path, error)
            elif wait:
                log.warning("another process is running in %s; waiting for its end", self.path)
                fcntl.lockf(lock, fcntl.LOCK_EX)
            else:
                lock.close()
                raise ValueError(
                    f"another process is running in {self.path}; wait for its end, or choose another hydra.run.dir"
                ) from None
        self._lock = lock

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin a new run here.

        Raises:
            ValueError: If the folder already holds a run.
        """
        self.hold()
        if self.config.exists() or self.results.exists() or self.last.exists():
            raise ValueError(
                f"{self.path} already holds a run, and a run is never overwritten; "
                f"choose another hydra.run.dir, or continue it with resume={self.path}"
            )
        self._note_environment()
        if HydraConfig.initialized():
            # Hydra writes .hydra/ anew for every start in a folder, this one's or not, refused or not.
            # On one line and with an end, so that half of it is no YAML.
            hydra = HydraConfig.get()
            kept = {"overrides": list(hydra.overrides.task), "choices": OmegaConf.to_container(hydra.runtime.choices)}
            files.write_text(self.overrides, json.dumps(kept) + "\n")
        files.write_text(self.config, OmegaConf.to_yaml(OmegaConf.create(dict(config))))

    def started_with(self) -> list[str]:
        """Return the overrides that the run was started with; none if it was started from Python."""
        return [str(item) for item in OmegaConf.load(self.overrides).overrides] if self.overrides.is_file() else []

    def give_up(self) -> None:
        """Leave the folder to another run: this one failed before anything of it was worth keeping."""
        for file in (self.config, self.environment, self.partition, self.overrides):
            file.unlink(missing_ok=True)

    def resume(
        self, config: Mapping[str, Any], free: Iterable[str] = (*NO_INFLUENCE, "loop.rounds")
    ) -> dict[str, Any] | None:
        """Go on with the run that is here.

        Args:
            config: The configuration now.
            free: Keys that may differ from the run's own.

        Returns:
            Its last checkpoint; None if it was stopped before the first.

        Raises:
            FileNotFoundError: If there is no run.
            ValueError: If the configuration differs from the run's own in something that would change its results, the
                folder is held by another process, or a file is damaged or of another run, by name.
        """
        before = self.read_config()
        self.hold()
        checkpoint = None
        if self.last.exists():
            partition = Partition.load(self.partition) if self.partition.exists() else None
            checkpoint = read_checkpoint(self.last, self.identity(before, partition))
        if changed := self.changed_config(config, free):
            raise ValueError(
                f"{self.path} was run with another configuration: {'; '.join(changed[:6])}. "
                "Start a new run, or leave these as they were"
            )
        if _last_bits(before) != _last_bits(config):
            log.warning(
                "this run was begun with other executor.threads, or another way of stacking: last bits may differ"
            )
        for folder in (self.path, self.checkpoints, self.checkpoints / CLIENTS, self.figures):
            files.remove_leftovers(folder)
        if changed := self.changed_environment():
            log.warning("this run was begun in another environment, its last bits may differ: %s", "; ".join(changed))
        self._note_environment()
        return checkpoint

    def identity(self, config: Mapping[str, Any], partition: Partition | None) -> dict[str, str]:
        """Return hashes that tell this run from others, for its checkpoints.

        Args:
            config: The configuration; that of ``config.yaml`` once there is one.
            partition: Who holds which examples, if that is known.
        """
        kept = {key: value for key, value in config.items() if key not in NO_INFLUENCE}
        kept["loop"] = {key: value for key, value in (config.get("loop") or {}).items() if key != "rounds"}
        found = {"configuration": files.fingerprint(kept)}
        return found if partition is None else {**found, "partition": partition.hash}

    def changed_config(self, config: Mapping[str, Any], ignore: Iterable[str] = NO_INFLUENCE) -> list[str]:
        """List in words where the run's configuration differs from another in what changes results.

        A key that came after the run was made counts as its default of now, with a warning.
        """
        task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        given = {str(word).lstrip("+~").partition("=")[0] for word in task}
        before, added = _completed(self.read_config(), config, given)
        if added:
            log.warning("%s does not know %s yet; the default of now counts", self.config, ", ".join(added))
        return differences(before, dict(config), ignore)

    def changed_environment(self) -> list[str]:
        """List in words where what a run was last made with, if that was noted, differs from what is here now."""
        before = self.environments()
        return differences(before[-1], environment(), ["command"]) if before else []

    def environments(self) -> list[dict[str, str]]:
        """Return what the run was made with, start after start; empty where that was not noted."""
        if not self.environment.is_file():
            return []
        try:
            noted = json.loads(self.environment.read_text())
            if not (isinstance(noted, list) and all(isinstance(one, dict) for one in noted)):
                raise ValueError("it is no list of environments")
        except ValueError as error:
            log.warning("%s is damaged (%s) and is begun anew", self.environment, error)
            return []
        return noted

    def _note_environment(self) -> None:
        noted = [*self.environments(), environment()]
        files.write_text(self.environment, json.dumps(noted, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Return the configuration of the run, resolved.

        Raises:
            FileNotFoundError: If the folder holds no run.
            ValueError: If the file is damaged, or the run is of a version that is too old.
        """
        if not self.config.is_file():
            raise FileNotFoundError(f"{self.path} holds no run of train.py: there is no {self.config.name} in it")
        try:
            content = OmegaConf.to_container(OmegaConf.load(self.config), resolve=False)
        except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{self.config} is damaged: {reason}; start a new run") from error
        lacking = [key for key in ("seed", "data", "model") if key not in (content or {})]
        if not isinstance(content, dict) or lacking:
            raise ValueError(f"{self.config} is damaged: it lacks {', '.join(lacking)}")
        version = (self.environments() or [{}])[0].get("fl_lightning", OLDEST)
        if _numbers(version) < _numbers(OLDEST):
            raise ValueError(
                f"{self.path} was made by fl_lightning {version}; runs are read from {OLDEST} on; use the version and "
                f"commit that {self.environment.name} names, or start a new run"
            )
        return {str(key): value for key, value in content.items()}

    def keep_partition(self, partition: Partition) -> None:
        """Save who holds which examples, or, where that is saved already, make sure it is the same."""
        if self.partition.exists():
            Partition.load(self.partition).check_equal(partition)
        else:
            partition.save(self.partition)


def _completed(
    old: Mapping[str, Any], new: Mapping[str, Any], given: Container[str], path: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Add what an older configuration lacks: a key of the root or an argument of the same class, unless given now."""
    filled, added = dict(old), []
    for key, value in new.items():
        where = f"{path}.{key}" if path else str(key)
        if key in old:
            if isinstance(old[key], Mapping) and isinstance(value, Mapping):
                filled[key], inner = _completed(old[key], value, given, where)
                added += inner
        elif where not in given and (not path or ("_target_" in old and old["_target_"] == new.get("_target_"))):
            filled[key] = value
            added.append(where)
    return filled, added


def _last_bits(config: Mapping[str, Any]) -> tuple[Any, bool]:
    """Return what of the executor may change the last bits of a result."""
    executor = config.get("executor") or {}
    return executor.get("threads", 1), str(executor.get("_target_")).endswith("CohortExecutor")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:3] if part.isdigit()]
