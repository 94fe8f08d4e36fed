"""Defines what every executor does; the server reaches clients through it alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from fl_lightning.client import Broadcast, Client, ClientInfo, Exam, Fit, Scores, Update
from fl_lightning.fit.local import LocalTraining
from fl_lightning.run.config import instantiate
from fl_lightning.state import State, all_finite

Message = Broadcast | Exam
Task = tuple[ClientInfo, Message]


@dataclass
class Outcome:
    """What came of one message: the update of a fit, the scores of an exam, or the exception that ended it.

    Attributes:
        client: The client.
        update: What a fit sends back.
        scores: What an exam found.
        error: What went wrong.
        own_is_finite: Whether what a fit leaves with the client holds neither NaN nor an infinity.
    """

    client: ClientInfo
    update: Update | None = None
    scores: Scores | None = None
    error: Exception | None = None
    own_is_finite: bool = True


class Executor(ABC):
    """Describes, fits, scores and keeps: whatever belongs to a client is reached through here alone.

    Results depend neither on where fits run nor on how many run at once. What a fit leaves with its client is put aside
    until :meth:`commit`: a round that is interrupted changes nothing.

    Attributes:
        recipe: The configuration from which what :meth:`setup` is given can be made anew elsewhere.
    """

    relays = False
    """Whether clients can train one after another, each from what the one before left in ``update.here``."""

    recipe: Mapping[str, Any] = {}

    def keeps_updates(self, device: torch.device) -> bool:
        """Tell whether updates that are only averaged may stay as they were trained: where, and in one piece.

        Args:
            device: Where fits run.
        """
        return False

    def find_data(self, config: Mapping[str, Any]) -> Any:
        """Return the clients' data, or what is known of them where they are elsewhere.

        Args:
            config: The configuration, plain.

        Returns:
            A :class:`~fl_lightning.data.federated_data.FederatedData`.
        """
        return instantiate(config["data"], "data")

    def begin(self) -> None:  # noqa: B027 - in this process, clients are made with each run
        """Begin a run of its own at clients that are elsewhere: what they hold of other runs is not taken up."""

    @abstractmethod
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        """Get ready, before the first round.

        Args:
            local: What runs a fit; already set up.
            clients: All clients of the federation that live in this process.
        """

    @abstractmethod
    def describe(self) -> list[ClientInfo]:
        """Return what the server may know of each client, in their order."""

    @abstractmethod
    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Run fits and exams, and yield what came of each, in the order of the tasks.

        Args:
            tasks: Clients, each with a :class:`Broadcast` to train on or an :class:`Exam` to answer; consumed as places
                become free.
        """

    @abstractmethod
    def commit(self, ids: Iterable[int]) -> None:
        """Let what the last fits of these clients left with them take the place of what was there; drop the rest."""

    @abstractmethod
    def keep(self, label: str) -> None:
        """Let every client put its personal tensors aside, in the place of those of the same label."""

    @abstractmethod
    def restore(self, label: str) -> None:
        """Let every client take up the personal tensors that it put aside under a label."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to find the clients as they are now: tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def close(self) -> None:  # noqa: B027 - most took nothing
        """Give back what :meth:`setup` took; called also after an error."""

    def disconnect(self) -> None:  # noqa: B027 - most hold nobody
        """Let go of whoever was reached through :meth:`find_data`, at the end of a command."""


class Simulation(Executor):
    """Keeps the clients' state in this process, where :meth:`_answers` finds it, wherever their fits run."""

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        self.local = local
        self.clients = {client.id: client for client in clients}
        self._pending: dict[int, Fit] = {}

    @override
    def describe(self) -> list[ClientInfo]:
        return [client.describe() for client in self.clients.values()]

    @override
    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        waiting: deque[ClientInfo] = deque()

        def own() -> Iterator[tuple[Client, Message]]:
            for info, message in tasks:
                if info.id not in self.clients:
                    raise ValueError(f"client {info.name} is not among those that the executor was set up with")
                waiting.append(info)
                yield self.clients[info.id], message

        for answer in self._answers(own()):
            info = waiting.popleft()
            if isinstance(answer, Fit):
                yield self._take(info, answer)
            elif isinstance(answer, Scores):
                yield Outcome(info, scores=answer)
            else:
                yield Outcome(info, error=answer)

    @abstractmethod
    def _answers(self, tasks: Iterable[tuple[Client, Message]]) -> Iterator[Fit | Scores | Exception]:
        """Yield what came of each task, in their order; clients are only read."""

    def _take(self, info: ClientInfo, fit: Fit) -> Outcome:
        if fit.stage:
            self.clients[info.id].models[fit.stage] = fit.personal
        else:
            self._pending[info.id] = fit
        return Outcome(info, update=fit.update, own_is_finite=all_finite(fit.personal))

    @override
    def commit(self, ids: Iterable[int]) -> None:
        for id in ids:
            fit, client = self._pending[id], self.clients[id]
            client.personal, client.memory = fit.personal, fit.memory
        self._pending = {}

    @override
    def keep(self, label: str) -> None:
        for client in self.clients.values():
            # References are enough: states are replaced from round to round, never written to.
            client.kept[label] = dict(client.personal)

    @override
    def restore(self, label: str) -> None:
        for client in self.clients.values():
            client.personal = dict(client.kept[label])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "clients": {
                id: {"personal": client.personal, "memory": client.memory, "kept": client.kept}
                for id, client in self.clients.items()
                if client.personal or client.memory or client.kept
            }
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for id, client in self.clients.items():
            held = state_dict["clients"].get(id, {})
            client.personal = dict(held.get("personal", {}))
            client.memory = dict(held.get("memory", {}))
            client.kept = {label: dict(state) for label, state in held.get("kept", {}).items()}


def own_part(client: Client, message: Message) -> tuple[State, State, dict[str, State]]:
    """Return what a client elsewhere needs of its own for a message: personal tensors, memory, models of stages."""
    if isinstance(message, Broadcast):
        return client.personal, client.memory, {}
    models = {message.stage: client.models[message.stage]} if message.stage else {}
    return client.personal if message.personal and not message.stage else {}, {}, models
