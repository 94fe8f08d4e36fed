"""FedDyn: a regularizer that follows a client's own movement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self, override

from fl_lightning.callback import Server
from fl_lightning.checks import at_least
from fl_lightning.fit.gradients import GradientEdit, add_pull, refuse_scaled_gradients, stepped
from fl_lightning.state import Layout, State, with_prefix, without_prefix

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, ClientInfo, Update
    from fl_lightning.module import FederatedModule

PREFIX = "moved|"


class DynamicRegularization(GradientEdit):
    r"""Aligns the optima of the clients' losses with that of the federation.

    Acar, Zhao, Matas, Mattina, Whatmough, Saligrama, Federated Learning Based on Dynamic Regularization, ICLR 2021,
    https://openreview.net/forum?id=B7v4QMR6Z9w, Algorithm 1. A client minimises :math:`L_k(\theta) -
    \langle g_k, \theta \rangle + \frac{\alpha}{2} \lVert \theta - \theta^{t-1} \rVert^2`, then :math:`g_k \leftarrow
    g_k - \alpha (\theta_k - \theta^{t-1})`; the server, of m clients, sets :math:`h \leftarrow h - \frac{\alpha}{m}
    \sum_k (\theta_k - \theta^{t-1})` and :math:`\theta^t` to the clients' mean less :math:`h / \alpha`. Kept here are
    :math:`-g_k / \alpha` and :math:`-h / \alpha`, which are sums of movements: both terms are then one pull towards
    :math:`\theta^{t-1} + g_k / \alpha`. Nothing travels but the model. Parameters that stay at the client are left
    alone.

    Args:
        alpha: Weight of the regularizer, at least 0. At 0 the method is off, and this is FedAvg, to the bit.
    """

    saved = ("moved",)

    def __init__(self, alpha: float = 0.1) -> None:
        at_least("alpha", alpha, 0)
        self.alpha = alpha
        self.moved: State = {}

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        parameters = {name for name, _ in module.named_parameters()}
        self._received = {name: tensor for name, tensor in broadcast.state.items() if name in parameters}
        known = without_prefix(PREFIX, client.memory)
        self._moved = {name: known.get(name, torch.zeros_like(tensor)) for name, tensor in self._received.items()}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_scaled_gradients(self, trainer)
        device = pl_module.device
        self._anchor = {name: (tensor - self._moved[name]).to(device) for name, tensor in self._received.items()}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.alpha:
            parameters = stepped(pl_module.named_parameters(), optimizer)
            add_pull([pair for pair in parameters if pair[0] in self._anchor], self._anchor, self.alpha)

    @override
    def begin_rows(self, clients: Sequence[Self], start: State, layout: Layout) -> State:
        names = clients[0]._received
        # What stays at the client is pulled by nothing.
        anchors = {name: start[name] for name, _, _ in layout.parts}
        for name in anchors.keys() & names.keys():
            anchors[name] = torch.stack([one._received[name] - one._moved[name] for one in clients]).to(start[name])
        weights = {n: x.new_full((1, *x.shape[1:]), self.alpha * (n in names)) for n, x in anchors.items()}
        [anchor], [weight] = layout.join(anchors).values(), layout.join(weights).values()
        return {"anchor": anchor, "weight": weight}

    @override
    def edit_rows(self, held: State, rows: Tensor, gradients: Tensor, alive: Tensor) -> None:
        if self.alpha:
            gradients.addcmul_(rows - held["anchor"], held["weight"])

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        if self.alpha:
            moved = {name: self._moved[name] + update.state[name] - x for name, x in self._received.items()}
            client.memory.update(with_prefix(PREFIX, moved))
        self._received, self._moved, self._anchor = {}, {}, {}

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        for name in loop.aggregator.parameters & update.state.keys() if self.alpha else ():
            share = (update.state[name] - loop.state[name]) / len(loop.clients)
            self.moved[name] = self.moved[name] + share if name in self.moved else share

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        loop.state = {name: x + self.moved[name] if name in self.moved else x for name, x in loop.state.items()}
