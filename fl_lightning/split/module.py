"""Trains the client's half of a cut model, as a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fl_lightning.checks import ArgumentError, at_least, one_of
from fl_lightning.models.gpt import TokenEmbedding
from fl_lightning.models.model import Model
from fl_lightning.models.prompts import PROMPT
from fl_lightning.module import Batch, FederatedModule
from fl_lightning.split.blocks import chain, run
from fl_lightning.split.cost import Reach
from fl_lightning.split.cut import Cut, Parts, parts
from fl_lightning.split.exchange import Exchange
from fl_lightning.split.transformer_blocks import Part

CLIENT_PARTS = ("base", "top", "tail", "head")


class SplitModule(FederatedModule):
    """A model whose middle blocks are computed by a server while it trains.

    It has the tensors of the whole model, so that a personal model can be evaluated, saved and exported like any other:
    a client's own and the server's. During a fit the server's are not used: the activation at the cut goes out through
    an `Exchange` and the body's output comes in.

    Args:
        model: Backbone, head, and where the head sits in the original network.
        label_smoothing: As in `FederatedModule`.
        start: First block that the server holds, at least 1.
        end: First block of the client's tail; 0 or less counts from the last: at 0 the tail is the head alone.
        blocks: Module paths of the backbone's blocks, where they are not known by themselves; see `chain`.
        lr_factors: What the learning rate is multiplied by, for ``base``, ``top``, ``tail`` and ``head``; 1 where not
            given. At 0 a part is frozen, buffers included. Of the rounds: a stage after them trains what its own
            callbacks say.
    """

    def __init__(
        self,
        model: Model,
        label_smoothing: float = 0.0,
        start: int = 1,
        end: int = -1,
        blocks: Sequence[str | Sequence[str]] | None = None,
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(model, label_smoothing)
        if PROMPT in dict(self.backbone.named_parameters(recurse=False)):
            raise ArgumentError(
                "model.adapters must be low-rank ({rank: 4, targets: attention}) where the model is cut, got a prompt, "
                "which belongs to no block of it"
            )
        self.blocks = chain(self.backbone, blocks)
        self.start = start
        self.end = end if end > 0 else len(self.blocks) + end
        self.lr_factors = dict(lr_factors or {})
        for part, factor in self.lr_factors.items():
            one_of("lr_factors", part, CLIENT_PARTS)
            at_least(f"lr_factors.{part}", factor, 0)
        # A wrong `start` or `end`, or a torn tensor, must show before anything runs.
        held = self.parts(self.cut_at(start))
        trained = {name for name, _ in self.named_parameters(remove_duplicate=False)} - self.base_names
        for holder, names in (("client", held.client), ("server", held.body)):
            if not trained.intersection(names):
                raise ValueError(
                    f"the {holder} must have something to train, but with model.adapters its blocks have none; "
                    f"move module.start={self.start} or module.end={self.end} of {len(self.blocks)} blocks"
                )
        self.exchange: Exchange | None = None
        self.line: Exchange | None = None  # of a client that does not hold the body
        self._penalty: Tensor | None = None

    def cut_at(self, at: int) -> Cut:
        """Return the cut of a client whose private part ends before block ``at``."""
        return Cut(self.start, at, self.end).check(len(self.blocks))

    def parts(self, cut: Cut) -> Parts:
        """Return which tensors lie where for a cut."""
        return parts(self.blocks, self.head, self, cut)

    def frozen(self, held: Parts) -> list[str]:
        """Return the names of a client's tensors that are not trained, for its parts."""
        return [name for part in CLIENT_PARTS if self._lr_factor(part) == 0 for name in getattr(held, part)]

    def reach(self, cut: Cut, body_frozen: bool = False) -> Reach:
        """Return how far back a batch's gradient goes for a client's cut: to where something is trained."""
        held = self.parts(cut)
        front = {*held.base, *held.top}.difference(self.frozen(held), self.base_names)
        if any(name in front for name, _ in self.named_parameters(remove_duplicate=False)):
            return "front"
        return "tail" if body_frozen else "body"

    def _lr_factor(self, part: str) -> float:
        # Of the rounds: what a stage after them trains is said by its own callbacks.
        return 1.0 if self.context.stage else self.lr_factors.get(part, 1.0)

    def example_input(self, in_channels: int, image_size: int) -> Tensor:
        """Return one blank input: an image ``(1, C, H, W)``, or tokens ``(1, T)`` for a language model."""
        first = next(iter(self.blocks.values()))
        if isinstance(first, (TokenEmbedding, Part)):
            return torch.full((1, image_size), 0 if first.padding is None else first.padding + 1)
        return torch.zeros(1, in_channels, image_size, image_size)

    def leave_out(self, cut: Cut) -> None:
        """Give up the tensors of the body behind a client's cut, which the server holds."""
        blocks = list(self.blocks.values())
        held = nn.ModuleList([*blocks[: cut.at], *blocks[cut.end :], self.head])
        kept = {id(tensor) for tensor in (*held.parameters(), *held.buffers())}
        for block in blocks[cut.at : cut.end]:
            for part in block.modules():
                for own in (part._parameters, part._buffers):
                    own.update({name: None for name, tensor in own.items() if id(tensor) not in kept})
        self._base = None

    def connect(self, exchange: Exchange | None) -> None:
        """Attach the line to the server for a fit, or take it away."""
        self.exchange = exchange
        if exchange is None:
            still: set[str] = set(self.base_names)
        else:
            held = self.parts(exchange.cut)
            still = {*self.base_names, *self.frozen(held), *held.body}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in still)

    @override
    def features(self, x: Tensor) -> Tensor:
        """Return the features; through the server while a line to it is attached."""
        exchange = self.exchange or self.line
        if exchange is None:
            return super().features(x)
        blocks, cut = list(self.blocks.values()), exchange.cut
        base = run(blocks[: cut.start], x)
        activation = run(blocks[cut.start : cut.at], base)
        if torch.is_grad_enabled() and self.training:
            output, self._penalty = exchange.train(activation, base if exchange.aligns else None)
        else:
            output = exchange.evaluate(activation)
        return run(blocks[cut.end :], output)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step. What is logged stays the task's loss; the alignment is added to what goes backward."""
        loss = super().training_step(batch, batch_idx)
        penalty, self._penalty = self._penalty, None
        return loss if penalty is None else loss + penalty

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.exchange is not None and batch_idx == 0:
            self._freeze_statistics()

    @override
    def configure_optimizers(self) -> Any:
        """One optimizer over what the client holds and trains, with a group for each part."""
        if self.exchange is None:
            return super().configure_optimizers()
        held = self.parts(self.exchange.cut)
        named = {name: tensor for name, tensor in self.named_parameters() if name not in self.base_names}
        groups: list[Any] = [
            {"params": [named[name] for name in getattr(held, part) if name in named], "lr_factor": factor}
            for part in CLIENT_PARTS
            if (factor := self._lr_factor(part)) > 0
        ]
        return self.context.configure([group for group in groups if group["params"]])

    def _freeze_statistics(self) -> None:
        """Put wholly frozen blocks in evaluation mode: a BatchNorm's statistics move even without gradients."""
        assert self.exchange is not None
        cut, blocks = self.exchange.cut, list(self.blocks.values())
        held = (blocks[: cut.start], blocks[cut.start : cut.at], blocks[cut.end :], [self.head])
        for part, modules in zip(CLIENT_PARTS, held, strict=True):
            if self._lr_factor(part) == 0:
                for module in modules:
                    module.eval()
