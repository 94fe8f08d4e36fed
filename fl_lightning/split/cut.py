"""Describes where a chain of blocks is cut, and which tensor lies on which side."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from fl_lightning.split.blocks import Chain, named_tensors, tensor_names


@dataclass(frozen=True)
class Cut:
    """A U-shaped cut: the client holds blocks ``[0, at)`` and ``[end, n)`` with the head, the server ``[start, end)``.

    The server holds ``[start, end)`` for everybody; a client whose own cut ``at`` lies later than ``start`` has a
    private duplicate of ``[start, at)``, its *top*. Blocks ``[0, start)`` are its *base*, ``[end, n)`` and the head its
    *tail*. The loss is in the tail, so labels never leave the client.

    Attributes:
        start: First block that the server holds, at least 1: inputs never leave the client.
        at: First block that the server computes for this client, in [start, end).
        end: First block after the server's, at most the number of blocks.
    """

    start: int
    at: int
    end: int

    def check(self, num_blocks: int) -> Cut:
        """Return this cut if it is legal for a chain of ``num_blocks`` blocks."""
        if not 1 <= self.start <= self.at < self.end <= num_blocks:
            raise ValueError(
                f"a cut needs 1 <= start <= cut < end <= {num_blocks}, the number of blocks, "
                f"got start {self.start}, cut {self.at}, end {self.end}"
            )
        return self


@dataclass(frozen=True)
class Parts:
    """Names of a model's tensors by the part they belong to for one cut.

    Attributes:
        base: Client, personal: blocks ``[0, start)``.
        top: Client, personal: its duplicate of the server's blocks ``[start, at)``.
        body: Server: blocks ``[at, end)`` as this client uses them.
        tail: Client, personal: blocks ``[end, n)``.
        head: Client, personal: the head.
    """

    base: tuple[str, ...]
    top: tuple[str, ...]
    body: tuple[str, ...]
    tail: tuple[str, ...]
    head: tuple[str, ...]

    @property
    def client(self) -> tuple[str, ...]:
        """All names of what the client holds."""
        return self.base + self.top + self.tail + self.head

    def without(self, names: Collection[str]) -> Parts:
        """Return the parts without some tensors, such as those that nobody trains."""
        return Parts(*(tuple(name for name in part if name not in names) for part in vars(self).values()))


def parts(blocks: Chain, head: nn.Module, model: nn.Module, cut: Cut) -> Parts:
    """Assign every tensor of a model to the part that holds it.

    A tensor that is tied (held under two names, or by two blocks) must have one holder: between the two ends of a
    client it may be shared, between client and server it cannot, since two machines cannot update one tensor.

    Args:
        blocks: The backbone's blocks.
        head: The head.
        model: The whole, whose ``state_dict`` names are used.
        cut: The cut.

    Raises:
        ValueError: If the cut is not legal, or separates tied tensors, or a tensor lies in no part.
    """
    cut.check(len(blocks))
    named = named_tensors(model)
    ordered = list(blocks.values())
    base = tensor_names(ordered[: cut.start], named)
    top = tensor_names(ordered[cut.start : cut.at], named)
    body = tensor_names(ordered[cut.at : cut.end], named)
    last = tensor_names([head], named)
    tail = tensor_names(ordered[cut.end :], named)
    server = set(tensor_names(ordered[cut.start : cut.end], named))
    torn = server & {*base, *tail, *last} or set(top) & set(body)
    if torn:
        raise ValueError(
            f"the cut {cut.start}:{cut.at}:{cut.end} tears apart the tied tensor {min(torn)!r}, which "
            "would have two holders; move the cut so that one party holds both ends, or untie them."
        )
    last = [name for name in last if name not in base and name not in tail]  # tied ends of a client count once
    tail = [name for name in tail if name not in base]
    lost = named.keys() - {*base, *top, *body, *tail, *last}
    if lost:
        raise ValueError(f"{', '.join(sorted(lost)[:4])} lie in no block and no head, so nobody would hold them.")
    return Parts(tuple(base), tuple(top), tuple(body), tuple(tail), tuple(last))
