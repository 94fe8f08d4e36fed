"""Sets which parts of the model train at which time of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from fl_lightning.callback import FederatedCallback
from fl_lightning.checks import ArgumentError, above, one_of, whole
from fl_lightning.state import match

BatchNormPolicy = Literal["train", "frozen_stats", "frozen"]


@dataclass(frozen=True)
class Phase:
    """A stretch of a fit in which one part of the model trains and the rest stays as it is.

    Args:
        train: Shell patterns of the tensors that train, such as ``["head"]`` or ``["*"]``.
        epochs: How long, in epochs, at least 0; at 0 the phase is skipped.
        steps: How long, in optimizer steps, instead. With neither, the phase takes what the others leave.
        lr: Learning rate of the phase, above 0, in the place of the optimizer's; a scheduler goes on shaping it.
        batch_norm: What BatchNorm layers do. ``train``: whatever the part they belong to does. ``frozen_stats``: they
            normalise with their running statistics and leave these alone. ``frozen``: their weights stay, too.
    """

    train: Sequence[str]
    epochs: int | None = None
    steps: int | None = None
    lr: float | None = None
    batch_norm: BatchNormPolicy = "train"

    def __post_init__(self) -> None:
        train = self.train
        if not (isinstance(train, (list, tuple)) and train and all(isinstance(one, str) for one in train)):
            raise ArgumentError(f"phases.train must be a list of at least one pattern like [head], got {train!r}")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"a phase lasts for epochs or for steps, got both: {self.epochs} and {self.steps}")
        for name in ("epochs", "steps"):
            whole(f"phases.{name}", getattr(self, name), 0, or_null=True)
        above("phases.lr", self.lr, 0, or_null=True)
        one_of("phases.batch_norm", self.batch_norm, BatchNormPolicy)

    @property
    def takes_the_rest(self) -> bool:
        """Whether its length is what the other phases leave."""
        return self.epochs is None and self.steps is None


class FreezeSchedule(FederatedCallback):
    """Trains parts of the model in turn: linear probing before fine-tuning, a head before a body, a body alone.

    A frozen parameter gets no gradient, so momentum and weight decay leave it alone, and every part that is frozen
    whole is in eval mode, so that statistics and dropout in it stand still too: its tensors do not change by a bit.
    Each phase starts with a fresh optimizer state. After the fit the model is as trainable as before.

    Args:
        phases: What trains, one phase after another; each a mapping with the arguments of :class:`Phase`. Their lengths
            must add up to the length of the fit.
    """

    def __init__(self, phases: Sequence[Mapping[str, Any] | Phase]) -> None:
        self.phases = [_phase(index, phase) for index, phase in enumerate(phases)]
        if not self.phases:
            raise ValueError("a freeze schedule needs at least one phase, got none")
        if sum(phase.takes_the_rest for phase in self.phases) > 1:
            raise ValueError("only one phase may leave both epochs and steps open, to take the rest of the fit")
        self._starts: list[tuple[int, Phase]] = []
        self._trainable: list[tuple[nn.Parameter, bool]] = []
        self._lr_ratio = 1.0
        self._steps = 0

    @override
    def check(self, module: LightningModule, trainer: Trainer) -> None:
        tied = _tied(module)
        for phase in self.phases:
            found = match(module.state_dict(), phase.train)
            if found and all(name in tied for name in found):
                raise ValueError(
                    f"{found[0]} shares its weights with {tied[found[0]]} and cannot train by itself; set model.tied="
                    "false, where the model has that, or train both"
                )
        epochs = trainer.max_epochs
        if trainer.max_steps == -1 and epochs is not None and not any(phase.steps for phase in self.phases):
            self._check_sum(sum(phase.epochs or 0 for phase in self.phases), epochs, "epochs", "trainer.max_epochs")

    def _check_sum(self, taken: int, total: int, unit: str, key: str) -> None:
        open_end = any(phase.takes_the_rest for phase in self.phases)
        if taken > total or (taken < total and not open_end):
            raise ValueError(
                f"the phases of the freeze schedule take {taken} {unit}, but the fit has {total}; "
                f"change the phases or {key}, or leave one phase's epochs null to take the rest"
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits = [trainer.max_epochs * per_epoch if trainer.max_epochs not in (None, -1) else math.inf]
        # The Trainer counts the steps of all optimizers; here a step is a batch after which they stepped.
        limits += [trainer.max_steps // len(trainer.optimizers)] if trainer.max_steps != -1 else []
        total = int(min(limits))
        lengths = [phase.steps if phase.steps is not None else (phase.epochs or 0) * per_epoch for phase in self.phases]
        self._check_sum(sum(lengths), total, "steps", "the length of the fit")
        start, self._steps = 0, -1
        self._starts = []
        for phase, length in zip(self.phases, lengths, strict=True):
            length = total - sum(lengths) if phase.takes_the_rest else length
            if length:
                self._starts.append((start, phase))
            start += length
        self._trainable = [(p, p.requires_grad) for p in pl_module.parameters()]
        self._lr_ratio = 1.0
        self._advance(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Did the batch before this one end with a step? An epoch's last batch does.
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._steps += 1
        self._advance(trainer, pl_module)

    def _advance(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._starts or max(self._steps, 0) < self._starts[0][0]:
            return
        _, phase = self._starts.pop(0)
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        self._set_lr(trainer, phase)
        freeze(module, phase.train, phase.batch_norm, [p for p, trainable in self._trainable if trainable])

    def _set_lr(self, trainer: Trainer, phase: Phase) -> None:
        """Scale rates rather than set them: schedulers and ``context.lr_factor`` then keep their say."""
        ratio = 1.0 if phase.lr is None else phase.lr / trainer.optimizers[0].defaults["lr"]
        factor, self._lr_ratio = ratio / self._lr_ratio, ratio
        scale_rates(trainer.optimizers, [config.scheduler for config in trainer.lr_scheduler_configs], factor)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release(pl_module)

    def _release(self, module: LightningModule) -> None:
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)
        self._trainable = []
        self._starts = []
        module.train()


def scale_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiply learning rates, and what schedulers make them from."""
    if factor == 1.0:
        return
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for key in {"lr", "initial_lr"} & group.keys():
                group[key] *= factor
    for scheduler in schedulers:
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]


def freeze(
    module: nn.Module, train: Sequence[str], batch_norm: BatchNormPolicy, parameters: Sequence[nn.Parameter]
) -> None:
    """Let one part of a module train, and hold the rest still.

    Args:
        module: The module; put in train mode but for what is frozen.
        train: Shell patterns of the tensors that train.
        batch_norm: As in :class:`Phase`.
        parameters: Those that may train at all; others stay frozen whatever the patterns say.
    """
    training = set(match(module.state_dict(), train))
    if batch_norm == "frozen":
        training -= {name for prefix, _ in _batch_norms(module) for name in training if name.startswith(f"{prefix}.")}
    allowed = {id(parameter) for parameter in parameters}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in training and id(parameter) in allowed)
        if not parameter.requires_grad:
            parameter.grad = None
    module.train()
    _hold_still(module, "", training)
    if batch_norm != "train":
        for _, part in _batch_norms(module):
            part.eval()


def _hold_still(module: nn.Module, prefix: str, training: set[str]) -> None:
    """Put the largest parts that have tensors, of which none trains, in eval mode."""
    names = [f"{prefix}{name}" for name in module.state_dict()]
    if names and not training.intersection(names):
        module.eval()
        return
    for name, child in module.named_children():
        _hold_still(child, f"{prefix}{name}.", training)


def _tied(module: nn.Module) -> dict[str, str]:
    """Return the names of parameters that have another name before, by which torch knows them, with that name."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _batch_norms(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm))


def _phase(index: int, phase: Mapping[str, Any] | Phase) -> Phase:
    if isinstance(phase, Phase):
        return phase
    known = [field.name for field in fields(Phase)]
    unknown = [str(key) for key in phase if key not in known]
    if unknown or "train" not in phase:
        problem = f"has the unknown key {unknown[0]!r}" if unknown else "does not say what to train"
        raise ValueError(f"phase {index} of the freeze schedule {problem}; a phase takes {', '.join(known)}")
    return Phase(**phase)
