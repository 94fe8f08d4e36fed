"""The base of all plug-ins: a Lightning callback with a server half."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, Update
    from fl_lightning.local import LocalTraining
    from fl_lightning.loop import FederatedLoop
    from fl_lightning.module import FederatedModule
    from fl_lightning.state import State


class FederatedCallback(Callback):
    """A behaviour that lives for the whole federation, its client half and its server half in one class.

    When each hook runs, ``S`` at the server and ``C`` at a client (possibly in another process):

    .. code-block:: text

        S  check(module, trainer)
        S  on_federation_start(loop)
           for each round:
        S    on_round_start(loop, cohort)
             for each client of the cohort:
        S      on_broadcast(loop, client, broadcast)
        C      on_client_start(client, module, broadcast)
        C      Lightning's own hooks, on_fit_start ... on_fit_end, around one Trainer.fit
        C      on_client_end(client, module, update)
        S      on_update(loop, client, update)             in the cohort's order, whatever order they finished in
        S    on_aggregate_end(loop)
        S    on_round_end(loop)
        S  on_federation_end(loop)

    The halves may run in different processes, so they talk through ``broadcast.extra`` and ``update.extra`` alone; the
    client half remembers in ``client.memory``. Server state belongs in ``state_dict``: it is saved with every
    checkpoint. State of one fit is set in ``on_client_start`` or ``on_fit_start``, never in ``__init__``.

    Any other Lightning callback lives for one fit: each fit gets a fresh copy of it.
    """

    name: str = ""
    """The key under ``callbacks`` in the configuration; set by the loop."""

    @property
    def state_key(self) -> str:
        """A key of its own, so that one class may appear twice (Lightning refuses two with one key)."""
        return f"{type(self).__qualname__}:{self.name}"

    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        """Called once before any training, with a Trainer like those of the fits: raise here for what cannot work."""

    def on_federation_start(self, loop: FederatedLoop) -> None:
        """Called once, when the loop knows its module and clients, before the first (or the resumed) round."""

    def on_round_start(self, loop: FederatedLoop, cohort: Sequence[Client]) -> None:
        """Called when the cohort is drawn."""

    def on_broadcast(self, loop: FederatedLoop, client: Client, broadcast: Broadcast) -> None:
        """Called before a message goes down; may change it: tensors are replaced, never written to."""

    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        """Called when the model is loaded, before the fit."""

    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        """Called after the fit; may change the update before it is sent."""

    def on_update(self, loop: FederatedLoop, client: Client, update: Update) -> None:
        """Called when a sound update has arrived, before it is merged."""

    def on_aggregate_end(self, loop: FederatedLoop) -> None:
        """Called when ``loop.state`` is the merged state; may replace it."""

    def on_round_end(self, loop: FederatedLoop) -> None:
        """Called when the round is over; numbers handed to ``loop.log`` here belong to it."""

    def on_federation_end(self, loop: FederatedLoop) -> None:
        """Called once after the last round."""

    def stage(self, local: LocalTraining) -> LocalTraining | None:
        """Return a training of its own, outside the rounds, which :meth:`FederatedLoop.run_stage` runs where fits run.

        Args:
            local: The training of the rounds.
        """
        return None

    def personalizes(self, loop: FederatedLoop, client: Client) -> bool:
        """Tell whether :meth:`personal_state` now has something for a client."""
        return False

    def personal_state(self, loop: FederatedLoop, client: Client) -> State:
        """Return tensors to put into a client's personal model before it is scored."""
        return {}

    def global_state(self, loop: FederatedLoop) -> State:
        """Return tensors that complete the global model where the shared part alone does not (a global head)."""
        return {}

    def results(self, loop: FederatedLoop) -> dict[str, Any]:
        """Return entries of its own for ``results.json``: plain values under a key that is not taken."""
        return {}
