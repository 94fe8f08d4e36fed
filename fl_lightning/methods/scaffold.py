"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self, override

from fl_lightning.callback import Server
from fl_lightning.fit.gradients import GradientEdit, refuse_scaled_gradients, stepped
from fl_lightning.state import Layout, State, with_prefix, without_prefix

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, ClientInfo, Update
    from fl_lightning.module import FederatedModule

PREFIX = "control|"


class ControlVariates(GradientEdit):
    r"""Corrects every local gradient by :math:`c - c_i`, so that clients do not drift apart.

    Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, ICML 2020,
    https://arxiv.org/abs/1910.06378, Algorithm 1. A client's new variate is the mean of the gradients along its fit,
    for what was frozen meanwhile over the steps in which it trained. For plain SGD of a constant rate that *is* the
    paper's option II, :math:`c_i - c + (x - y_i) / (K \eta)`; unlike the formula it also means something with momentum,
    schedules or Adam. Up go the model and the change of :math:`c_i`, down the model and :math:`c`: twice the traffic of
    FedAvg. Parameters that stay at the client are left alone.
    """

    saved = ("control",)

    def __init__(self) -> None:
        self.control: State = {}

    @override
    def on_round_start(self, loop: Server, cohort: Any) -> None:
        self._change: State = {}

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        if not self.control:
            parameters = loop.aggregator.parameters
            self.control = {name: torch.zeros_like(tensor) for name, tensor in loop.state.items() if name in parameters}
        broadcast.extra.update(with_prefix(PREFIX, self.control))

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._server = without_prefix(PREFIX, broadcast.extra)
        known = without_prefix(PREFIX, client.memory)
        self._own = {name: known.get(name, torch.zeros_like(c)) for name, c in self._server.items()}
        self._sums: State = {}
        self._steps: Counter[str] = Counter()
        self._correction: State = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_scaled_gradients(self, trainer)
        difference = {name: c - self._own[name] for name, c in self._server.items()}
        self._correction = {name: tensor.to(pl_module.device) for name, tensor in difference.items()}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        parameters = stepped(pl_module.named_parameters(), optimizer)
        named = [(name, p.grad) for name, p in parameters if p.grad is not None and name in self._correction]
        if not named:
            return
        gradients = [gradient for _, gradient in named]
        with torch.no_grad():
            self._sums.update({name: torch.zeros_like(g) for name, g in named if name not in self._sums})
            torch._foreach_add_([self._sums[name] for name, _ in named], gradients)
            torch._foreach_add_(gradients, [self._correction[name] for name, _ in named])
        self._steps.update(name for name, _ in named)

    @override
    def begin_rows(self, clients: Sequence[Self], start: State, layout: Layout) -> State:
        corrections = {name: torch.zeros_like(start[name]) for name, _, _ in layout.parts}
        for name in corrections.keys() & clients[0]._server.keys():
            differences = [one._server[name] - one._own[name] for one in clients]
            corrections[name] = torch.stack(differences).to(start[name])
        [correction] = layout.join(corrections).values()
        return {"correction": correction, "sums": torch.zeros_like(correction)}

    @override
    def edit_rows(self, held: State, rows: Tensor, gradients: Tensor, alive: Tensor) -> None:
        held["sums"].addcmul_(gradients, alive)
        gradients.add_(held["correction"])

    @override
    def end_rows(self, clients: Sequence[Self], held: State, layout: Layout, steps: Sequence[int]) -> None:
        sums = held["sums"].to("cpu")
        for one, number, row in zip(clients, steps, sums, strict=True):
            found = layout.views({sums.dtype: row})
            for name in found.keys() & one._server.keys():
                one._sums[name] = one._sums[name] + found[name] if name in one._sums else found[name].clone()
                one._steps[name] += number

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        for name, total in self._sums.items():
            new = (total / self._steps[name]).to(self._own[name].device)
            update.extra[PREFIX + name] = new - self._own[name]
            client.memory[PREFIX + name] = new
        self._sums, self._correction, self._server, self._own = {}, {}, {}, {}

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        for name, change in without_prefix(PREFIX, update.extra).items():
            share = change / len(loop.clients)
            self._change[name] = self._change[name] + share if name in self._change else share

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        self.control = {name: c + self._change[name] if name in self._change else c for name, c in self.control.items()}
