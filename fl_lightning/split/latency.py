"""Bytes and simulated seconds of split training, from the formula; the real counts must agree with it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fl_lightning.split.cut import Cut
from fl_lightning.split.profile import ClientProfile, ModelProfile
from fl_lightning.split.traffic import Traffic

Reach = Literal["front", "body", "tail"]
"""How far back a batch's gradient goes: into the client's front, no further than the body since the front is frozen, or
no further than the tail since the body is frozen too."""


@dataclass(frozen=True)
class BatchSeconds:
    """Simulated seconds of one batch, in the order in which they pass; waiting for the server comes on top.

    Attributes:
        front: Forward through the front, and message 1.
        body_forward: At the server, with its copy of the private top where it aligns.
        tail: Message 2, forward and backward through the tail, and message 3.
        body_backward: At the server.
        front_backward: Message 4, and backward through the front.
    """

    front: float
    body_forward: float
    tail: float
    body_backward: float
    front_backward: float

    @property
    def total(self) -> float:
        """Seconds from the first layer to the last gradient, if the server is free."""
        return self.front + self.body_forward + self.tail + self.body_backward + self.front_backward


def batch_bytes(
    cut: Cut, model: ModelProfile, batch_size: int, align_at: str | None, reach: Reach = "front"
) -> Traffic:
    """Return what one batch sends: twice the activations at the cut and at the end, and what alignment adds.

    Args:
        cut: The client's cut.
        model: What the blocks put out, in float32.
        batch_size: Examples in the batch.
        align_at: ``"server"``, ``"client"``, or ``None`` without alignment.
        reach: How far back the gradient goes; where it stops it is not sent.
    """
    at, end = batch_size * model.out_bytes(cut.at), batch_size * model.out_bytes(cut.end)
    aligned = align_at is not None and cut.at > cut.start
    base = batch_size * model.out_bytes(cut.start)
    return Traffic(
        activation_up=at + (base if aligned else 0),
        activation_down=end + (at if aligned and align_at == "client" else 0),
        gradient_up=0 if reach == "tail" else end,
        gradient_down=at if reach == "front" else 0,
    )


@dataclass(frozen=True)
class LatencyModel:
    """Prices a batch in seconds: forward FLOPs F, backward 2F, one server that computes one request at a time.

    Attributes:
        model: What the blocks cost.
        batch_size: Examples in a batch.
        server_flops_per_second: Speed of the server, above 0.
        align_at: Where the alignment is computed: ``"server"``, ``"client"``, or ``None`` without alignment.
    """

    model: ModelProfile
    batch_size: int
    server_flops_per_second: float = float("inf")
    align_at: str | None = None

    def batch(
        self, cut: Cut, client: ClientProfile, batch_size: int | None = None, reach: Reach = "front"
    ) -> BatchSeconds:
        """Return the seconds of one batch of one client that has the server to itself.

        Args:
            cut: The client's cut.
            client: Its device and link.
            batch_size: Examples, if not a full batch.
            reach: How far back the gradient goes.
        """
        size = self.batch_size if batch_size is None else batch_size
        model, sent = self.model, batch_bytes(cut, self.model, size, self.align_at, reach)
        front = size * model.flops(0, cut.at) / client.flops_per_second
        tail = size * (model.flops(cut.end, len(model.blocks)) + model.head.flops) / client.flops_per_second
        body = size * model.flops(cut.at, cut.end) / self.server_flops_per_second
        copies = size * model.flops(cut.start, cut.at) / self.server_flops_per_second if self.align_at else 0.0
        return BatchSeconds(
            front=front + sent.activation_up / client.up,
            body_forward=body + copies,
            tail=sent.activation_down / client.down + 3 * tail + sent.gradient_up / client.up,
            body_backward=0.0 if reach == "tail" else 2 * body,
            front_backward=sent.gradient_down / client.down + (2 * front if reach == "front" else 0.0),
        )


def with_weights(batches: Sequence[BatchSeconds], down: float, up: float) -> list[BatchSeconds]:
    """Return a fit's batches where the client's own weights come down before the first and go up after the last.

    Args:
        batches: At least one.
        down: Seconds of the way down.
        up: Seconds of the way up.
    """
    begun = [replace(batches[0], front=batches[0].front + down), *batches[1:]]
    return [*begun[:-1], replace(begun[-1], front_backward=begun[-1].front_backward + up)]


def sequential_seconds(clients: Sequence[Sequence[BatchSeconds]]) -> float:
    """Return the seconds of a round in which one client trains after the other."""
    return sum(batch.total for batches in clients for batch in batches)


def asynchronous_seconds(clients: Sequence[Sequence[BatchSeconds]]) -> float:
    """Return the seconds of a round in which all clients train at once and queue at one server, first come first.

    Args:
        clients: The batches of each client, in their order.
    """
    free, finished = 0.0, 0.0
    # (when a request reaches the server, whose it is, which batch, whether it is the backward half)
    requests = [(batches[0].front, index, 0, False) for index, batches in enumerate(clients) if batches]
    heapq.heapify(requests)
    while requests:
        arrival, index, step, backward = heapq.heappop(requests)
        batch = clients[index][step]
        free = max(arrival, free) + (batch.body_backward if backward else batch.body_forward)
        if not backward:
            heapq.heappush(requests, (free + batch.tail, index, step, True))
        elif step + 1 < len(clients[index]):
            following = free + batch.front_backward + clients[index][step + 1].front
            heapq.heappush(requests, (following, index, step + 1, False))
        else:
            finished = max(finished, free + batch.front_backward)
    return finished
