"""Draws how far the rounds are on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.client import ClientInfo, Update
from fl_lightning.terminal import Bar


class Progress(FederatedCallback):
    """Draws one bar for the rounds, with the newest numbers and the time left, and one for the clients of the round.

    The time left is that of the rounds; scoring the kept models on test data comes after them.

    Args:
        show: Metrics to show beside the bar, where they exist.
        enabled: Whether to draw; None: only on a terminal.
    """

    reads_updates = False

    def __init__(
        self,
        show: Sequence[str] = ("val/global/accuracy/mean", "val/personal/accuracy/mean", "fit/train_loss"),
        enabled: bool | None = None,
    ) -> None:
        self.show = list(show)
        self.enabled = enabled
        self._bar: Bar | None = None

    @override
    def on_round_start(self, loop: Server, cohort: Sequence[ClientInfo]) -> None:
        if self._bar is None:
            self._bar = Bar("rounds", loop.rounds, loop.round, "clients", starts_slowly=True, enabled=self.enabled)
        self._bar.begin(len(cohort))

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        if self._bar is not None:
            self._bar.advance_inner()

    @override
    def on_round_logged(self, loop: Server, metrics: Mapping[str, float]) -> None:
        if self._bar is not None:
            shown = [f"{key.removesuffix('/mean')} {metrics[key]:.3f}" for key in self.show if key in metrics]
            self._bar.advance()
            self._bar.show(", ".join(shown) if loop.round < loop.rounds else "scoring")

    @override
    def on_federation_close(self, loop: Server) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None
