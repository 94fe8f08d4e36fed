"""What clients and server exchange of low-rank adapters, and what merging them loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.checks import ArgumentError, at_least, within
from fl_lightning.client import Broadcast, Client, ClientInfo, Update
from fl_lightning.methods.low_rank_merging import MergingAggregator, need_adapters
from fl_lightning.models.adapters import AdaptedLayer
from fl_lightning.module import FederatedModule
from fl_lightning.state import State


class LowRankCallback(FederatedCallback):
    """Base of what needs a model with adapters."""

    def __init__(self) -> None:
        self.layers: list[AdaptedLayer] = []

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        self.layers = need_adapters(module)


class AggregationError(LowRankCallback):
    r"""Logs how far the model that clients start from next is from the dense mean of what they sent.

    ``lora/aggregation_error`` is :math:`\|W' - \sum_i p_i W_i\|_F / \|\sum_i p_i W_i - W\|_F` over all adapted layers,
    with W the weights plus scaled BA before the round, W_i after client i's fit, W' after merging, and p_i the weights
    of the aggregator. 0: merging is exact; 1: as if the round had not been. Where clients have unlike ranks, it is the
    mean over the cohort of what each starts from.
    """

    saved = ("errors",)

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[float] = []

    @override
    def on_round_start(self, loop: Server, cohort: Sequence[ClientInfo]) -> None:
        # States are replaced, never written to. A factor that nobody trains is in none.
        self._still = {name: loop.initial[name] for layer in self.layers for name in (layer.a, layer.b)}
        self._before = {**self._still, **loop.state}
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[int, float] = {}

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        weight = loop.aggregator.weight(update)
        state = {**self._before, **update.state}
        for layer in self.layers:
            change = layer.product(state) * weight
            self._sums[layer.name] = self._sums[layer.name] + change if layer.name in self._sums else change
        self._weights[client.id] = weight

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        total = math.fsum(self._weights.values())
        if not total:
            return
        ranks = next((c for c in loop.federated_callbacks if isinstance(c, ClientRanks)), None)
        after = {**self._still, **loop.state}
        change, apart = 0.0, 0.0
        for layer in self.layers:
            mean = self._sums[layer.name] / total
            moved = torch.zeros_like(mean)
            if layer.weight in loop.state:
                moved = layer.as_matrix(loop.state[layer.weight].double() - self._before[layer.weight].double())
            change += float((mean - layer.product(self._before)).square().sum())
            own = [ranks.rank(id) if ranks else None for id in self._weights]
            for rank in dict.fromkeys(own):
                start = after if rank is None else cut(layer, after, rank)
                error = float((moved + layer.product(start) - mean).square().sum())
                apart += error * own.count(rank) / len(own)
        self.errors.append(math.sqrt(apart / change) if change else 0.0)
        loop.log({"lora/aggregation_error": self.errors[-1]})

    @override
    def results(self, loop: Server) -> dict[str, Any]:
        mean = math.fsum(self.errors) / len(self.errors) if self.errors else None
        return {"lora": {"aggregation_error": mean}}


def cut(layer: AdaptedLayer, state: State, rank: int) -> State:
    """Return a layer's A and B without what is beyond a rank."""
    return {layer.a: state[layer.a][:rank], layer.b: state[layer.b][:, :rank]}


class ClientRanks(LowRankCallback):
    r"""Gives clients adapters of unlike ranks: each is sent, trains and sends back the first rows of A, columns of B.

    The model has the largest rank; at a client zeros stand for what it lacks, and stay zeros, since each of the two
    gets a gradient only through the other. The scale alpha/rank is the model's for all.

    With ``prune``, HetLoRA's rank self-pruning (see
    :class:`~fl_lightning.methods.low_rank_merging.NormWeightedAggregator`): the loss gets
    :math:`\lambda \sum \|B_{:, \gamma r : r}\|_F \|A_{\gamma r : r}\|_F` over the layers, and a client whose sum is
    smaller after its fit than before goes on with rank :math:`\gamma r`. That this is the rule is our reading.

    Args:
        ranks: Ranks of the clients, in turn, each at least 1 and at most the model's; None: the model's for all.
        prune: :math:`\lambda`, at least 0; None: ranks stay.
        keep: :math:`\gamma`, in (0, 1).
    """

    saved = ("pruned",)

    def __init__(self, ranks: Sequence[int] | None = None, prune: float | None = None, keep: float = 0.99) -> None:
        super().__init__()
        if ranks is not None and not (ranks and all(rank >= 1 for rank in ranks)):
            raise ArgumentError(f"ranks must be null, or list ranks of at least 1, got {list(ranks)}")
        at_least("prune", prune, 0, or_null=True)
        within("keep", keep, "(0, 1)")
        self.ranks = ranks
        self.prune = prune
        self.keep = keep
        self.pruned: dict[int, int] = {}

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        super().check(module, trainer)
        self._full = int(module.get_parameter(self.layers[0].a).shape[0])
        if self.ranks is not None and max(self.ranks) > self._full:
            raise ValueError(
                f"callbacks.{self.name}.ranks must be at most model.adapters.rank={self._full}, got {max(self.ranks)}"
            )

    @override
    def on_federation_start(self, loop: Server) -> None:
        own = self.ranks or [self._full]
        self._given = {client.id: own[place % len(own)] for place, client in enumerate(loop.clients)}

    def rank(self, client: int) -> int:
        """Return the rank of a client's adapters."""
        return self.pruned.get(client, self._given.get(client, self._full))

    def cut(self, state: State, client: int) -> State:
        """Return the adapters of a state as a client has them, up to its rank."""
        parts = [cut(layer, state, self.rank(client)) for layer in self.layers]
        return {name: tensor.contiguous() for part in parts for name, tensor in part.items()}

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        broadcast.state |= self.cut(broadcast.state, client.id)

    @override
    def on_download(self, client: Client, state: State) -> State:
        return {**state, **self._filled(state)}

    def _filled(self, state: State) -> State:
        found: State = {}
        for layer in self.layers:
            if layer.a in state and state[layer.a].shape[0] < self._full:
                a, b = state[layer.a], state[layer.b]
                found[layer.a] = a.new_zeros(self._full, *a.shape[1:])
                found[layer.b] = b.new_zeros(b.shape[0], self._full, *b.shape[2:])
                found[layer.a][: a.shape[0]], found[layer.b][:, : a.shape[0]] = a, b
        return found

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        sent = {**broadcast.state, **broadcast.here}
        self._rank = int(sent[self.layers[0].a].shape[0])
        self._least = max(1, int(self.keep * self._rank))
        if self.prune is not None:
            self._at_start = float(self._tail(module).detach())
            strength = self.prune
            module.context.loss_transforms.append(lambda loss: loss + strength * self._tail(module))

    def _tail(self, module: FederatedModule) -> Tensor:
        """Return the sum over layers of the norms' product beyond the rank that pruning would keep."""
        tails = []
        for layer in self.layers:
            a, b = module.get_parameter(layer.a), module.get_parameter(layer.b)
            rows, columns = a[self._least : self._rank], b[:, self._least : self._rank]
            # The root of zero has no gradient, and B begins as zero.
            tails.append((rows.square().sum() + 1e-12).sqrt() * (columns.square().sum() + 1e-12).sqrt())
        return torch.stack(tails).sum()

    @override
    def on_upload(self, client: Client, module: FederatedModule, update: Update) -> None:
        rank = self._rank
        if self.prune is not None and self._at_start > 1e-9 and float(self._tail(module).detach()) < self._at_start:
            rank = self._least
        for layer in self.layers:
            update.state |= {n: t.contiguous() for n, t in cut(layer, update.state, rank).items()}

    @override
    def on_receive(self, loop: Server, client: ClientInfo, update: Update) -> None:
        rank = int(update.state[self.layers[0].a].shape[0])
        if rank < self.rank(client.id):
            self.pruned[client.id] = rank
        update.state |= self._filled(update.state)

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        if self.prune is not None or self.ranks is not None:
            ranks = [self.rank(client.id) for client in loop.clients]
            loop.log({"lora/mean_rank": sum(ranks) / len(ranks)})


class AlternatingFactors(LowRankCallback):
    """RoLoRA: B is trained and averaged in rounds 0, 2, ... with A as it is, A in rounds 1, 3, ... with B as it is.

    Chen, Ju, Dalal, Zhu, Khisti, Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA,
    2024, https://arxiv.org/abs/2409.02346: with one factor the same everywhere, the mean of the other is exact. What
    was trained goes up; down goes what changed since the client last took part.
    """

    saved = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, int] = {}

    def _names(self, trained: bool, round: int) -> set[str]:
        return {layer.b if trained == (round % 2 == 0) else layer.a for layer in self.layers}

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        if broadcast.round and self.last.get(client.id) == broadcast.round - 1:
            known = self._names(True, broadcast.round)  # it stood still in the last round
            broadcast.here |= {name: broadcast.state[name] for name in known}
            broadcast.state = {name: t for name, t in broadcast.state.items() if name not in known}

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._still = still = self._names(False, broadcast.round)
        for name in {*still, *self._names(True, broadcast.round)}:
            module.get_parameter(name).requires_grad_(name not in still)
            module.get_parameter(name).grad = None

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        for name in self._still:
            module.get_parameter(name).requires_grad_(True)
        update.state = {name: t for name, t in {**update.state, **update.here}.items() if name not in self._still}
        update.here = {}

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        self.last[client.id] = loop.round


class MergedBase(LowRankCallback):
    """Sends what a merging server changed in the base as factors, each client those that it has not had yet.

    A client would add the factors to its own copy of the base; here the server's sum is put in its place. Where a
    client has missed so much that the changed weights themselves are smaller, those are sent. Adapters that begin anew
    from the round's seed are not sent.
    """

    saved = ("seen",)

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        super().check(module, trainer)
        self._base = {layer.weight for layer in self.layers}
        self._adapters = {name for layer in self.layers for name in (layer.a, layer.b)}

    @staticmethod
    def _aggregator(loop: Server) -> MergingAggregator:
        if not isinstance(loop.aggregator, MergingAggregator):
            raise ValueError(f"aggregator must merge into the base, got {type(loop.aggregator).__name__}")
        return loop.aggregator

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        aggregator = self._aggregator(loop)
        drawn = self._adapters if aggregator.restarts and aggregator.merges else set()
        broadcast.extra |= aggregator.missed(broadcast.state, self.seen.get(client.id, 0))
        broadcast.here |= {n: t for n, t in broadcast.state.items() if n in self._base or n in drawn}
        broadcast.state = {n: t for n, t in broadcast.state.items() if n not in broadcast.here}

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        update.state |= {name: tensor for name, tensor in update.here.items() if name in self._adapters}
        update.here = {}

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        self.seen[client.id] = self._aggregator(loop).merges
