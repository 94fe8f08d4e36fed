"""Runs split training within the federated loop: chooses cuts, hands out the server's body, counts bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from fl_lightning.callback import Server
from fl_lightning.checks import ArgumentError, above, one_of
from fl_lightning.client import Broadcast, Fit, Scores
from fl_lightning.evaluation.predict import evaluating
from fl_lightning.executors.executor import Message
from fl_lightning.executors.serial import SerialExecutor
from fl_lightning.split.aggregators import EdgeAggregator
from fl_lightning.split.alignment import Alignment
from fl_lightning.split.blocks import check
from fl_lightning.split.body import MakeOptimizer
from fl_lightning.split.cost import (
    MEASURED,
    BatchSeconds,
    ClientProfile,
    LatencyModel,
    Reach,
    asynchronous_seconds,
    optimizer_slots,
    profile_model,
    sequential_seconds,
    with_weights,
)
from fl_lightning.split.cut import Cut
from fl_lightning.split.fit import COPY, OPTIMIZER, RELAY, SplitFit, account, connecting
from fl_lightning.split.module import SplitModule
from fl_lightning.split.policy import CutPolicy, FixedCuts
from fl_lightning.split.sharing import SplitSharing
from fl_lightning.split.traffic import Traffic
from fl_lightning.state import all_finite, num_bytes

if TYPE_CHECKING:
    from fl_lightning.client import Client, ClientInfo, Update
    from fl_lightning.module import FederatedModule
    from fl_lightning.state import State

Schedule = Literal["sequential", "asynchronous"]
PREFIX = "split/"
TRAINED = {True: "one body, one client after another", False: "a body for each client, averaged"}


class Relay:
    """Hands one server body from client to client: each begins with it as the client before left it.

    A client that fails, or comes out with NaN or an infinity, leaves it as it was. Where the server asks for it, the
    clients' own shared tensors are handed on, too.
    """

    def __init__(self) -> None:
        self._left: State = {}
        self._ends: State = {}

    def hand(self, message: Broadcast) -> None:
        """Put what the last client left into a message, in the place of what the round began with."""
        for name in message.here:
            message.here[name] = self._left.get(name.removeprefix(COPY), message.here[name])
        message.here |= {name: kept for name, kept in self._left.items() if name.startswith(OPTIMIZER)}
        if RELAY in message.here:
            message.state = {name: self._ends.get(name, tensor) for name, tensor in message.state.items()}

    def take(self, update: Update, own_is_finite: bool) -> None:
        """Take what a client leaves, if all of it is finite."""
        if own_is_finite and all(all_finite(part) for part in (update.state, update.extra, update.here)):
            self._left |= update.here
            self._ends |= update.state


class SplitExecutor(SerialExecutor):
    """Runs clients one after another, in this process, through the one body of a split server."""

    relays = True

    @override
    def _answers(self, tasks: Iterable[tuple[Client, Message]]) -> Iterator[Fit | Scores | Exception]:
        relay = Relay()
        for client, message in tasks:
            if isinstance(message, Broadcast):
                relay.hand(message)
            for answer in super()._answers([(client, message)]):
                if isinstance(answer, Fit):
                    relay.take(answer.update, all_finite(answer.personal))
                yield answer


class SplitServer(SplitFit):
    """The server's half of split training: it chooses cuts, hands out the body, and keeps account of the traffic.

    The body goes to a fit in ``broadcast.here`` and comes back in ``update.here``: its weights stay at the server and
    are not counted, activations and gradients are. With ``in_turn`` it is one copy that all clients train, one after
    another; else each client's fit has a copy of its own, which the aggregator averages.

    Args:
        policy: Chooses every client's cut, once; all legal cuts in turn by default.
        profiles: What the clients' devices can do (``flops_per_second, memory, up, down``), used in turn. What a client
            declares of itself (``python -m fl_lightning.site --memory --speed``) goes before it.
        measure: Whether every client measures its own free memory and its speed before the first round, and reports
            them; ``profiles`` then says what its links can do. What a client declares goes before what it measures.
        server_flops_per_second: Speed of the server, above 0.
        optimizer: As in `SplitFit`.
        keep_optimizer: Whether the body's optimizer lives on from fit to fit; else each fit starts a fresh one.
        alignment: As in `SplitFit`.
        clip: As in `SplitFit`.
        schedule: What the simulated time of a round assumes: clients one after another, or all at once with one queue.
            The batches themselves are computed one client after another.
        frozen: As in `SplitFit`.
        in_turn: Whether the body is one copy; this takes ``executor=split``, or ``executor=sites``.
        relay: Whether a client hands those of its own tensors that are shared on to the next one, so that one model
            goes round; else they are averaged. With ``in_turn``, and one cut for all.
    """

    saved = ("chosen", "reported", "sent", "simulated_seconds", "optimizers", "missed")

    def __init__(
        self,
        policy: CutPolicy | None = None,
        profiles: Sequence[Mapping[str, float]] = ({},),
        server_flops_per_second: float = float("inf"),
        optimizer: MakeOptimizer | None = None,
        keep_optimizer: bool = True,
        alignment: Alignment | None = None,
        clip: float | None = None,
        schedule: Schedule = "sequential",
        frozen: bool = False,
        in_turn: bool = True,
        measure: bool = False,
        relay: bool = False,
    ) -> None:
        super().__init__(optimizer, keep_optimizer, alignment, clip, frozen)
        if server_flops_per_second != float("inf"):
            above("server_flops_per_second", server_flops_per_second, 0)
        one_of("schedule", schedule, Schedule)
        self.policy = policy or FixedCuts()
        self.profiles = ClientProfile.several(profiles)
        self.server_flops_per_second = server_flops_per_second
        self.schedule = schedule
        self.in_turn = in_turn
        self.measure = measure
        if relay and not in_turn:
            raise ArgumentError("relay must be false where in_turn is false: clients then train at the same time")
        self.relay = relay
        self.chosen: dict[int, int] = {}
        self.reported: dict[int, dict[str, float]] = {}
        self.sent = Traffic().numbers()
        self.simulated_seconds = 0.0
        self.optimizers: dict[str, State] = {}
        self.missed: dict[str, list[int]] = {}
        self.cuts: dict[int, Cut] = {}
        self.shapes: list[torch.Size] = []  # of one example's output of each block

    @override
    def check(self, module: FederatedModule, trainer: Trainer) -> None:
        if not isinstance(module, SplitModule):
            raise TypeError(
                f"split training needs a SplitModule, got {type(module).__name__}; "
                "set module._target_=fl_lightning.split.module.SplitModule"
            )
        if trainer.precision == "16-mixed":
            raise ValueError("a server cannot unscale a client's gradients; set trainer.precision=bf16-mixed")

    @override
    def on_federation_start(self, loop: Server) -> None:
        module, sharing = loop.module, loop.sharing
        assert isinstance(module, SplitModule)
        if not isinstance(sharing, SplitSharing):
            raise TypeError("split training needs sharing._target_=fl_lightning.split.sharing.SplitSharing")
        if self.in_turn and not loop.executor.relays:
            raise ValueError(
                "callbacks.server.in_turn=true trains one server body by one client after another, which takes "
                f"executor=split or sites, got {type(loop.executor).__name__}; method=splitfed runs in any"
            )
        if not self.in_turn and isinstance(loop.executor, SplitExecutor):
            raise ValueError(
                "executor=split trains one server body; set callbacks.server.in_turn=true, or executor=serial"
            )
        x = module.example_input_array
        assert isinstance(x, Tensor)
        module.to("cpu")
        check(module.blocks, module.backbone, x)
        with evaluating(module), torch.no_grad():
            outputs = accumulate(module.blocks.values(), lambda out, block: block(out), initial=x)
            self.shapes = [out.shape[1:] for out in outputs][1:]
        ids = [client.id for client in loop.clients]
        if self.measure and not self.reported:
            answers = loop.ask(self.name, loop.clients, with_state=False)
            self.reported = {client: {key: float(t) for key, t in told.items()} for client, told in answers.items()}
        given = {client: self.profiles[index % len(self.profiles)] for index, client in enumerate(ids)}
        self._profile_of = {
            client.id: replace(given[client.id], **{**self.reported.get(client.id, {}), **client.device})
            for client in loop.clients
        }
        self.latency = self.latency_model(module, x, loop.clients[0].batch_size, loop.local.optimizer)
        if not self.chosen:  # a resumed run goes on with the recorded choice
            choice = self.choose_cuts(module, self.latency, list(self._profile_of.values()))
            self.chosen = {client: cut.at for client, cut in zip(ids, choice, strict=True)}
        self.cuts = {client: module.cut_at(at) for client, at in self.chosen.items()}
        sharing.assign(self.cuts)
        if self.relay and (not sharing.exchanged(module) or len(set(self.chosen.values())) > 1):
            raise ValueError(
                "callbacks.server.relay=true hands the clients' part on, which takes one cut for all "
                f"(split_policy=earliest) and sharing.shared=['*'], got cuts {sorted(set(self.chosen.values()))} and "
                f"{list(sharing.shared)}"
            )

    @override
    def on_request(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> State:
        """Return what this machine can do."""
        device = ClientProfile.measured(module.device)
        return {name: torch.tensor(getattr(device, name), dtype=torch.float64) for name in MEASURED}

    def latency_model(self, module: SplitModule, x: Tensor, batch_size: int, optimizer: MakeOptimizer) -> LatencyModel:
        """Measure the blocks on one example ``(1, ...)``, and price batches by them."""
        profile = profile_model(module.blocks, module.head, x)
        slots = optimizer_slots(optimizer)
        return LatencyModel(profile, batch_size, self.server_flops_per_second, self.alignment.place, slots)

    def choose_cuts(self, module: SplitModule, latency: LatencyModel, profiles: Sequence[ClientProfile]) -> list[Cut]:
        """Return the policy's choice for clients with these devices."""
        return [
            self.policy.choose(index, profile, latency, module.start, module.end)
            for index, profile in enumerate(profiles)
        ]

    @override
    def on_round_start(self, loop: Server, cohort: Sequence[ClientInfo]) -> None:
        self._batches: list[list[BatchSeconds]] = []
        self._round = Traffic()
        self._body: State = {}
        self._awaited = {client.id: client.name for client in cohort}

    @override
    def on_broadcast(self, loop: Server, client: ClientInfo, broadcast: Broadcast) -> None:
        module, cut = loop.module, self.cuts[client.id]
        assert isinstance(module, SplitModule)
        held = module.parts(cut).without(module.base_names)
        body = loop.state if self.in_turn else loop.aggregator.broadcast(loop.state, client)
        broadcast.state = {name: tensor for name, tensor in broadcast.state.items() if name not in held.body}
        broadcast.here |= connecting(cut) | {name: body[name] for name in held.body}
        if self.alignment.place:
            broadcast.here |= {COPY + name: body[name] for name in held.top}
        if self.keep_optimizer:
            broadcast.here |= self.optimizers.get(self._key(client), {})
        if self.relay:
            broadcast.here[RELAY] = torch.tensor(True)

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        module, cut, device = loop.module, self.cuts[client.id], self._profile_of[client.id]
        assert isinstance(module, SplitModule)
        self._awaited.pop(client.id)
        sizes, traffic = account(update.here)
        if self.keep_optimizer:
            kept = [name for name in update.here if name.startswith(OPTIMIZER)]
            self.optimizers[self._key(client)] = {name: update.here.pop(name) for name in kept}
        if self.in_turn:  # the last client's is the server's: nothing to average
            self._body |= update.here
            update.here = {}
        batches = self.price(client, sizes, module.reach(cut, self.frozen))
        own = num_bytes(update.state)
        if self.relay:
            self._body |= update.state
            update.state = {}
        self._batches.append(with_weights(batches, own / device.down, own / device.up) if batches else [])
        self.sent = (self.traffic + traffic).numbers()
        self._round += traffic
        loop.bytes_up += traffic.up
        loop.bytes_down += traffic.down

    @override
    def on_aggregate_end(self, loop: Server) -> None:
        loop.state = {**loop.state, **self._body}
        for name in self._awaited.values():
            self.missed[name] = [*self.missed.get(name, ()), loop.round]
        seconds = self.seconds_of(self._batches)
        self.simulated_seconds += seconds
        loop.log({f"{PREFIX}{name}": value for name, value in self._round.numbers().items()})
        loop.log({f"{PREFIX}simulated_seconds_round": seconds, f"{PREFIX}simulated_seconds": self.simulated_seconds})
        loop.log({f"{PREFIX}{name}": value for name, value in _between_servers(loop).items()})

    @property
    def traffic(self) -> Traffic:
        """What all fits sent so far."""
        return Traffic.of(self.sent)

    def _key(self, client: ClientInfo) -> str:
        return "body" if self.in_turn else str(client.id)

    def price(self, client: ClientInfo, batches: Sequence[int], reach: Reach) -> list[BatchSeconds]:
        """Return the simulated seconds of batches of these sizes, by how far back their gradients went."""
        cut, profile = self.cuts[client.id], self._profile_of[client.id]
        return [self.latency.batch(cut, profile, size, reach) for size in batches]

    def tail_seconds(self, client: ClientInfo, examples: int) -> float:
        """Return the simulated seconds in which a client's tail trains on examples that came before."""
        cut, device, model = self.cuts[client.id], self._profile_of[client.id], self.latency.model
        flops = model.flops(cut.end, len(model.blocks)) + model.head.flops
        return 3 * examples * flops / device.flops_per_second

    def seconds_of(self, batches: Sequence[Sequence[BatchSeconds]]) -> float:
        """Return the simulated seconds in which all clients train their batches, by the schedule."""
        return (sequential_seconds if self.schedule == "sequential" else asynchronous_seconds)(batches)

    @override
    def results(self, loop: Server) -> dict[str, Any]:
        """Return the recorded cuts and the account of bytes and simulated time, for ``results.json``."""
        module = loop.module
        assert isinstance(module, SplitModule)
        return {
            "split": {
                "start": module.start,
                "end": module.end,
                "blocks": list(module.blocks),
                "cuts": {client.name: self.cuts[client.id].at for client in loop.clients},
                "declared": {c.name: c.device for c in loop.clients if c.device},
                "measured": {c.name: self.reported[c.id] for c in loop.clients if c.id in self.reported},
                "trained": TRAINED[self.in_turn],
                "missed_rounds": self.missed,
                "simulated_schedule": self.schedule,
                "bytes": {**self.sent, **_between_servers(loop)},
                "simulated_seconds": self.simulated_seconds,
            }
        }


def _between_servers(loop: Server) -> dict[str, float]:
    """Return the bytes between edge servers and a cloud so far, where there are any."""
    levels = loop.aggregator
    if not isinstance(levels, EdgeAggregator):
        return {}
    return {"edges_to_cloud": float(levels.bytes_to_cloud), "cloud_to_edges": float(levels.bytes_from_cloud)}
