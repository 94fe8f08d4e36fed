r"""How a server merges low-rank adapters. Notation: layer W + s B_i A_i at client i, weights p_i that sum to 1.

What all rules are held against is the dense mean :math:`\sum_i p_i s B_i A_i`, which averaging B and A each for itself
is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from fl_lightning.aggregators import Aggregator, Weights
from fl_lightning.checks import ArgumentError
from fl_lightning.client import ClientInfo, Update
from fl_lightning.models.adapters import AdaptedLayer, adapted_layers
from fl_lightning.state import RunningMean, State, num_bytes


class LowRankAggregator(Aggregator):
    """Base of the rules that treat a layer's A and B together; whatever else is shared is averaged.

    Args:
        weights: As in :class:`~fl_lightning.aggregators.Aggregator`.
    """

    @override
    def setup(self, module: nn.Module, clients: Sequence[ClientInfo] = (), device: torch.device | None = None) -> None:
        super().setup(module, clients, device)
        self.layers = need_adapters(module)

    def collect(self, updates: Iterable[Update]) -> tuple[State, list[State], list[float]]:
        """Return the mean of all that was sent, the adapters of each client, and the clients' p_i."""
        mean, adapters, weights = RunningMean(), [], []
        names = {name for layer in self.layers for name in (layer.a, layer.b)}
        for update in updates:
            weights.append(self.weight(update))
            mean.add(update.state, weights[-1])
            adapters.append({name: update.state[name] for name in names})
        total = math.fsum(weights)
        return mean.compute(), adapters, [weight / total for weight in weights]

    def stack(self, layer: AdaptedLayer, adapters: Sequence[State], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        r"""Return [p_1 s B_1 ... p_K s B_K] (out, R) and [A_1; ...; A_K] (R, in), whose product is the dense mean.

        Rows that a client of a lower rank does not have are left out. Both are float64.
        """
        left = torch.cat([p * layer.scale * one[layer.b].double().flatten(1) for p, one in pairs(weights, adapters)], 1)
        right = torch.cat([one[layer.a].double().flatten(1) for one in adapters])
        used = left.any(0) | right.any(1)
        return left[:, used], right[used]


def pairs(weights: Sequence[float], adapters: Sequence[State]) -> Iterable[tuple[float, State]]:
    """Return each client's weight with its adapters."""
    return zip(weights, adapters, strict=True)


def need_adapters(module: nn.Module) -> list[AdaptedLayer]:
    """Return the module's layers with adapters."""
    if not (layers := adapted_layers(module)):
        raise ValueError("model.adapters must be given for this method, such as {rank: 4, alpha: 8, targets: auto}")
    if layers[0].lengths in dict(module.named_parameters()):
        raise ArgumentError("model.adapters.dora must be false for this method, which is about B A alone, got true")
    return layers


class SingularValueAggregator(LowRankAggregator):
    r"""FlexLoRA: the dense mean, cut to the rank of the adapters by its singular values.

    Bai, Chen, Qian, Yao, Li, Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client
    Resources, NeurIPS 2024, https://arxiv.org/abs/2402.11505: :math:`\sum_i p_i s B_i A_i = U \Sigma V^\top`, then
    :math:`B = U_r \Sigma_r / s` and :math:`A = V_r^\top`. Exact where the rank holds the mean. The columns are in the
    order of their singular values: a client of a lower rank takes the first ones.
    """

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        merged, adapters, weights = self.collect(updates)
        for layer in self.layers if adapters else ():
            left, right = self.stack(layer, adapters, weights)
            u, sigma, v = singular_values(left, right)
            rank = min(state[layer.a].shape[0], len(sigma))
            a, b = torch.zeros_like(state[layer.a]), torch.zeros_like(state[layer.b])
            a.flatten(1)[:rank] = v[:rank].to(a.dtype)
            b.flatten(1)[:, :rank] = (u[:, :rank] * sigma[:rank] / layer.scale).to(b.dtype)
            merged[layer.a], merged[layer.b] = a, b
        return {**state, **merged}


def singular_values(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, the singular values and V^T of ``left @ right``, by way of the small matrix between them."""
    if left.shape[1] >= min(left.shape[0], right.shape[1]):
        u, sigma, v = torch.linalg.svd(left @ right, full_matrices=False)
        return u, sigma, v
    q, upper = torch.linalg.qr(left)
    p, lower = torch.linalg.qr(right.T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return q @ u, sigma, v @ p.T


class MergingAggregator(LowRankAggregator):
    """Base of the rules that also change the weights that adapters stand beside.

    A client adds the changes itself, from factors that it is sent (see
    :class:`~fl_lightning.methods.low_rank_clients.MergedBase`). Needs ``sharing.merged``.
    """

    saved = ("factors", "merges")

    #: Whether adapters begin every round anew, from the round's seed, which nobody need send.
    restarts = False

    def __init__(self, weights: Weights = "examples") -> None:
        super().__init__(weights)
        self.factors: list[State] = []
        self.merges = 0

    @override
    def setup(self, module: nn.Module, clients: Sequence[ClientInfo] = (), device: torch.device | None = None) -> None:
        super().setup(module, clients, device)
        own = module.state_dict()
        kept = {own[layer.weight].dtype for layer in self.layers} - {torch.float32}
        if kept:
            raise ValueError(
                f"model.adapters.base must be float32 for this method, which changes the weights, got {kept.pop()}"
            )
        self.dense_bytes = num_bytes({layer.weight: own[layer.weight] for layer in self.layers})

    def merge(self, state: State, changes: Mapping[str, tuple[Tensor, Tensor]]) -> State:
        """Return the base's weights after a change by left @ right of each layer, and remember the factors."""
        merged: State = {}
        for layer in self.layers:
            left, right = changes[layer.weight]
            weight = state[layer.weight]
            merged[layer.weight] = (weight.double() + layer.as_weight(left @ right)).to(weight.dtype)
        self.factors.append(
            {f"{key}/{side}": m.float() for key, both in changes.items() for side, m in zip("BA", both, strict=True)}
        )
        self.merges += 1
        while self.factors and sum(map(num_bytes, self.factors)) >= self.dense_bytes:
            self.factors.pop(0)  # who lacks these is better served with the weights
        return merged

    def missed(self, state: State, seen: int) -> State:
        """Return what a client that has taken in ``seen`` merges is sent: factors, or weights where these are less."""
        missing = self.merges - seen
        if missing > len(self.factors):
            return {layer.weight: state[layer.weight] for layer in self.layers}
        rounds = self.factors[len(self.factors) - missing :] if missing else []
        return {f"{number}/{key}": tensor for number, one in enumerate(rounds) for key, tensor in one.items()}


class StackingAggregator(MergingAggregator):
    r"""FLoRA: the dense mean goes into the base, and adapters start anew: A random, B zero.

    Wang, Shen, He, Sun, Wang, Lyu, Li, FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
    Adaptations, NeurIPS 2024, https://arxiv.org/abs/2409.05976:
    :math:`\Delta W = [p_1 B_1 \dots p_K B_K] [A_1; \dots; A_K]`, which is the dense mean for any ranks.
    """

    restarts = True

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        merged, adapters, weights = self.collect(updates)
        if adapters:
            merged |= self.merge(state, {one.weight: self.stack(one, adapters, weights) for one in self.layers})
            for layer in self.layers:
                merged[layer.a] = nn.init.kaiming_uniform_(torch.empty_like(state[layer.a]), a=math.sqrt(5))  # as peft
                merged[layer.b] = torch.zeros_like(state[layer.b])
        return {**state, **merged}


class ResidualAggregator(MergingAggregator):
    r"""FedEx-LoRA: the means of A and of B, and what they lack of the dense mean goes into the base.

    Singhal, Ponkshe, Vepakomma, FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Large Language
    Models, ACL 2025, https://arxiv.org/abs/2410.09432: :math:`\Delta W_{res} = \sum_i p_i B_i A_i - \bar B \bar A`,
    which is :math:`\sum_i p_i (B_i - \bar B)(A_i - \bar A)`: so it travels.
    """

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        merged, adapters, weights = self.collect(updates)
        if adapters:
            changes = {}
            for layer in self.layers:
                names = (layer.a, layer.b)
                apart = [{name: one[name].double() - merged[name].double() for name in names} for one in adapters]
                changes[layer.weight] = self.stack(layer, apart, weights)
            merged |= self.merge(state, changes)
        return {**state, **merged}


class NormWeightedAggregator(LowRankAggregator):
    r"""HetLoRA: A and B averaged with weights :math:`\|B_k A_k\|_F`, over all layers; zeros fill up lower ranks.

    Cho, Liu, Xu, Fahrezi, Joshi, Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models,
    EMNLP 2024, https://arxiv.org/abs/2401.06432. Read from its figures and abstract: one weight for each client.
    Whatever else is shared has the weights of :class:`~fl_lightning.aggregators.Aggregator`.
    """

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        merged, adapters, _ = self.collect(updates)
        norms = [math.sqrt(sum(float(one.product(own).square().sum()) for one in self.layers)) for own in adapters]
        if not sum(norms):
            return {**state, **merged}
        mean = RunningMean()
        for norm, own in pairs(norms, adapters):
            mean.add(own, norm)
        return {**state, **merged, **mean.compute()}
