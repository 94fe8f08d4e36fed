"""A LightningModule as it is, seen as the backbone and the head that a federation divides models into."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Metric
from typing_extensions import override

from fl_lightning.fit.stock import quiet_warnings, silence_lightning
from fl_lightning.fit.tensors import PlainAttributes
from fl_lightning.models.model import Model
from fl_lightning.module import FederatedModule
from fl_lightning.task import Task


class Without(nn.Module):
    """A module without one of the parts in it: the same tensors, in the same order. Its output is that part's input.

    Args:
        whole: The module.
        path: Of the part, such as ``fc`` or ``net.head``; empty: nothing is left out.
    """

    def __init__(self, whole: nn.Module, path: str) -> None:
        vars(self)["whole"], vars(self)["path"] = whole, path
        mode = whole.training
        super().__init__()
        whole.training = mode
        vars(self)["_parameters"], vars(self)["_buffers"] = whole._parameters, whole._buffers
        vars(self)["_non_persistent_buffers_set"] = whole._non_persistent_buffers_set
        name, _, rest = path.partition(".")
        if path and name not in whole._modules:
            raise ValueError(
                f"module.head must be the path of a part, one of {', '.join(whole._modules)}, got {name!r}"
            )
        for key, child in whole._modules.items():
            if key != name:
                self._modules[key] = child
            elif rest and child is not None:
                self._modules[key] = Without(child, rest)

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return bool(vars(self)["whole"].training)

    @training.setter
    def training(self, mode: bool) -> None:
        vars(self)["whole"].training = mode

    @override
    def forward(self, x: Any) -> Any:
        whole, path = vars(self)["whole"], vars(self)["path"]
        if not path:
            return whole(x)
        seen: list[Any] = []
        handle = whole.get_submodule(path).register_forward_pre_hook(lambda part, args: seen.append(args[0]))
        try:
            whole(x)
        finally:
            handle.remove()
        return seen[-1]


class AdaptedModule(FederatedModule):
    """Lets a LightningModule take part in a federation untouched: its own steps, hooks, optimizers and logging.

    A Trainer fits the very module; only the loss passes through what callbacks add to it. Its ``forward`` takes the
    inputs of a batch and returns the outputs that the task scores.

    Args:
        lightning: The module.
        head: Path of its last part, such as ``fc``, for methods that treat it apart; empty: there is none.
        task: What it is trained for.
        own_optimizer: Whether its own ``configure_optimizers`` is called, where it has one.
    """

    def __init__(
        self, lightning: LightningModule, head: str = "", task: Task | None = None, own_optimizer: bool = True
    ) -> None:
        backbone = Without(lightning, head)
        super().__init__(Model(backbone, lightning.get_submodule(head) if head else nn.Identity(), head), task=task)
        # Beside the parts, not among them: its tensors are theirs.
        vars(self)["lightning"] = lightning
        self._attributes = PlainAttributes(lightning)
        self.own_optimizer = own_optimizer and configures_optimizers(lightning)

    @property
    @override
    def whole(self) -> LightningModule:
        lightning: LightningModule = vars(self)["lightning"]
        return lightning

    @override
    def forward(self, x: Any) -> Tensor:
        outputs: Tensor = self.whole(x)
        return outputs

    @override
    def loss(self, batch: Any) -> Tensor:
        """Return the loss of its own training step; only where nothing is logged in it or a fit is running."""
        return loss_of(self.whole.training_step(*((batch, 0) if takes_index(self.whole) else (batch,))))

    @override
    def train(self, mode: bool = True) -> AdaptedModule:
        super().train(mode)
        if "lightning" in vars(self):
            self.whole.train(mode)
        return self

    @override
    def to(self, *args: Any, **kwargs: Any) -> AdaptedModule:
        self.whole.to(*args, **kwargs)
        super().to(*args, **kwargs)
        return self

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the running fit."""
        return self.whole.trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        self.whole.trainer = trainer

    @override
    def log(self, *args: Any, **kwargs: Any) -> None:
        self.whole.log(*args, **kwargs)

    @override
    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.whole.optimizers(use_pl_optimizer)

    @contextmanager
    @override
    def fitting(self) -> Iterator[None]:
        """Let the loss of every training step pass through this fit's context, for as long as the context lasts.

        Attributes of the module that are no tensors of it begin every fit as they were made: it serves all clients, and
        what one has counted or stored is no other's.
        """
        whole, context = self.whole, self.context
        self._attributes.restore()
        step = whole.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            if output is None or (isinstance(output, dict) and "loss" not in output):
                return output  # a step that is left out, or an optimization by hand
            loss = loss_of(output)
            context.losses.append(loss.detach())
            for transform in context.loss_transforms:
                loss = transform(loss)
            return {**output, "loss": loss} if isinstance(output, dict) else loss

        vars(whole)["training_step"] = training_step
        if not self.own_optimizer:
            vars(whole)["configure_optimizers"] = self.configure_optimizers
        try:
            yield
        finally:
            vars(whole).pop("training_step")
            vars(whole).pop("configure_optimizers", None)

    @override
    def seen_by(self, callback: Callback) -> Callback:
        return Beside(callback, self)

    def logged_in(self, step: str, batch: Any, index: int) -> dict[str, float]:
        """Return what a step of the module logs of a batch: the number of each name.

        Args:
            step: ``validation_step`` or ``test_step``.
            batch: Where the module is.
            index: Of the batch.
        """
        whole, found = self.whole, {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(value, Metric):
                raise ValueError(f"{step} must log numbers, got a {type(value).__name__} as {name!r}; log its value")
            found[name] = float(value)

        def log_dict(values: Any, *args: Any, **kwargs: Any) -> None:
            for name, value in values.items():
                log(name, value)

        if getattr(type(whole), step) is getattr(LightningModule, step):
            raise ValueError(f"{type(whole).__name__} must have a {step}, which logs what scores it")
        before: dict[str, Any] = {name: vars(whole)[name] for name in ("log", "log_dict") if name in vars(whole)}
        vars(whole)["log"], vars(whole)["log_dict"] = log, log_dict
        try:
            run = getattr(whole, step)
            run(batch, index) if "batch_idx" in inspect.signature(run).parameters else run(batch)
        finally:
            for name in ("log", "log_dict"):
                del vars(whole)[name]
            vars(whole).update(before)
        return found

    def try_step(self, batch: Any, validate: bool = False) -> None:
        """Fit a copy to one batch, so that what cannot work is found before the first round.

        Args:
            batch: Of training data.
            validate: Whether fits also validate (``local.validate``): then the batch is validated on, too.
        """
        name = type(self.whole).__name__
        trial = copy.deepcopy(self)
        outputs: list[Any] = []
        step = trial.whole.training_step

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            outputs.append(step(*args, **kwargs))
            return outputs[-1]

        vars(trial.whole)["training_step"] = training_step
        options: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        silence_lightning()
        trainer = Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **options)
        one: DataLoader[Any] = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
        if not self.own_optimizer:
            vars(trial.whole)["configure_optimizers"] = lambda: torch.optim.SGD(trial.parameters(), lr=0.0)
        with torch.random.fork_rng(devices=[]):
            try:
                with quiet_warnings():
                    trainer.fit(trial.whole, one, one if validate else None)
            except Exception as error:
                words = (str(error).splitlines() or [""])[0]
                if "conditioned on metric" in words and not validate:
                    words += "; a fit validates with local.validate=true alone"
                raise ValueError(f"{name} cannot be fitted to a batch: {type(error).__name__}: {words}") from error
        if self.whole.automatic_optimization:
            try:
                finite = bool(loss_of(outputs[-1]).isfinite())
            except (TypeError, KeyError, AttributeError):
                raise ValueError(
                    f"{name}.training_step must return a loss, or a dict with one, got {type(outputs[-1]).__name__}"
                ) from None
            if not finite:
                raise ValueError(
                    f"{name}.training_step must return a finite loss, got {float(loss_of(outputs[-1]).detach())}"
                )


class Beside(Callback):
    """Calls the Lightning hooks of a federated callback with the module that the federation sees.

    Args:
        callback: The callback.
        module: That module.
    """

    def __init__(self, callback: Callback, module: FederatedModule) -> None:
        for name in dir(Callback):
            ours, theirs = getattr(Callback, name), getattr(type(callback), name)
            if (name.startswith("on_") or name in ("setup", "teardown")) and ours is not theirs:
                vars(self)[name] = partial(_call, getattr(callback, name), module)


def _call(hook: Callable[..., Any], module: FederatedModule, trainer: Trainer, _: Any, *args: Any, **more: Any) -> Any:
    return hook(trainer, module, *args, **more)


def loss_of(output: Any) -> Tensor:
    """Return the loss that a training step has returned."""
    loss: Tensor = output["loss"] if isinstance(output, dict) else output
    loss.detach()  # what is no tensor has no such thing
    return loss


def configures_optimizers(lightning: LightningModule) -> bool:
    """Tell whether a module makes its own optimizers."""
    return type(lightning).configure_optimizers is not LightningModule.configure_optimizers


def takes_index(lightning: LightningModule) -> bool:
    """Tell whether its training step takes the number of the batch."""
    return type(lightning).training_step.__code__.co_argcount > 2
