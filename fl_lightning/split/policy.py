"""Chooses the cut of each client, once; the choice is recorded with the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fl_lightning.checks import above, at_least
from fl_lightning.split.cost import ClientProfile, LatencyModel
from fl_lightning.split.cut import Cut


class CutPolicy(Protocol):
    """Chooses a cut for a client."""

    def choose(self, index: int, client: ClientProfile, latency: LatencyModel, start: int, end: int) -> Cut:
        """Return the client's cut.

        Args:
            index: The client's place among all clients.
            client: What its device can do.
            latency: Knows what the blocks cost and the batch size, and prices a cut in seconds a batch.
            start: First block the server holds.
            end: First block of the tail.
        """
        ...


class FixedCuts:
    """The cuts are given, one a client; a shorter list is used in turn.

    Args:
        cuts: The cut of the first client, the second, …; without it every legal cut in turn, from the earliest.
    """

    def __init__(self, cuts: Sequence[int] | None = None) -> None:
        if cuts is not None and not cuts:
            raise ValueError("`cuts` must list at least one cut, got none.")
        self.cuts = cuts

    def choose(self, index: int, client: ClientProfile, latency: LatencyModel, start: int, end: int) -> Cut:
        """Return the listed cut."""
        cuts = range(start, end) if self.cuts is None else self.cuts
        return Cut(start, cuts[index % len(cuts)], end).check(len(latency.model.blocks))


class BudgetCuts:
    """The latest cut whose front and tail fit the client's memory, and compute a batch in time.

    Time bends and memory does not: a client that is too slow for every cut takes the earliest, one whose memory does
    not hold the earliest is refused before any training, with what it lacks.

    Args:
        seconds: Seconds of the client's own computation a batch, forward and backward, above 0.
    """

    def __init__(self, seconds: float = float("inf")) -> None:
        if seconds != float("inf"):
            above("seconds", seconds, 0)
        self.seconds = seconds

    def choose(self, index: int, client: ClientProfile, latency: LatencyModel, start: int, end: int) -> Cut:
        """Return the latest cut within the budget.

        Raises:
            ValueError: If the client's memory holds none.
        """
        model = latency.model
        for at in range(end - 1, start - 1, -1):
            memory = model.client_memory(at, end, latency.batch_size, latency.optimizer_slots)
            seconds = 3 * latency.batch_size * model.client_flops(at, end) / client.flops_per_second
            if memory <= client.memory and (seconds <= self.seconds or at == start):
                return Cut(start, at, end).check(len(model.blocks))
        raise ValueError(
            f"client {index} cannot even hold the cut {start}: it would need {memory} of {client.memory:.0f} bytes; "
            "lower data.batch_size or module.start, or raise its memory (callbacks.server.profiles, a site's --memory)"
        )


class CheapestCuts:
    """The cut with the least weighted sum of a proxy of what is lost in accuracy and the time of a batch.

    The proxy is the share of the server's blocks of which the client has no private duplicate: a later cut
    personalises more. The paper's own objective is not published in what we could read; this one is declared as ours.

    Args:
        accuracy: Weight of the proxy, which lies in [0, 1]; at least 0.
        time: Weight of one second a batch; at least 0.
    """

    def __init__(self, accuracy: float = 1.0, time: float = 1.0) -> None:
        at_least("accuracy", accuracy, 0)
        at_least("time", time, 0)
        self.accuracy, self.time = accuracy, time

    def choose(self, index: int, client: ClientProfile, latency: LatencyModel, start: int, end: int) -> Cut:
        """Return the cheapest cut; the earliest of equals."""

        def price(cut: Cut) -> float:
            without = (cut.end - cut.at) / (cut.end - cut.start)
            return self.accuracy * without + self.time * latency.batch(cut, client).total

        return min((Cut(start, at, end).check(len(latency.model.blocks)) for at in range(start, end)), key=price)
