"""Pulls weights towards those that the fit began with."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self, override

from fl_lightning.checks import at_least
from fl_lightning.fit.gradients import GradientEdit, add_pull, refuse_scaled_gradients, stepped
from fl_lightning.state import Layout, State


class ProximalPenalty(GradientEdit):
    r"""Pulls the parameters towards where the fit began, by :math:`\frac{\mu}{2}\lVert w - w^t \rVert^2`.

    Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, https://arxiv.org/abs/1812.06127.
    The gradient :math:`\mu (w - w^t)` is added when Lightning has unscaled it and has not yet clipped it, so mixed
    precision, accumulation and clipping all see the true objective. The logged loss stays the task's own.

    Args:
        mu: Weight of the penalty, at least 0. At 0 nothing is added, to the bit.

    Raises:
        ValueError: If ``mu`` is negative.
        TypeError: At the start of a fit, if the optimizer unscales gradients within its own step (fused ones under
            16-mixed): the penalty would be added to scaled gradients.
    """

    def __init__(self, mu: float = 0.01) -> None:
        at_least("mu", mu, 0)
        self.mu = mu

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_scaled_gradients(self, trainer)
        self._start = {name: p.detach().clone() for name, p in pl_module.named_parameters()} if self.mu else {}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not self.mu:
            return
        add_pull(stepped(pl_module.named_parameters(), optimizer), self._start, self.mu)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = {}

    @override
    def begin_rows(self, clients: Sequence[Self], start: State, layout: Layout) -> State:
        [rows] = layout.join(start).values()
        return {"start": rows} if self.mu else {}

    @override
    def edit_rows(self, held: State, rows: Tensor, gradients: Tensor, alive: Tensor) -> None:
        if self.mu:
            gradients.add_(rows - held["start"], alpha=self.mu)
