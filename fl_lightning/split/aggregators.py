"""Averages on two levels: clients at edge servers, edge servers at a cloud."""

from __future__ import annotations

from collections.abc import Iterable

from typing_extensions import override

from fl_lightning.aggregators import Aggregator, Weights
from fl_lightning.checks import at_least
from fl_lightning.client import ClientInfo, Update
from fl_lightning.state import RunningMean, State, num_bytes


class EdgeAggregator(Aggregator):
    """Every round each edge server averages its clients; every few rounds the cloud averages the edge servers.

    Between two visits to the cloud a client goes on from the model of its own edge server. What the federation calls
    its shared state is then the mean over the edge servers, which nobody trains on.

    Args:
        edges: Number of edge servers, at least 1; client i belongs to server i modulo this number.
        cloud_every: Rounds between two averages at the cloud, at least 1; at 1, or with one edge, this is FedAvg.
        weights: As in `Aggregator`; an edge server weighs what its clients weigh together.

    Attributes:
        bytes_to_cloud: What edge servers have sent to the cloud so far; no part of the clients' traffic.
        bytes_from_cloud: What the cloud has sent to edge servers.
    """

    saved = ("round", "states", "edge_weights", "bytes_to_cloud", "bytes_from_cloud")

    def __init__(self, edges: int = 2, cloud_every: int = 2, weights: Weights = "examples") -> None:
        super().__init__(weights)
        at_least("edges", edges, 1)
        at_least("cloud_every", cloud_every, 1)
        self.edges, self.cloud_every = edges, cloud_every
        self.round = 0
        self.states: dict[int, State] = {}
        self.edge_weights: dict[int, float] = {}
        self.bytes_to_cloud = self.bytes_from_cloud = 0

    @override
    def broadcast(self, state: State, client: ClientInfo) -> State:
        return {**state, **self.states.get(client.id % self.edges, {})}

    @override
    def aggregate(self, state: State, updates: Iterable[Update]) -> State:
        means: dict[int, RunningMean] = {}
        weights: dict[int, float] = {}
        for update in updates:
            edge, weight = update.client_id % self.edges, self.weight(update)
            means.setdefault(edge, RunningMean()).add(update.state, weight)
            weights[edge] = weights.get(edge, 0.0) + weight
        for edge, mean in means.items():
            self.states[edge] = {**state, **self.states.get(edge, {}), **mean.compute()}
        self.edge_weights.update(weights)  # an edge server without a client this round keeps its model and its weight
        cloud = RunningMean()
        for edge in sorted(self.states):
            cloud.add(self.states[edge], self.edge_weights[edge])
        merged = {**state, **cloud.compute()}
        self.round += 1
        if self.round % self.cloud_every == 0:
            self.bytes_to_cloud += sum(num_bytes(own) for own in self.states.values())
            self.bytes_from_cloud += len(self.states) * num_bytes(merged)
            self.states, self.edge_weights = {}, {}
        return merged
