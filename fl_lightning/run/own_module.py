"""A LightningModule as it is, named in the configuration."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_object
from lightning.pytorch import LightningModule
from torch import Tensor

from fl_lightning.adapted import AdaptedModule
from fl_lightning.evaluation.predict import evaluating
from fl_lightning.module import FederatedModule
from fl_lightning.run.config import instantiate
from fl_lightning.seeding import derive_seed
from fl_lightning.task import Task, takes

log = logging.getLogger(__name__)


def takes_no_model(node: Mapping[str, Any]) -> bool:
    """Tell whether a node names a LightningModule as it is, which brings its own network."""
    try:
        target = get_object(node["_target_"])
    except Exception:  # which is said where it is made
        return False
    if inspect.isclass(target):
        return issubclass(target, LightningModule) and not issubclass(target, FederatedModule)
    return callable(target) and not takes(target, "model")


def arguments_of(node: Any) -> Any:
    """Return the node ``module`` without what a LightningModule as it is does not take."""
    if not isinstance(node, Mapping) or "_target_" not in node or not takes_no_model(node):
        return node
    smoothing = node.get("label_smoothing", 0.0)
    dropped = ("head", "label_smoothing") if smoothing == 0 else ("head",)  # 0 is what FederatedModule begins with
    return {key: value for key, value in node.items() if key not in dropped}


def adapted(config: Mapping[str, Any], sizes: Mapping[str, int], task: Task) -> AdaptedModule:
    """Make a LightningModule as it is, with the initial weights that follow from the run's seed.

    Args:
        config: The configuration, plain.
        sizes: ``num_classes``, ``in_channels`` and ``image_size`` of the data, for whichever it requires.
        task: What it is trained for.
    """
    node = config["module"]
    name = node["_target_"].rpartition(".")[2]
    known = inspect.signature(get_object(node["_target_"])).parameters
    own = arguments_of(node)
    required = [key for key, one in known.items() if one.default is inspect.Parameter.empty and key not in own]
    needed = {key: size for key, size in sizes.items() if key in required}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config["seed"], "initial weights"))
        module = instantiate(own, "module", **needed)
    if not isinstance(module, LightningModule) or isinstance(module, FederatedModule):
        kind = type(module).__name__
        raise ValueError(f"module._target_ must name a LightningModule, got {name}, which gives a {kind}")
    made = AdaptedModule(module, node.get("head") or "", task)
    log.info(
        "%s is the whole model, with its own loss%s: model= is not used",
        name,
        " and optimizer, so optimizer= and scheduler= are not either" if made.own_optimizer else "",
    )
    return made


def check_adapted(module: AdaptedModule, x: Any, outputs: Tensor) -> None:
    """Check that the head that was named is the last part of a LightningModule."""
    if not module.head_path:
        return
    with evaluating(module), torch.inference_mode():
        again = module.head(module.features(x))
    if again.shape != outputs.shape or not torch.allclose(again, outputs, atol=1e-5):
        raise ValueError(
            f"module.head must be the part whose output forward returns, got {module.head_path!r}, after which more is "
            "computed"
        )
