"""Says which weights travel when a model is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn
from typing_extensions import override

from fl_lightning.sharing import Buffers, Sharing
from fl_lightning.split.cut import Cut, Parts
from fl_lightning.split.module import SplitModule

if TYPE_CHECKING:
    from fl_lightning.client import Client, ClientInfo


class SplitSharing(Sharing):
    """The server's body is shared without ever leaving the server; of a client's own tensors, what is said here.

    A private top is always personal: other clients leave those blocks to the server.

    Args:
        shared: Shell patterns of the clients' tensors that are exchanged as weights; none by default.
        personal: As in `Sharing`; like the rest, of the clients' tensors only.
        personal_batch_norm: As in `Sharing`.
        buffers: As in `Sharing`.
        fixed: As in `Sharing`; parts whose learning rate the module puts at 0 belong to it by themselves.
    """

    def __init__(
        self,
        shared: Sequence[str] = (),
        personal: Sequence[str] = (),
        personal_batch_norm: bool = False,
        buffers: Buffers = "average",
        fixed: Sequence[str] = (),
    ) -> None:
        super().__init__(shared, personal, personal_batch_norm, buffers, fixed)
        self._cuts: dict[int, Cut] = {}

    def assign(self, cuts: Mapping[int, Cut]) -> None:
        """Learn where each client's model is cut, by client id."""
        self._cuts = dict(cuts)

    @override
    def names(self, module: nn.Module, client: Client | ClientInfo | None = None) -> list[str]:
        """Return the names of the body's tensors behind the client's cut, and of those of its own that it shares."""
        held = self._parts(module, client)
        chosen = {*held.body, *self.exchanged(module)} - self.base_names(module)
        return [name for name in module.state_dict() if name in chosen]

    @override
    def fixed_names(self, module: nn.Module) -> set[str]:
        assert isinstance(module, SplitModule)
        return super().fixed_names(module) | set(module.frozen(self._parts(module, None)))

    def exchanged(self, module: nn.Module) -> list[str]:
        """Return the names of the tensors that clients hold and exchange as weights: what truly crosses the network."""
        body = set(self._parts(module, None).body)
        return [name for name in super().names(module) if name not in body]

    def _parts(self, module: nn.Module, client: Client | ClientInfo | None) -> Parts:
        assert isinstance(module, SplitModule)  # as SplitServer has checked
        cut = self._cuts.get(client.id) if client is not None else None
        return module.parts(cut or module.cut_at(module.start))
