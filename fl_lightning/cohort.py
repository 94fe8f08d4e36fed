"""Who takes part in a round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

from fl_lightning.checks import ArgumentError, at_least, within
from fl_lightning.seeding import derive_seed

T = TypeVar("T")


class Cohort:
    """Draws the clients of each round, uniformly without replacement.

    The draw depends on the seed and the round alone, so all methods compared under one seed see the same cohorts.

    Args:
        fraction: Share of all clients, in (0, 1]; the number is rounded to the nearest, at least 1.
        number: Number of clients instead; exactly one of the two counts.
        minimum: The least number of clients of a round, at least 1.
        availability: Probability in (0, 1] that a client can be reached in a round. Where fewer than ``minimum`` can
            be, the nearest to being so join: a round is never smaller than ``minimum``.
    """

    def __init__(
        self, fraction: float = 1.0, number: int | None = None, minimum: int = 1, availability: float = 1.0
    ) -> None:
        within("fraction", fraction, "(0, 1]")
        at_least("number", number, 1, or_null=True)
        if number is not None and fraction != 1:
            raise ArgumentError(f"fraction must be 1 where number is given, got {fraction}")
        at_least("minimum", minimum, 1)
        within("availability", availability, "(0, 1]")
        self.fraction = fraction
        self.number = number
        self.minimum = minimum
        self.availability = availability

    def size(self, num_clients: int) -> int:
        """Return how many clients a round asks for."""
        for key, value in (("number", self.number), ("minimum", self.minimum)):
            if value is not None and value > num_clients:
                raise ValueError(f"cohort.{key} asks for {value} clients a round, but the federation has {num_clients}")
        wanted = self.number if self.number is not None else int(self.fraction * num_clients + 0.5)
        return max(wanted, self.minimum, 1)

    def draw(self, clients: Sequence[T], round: int, seed: int) -> list[T]:
        """Return the clients of a round, in the order of ``clients``.

        Args:
            clients: All clients.
            round: The round, from 0.
            seed: The seed of the run.
        """
        size = self.size(len(clients))
        generator = torch.Generator().manual_seed(derive_seed(seed, "cohort", round))
        reach = torch.rand(len(clients), generator=generator)
        order = torch.randperm(len(clients), generator=generator).tolist()
        if self.availability < 1:
            available = (reach < self.availability).tolist()
            nearest = torch.argsort(reach).tolist()
            chosen = [i for i in order if available[i]][:size]
            chosen += [i for i in nearest if i not in chosen][: max(0, self.minimum - len(chosen))]
        else:
            chosen = order[:size]
        return [clients[i] for i in sorted(chosen)]
