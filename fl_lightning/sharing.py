"""Which tensors travel: the first of the three questions that a federated method answers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_lightning.checks import one_of
from fl_lightning.state import match

if TYPE_CHECKING:
    from fl_lightning.client import Client, ClientInfo

Buffers = Literal["average", "local", "reset"]


class Sharing:
    """Splits the tensors of a model, parameters and buffers alike, into shared and personal ones.

    Every tensor is one or the other and none is both, but for those that nobody trains. Only shared tensors are ever
    put into a message, so a personal tensor cannot leak and bytes are counted right by construction.

    Args:
        shared: Shell patterns of what is shared; all by default. Empty shares nothing: every client trains alone.
        personal: Shell patterns of what stays at the client, taken out of ``shared``.
        personal_batch_norm: Whether BatchNorm layers stay at the client whole, weights and statistics. They are found
            by their class: names mislead (``downsample.1``).
        buffers: What becomes of BatchNorm's running statistics. ``average``: exchanged and averaged like weights.
            ``local``: they stay at the client. ``reset``: exchanged, but every fit gathers fresh ones, the mean over
            its batches.
        fixed: Shell patterns of what nobody trains, taken out of both: it is the same everywhere from the start, and
            never travels. A fit that changes such a tensor is an error; freeze it. Parameters that are frozen from the
            start (the weights that adapters stand beside) are fixed without a pattern.
        merged: Shell patterns of parameters that are frozen from the start and that the server changes all the same,
            since it merges adapters into them. They are shared; how their changes travel is the method's.
    """

    def __init__(
        self,
        shared: Sequence[str] = ("*",),
        personal: Sequence[str] = (),
        personal_batch_norm: bool = False,
        buffers: Buffers = "average",
        fixed: Sequence[str] = (),
        merged: Sequence[str] = (),
    ) -> None:
        one_of("buffers", buffers, Buffers)
        self.shared = tuple(shared)
        self.personal = tuple(personal)
        self.fixed = tuple(fixed)
        self.merged = tuple(merged)
        self.personal_batch_norm = personal_batch_norm
        self.buffers = buffers
        self._names: tuple[Any, list[str]] = (None, [])

    def names(self, module: nn.Module, client: Client | ClientInfo | None = None) -> list[str]:
        """Return the names of the tensors that travel between the server and a client, in the model's order.

        Override where the shared part differs by client.

        Args:
            module: The model.
            client: The client; ``None`` asks for the union over all clients, which the server holds.
        """
        known, found = self._names
        if known is None or known() is not module:
            names = list(module.state_dict())
            kept = set(match(names, self.personal)) if self.personal else set()
            kept |= self.fixed_names(module)
            if self.personal_batch_norm:
                kept |= _batch_norm_names(module, buffers_only=False)
            if self.buffers == "local":
                kept |= _batch_norm_names(module, buffers_only=True)
            shared = match(names, self.shared) if self.shared else []
            found = [name for name in shared if name not in kept]
            if shared and not found:
                raise ValueError(
                    f"sharing.shared must name a tensor that does not stay with the clients, got {list(self.shared)}; "
                    "shared=[] shares nothing"
                )
            self._names = weakref.ref(module), found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": (None, [])}  # a weak reference does not travel

    def fixed_names(self, module: nn.Module) -> set[str]:
        """Return the names of the tensors that nobody trains."""
        patterned = set(match(module.state_dict(), self.fixed)) if self.fixed else set()
        return patterned | self.base_names(module)

    def base_names(self, module: nn.Module) -> set[str]:
        """Return the names of the parameters that are frozen from the start, and that the server leaves alone too."""
        base: set[str] = set(getattr(module, "base_names", ()))
        if not self.merged:
            return base
        if not base:
            raise ValueError("sharing.merged needs a model with frozen weights, such as model.adapters={rank: 4}")
        return base - set(match(sorted(base), self.merged))

    @contextmanager
    def prepared(self, module: nn.Module) -> Iterator[None]:
        """Make a freshly loaded module ready for a fit, as the buffer policy says, until the fit is over."""
        layers = [part for part in module.modules() if isinstance(part, _BatchNorm)] if self.buffers == "reset" else []
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches: no share of the constants that it begins with
        try:
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


def _batch_norm_names(module: nn.Module, buffers_only: bool) -> set[str]:
    names = set()
    for prefix, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            own = (name for name, _ in part.named_buffers()) if buffers_only else iter(part.state_dict())
            names |= {f"{prefix}.{name}" if prefix else name for name in own}
    return names
