"""Federated multi-task learning: clients are tasks, and a matrix says how they are related."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.callbacks.proximal_penalty import refuse_scaled_gradients
from fl_lightning.state import State, snapshot

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, Update
    from fl_lightning.loop import FederatedLoop
    from fl_lightning.module import FederatedModule

Relations = Literal["learned", "mean"]
OWN = "own coefficient"


class TaskRelations(FederatedCallback):
    r"""Ties the clients' models by :math:`\frac{\lambda}{2} \mathrm{tr}(D \Omega D^\top)`; column t of D is how far
    client t's parameters have come from the common start.

    After Smith, Chiang, Sanjabi, Talwalkar, Federated Multi-Task Learning (MOCHA), NeurIPS 2017,
    https://arxiv.org/abs/1705.10467. MOCHA solves this for linear models in the dual; the reading built here steps
    along the primal gradient :math:`\lambda \sum_s \Omega_{ts} d_s`, which any model has, the others' columns as
    they were last heard. ``learned`` takes :math:`\Sigma = (D^\top D)^{1/2} / \mathrm{tr}` from Zhang, Yeung, A
    Convex Formulation for Learning Task Relationships in Multi-Task Learning, UAI 2010, and :math:`\Omega = (m
    \Sigma + \epsilon I)^{-1}`; ``mean`` is :math:`I - 11^\top / m`. Models go up, and one model each comes down:
    the others' pull.

    Args:
        lam: Weight of the tie, at least 0. At 0 clients train alone, to the bit.
        relations: ``learned`` anew after each round, or fixed to ``mean``.
        epsilon: Ridge of the inverse, above 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, lam: float = 0.01, relations: Relations = "learned", epsilon: float = 0.1) -> None:
        if not lam >= 0:
            raise ValueError(f"`lam` of the task relations must be at least 0, got {lam}")
        if relations not in get_args(Relations):
            raise ValueError(f"`relations` must be learned or mean, got {relations!r}")
        if not epsilon > 0:
            raise ValueError(f"`epsilon` of the task relations must be above 0, got {epsilon}")
        self.lam = lam
        self.relations = relations
        self.epsilon = epsilon
        self.models: dict[int, State] = {}

    @override
    def on_round_start(self, loop: FederatedLoop, cohort: Any) -> None:
        self._ids = [client.id for client in loop.clients]
        self._moved = {
            client_id: {name: tensor - loop.local.initial[name] for name, tensor in model.items()}
            for client_id, model in self.models.items()
        }
        self._omega = self.omega(self._moved)

    def omega(self, moved: dict[int, State]) -> Tensor:
        """Return the matrix of relations ``(m, m)``, float64; a client not heard of has not moved."""
        m = len(self._ids)
        if self.relations == "mean":
            return torch.eye(m, dtype=torch.float64) - 1 / m
        gram = torch.zeros(m, m, dtype=torch.float64)
        heard = [index for index, client_id in enumerate(self._ids) if client_id in moved]
        for name in next(iter(moved.values()), {}):
            rows = torch.stack([moved[self._ids[index]][name].flatten().double() for index in heard])
            gram[torch.tensor(heard)[:, None], torch.tensor(heard)] += rows @ rows.T
        values, vectors = torch.linalg.eigh(gram)
        roots = values.clamp(min=0).sqrt()
        spread = m * roots / roots.sum() if roots.sum() > 0 else torch.ones(m, dtype=torch.float64)
        return vectors @ torch.diag(1 / (spread + self.epsilon)) @ vectors.T

    @override
    def on_broadcast(self, loop: FederatedLoop, client: Client, broadcast: Broadcast) -> None:
        if not self.lam or not self._moved:
            return
        row = self._omega[self._ids.index(client.id)]
        own = row[self._ids.index(client.id)]
        # The gradient is lam * (own * w + pull): the client need not know where all began.
        for name in next(iter(self._moved.values())):
            pull = -own * loop.local.initial[name].double()
            for client_id, moved in self._moved.items():
                if client_id != client.id:
                    pull += row[self._ids.index(client_id)] * moved[name].double()
            broadcast.extra[name] = pull.to(loop.local.initial[name].dtype)
        broadcast.extra[OWN] = own.clone()

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._pull = {name: tensor for name, tensor in broadcast.extra.items() if name != OWN}
        self._own = float(broadcast.extra.get(OWN, 0.0))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_scaled_gradients(self, trainer)
        self._pull = {name: tensor.to(pl_module.device) for name, tensor in self._pull.items()}

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        with torch.no_grad():
            for name, w in pl_module.named_parameters():
                if w.grad is not None and name in self._pull:
                    w.grad.add_(self._own * w + self._pull[name], alpha=self.lam)

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        self._pull = {}
        update.extra.update(snapshot(dict(module.named_parameters())))

    @override
    def on_update(self, loop: FederatedLoop, client: Client, update: Update) -> None:
        self.models[client.id] = dict(update.extra)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"models": self.models}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.models = dict(state_dict["models"])
