"""What a module holds: its tensors, looked up once, and its plain attributes."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from fl_lightning.state import State


class ModuleTensors:
    """The tensors of a module by name, the very ones, without walking through the module each time.

    ``state_dict`` takes as long as a training step of a small network. Here every look checks that the module still has
    the parts it had, and only if it has not, asks it again.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._find()

    def __call__(self) -> State:
        """Return what ``module.state_dict(keep_vars=True)`` would."""
        if any(siblings.get(name) is not part for siblings, name, part in self._parts):
            self._find()
        return {name: owner[key] for name, owner, key in self._places}

    def train(self) -> None:
        """Put the module in train mode, if a part of it is not."""
        if not all(part.training for _, _, part in self._parts) or not self.module.training:
            self.module.train()

    def _find(self) -> None:
        self._parts = [
            (part._modules, name, child)
            for part in self.module.modules()
            for name, child in part._modules.items()
            if child is not None
        ]
        places: dict[str, tuple[str, dict[str, Any], str]] = {}
        for prefix, part in self.module.named_modules(remove_duplicate=False):
            for owner in (part._parameters, part._buffers):
                for key in owner:
                    name = f"{prefix}.{key}" if prefix else key
                    places[name] = (name, owner, key)
        self._places = [places[name] for name in self.module.state_dict() if name in places]


class PlainAttributes:
    """Remembers the attributes of a module that are no parameters, buffers or parts: counters, lists of outputs.

    Args:
        module: The module; parts of it of classes other than torch's own count too. Metrics begin anew.
    """

    def __init__(self, module: nn.Module) -> None:
        own = [part for part in module.modules() if not type(part).__module__.startswith("torch.")]
        self._metrics = [part for part in own if isinstance(part, (Metric, MetricCollection))]
        parts = [module, *(part for part in own if not isinstance(part, (Metric, MetricCollection)))]
        self._parts = [(part, {k: _copy(v) for k, v in vars(part).items() if k not in _OTHERS}) for part in parts]

    def restore(self) -> None:
        """Put the attributes back as they were, as often as is wanted."""
        for part, attributes in self._parts:
            for name in vars(part).keys() - attributes.keys() - _OTHERS:
                delattr(part, name)
            vars(part).update(_copy(attributes))
        for metric in self._metrics:
            metric.reset()


#: What torch and Lightning keep in a module, and set at the beginning of a fit.
_OTHERS = {*vars(LightningModule()), "context"}


def _copy(value: Any) -> Any:
    """Copy tensors and containers; whatever else is meant stays the same object."""
    if isinstance(value, Tensor):
        return value.detach().clone() if not value.requires_grad else value
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update((key, _copy(item)) for key, item in value.items())
        return found
    if type(value) in (list, set):
        return type(value)(_copy(item) for item in value)
    return deque(map(_copy, value), value.maxlen) if type(value) is deque else value
