"""The base of all plug-ins: a Lightning callback with a server half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger

from fl_lightning.state import DeclaredState

if TYPE_CHECKING:
    from fl_lightning.aggregators import Aggregator
    from fl_lightning.client import Broadcast, Client, ClientInfo, Exam, Scores, Split, Update
    from fl_lightning.cohort import Cohort
    from fl_lightning.evaluation.predict import Metrics
    from fl_lightning.module import FederatedModule
    from fl_lightning.sharing import Sharing
    from fl_lightning.state import State


@dataclass(frozen=True)
class Stage:
    """A training outside the rounds: how long it is, in epochs or in steps, and which callbacks act in it."""

    epochs: int = 0
    steps: int = 0
    callbacks: Mapping[str, Callback] = field(default_factory=dict)


class Server(Protocol):
    """What a hook may use of the federation: the server's side of a run (:class:`fl_lightning.loop.FederatedLoop`)."""

    round: int
    rounds: int
    state_round: int
    seed: int
    should_stop: bool
    module: FederatedModule
    clients: list[ClientInfo]
    unseen: list[ClientInfo]
    state: State
    kept_global: State | None
    history: list[dict[str, float]]
    aggregator: Aggregator
    cohort: Cohort
    sharing: Sharing
    local: Any
    executor: Any
    metrics: Metrics
    logger: Logger | None
    bytes_up: int
    bytes_down: int

    @property
    def device(self) -> torch.device:
        """Return where fits run in this process."""

    @property
    def initial(self) -> State:
        """Return all tensors of the model before the first round."""

    @property
    def num_classes(self) -> int:
        """Return the number of classes; 0 where labels are no classes."""

    @property
    def has_personal(self) -> bool:
        """Tell whether clients have models of their own."""

    @property
    def federated_callbacks(self) -> list[FederatedCallback]:
        """Return the callbacks that live for the whole federation."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """Add numbers to the running round."""

    def global_state(self) -> State | None:
        """Return the global model, or None."""

    def personal_state(self, client: ClientInfo) -> State:
        """Return a client's personal model."""

    def personalizes(self, client: ClientInfo) -> bool:
        """Tell whether a callback makes the model of a client."""

    def global_exam(self, split: Split, **options: Any) -> Exam | None:
        """Return the exam of the global model, or None."""

    def personal_exam(self, client: ClientInfo, split: Split, **options: Any) -> Exam:
        """Return the exam of a client's personal model."""

    def score(self, exams: Iterable[tuple[ClientInfo, Exam]]) -> list[Scores]:
        """Have models scored where the data are."""

    def ask(self, name: str, clients: Sequence[ClientInfo], with_state: bool = True) -> dict[int, State]:
        """Ask clients something; the bytes count."""

    def run_stage(self, name: str, clients: Sequence[ClientInfo], round: int) -> dict[str, float]:
        """Let clients train outside the rounds, and return the means of what their fits logged."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on."""


class FederatedCallback(DeclaredState, Callback):
    """A behaviour that lives for the whole federation, its client half and its server half in one class.

    When each hook runs, ``S`` at the server and ``C`` at a client (possibly in another process, or at another site):

    .. code-block:: text

        S  check(module, trainer)
        S  on_federation_start(loop)
           for each round:
        S    on_round_start(loop, cohort)                  may ask clients first, by loop.ask
        S    on_broadcast(loop, client, broadcast)         for the whole cohort, before anybody trains
             for each client of the cohort:
        C      on_download(client, state)                  undoes what on_broadcast did to tensors for the way
        C      on_client_start(client, module, broadcast)
        C      Lightning's own hooks, on_fit_start ... on_fit_end, around one Trainer.fit
        C      on_client_end(client, module, update)
        C      on_upload(client, module, update)           when all callbacks have had their on_client_end
        S      on_receive(loop, client, update)            the bytes are counted, nothing is checked or merged yet
        S      on_update(loop, client, update)             in the cohort's order, whatever order they finished in
        S    on_aggregate_end(loop)
        S    on_round_end(loop)
        S    on_round_logged(loop, metrics)                the round's numbers are complete, loop.round is the next one
        S  on_federation_end(loop)
        S  on_federation_close(loop)                       also after an error

    The order does not depend on the executor. The halves may run in different processes, so they talk through
    ``broadcast.extra`` and ``update.extra`` alone; the client half remembers in ``client.memory``. The server half gets
    a :class:`~fl_lightning.client.ClientInfo`, the client half the :class:`~fl_lightning.client.Client` itself, with
    its data. Server state is declared in :attr:`saved`: it is in every checkpoint. State of one fit is set in
    ``on_client_start`` or ``on_fit_start``, never in ``__init__``.

    What may be relied on:

    * What came down is shared by all clients of a round: neither half writes into tensors of ``broadcast``, it puts
      others in their place. ``update`` holds tensors on the CPU (for callbacks that say :attr:`reads_updates`), and
      only names of tensors that are shared.
    * What the client half puts into ``client.memory`` takes effect when the round is over.
    * In ``on_update`` ``loop.state`` is still the old model, in ``on_aggregate_end`` the new one.
    * Within rounds torch's generators follow from the run's seed. The model is surely on its device from
      ``on_train_start`` to ``on_train_end`` (``pl_module.device``); there a method may train before the fit.
    * What is saved, and ``client.memory``, hold tensors and plain values: nothing else is read back from a checkpoint.

    Any other Lightning callback lives for one fit: each fit gets a fresh copy of it.
    """

    name: str = ""
    """The key under ``callbacks`` in the configuration; set by the loop."""

    reads_updates: bool = True
    """Whether a hook that gets an ``update`` looks at its tensors. Where no callback has such hooks or all say False,
    updates may stay on the accelerator until they are averaged, which spares a copy of the model for every client."""

    @property
    def needs_updates(self) -> bool:
        """Whether tensors of updates must come to the CPU, for a hook of this callback reads them."""
        hooks = ("on_client_end", "on_upload", "on_receive", "on_update")
        given = any(getattr(type(self), name) is not getattr(FederatedCallback, name) for name in hooks)
        return self.reads_updates and given

    @property
    def state_key(self) -> str:
        """A key of its own, so that one class may appear twice (Lightning refuses two with one key)."""
        return f"{type(self).__qualname__}:{self.name}"

    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        """Called once before any training, with a Trainer like those of the fits: raise here for what cannot work."""

    def on_federation_start(self, loop: Server) -> None:
        """Called once, when the loop knows its module and clients, before the first (or the resumed) round."""

    def on_round_start(self, loop: Server, cohort: Sequence[ClientInfo]) -> None:
        """Called when the cohort is drawn."""

    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        """Called before a message goes down; may change it: tensors are replaced, never written to."""

    def on_request(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> State:
        """Return what a client answers to ``loop.ask``; the model of the broadcast is loaded, nothing is trained."""
        raise NotImplementedError(f"callbacks.{self.name} asks clients, but has no on_request")

    def on_download(self, client: Client, state: State) -> State:
        """Called first at the client, before the model is loaded; returns what came down as the model has it."""
        return state

    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        """Called when the model is loaded, before the fit."""

    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        """Called after the fit; may change the update before it is sent."""

    def on_upload(self, client: Client, module: FederatedModule, update: Update) -> None:
        """Called last at the client; transforms what is sent: clips, masks, compresses."""

    def on_receive(self, loop: Server, client: ClientInfo, update: Update) -> None:
        """Called first at the server; undoes what :meth:`on_upload` did for the way."""

    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        """Called when a sound update has arrived, before it is merged."""

    def on_aggregate_end(self, loop: Server) -> None:
        """Called when ``loop.state`` is the merged state; may replace it."""

    def on_round_end(self, loop: Server) -> None:
        """Called when the round is over; numbers handed to ``loop.log`` here belong to it."""

    def on_round_logged(self, loop: Server, metrics: Mapping[str, float]) -> None:
        """Called when the numbers of the round just over are complete; ``loop.round`` counts the rounds done."""

    def on_federation_end(self, loop: Server) -> None:
        """Called once after the last round."""

    def on_federation_close(self, loop: Server) -> None:
        """Called once at the very end, also after an error."""

    def stage(self) -> Stage | None:
        """Describe a training of its own, outside the rounds, which ``loop.run_stage`` runs where fits run."""
        return None

    def personalizes(self, loop: Server, client: ClientInfo) -> bool:
        """Tell whether the personal model of a client is now the one that :meth:`stage` makes."""
        return False

    def prepare_personal(self, loop: Server) -> None:
        """Called before clients that it personalizes are scored: see that their models are there."""

    def global_state(self, loop: Server) -> State:
        """Return tensors that complete the global model where the shared part alone does not (a global head)."""
        return {}

    def groups(self, loop: Server) -> dict[str, list[int]]:
        """Return groups of clients that are also scored apart: their ids by the group's name."""
        return {}

    def results(self, loop: Server) -> dict[str, Any]:
        """Return entries of its own for ``results.json``: plain values under a key that is not taken."""
        return {}


def check_hook_names(callback: FederatedCallback, name: str) -> None:
    """Check that whatever a callback calls a hook is one.

    Args:
        callback: The callback.
        name: Its key under ``callbacks``.

    Raises:
        ValueError: If a method's name begins like that of a hook, and is none.
    """
    known = [hook for hook in dir(FederatedCallback) if hook.startswith("on_")]
    for method in dir(type(callback)):
        if method.startswith("on_") and method not in known and callable(getattr(type(callback), method)):
            close = " or ".join(get_close_matches(method, known) or known)
            raise ValueError(f"callbacks.{name} has a method {method}, which is no hook; did you mean {close}?")
