"""The objective: a backbone and a head, as one LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn

from fl_lightning.checks import within
from fl_lightning.models.model import Model
from fl_lightning.state import State, difference, load
from fl_lightning.task import Classification, Task

if TYPE_CHECKING:
    from fl_lightning.client import Client

Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[..., torch.optim.Optimizer]


@dataclass
class FitContext:
    """What belongs to one fit: made when it begins, gone when it ends.

    Attributes:
        optimizer: Makes the optimizer from the parameters.
        scheduler: Makes a learning-rate scheduler from the optimizer; None: constant.
        interval: When the scheduler steps: after every ``epoch``, or after every ``step`` of the optimizer.
        stage: Name of the callback whose training outside the rounds this is; empty in a round.
        lr_factor: What learning rates are multiplied by.
        settings: Values that a module takes in this fit in the place of its own.
        logs_loss: Whether a callback may want ``train_loss`` logged.
        losses: The training loss of each batch so far.
        loss_transforms: What a loss goes through before it is differentiated.
    """

    optimizer: MakeOptimizer | None = None
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    interval: str = "epoch"
    stage: str = ""
    lr_factor: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    logs_loss: bool = False
    losses: list[Tensor] = field(default_factory=list)
    loss_transforms: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def configure(self, parameters: Iterable[Any]) -> Any:
        """Make optimizer and scheduler, as ``configure_optimizers`` returns them.

        Args:
            parameters: Parameters, or groups of them, whose ``lr_factor`` multiplies their learning rate.

        Raises:
            RuntimeError: If no fit is running.
        """
        if self.optimizer is None:
            raise RuntimeError("there is no optimizer outside a fit; give one to LocalTraining(optimizer=...)")
        optimizer = self.optimizer(parameters)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.pop("lr_factor", 1.0) * self.lr_factor
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": self.interval},
        }


class FederatedModule(LightningModule):
    """A backbone that turns inputs into features, a head that turns features into logits, and what trains them.

    Tensors are named ``backbone.*`` and ``head.*``. A method with another objective overrides :meth:`loss`; one with a
    second model also :meth:`personal_forward`.

    Args:
        model: Backbone, head, and where the head sits in the original network.
        label_smoothing: As in :func:`torch.nn.functional.cross_entropy`, in [0, 1).
        task: What it is trained for; None: one class of several for each example.
    """

    needs_classes: ClassVar[bool] = False
    """Whether its loss is one of classes alone, so that ``task`` must be ``classification``."""

    uses_all: ClassVar[bool] = False
    """Whether :meth:`forward` uses all tensors, and not backbone and head alone."""

    def __init__(self, model: Model, label_smoothing: float = 0.0, task: Task | None = None) -> None:
        super().__init__()
        within("label_smoothing", label_smoothing, "[0, 1)")
        self.backbone = model.backbone
        self.head = model.head
        self.head_path = model.head_path
        self.label_smoothing = label_smoothing
        self.task = task or Classification()
        self.context = FitContext()
        self.idle: frozenset[str] = frozenset()
        self._base: frozenset[str] | None = None

    @property
    def base_names(self) -> frozenset[str]:
        """Names of the parameters that were frozen from the start: nobody trains them, and they never travel.

        They are looked up once, before the first fit: what a fit freezes for a while is none of them.
        """
        if self._base is None:
            named = self.named_parameters(remove_duplicate=False)
            self._base = frozenset(name for name, parameter in named if not parameter.requires_grad)
        return self._base

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that an optimizer may have: all but those that were frozen from the start."""
        return [parameter for name, parameter in self.named_parameters() if name not in self.base_names]

    @property
    def whole(self) -> LightningModule:
        """The LightningModule that a Trainer fits."""
        return self

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Make :attr:`whole` ready for a fit, for as long as the context lasts."""
        yield

    def seen_by(self, callback: Callback) -> Callback:
        """Return a callback that gets this module in its hooks, whatever the Trainer fits."""
        return callback

    def for_client(self, client: Client) -> None:
        """Called when a client's tensors are loaded, to train or to be scored: here a module may differ by client.

        Names that it puts into ``self.idle`` are of personal tensors that this client does not have: it keeps none.
        """

    def features(self, x: Tensor) -> Tensor:
        """Return the features ``(N, D)`` of inputs ``(N, ...)``: what the head sees."""
        features: Tensor = self.backbone(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits ``(N, C)`` of inputs ``(N, ...)``."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def personal_forward(self, x: Tensor) -> Tensor:
        """Return the logits of the personal model; the same as :meth:`forward` unless a method has a second model."""
        logits: Tensor = self(x)
        return logits

    @property
    def global_names(self) -> list[str]:
        """Names of the tensors that :meth:`forward` uses: a second model is no part of the global one."""
        return [name for name in self.state_dict() if self.uses_all or name.startswith(("backbone.", "head."))]

    def start_from(self, state: State) -> None:
        """Take the tensors of a global model as initial values.

        Args:
            state: All tensors named by :attr:`global_names`, or those of backbone and head.
        """
        tensors = self.state_dict()
        own = {name: tensors[name] for name in self.global_names}
        if state.keys() != own.keys():
            own = {name: tensor for name, tensor in own.items() if name.startswith(("backbone.", "head."))}
        if words := difference(state, own):
            raise ValueError(f"the weights to start from are another model's: {words}")
        load(self, {**tensors, **state})

    @property
    def has_personal_model(self) -> bool:
        """Whether :meth:`personal_forward` is a model of its own."""
        return type(self).personal_forward is not FederatedModule.personal_forward

    def loss(self, batch: Batch) -> Tensor:
        """Return the training loss of a batch of inputs ``(N, ...)`` and targets, a scalar."""
        x, y = batch
        return self.criterion(self(x), y)

    def criterion(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of outputs, as the task has it, a scalar."""
        return self.task.loss(outputs, targets, self.label_smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step. The loss is kept as a tensor: reading its value here would stop an accelerator every step."""
        loss, context = self.loss(batch), self.context
        context.losses.append(loss.detach())
        if context.logs_loss:
            self.log("train_loss", loss.detach(), on_step=True, on_epoch=True, batch_size=len(batch[1]))
        for transform in context.loss_transforms:
            loss = transform(loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``val_loss``, and ``val_acc`` where there are classes, for callbacks that monitor them within a fit."""
        x, y = batch
        outputs, targets = self.task.flat(self(x), y)
        self.log("val_loss", self.task.mean_loss(outputs, targets), on_step=False, on_epoch=True, batch_size=len(y))
        if self.task.has_classes:
            right = (self.task.predicted(outputs) == targets).float().mean()
            self.log("val_acc", right, on_step=False, on_epoch=True, batch_size=len(y))

    def configure_optimizers(self) -> Any:
        """One fresh optimizer; a parameter frozen for a while has no gradient, and torch then leaves it alone."""
        return self.context.configure(self.trained_parameters())


def with_value_of(shown: Tensor, *hidden: Tensor) -> Tensor:
    """Return a loss with the gradients of all its arguments and the value of the first.

    The logged training loss then stays the task's own, and comparable between methods.
    """
    return shown + sum(loss - loss.detach() for loss in hidden)
