"""The federated loop: sample, train, aggregate, repeat. It knows no method and is never subclassed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger

from fl_lightning.aggregators import Aggregator
from fl_lightning.callback import FederatedCallback, check_hook_names
from fl_lightning.checks import at_least, one_of
from fl_lightning.client import Broadcast, Client, ClientInfo, Exam, Scores, Split, Update
from fl_lightning.cohort import Cohort
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.executors.executor import Executor, Outcome
from fl_lightning.fit.local import FitPlan, LocalTraining
from fl_lightning.seeding import derive_seed, global_seed
from fl_lightning.sharing import Sharing
from fl_lightning.state import State, all_finite

if TYPE_CHECKING:
    from fl_lightning.module import FederatedModule

log = logging.getLogger(__name__)

OnBadUpdate = Literal["raise", "drop"]
OnClientError = Literal["raise", "skip"]


class DivergedError(ValueError):
    """A model or what a client sends holds NaN or an infinity."""


class FederatedLoop:
    """Runs the rounds of a federation. It reaches clients through its executor alone.

    Args:
        rounds: Number of rounds, at least 0.
        seed: The seed of everything random.
        cohort: Who takes part in a round.
        sharing: Which tensors travel.
        local: How a client trains.
        aggregator: How the server merges.
        executor: The way to the clients: where they are described, fitted, scored.
        callbacks: Plug-ins by name: federated callbacks, and Lightning callbacks that live for one fit.
        metrics: What models are scored by; None: accuracy and loss.
        logger: Any Lightning logger, for callbacks that log.
        on_bad_update: What an update with NaN or an infinity does: ``raise`` stops the run, ``drop`` leaves it out and
            counts it.
        on_client_error: What an exception within a client's fit does: ``raise`` stops the run, ``skip`` leaves the
            client out of the round and counts it.
    """

    def __init__(
        self,
        rounds: int,
        seed: int,
        cohort: Cohort,
        sharing: Sharing,
        local: LocalTraining,
        aggregator: Aggregator,
        executor: Executor,
        callbacks: Mapping[str, Callback] | None = None,
        metrics: Metrics | None = None,
        logger: Logger | None = None,
        on_bad_update: OnBadUpdate = "raise",
        on_client_error: OnClientError = "raise",
    ) -> None:
        at_least("rounds", rounds, 0)
        one_of("on_bad_update", on_bad_update, OnBadUpdate)
        one_of("on_client_error", on_client_error, OnClientError)
        self.rounds = rounds
        self.seed = seed
        self.cohort = cohort
        self.sharing = sharing
        self.local = local
        self.aggregator = aggregator
        self.executor = executor
        self.callbacks: dict[str, Callback] = {}
        for name, callback in (callbacks or {}).items():
            self.add_callback(name, callback)
        self.metrics = metrics or Metrics()
        self.logger = logger
        self.on_bad_update = on_bad_update
        self.on_client_error = on_client_error

        self.round = 0
        self.state_round = -1  # the round that made `state`
        self.should_stop = False  # end after the running round
        self.interrupted = False  # and leave the rest to a resumed run
        self.state: State = {}
        self.kept_global: State | None = None
        self.clients: list[ClientInfo] = []
        self.unseen: list[ClientInfo] = []
        self.history: list[dict[str, float]] = []
        self.bytes_up = 0
        self.bytes_down = 0
        self.seconds = 0.0
        self._metrics: dict[str, float] = {}
        self._is_open = False

    def add_callback(self, name: str, callback: Callback) -> None:
        """Add a plug-in behind those that are there."""
        if name in self.callbacks:
            raise ValueError(f"there are two callbacks named {name!r}; give one another name")
        if not isinstance(callback, Callback):
            raise TypeError(f"callbacks.{name} is a {type(callback).__name__}, which is no lightning.pytorch.Callback")
        if isinstance(callback, FederatedCallback):
            check_hook_names(callback, name)
            callback.name = name
        self.callbacks[name] = callback

    @property
    def federated_callbacks(self) -> list[FederatedCallback]:
        """The callbacks that live for the whole federation, in their order."""
        return [callback for callback in self.callbacks.values() if isinstance(callback, FederatedCallback)]

    def fit(
        self,
        module: FederatedModule,
        clients: Sequence[Client],
        unseen: Sequence[Client] = (),
        resume: Mapping[str, Any] | None = None,
    ) -> State:
        """Run the rounds that are left.

        Args:
            module: The model with its initial values.
            clients: The clients, where they live in this process.
            unseen: Clients that never train; only evaluated on.
            resume: What :meth:`state_dict` gave, to go on from there.

        Returns:
            The shared tensors after the last round.
        """
        with self.open(module, clients, unseen, resume):
            self.run_rounds()
        return self.state

    @contextmanager
    def open(
        self,
        module: FederatedModule,
        clients: Sequence[Client],
        unseen: Sequence[Client] = (),
        resume: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Open the way to the clients for as long as the context lasts; the arguments are those of :meth:`fit`."""
        self.module = module
        self.local.metrics = self.metrics
        self.local.setup(module, self.sharing, list(self.callbacks.values()), self.seed)
        self.local.keeps_updates = self._updates_may_stay()
        self._people = [*clients, *unseen]
        newcomers = {client.id for client in unseen}
        with self._reach():
            known = self.executor.describe()
            self.unseen = [info for info in known if info.unseen or info.id in newcomers]
            self.clients = [info for info in known if info not in self.unseen]
            self.cohort.size(len(self.clients))
            self.aggregator.setup(module, self.clients, self.device)
            self.state = {name: self.local.initial[name] for name in self.sharing.names(module)}
            if resume is not None:
                self.load_state_dict(resume)
            try:
                yield
            finally:
                for callback in self.federated_callbacks:
                    callback.on_federation_close(self)

    def _updates_may_stay(self) -> bool:
        """Tell whether updates are averaged where they were trained: nothing else may ask for their tensors."""
        return (
            self.executor.keeps_updates(self.device)
            and self.aggregator.only_averages
            and type(self.local.plan) is FitPlan
            and self.device.type != "mps"  # which has no float64 to sum in
            and not any(callback.needs_updates for callback in self.federated_callbacks)
        )

    @contextmanager
    def _reach(self) -> Iterator[None]:
        """Keep the executor up."""
        if self._is_open:
            yield
            return
        self._is_open = True
        try:
            self.executor.setup(self.local, self._people)
            yield
        finally:
            self._is_open = False
            self.executor.close()

    def run_rounds(self) -> None:
        """Run the rounds that are left, on an open loop."""
        for callback in self.federated_callbacks:
            callback.on_federation_start(self)
        while self.round < self.rounds and not self.should_stop:
            # What the server's half of a method draws follows from the seed too; a fit has a seed of its own.
            with global_seed(derive_seed(self.seed, "server", self.round), self.local.device):
                self._run_round()
        if not self.interrupted:
            self.rounds = self.round  # fewer than asked for where a callback ended them
            for callback in self.federated_callbacks:
                callback.on_federation_end(self)

    def _run_round(self) -> None:
        start = time.monotonic()
        self._metrics = {}
        bytes_before = self.bytes_up, self.bytes_down

        # 1. Draw the cohort.
        cohort = self.cohort.draw(self.clients, self.round, self.seed)
        for callback in self.federated_callbacks:
            callback.on_round_start(self, cohort)

        # 2. Train the clients, and 3. merge their updates as they come.
        self._sound: list[int] = []
        tasks = [(client, self.broadcast(client)) for client in cohort]
        self.bytes_down += sum(broadcast.num_bytes for _, broadcast in tasks)
        merged = self.aggregator.aggregate(self.state, self._updates(tasks))
        if not all_finite(merged):
            raise DivergedError(
                f"round {self.round}: the merged model holds NaN or an infinity, which no update did; "
                "lower aggregator.lr"
            )
        self.state, self.state_round = merged, self.round
        self.executor.commit(self._sound)
        for callback in self.federated_callbacks:
            callback.on_aggregate_end(self)
        seconds = time.monotonic() - start

        # 4. Measure, log, save.
        self.log(
            {
                "traffic/bytes_up": self.bytes_up - bytes_before[0],
                "traffic/bytes_down": self.bytes_down - bytes_before[1],
                "time/seconds": seconds,
                "time/clients_per_second": len(cohort) / max(seconds, 1e-9),
            }
        )
        for callback in self.federated_callbacks:
            callback.on_round_end(self)
        self.seconds += time.monotonic() - start
        self.history.append({"round": self.round, **self._metrics})
        self.round += 1
        for callback in self.federated_callbacks:
            callback.on_round_logged(self, self.history[-1])

    def _updates(self, tasks: Sequence[tuple[ClientInfo, Broadcast]]) -> Iterator[Update]:
        logged: list[Mapping[str, float]] = []
        failed = bad = 0
        for outcome in self.executor.run(tasks):
            client, update = outcome.client, outcome.update
            if update is None:
                if self.on_client_error == "raise":
                    raise self._failure(f"round {self.round}", outcome, "loop.on_client_error=skip goes on without it")
                log.warning("round %d: client %s left out: %s", self.round, client.name, outcome.error)
                failed += 1
                continue
            self.bytes_up += update.num_bytes
            for callback in self.federated_callbacks:
                callback.on_receive(self, client, update)
            if problem := _not_finite(outcome):
                if self.on_bad_update == "raise":
                    raise DivergedError(
                        f"round {self.round}, client {client.name}: its {problem} holds NaN or an infinity; lower the "
                        "learning rate, clip gradients, or set loop.on_bad_update=drop to go on without such updates"
                    )
                log.warning("round %d: client %s dropped: its %s is not finite", self.round, client.name, problem)
                bad += 1
                continue
            self._sound.append(client.id)
            logged.append(update.metrics)
            for callback in self.federated_callbacks:
                callback.on_update(self, client, update)
            yield replace(update, state={**update.state, **update.here}) if update.here else update
        self.log({f"fit/{name}": mean for name, mean in _means(logged).items()})
        self.log({"round/trained": len(self._sound)})
        if self.on_client_error == "skip":
            self.log({"round/failed": failed})
        if self.on_bad_update == "drop":
            self.log({"round/dropped": bad})
        if (failed or bad) and not self._sound:
            log.warning("round %d: no client is left; the model stays as it was", self.round)

    def broadcast(self, client: ClientInfo) -> Broadcast:
        """Return what the server would send to a client now."""
        broadcast = Broadcast(self.round, self._shared_state(client))
        for callback in self.federated_callbacks:
            callback.on_broadcast(self, client, broadcast)
        return broadcast

    def _shared_state(self, client: ClientInfo) -> State:
        state = self.aggregator.broadcast(self.state, client)
        return {name: state[name] for name in self.sharing.names(self.module, client)}

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add numbers to the running round."""
        self._metrics.update(metrics)

    def ask(self, name: str, clients: Sequence[ClientInfo], with_state: bool = True) -> dict[int, State]:
        """Ask clients something before they train; the bytes of request and answer count.

        Args:
            name: The callback whose :meth:`~fl_lightning.callback.FederatedCallback.on_request` answers.
            clients: Whom to ask.
            with_state: Whether each gets the shared tensors as they are now.

        Returns:
            The answers by client id.
        """
        tasks = [
            (client, Broadcast(self.round, self._shared_state(client) if with_state else {}, request=name))
            for client in clients
        ]
        self.bytes_down += sum(broadcast.num_bytes for _, broadcast in tasks)
        answers = {}
        for outcome in self.executor.run(tasks):
            if outcome.update is None:
                raise self._failure(f"round {self.round}, request of {name}", outcome)
            self.bytes_up += outcome.update.num_bytes
            answers[outcome.client.id] = outcome.update.extra
        return answers

    def run_stage(self, name: str, clients: Sequence[ClientInfo], round: int) -> dict[str, float]:
        """Let clients train outside the rounds, on what the server holds now. Nothing is sent back or merged.

        Within a round, what the fits log goes to its row as ``stage/<name>/<metric>``, the mean over clients.

        Args:
            name: The callback whose :meth:`~fl_lightning.callback.FederatedCallback.stage` it is. The client keeps its
                model under this name.
            clients: Who trains; those that never took part start from the global model, where there is one.
            round: The round that names the random streams of these fits.

        Returns:
            What the fits logged, means over clients by metric.
        """
        complete = self.global_state() or {}
        newcomers = {client.id for client in self.unseen}

        def tasks() -> Iterator[tuple[ClientInfo, Broadcast]]:
            for client in clients:
                state = self._shared_state(client)
                if client.id in newcomers:
                    state = {**state, **complete}
                broadcast = Broadcast(round, state, stage=name)
                for callback in callbacks:
                    callback.on_broadcast(self, client, broadcast)
                yield client, broadcast

        callbacks = self.local.stages[name].federated_callbacks
        logged = []
        with self._reach():
            for outcome in self.executor.run(tasks()):
                if outcome.update is None:
                    raise self._failure(name, outcome)
                logged.append(outcome.update.metrics)
                for callback in callbacks:
                    callback.on_update(self, outcome.client, outcome.update)
        means = _means(logged)
        self.log({f"stage/{name}/{metric}": mean for metric, mean in means.items()})
        return means

    def score(self, exams: Iterable[tuple[ClientInfo, Exam]]) -> list[Scores]:
        """Have models scored where the clients' data are.

        Args:
            exams: Clients, each with the model and the split to score.

        Returns:
            The scores, in the order of the exams.
        """
        found = []
        with self._reach():
            for outcome in self.executor.run(exams):
                if outcome.scores is None:
                    raise self._failure("scoring", outcome)
                found.append(outcome.scores)
        return found

    def global_exam(self, split: Split, **options: Any) -> Exam | None:
        """Return the exam of the global model, or None where the method has no meaningful one.

        Args:
            split: ``train``, ``val`` or ``test``.
            options: Further fields of the :class:`~fl_lightning.client.Exam`.
        """
        state = self.global_state()
        if state is None:
            return None
        fixed = self.sharing.fixed_names(self.module)  # the same everywhere from the start
        return Exam(split, {name: tensor for name, tensor in state.items() if name not in fixed}, **options)

    def personal_exam(self, client: ClientInfo, split: Split, **options: Any) -> Exam:
        """Return the exam of a client's personal model: its own tensors, and the shared ones as they are now.

        Args:
            client: The client.
            split: ``train``, ``val`` or ``test``.
            options: Further fields of the :class:`~fl_lightning.client.Exam`.
        """
        makers = [callback for callback in self.federated_callbacks if callback.personalizes(self, client)]
        if makers:
            makers[-1].prepare_personal(self)
            return Exam(split, personal=True, stage=makers[-1].name, **options)
        return Exam(split, self._shared_state(client), personal=True, **options)

    def personal_state(self, client: Client | ClientInfo) -> State:
        """Return all tensors of a client's personal model, which it hands over for this."""
        info = next(one for one in [*self.clients, *self.unseen] if one.id == client.id)
        [scores] = self.score([(info, self.personal_exam(info, "test", metrics=(), fetch=True))])
        assert scores.model is not None
        return scores.model

    def personalizes(self, client: ClientInfo) -> bool:
        """Whether a callback has a model of its own making for a client."""
        return any(callback.personalizes(self, client) for callback in self.federated_callbacks)

    def global_state(self) -> State | None:
        """Return all tensors of the global model, or None where the method has no meaningful one."""
        if self.kept_global is not None:
            return self.kept_global
        state = {name: self.local.initial[name] for name in self.sharing.fixed_names(self.module)} | self.state
        for callback in self.federated_callbacks:
            state.update(callback.global_state(self))
        names = self.module.global_names
        return {name: state[name] for name in names} if state.keys() >= set(names) else None

    @property
    def device(self) -> torch.device:
        """Where fits run in this process."""
        return self.local.device

    @property
    def initial(self) -> State:
        """All tensors of the model before the first round."""
        return self.local.initial

    @property
    def num_classes(self) -> int:
        """Number of classes of the clients' data; 0 where labels are no classes."""
        return max((len(client.label_counts) for client in self.clients), default=0)

    @property
    def has_personal(self) -> bool:
        """Whether clients have models of their own."""
        known = len(self.state) + len(self.sharing.fixed_names(self.module))
        return (
            self.module.has_personal_model
            or known < len(self.local.initial)
            or any(self.personalizes(client) for client in self.clients)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on: tensors and plain values only."""
        return {
            "round": self.round,
            "state_round": self.state_round,
            "base": self.local.base_checksum,
            "state": self.state,
            "aggregator": self.aggregator.state_dict(),
            "callbacks": {callback.name: callback.state_dict() for callback in self.federated_callbacks},
            "executor": self.executor.state_dict(),
            "history": self.history,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""
        if state_dict.get("base", self.local.base_checksum) != self.local.base_checksum:
            raise ValueError(
                "the frozen weights must be those that the run began with, and are others; is the file of init_from= "
                "or of model.name= another one now?"
            )
        self.round = state_dict["round"]
        self.state_round = state_dict["state_round"]
        self.state = dict(state_dict["state"])
        self.aggregator.load_state_dict(state_dict["aggregator"])
        for callback in self.federated_callbacks:
            if callback.name in state_dict["callbacks"]:  # one that only looks on may have come since
                callback.load_state_dict(state_dict["callbacks"][callback.name])
        self.executor.load_state_dict(state_dict["executor"])
        self.history = list(state_dict["history"])
        self.bytes_up = state_dict["bytes_up"]
        self.bytes_down = state_dict["bytes_down"]
        self.seconds = state_dict["seconds"]

    @staticmethod
    def _failure(what: str, outcome: Outcome, advice: str = "") -> RuntimeError:
        """Return the exception that ends the run after a client's, which is its cause."""
        error = RuntimeError(f"{what}, client {outcome.client.name}: {outcome.error}{f' ({advice})' if advice else ''}")
        error.__cause__ = outcome.error
        return error


def _means(logged: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the fits that logged it."""
    values: dict[str, list[float]] = {}
    for metrics in logged:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}


def _not_finite(outcome: Outcome) -> str:
    """Say which part of a fit's outcome holds NaN or an infinity; empty if none does."""
    assert outcome.update is not None
    update = outcome.update
    if not all(all_finite(part) for part in (update.state, update.extra, update.here)):
        return "update"
    return "" if outcome.own_is_finite else "own part"
