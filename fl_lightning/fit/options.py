"""What may be chosen for a fit, checked before the first one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from fl_lightning.module import FitContext

Engine = Literal["auto", "lean", "stock"]
Interval = Literal["epoch", "step"]

#: Weights stay float32: what travels, is averaged and is scored has one type.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

#: Arguments of the Trainer that every fit sets, and what to set instead.
TAKEN = {
    "callbacks": "add callbacks under `callbacks`",
    "enable_checkpointing": "a ModelCheckpoint under `callbacks` switches it on",
    "enable_model_summary": "leave it out",
    "enable_progress_bar": "set progress.enabled",
    "log_every_n_steps": "leave it out: every step is logged",
    "logger": "set logger=tensorboard, csv or none at the root; what a fit logs is kept as fit/<name>",
    "num_sanity_val_steps": "leave it out",
}


class NotCoveredError(Exception):
    """Somebody asked for what only Lightning's own loop can do; the message says what, to follow "because"."""


def check_trainer(arguments: Mapping[str, Any]) -> None:
    """Check arguments of the Trainer that Lightning lets through, or answers with a traceback."""
    given = {name: value for name, value in arguments.items() if value is not None}
    for name, instead in TAKEN.items():
        if name in given:
            raise ValueError(f"trainer.{name} must not be given, got {given[name]!r}: every fit sets it; {instead}")
    ends = any(given.get(name, -1) != -1 for name in ("max_steps", "max_time"))
    epochs = given.get("max_epochs", -1)
    if epochs < -1 or (epochs == -1 and not ends):
        raise ValueError(
            f"trainer.max_epochs must be at least 0, or -1 with trainer.max_steps, got {arguments.get('max_epochs')}; "
            "a fit has to end"
        )
    if given.get("max_steps", -1) < -1:
        raise ValueError(f"trainer.max_steps must be at least 0, or -1 for no limit, got {given['max_steps']}")
    if given.get("num_nodes", 1) != 1:
        raise ValueError(
            f"trainer.num_nodes must be 1, got {given['num_nodes']}; set executor=ray for several machines"
        )
    if given.get("devices", 1) in (0, "0", []):
        raise ValueError(
            f"trainer.devices must be 1, got {given['devices']!r}; for the CPU set trainer.accelerator=cpu"
        )
    least = {"accumulate_grad_batches": 1, "gradient_clip_val": 0, "limit_train_batches": 0, "limit_val_batches": 0}
    for name, bound in least.items():
        if name in given and not given[name] >= bound:
            raise ValueError(f"trainer.{name} must be at least {bound}, got {given[name]}")


def check_optimizer(context: FitContext, parameters: Iterable[nn.Parameter]) -> None:
    """Try out optimizer and scheduler on the parameters of a model."""
    try:
        optimizer = replace(context, scheduler=None).configure(parameters)
    except (ValueError, TypeError) as error:
        raise ValueError(f"optimizer: {error}") from error
    for name, value in getattr(optimizer, "defaults", {}).items():
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, (int, float)) and not math.isfinite(number):
                raise ValueError(f"optimizer.{name} must be a finite number, got {number}")
    if context.scheduler is not None:
        try:
            context.scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise ValueError(f"scheduler: {error}") from error
