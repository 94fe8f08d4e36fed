"""Fine-tunes a client's tail after the rounds of split training, and counts what it sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from typing_extensions import override

from fl_lightning.callback import Server
from fl_lightning.callbacks.fine_tuning import FineTuning
from fl_lightning.split.cost import BatchSeconds
from fl_lightning.split.executor import SplitServer
from fl_lightning.split.fit import SplitFit, account, connecting
from fl_lightning.split.traffic import Traffic

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, ClientInfo, Update


class PersonalStage(FineTuning):
    """Lets every client fit its tail to itself after the rounds, while its front and the server's body stand still.

    Activations still cross, up at the cut and down at the end, once for every example: the client keeps what came down,
    as long as its front makes the same of it (no augmentation). Gradients do not cross. Bytes are counted
    where they are sent and belong to the run's ``bytes_up`` and ``bytes_down``; bytes and simulated seconds of the
    stage alone are in ``results.json`` under ``personal_stage``.

    Args:
        epochs: As in `FineTuning`.
        steps: As in `FineTuning`.
        callbacks: As in `FineTuning`; they must freeze all but the tail, as a `FreezeSchedule` that trains the head.
    """

    def __init__(self, epochs: int = 0, steps: int = 0, callbacks: Mapping[str, Callback] | None = None) -> None:
        self._lines = _Lines()
        super().__init__(epochs, steps, {**(callbacks or {}), "lines": self._lines})

    @override
    def on_federation_start(self, loop: Server) -> None:
        super().on_federation_start(loop)
        servers = [callback for callback in loop.federated_callbacks if isinstance(callback, SplitServer)]
        if not servers:
            raise TypeError("a personal stage needs a SplitServer as callbacks.server; else take FineTuning")
        self._lines.server = servers[0]

    @override
    def results(self, loop: Server) -> dict[str, Any]:
        server, fits = self._lines.server, self._lines.fits
        traffic = sum((traffic for _, traffic in fits.values()), Traffic())
        batches = [
            [*server.price(client, fits[client.id][0], "tail"), self._rest(client)]
            for client in loop.clients
            if client.id in fits
        ]
        return {"personal_stage": {"bytes": traffic.numbers(), "simulated_seconds": server.seconds_of(batches)}}

    def _rest(self, client: ClientInfo) -> BatchSeconds:
        """Return the seconds of a client's batches for which nothing crosses: its tail alone."""
        server = self._lines.server
        examples = self.epochs * client.num_train or self.steps * client.batch_size
        rest = max(0, examples - sum(self._lines.fits[client.id][0]))
        return BatchSeconds(0.0, 0.0, server.tail_seconds(client, rest), 0.0, 0.0)


class _Lines(SplitFit):
    """Gives every fit of the stage a body that stands still, and remembers what it sent."""

    server: SplitServer

    def __init__(self) -> None:
        super().__init__(keep_optimizer=False, frozen=True)
        self.fits: dict[int, tuple[list[int], Traffic]] = {}

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        broadcast.here |= connecting(self.server.cuts[client.id])

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        if client.id in self.fits:  # it runs for the last and for the kept models; a federation would run it once
            return
        sizes, traffic = self.fits[client.id] = account(update.here)
        loop.bytes_up += traffic.up
        loop.bytes_down += traffic.down
