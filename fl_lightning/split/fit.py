"""Fits a cut model at one client, against a body made from what the server holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import above
from fl_lightning.split.alignment import Alignment
from fl_lightning.split.body import MakeOptimizer, ServerBody
from fl_lightning.split.cut import Cut
from fl_lightning.split.exchange import Exchange
from fl_lightning.split.module import SplitModule
from fl_lightning.split.traffic import Traffic

if TYPE_CHECKING:
    from fl_lightning.client import Broadcast, Client, Update
    from fl_lightning.module import FederatedModule
    from fl_lightning.state import State

# Entries of `broadcast.here` and `update.here` beside the body's tensors behind the client's cut:
COPY = "copy/"  # the body's tensor where the client has a private one of that name
OPTIMIZER = "optimizer/"  # what the body's optimizer keeps
RELAY = "split/relay"  # whether the client has the shared tensors of the client before it
CUT = "split/cut"  # the client's cut
BATCHES, TRAFFIC = "split/batches", "split/traffic"  # the sizes of the batches, and what they sent


def connecting(cut: Cut) -> State:
    """Return what ``broadcast.here`` must hold beside the body to connect a fit."""
    return {CUT: torch.tensor([cut.start, cut.at, cut.end])}


def account(here: State) -> tuple[list[int], Traffic]:
    """Take the sizes of a fit's batches and what they sent out of ``update.here``."""
    if TRAFFIC not in here:  # nothing was trained
        return [], Traffic()
    return here.pop(BATCHES).tolist(), Traffic(*here.pop(TRAFFIC).tolist())


class SplitFit(FederatedCallback):
    """The client's half of split training.

    Every fit makes its own body from ``broadcast.here`` and leaves it in ``update.here``. So a fit that is repeated
    starts where it started before, and fits may run in any process.

    Args:
        optimizer: Makes the body's optimizer; by default that of the clients.
        keep_optimizer: Whether what the body's optimizer keeps goes back to the server.
        alignment: How private tops are held near the body; none by default.
        clip: Largest norm of the body's gradient; ``None`` clips nothing.
        frozen: Whether the body is not trained.
    """

    def __init__(
        self,
        optimizer: MakeOptimizer | None = None,
        keep_optimizer: bool = True,
        alignment: Alignment | None = None,
        clip: float | None = None,
        frozen: bool = False,
    ) -> None:
        self.make_optimizer = optimizer
        self.keep_optimizer = keep_optimizer
        self.alignment = alignment or Alignment(weight=0.0)
        above("clip", clip, 0, or_null=True)
        self.clip = clip
        self.frozen = frozen

    def new_body(
        self, module: SplitModule, optimizer: MakeOptimizer, here: State, device: torch.device, guarded: bool = False
    ) -> ServerBody:
        """Return the server's half of a model as a fit begins with it.

        Args:
            module: The model; what is not in ``here`` has its weights.
            optimizer: The clients', for a body that has none of its own.
            here: Tensors of the body, its copies of a private top, and what its optimizer kept.
            device: Where it computes.
            guarded: As in `ServerBody`.
        """
        optimizer = self.make_optimizer or optimizer
        body = ServerBody(module, optimizer, self.alignment, self.clip, self.frozen, guarded, device)
        body.load_state({name.removeprefix(COPY): tensor for name, tensor in here.items()})
        body.load_optimizer_state(
            {name.removeprefix(OPTIMIZER): kept for name, kept in here.items() if name.startswith(OPTIMIZER)}
        )
        return body

    def left_of(self, body: ServerBody, names: Iterable[str]) -> State:
        """Return what a fit leaves in ``update.here``: those tensors of the body, its optimizer, the account."""
        found = {name: tensor for name, tensor in body.state().items() if name in set(names)}
        if self.keep_optimizer:
            found |= {OPTIMIZER + name: kept for name, kept in body.optimizer_state().items()}
        found[BATCHES] = torch.tensor(body.batches)
        found[TRAFFIC] = torch.tensor(list(vars(body.traffic).values()))
        return found

    @override
    def on_client_start(self, client: Client, module: FederatedModule, broadcast: Broadcast) -> None:
        self._here = broadcast.here
        self._half: ServerBody | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, SplitModule)
        pl_module.to(trainer.strategy.root_device)  # the body is made where the model trains
        exchange = pl_module.line
        if exchange is None:
            assert pl_module.context.optimizer is not None
            own = pl_module.state_dict()  # these weights are loaded already
            here = {name: tensor for name, tensor in self._here.items() if name not in own}
            self._half = self.new_body(pl_module, pl_module.context.optimizer, here, pl_module.device)
            exchange = Exchange(self._half, Cut(*self._here[CUT].tolist()), self.alignment)
        exchange.begin(self.frozen, 1.0 / trainer.accumulate_grad_batches)
        pl_module.connect(exchange)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, SplitModule)
        pl_module.connect(None)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, SplitModule)
        pl_module.connect(None)

    @override
    def on_client_end(self, client: Client, module: FederatedModule, update: Update) -> None:
        if self._half is not None:  # else the server has it
            update.here |= self.left_of(self._half, update.here)
            self._half = None
