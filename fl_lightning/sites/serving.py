"""Serves the models of a finished run to its sites: a client that cannot hold the whole model predicts with it."""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from typing_extensions import override

from fl_lightning.callbacks.checkpoint import read_checkpoint
from fl_lightning.callbacks.federated_evaluation import CHOOSING, FederatedEvaluation
from fl_lightning.client import Client, ClientInfo
from fl_lightning.fit.local import LocalTraining
from fl_lightning.loop import FederatedLoop
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.training import build_loop, fitting_module
from fl_lightning.run.trust import check_trusted
from fl_lightning.sites import messages
from fl_lightning.sites.executor import SitesExecutor, recipe
from fl_lightning.sites.jobs import Jobs
from fl_lightning.sites.seats import Seat, SiteData

log = logging.getLogger(__name__)

AT_SITES = "fl_lightning.sites.executor.SitesExecutor"


class ServingExecutor(SitesExecutor):
    """Reaches the sites of a run that is over, one at a time, whoever comes; it does not wait for the others.

    Args:
        clients: The names of the run's sites, in the order of their clients.
        settings: As in :class:`SitesExecutor`.
    """

    serves = True

    def __init__(self, clients: Sequence[str], **settings: Any) -> None:
        sites = settings.pop("sites")
        super().__init__(sites=dict(sites) if isinstance(sites, Mapping) else list(clients), **settings)
        self.names, self.on_missing = list(clients), "skip"
        self.standing: dict[str, Any] = {}
        self.restored = ""
        self._first = ""  # who is there, and was asked what the run's data look like

    @override
    def find_data(self, config: Mapping[str, Any]) -> SiteData:
        jobs = self.listen_for(config)
        assert self.host is not None
        while True:
            name = self.next_site()
            try:
                seat = self.described(name)
                break
            except RuntimeError as error:
                log.error("%s", error)
                self.host.release(name)
        self._first = name
        unseen = set(config["data"].get("unseen_clients") or ())
        jobs.seats = {
            name: Seat(replace(seat.info, id=index, name=name, unseen=name in unseen), seat.description)
            for index, name in enumerate(self.names)
        }
        self.recipe = recipe(config)
        return SiteData(list(jobs.seats.values()))

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        self.prepare(local)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.run_id, self.standing = state_dict["run"], state_dict["sites"]

    @override
    def restore(self, label: str) -> None:
        self.restored = label

    def next_site(self) -> str:
        """Wait for a site, and return its name."""
        assert self.host is not None
        first, self._first = self._first, ""
        return first or self.host.gather()[0]

    def described(self, name: str) -> Seat:
        """Return what a site says of its data.

        Raises:
            RuntimeError: If it cannot read them.
        """
        assert self._jobs is not None
        seat = self._jobs.seats.pop(name, None)  # it may have other data now
        try:
            [job] = self._jobs.serve([Jobs.job(name, self._jobs.describe)])
        finally:
            if seat is not None:
                self._jobs.seats[name] = seat
        if job.error is not None:
            raise RuntimeError(f"site {name}: {job.error}") from job.error
        header, states = job.content
        return Seat(messages.read_info(header, states, name), header)

    def admit(self, name: str) -> ClientInfo:
        """Let a site take up its state of the run's last checkpoint, and return its client.

        Raises:
            RuntimeError: If its data cannot be read, or have another form.
        """
        assert self._jobs is not None
        old, seat = self._jobs.seats[name], self.described(name)
        for key in ("shape", "type", "class_names"):
            if seat.description.get(key) != old.description.get(key):
                raise RuntimeError(
                    f"site {name}: its data have {key} {seat.description.get(key)}, the run's "
                    f"{old.description.get(key)}; bring them to one"
                )
        seat.info.id, seat.info.unseen = old.info.id, old.info.unseen
        self._jobs.seats[name] = seat
        self.life = secrets.token_hex(8)
        self.stand(seat, self.standing[name])
        if self.restored:
            seat.order("restore", self.restored)
        return seat.info


def serve(folder: Path, words: Sequence[str] = (), times: int | None = None, trust: Sequence[str] = ()) -> None:
    """Let each site of a run that comes predict or score with its model, as validation chose it.

    Args:
        folder: The run folder.
        words: ``executor.<key>=...``, where it shall be another than in the run.
        times: After how many sites to end; None: never.
        trust: Packages beside the known ones whose classes the run may name.

    Raises:
        ValueError: If the run's clients were not at sites, or a word is none.
    """
    run_folder = RunFolder(folder)
    config = plain(OmegaConf.create(run_folder.read_config()))
    check_trusted(config, "", trust, "the run to serve")
    if config["executor"]["_target_"] != AT_SITES or config["executor"].get("host") is not None:
        raise ValueError(
            f"{folder} must be a run with executor=sites, whose clients hold their part; models of a run in one "
            "process are files (evaluation.save_personal=true)"
        )
    checkpoint = read_checkpoint(run_folder.last)
    given = dict(config["executor"])
    for word in words:
        key, equals, value = word.partition("=")
        name = key.removeprefix("executor.")
        if not equals or not key.startswith("executor.") or name not in given or name == "sites":
            raise ValueError(f"{word} must be executor.<key>=<value> with one of {', '.join(sorted(given))}")
        given[name] = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))["value"]  # type: ignore
    given |= {
        "_target_": "fl_lightning.sites.serving.ServingExecutor",
        "clients": list(checkpoint["executor"]["sites"]),
    }
    loop = build_loop({**config, "executor": given, "logger": None, "resume": None}, run_folder, None)
    executor = loop.executor
    assert isinstance(executor, ServingExecutor)
    try:
        module = fitting_module(loop, config, executor.find_data(config))  # type: ignore[arg-type]
        with loop.open(module, [], [], checkpoint):
            for callback in loop.federated_callbacks:
                callback.on_federation_start(loop)
            evaluation = next(one for one in loop.federated_callbacks if isinstance(one, FederatedEvaluation))
            for view in CHOOSING:  # as the results of the run had it
                if view in evaluation.best:
                    evaluation.restore(loop, view)
            served = 0
            while times is None or served < times:
                _serve_one(loop, executor, executor.next_site())
                served += 1
    finally:
        executor.disconnect()


def _serve_one(loop: FederatedLoop, executor: ServingExecutor, name: str) -> None:
    """Let one site use its model; whatever goes wrong there, the next one is served."""
    assert executor.host is not None
    try:
        info = executor.admit(name)
        loop.state = dict(loop.state)  # a stage after the rounds is for this site alone
        loop.clients, loop.unseen = ([], [info]) if info.unseen else ([info], [])
        [scores] = loop.score([(info, loop.personal_exam(info, "test"))])
        values = ", ".join(f"{key} {value:.4g}" for key, value in scores.values.items())
        log.info("site %s: %d examples%s", name, scores.num_examples, f", {values}" if values else " predicted")
    except (RuntimeError, ValueError) as error:
        log.error("%s", error)
    finally:
        executor.host.release(name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a run's models to its sites, until told to stop."""
    options = argparse.ArgumentParser(
        prog="python -m fl_lightning.serve",
        description="Serve the models of a run with executor=sites to its sites, for fl_lightning.site --infer.",
    )
    options.add_argument("run", type=Path, help="run folder")
    options.add_argument("--times", type=int, help="end after so many sites; default: never")
    options.add_argument("--trust", action="append", default=[], help="a package of your own that the run may name")
    options.add_argument("words", nargs="*", help="executor.listen=..., and others of executor=sites")
    chosen = options.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    try:
        serve(chosen.run, chosen.words, chosen.times, chosen.trust)
    except (ValueError, TypeError, OSError, LookupError, RuntimeError, OmegaConfBaseException) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
