"""Measures a model as it is being personalized."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.client import Broadcast, Client, Update
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.measurement import Measurement, Measures


class EpochCurves(FederatedCallback):
    """Measures the model after epochs of a fit and sends the numbers with the update.

    Args:
        measurement: What measures.
        every: Epochs between two points, at least 1; the last epoch always is one.

    Raises:
        ValueError: If ``every`` is below 1.
    """

    def __init__(self, measurement: Measurement, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"curves.every must be at least 1 epoch, or null for none, got {every}")
        self.measurement = measurement
        self.every = every

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._client = client.id
        self._epochs: list[int] = []
        self._rows: list[torch.Tensor] = []

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs or trainer.should_stop:
            assert isinstance(pl_module, FederatedModule)
            self._epochs.append(epoch)
            self._rows.append(self.measurement.measure(pl_module, self._client).to_tensor())

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        if self._rows:
            update.extra["curve epochs"] = torch.tensor(self._epochs)
            update.extra["curve"] = torch.stack(self._rows)


def curve_of(update: Update) -> dict[int, Measures]:
    """Return the measures by epoch that came with an update; empty if none did."""
    if "curve" not in update.extra:
        return {}
    epochs = update.extra["curve epochs"].tolist()
    return {epoch: Measures.from_tensor(row) for epoch, row in zip(epochs, update.extra["curve"], strict=True)}
