"""Fine-tunes a transformer through small matrices beside its large ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import ArgumentError
from fl_lightning.models.adapters import Adapters


class LowRankAdaptation(FederatedCallback):
    """Trains adapters beside some layers of the backbone, and the head; the rest of the backbone stays.

    Adapters live for one fit: they are put in when it begins and added to the weights when it ends, so that everything
    else sees the plain model. For adapters that are parts of the model, and travel in its place: ``model.adapters``.

    Args:
        rank: As in :class:`~fl_lightning.models.adapters.Adapters`.
        alpha: The same.
        dropout: The same.
        targets: The same.
        dora: The same.
    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float = 8.0,
        dropout: float = 0.0,
        targets: str | Sequence[str] = "attention",
        dora: bool = False,
    ) -> None:
        self.adapters = Adapters(rank, alpha, targets, dropout, dora=dora)
        self._trainable: list[tuple[nn.Parameter, bool]] = []

    @override
    def check(self, module: LightningModule, trainer: Trainer) -> None:
        backbone: Any = module.backbone
        try:
            self.adapters.check(backbone)
        except ArgumentError as error:
            raise ArgumentError(f"callbacks.{self.name}.{error}") from None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        backbone: Any = pl_module.backbone
        self._trainable = [(p, p.requires_grad) for p in pl_module.parameters()]
        self.adapters.inject(backbone)
        pl_module.train()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._merge(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._merge(pl_module)

    def _merge(self, module: LightningModule) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        backbone: Any = module.backbone
        for name, part in list(backbone.named_modules()):
            if isinstance(part, BaseTunerLayer):
                part.merge()
                parent, _, attribute = name.rpartition(".")
                setattr(backbone.get_submodule(parent), attribute, part.get_base_layer())
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
        self._trainable = []
