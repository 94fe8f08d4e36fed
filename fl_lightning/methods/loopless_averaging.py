"""L2GD: a coin decides whether clients train or move towards their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.checks import at_least, within
from fl_lightning.seeding import derive_seed
from fl_lightning.state import RunningMean, State, snapshot, with_prefix, without_prefix

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, ClientInfo, Update
    from fl_lightning.module import FederatedModule

PREFIX = "mean|"


class LooplessAveraging(FederatedCallback):
    r"""Minimises :math:`\frac1n \sum_i f_i(x_i) + \frac{\lambda}{2n} \sum_i \lVert x_i - \bar x \rVert^2`.

    The number of local steps is not fixed: a coin decides.

    Hanzely, Richtarik, Federated Learning of a Mixture of Global and Local Models, 2020,
    https://arxiv.org/abs/2002.05516. A round is an iteration. With probability :math:`1 - p` all clients train, in
    the paper one step of size :math:`\alpha / (n (1 - p))`, which here is the optimizer's rate; else
    :math:`x_i \leftarrow (1 - c) x_i + c \bar x` with :math:`c = \alpha \lambda / (n p) = lr\,\lambda\,(1 - p) / p`.
    Averaging leaves the mean as it is, so models travel only where an averaging round follows a training round. At
    ``p=0`` clients train alone.

    Args:
        p: Probability of averaging, in [0, 1).
        lam: Weight of the tie to the mean, at least 0.
        lr: The optimizer's learning rate.
        seed: The run's seed: server and clients toss the same coin without a message.
    """

    saved = ("mean",)

    def __init__(self, p: float = 0.2, lam: float = 1.0, lr: float = 0.05, seed: int = 0) -> None:
        within("p", p, "[0, 1)")
        at_least("lam", lam, 0)
        at_least("lr", lr, 0)
        self.step = lr * lam * (1 - p) / p if p else 0.0
        if self.step > 0.5:
            raise ValueError(f"lr * lam * (1 - p) / p must be at most 1/2, got {self.step:g}; lower lam or raise p")
        self.p = p
        self.seed = seed
        self.mean: State = {}

    def averages(self, round: int) -> bool:
        """Tell whether a round averages; the same everywhere."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "coin", round))
        return bool(torch.rand(1, generator=generator) < self.p)

    @override
    def on_federation_start(self, loop: Server) -> None:
        if loop.cohort.size(len(loop.clients)) < len(loop.clients) or loop.cohort.availability < 1:
            raise ValueError("loopless averaging needs all clients in every round; set cohort.fraction=1")

    @override
    def on_round_start(self, loop: Server, cohort: Sequence[ClientInfo]) -> None:
        self._sum = RunningMean()

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        broadcast.train = not self.averages(loop.round)
        if not broadcast.train and loop.round and not self.averages(loop.round - 1):
            broadcast.extra.update(with_prefix(PREFIX, self.mean))

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._round = broadcast.round
        if broadcast.train:
            for name in [name for name in client.memory if name.startswith(PREFIX)]:
                del client.memory[name]
            return
        # A second averaging round in a row needs no message: the mean has not changed.
        client.memory.update(with_prefix(PREFIX, without_prefix(PREFIX, broadcast.extra)))
        own = module.state_dict()
        for name, mean in without_prefix(PREFIX, client.memory).items():
            if mean.is_floating_point():
                own[name].lerp_(mean.to(own[name]), self.step)

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        if not self.averages(self._round):
            travels = self.averages(self._round + 1)
            part = update.extra if travels else update.here
            part.update(with_prefix(PREFIX, snapshot(module.state_dict())))

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        self._sum.add(without_prefix(PREFIX, {**update.here, **update.extra}), 1.0)
        update.here = {}

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        # At sites of their own, clients that have trained send nothing unless the next round averages.
        self.mean = self._sum.compute() or (self.mean if self.averages(loop.round) else {})

    @override
    def global_state(self, loop: Server) -> State:
        """Return the mean of the clients' models where it is known: a simulation knows it in every round."""
        trained = any(not self.averages(round) for round in range(loop.state_round + 1))
        return self.mean if trained else loop.initial
