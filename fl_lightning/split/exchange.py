"""Connects a client's half of a model to the server's half, for autograd one function between the two."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Protocol

import torch
from torch import Tensor

from fl_lightning.split.alignment import Alignment
from fl_lightning.split.cost import Reach
from fl_lightning.split.cut import Cut


class Half(Protocol):
    """The server's half as a client sees it: :class:`~fl_lightning.split.body.ServerBody`, or the line to one."""

    def begin(self) -> None:
        """Begin a fit."""

    def forward(self, cut: Cut, activation: Tensor, base: Tensor | None, reach: Reach) -> tuple[Tensor, Tensor | None]:
        """Answer message 1 of a batch."""

    def backward(self, gradient: Tensor, scale: float) -> Tensor | None:
        """Answer message 3 of a batch."""

    def evaluate(self, cut: Cut, activation: Tensor) -> Tensor:
        """Return the body's output without training."""


class Exchange:
    """One client's line to the server: activation up, activation down, gradient up, gradient down.

    The same code runs in one process, where the server's half is at its other end, and over a network.

    Args:
        server: The server's half.
        cut: The client's cut.
        alignment: How its private top is held near the body.
    """

    def __init__(self, server: Half, cut: Cut, alignment: Alignment) -> None:
        self.server, self.cut, self.alignment = server, cut, alignment
        self.begin(frozen=False)
        self._anchor = torch.zeros((), requires_grad=True)  # so that a gradient goes up even from behind a frozen front

    @property
    def aligns(self) -> bool:
        """Whether the base's output is wanted: there is an alignment, and a private top to align."""
        return self.alignment.place is not None and self.cut.at > self.cut.start

    def begin(self, frozen: bool, scale: float = 1.0) -> None:
        """Begin a fit.

        Args:
            frozen: Whether the server's half is not trained.
            scale: By what the client multiplies its loss (accumulated batches).
        """
        self.frozen, self.scale = frozen, scale
        self._known: dict[bytes, Tensor] = {}
        self.server.begin()

    def train(self, activation: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Send an activation through the server's body; the gradient follows by itself when the loss goes backward.

        Args:
            activation: At the cut, part of the client's graph.
            base: The base's output, where alignment needs it; nothing flows back into it.

        Returns:
            The body's output, part of a graph, and what the client adds to its loss, if anything.
        """
        base = None if base is None else base.detach()
        if self.frozen and not activation.requires_grad:  # nothing before the tail is trained
            output, copies = self._kept(activation.detach(), base), None
        else:
            output, copies = _Server.apply(activation, self._anchor, self, base)
        return output, None if copies is None else self.alignment(activation, copies)

    def _kept(self, activation: Tensor, base: Tensor | None) -> Tensor:
        """Return the output of a body that stands still; what it has answered once in a fit is not sent again."""
        rows = [sha256(row.contiguous().cpu().view(torch.uint8).numpy()).digest() for row in activation]
        new = [index for index, row in enumerate(rows) if row not in self._known]
        if new:
            output, _ = self.server.forward(self.cut, activation[new], None if base is None else base[new], "tail")
            self._known |= {rows[index]: answer for index, answer in zip(new, output, strict=True)}
        return torch.stack([self._known[row] for row in rows])

    def evaluate(self, activation: Tensor) -> Tensor:
        """Return the body's output without training."""
        return self.server.evaluate(self.cut, activation)


class _Server(torch.autograd.Function):
    """The body's output as a function of the activation at the cut."""

    @staticmethod
    def forward(
        ctx: Any, activation: Tensor, anchor: Tensor, exchange: Exchange, base: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.exchange = exchange
        reach: Reach = "front" if ctx.needs_input_grad[0] else "body"
        output, copies = exchange.server.forward(exchange.cut, activation.detach(), base, reach)
        if copies is not None:
            ctx.mark_non_differentiable(copies)
        return output, copies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        exchange: Exchange = ctx.exchange
        return exchange.server.backward(gradients[0], exchange.scale), None, None, None
