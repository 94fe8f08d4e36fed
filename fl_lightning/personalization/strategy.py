"""One way to personalize, made of a YAML of ``conf/personalization``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from itertools import product
from typing import Any

import torch
from hydra.utils import get_class
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from fl_lightning.adapted import AdaptedModule
from fl_lightning.callback import FederatedCallback
from fl_lightning.callbacks.best_epoch import BestEpoch
from fl_lightning.callbacks.loss_flooding import LossFlooding
from fl_lightning.checks import one_of, whole
from fl_lightning.client import ClientInfo
from fl_lightning.fit.local import FitPlan, LocalTraining
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.epoch_models import EpochModels
from fl_lightning.personalization.run_models import RunModels
from fl_lightning.personalization.source import Source, Training
from fl_lightning.run.config import instantiate, instantiate_dict, plain
from fl_lightning.run.training import build_local
from fl_lightning.sharing import Sharing

SETTINGS = ("epochs", "batch_size", "trainer", "optimizer", "scheduler", "local", "callbacks", "flooding")
"""What every strategy has: as the root of the configuration says, or as the strategy's own node does."""

NODES = ("trainer", "optimizer", "local", "callbacks", "flooding")
"""Which of them are nodes."""

OWN = ("train", "start", "fits_in_turn", "best_epoch", "adapters")
STARTS = ("global", "random")


@dataclass
class Strategy:
    """How each client's model is made.

    Attributes:
        name: As in the configuration, with the values of the grid.
        base: Without them.
        values: The values of the grid.
        start: ``global``: from the global model; ``random``: from fresh weights; ``run``: the models are those of
            :attr:`run`.
        train: Whether anything is trained.
        local: What runs a client's fit, and measures models where its data are.
        callbacks: Act within the fit.
        settings: Its whole node of the configuration; empty where nothing is trained.
        adapters: What trains beside the model in its place, as in ``model.adapters``; None: the model.
        parts: The nodes of what runs a fit and of the callbacks, from which they can be made anew elsewhere.
        run: The run of ``train.py`` whose personal models these are; None: they are made here.
    """

    name: str
    base: str
    values: dict[str, Any]
    start: str
    train: bool
    local: LocalTraining
    callbacks: dict[str, Callback]
    settings: dict[str, Any]
    parts: dict[str, Any] = field(default_factory=dict)
    run: RunModels | None = None
    adapters: dict[str, Any] | None = None

    @property
    def personal(self) -> bool:
        """Whether each client has a model of its own."""
        return self.train or self.run is not None

    def of(self, source: Source, seed: int) -> Source:
        """Return what is personalized, with this strategy's adapters beside the model."""
        if self.adapters is None:
            return source
        return source.adapted(self.adapters, f"personalization.{self.base}.adapters", seed)

    def prepare(self, module: FederatedModule, seed: int) -> None:
        """Set the module up for this strategy, and check what can be checked before any training.

        Args:
            module: Serves all strategies, one after another.
            seed: Of the run; the same for all strategies.
        """
        self.local.batch_size = self.settings.get("batch_size")
        try:
            self.local.setup(module, Sharing(), list(self.callbacks.values()), seed)
        except (ValueError, ImportError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def check_clients(self, clients: Sequence[ClientInfo]) -> None:
        """Check that the clients have what the strategy needs."""
        parts = [self.local.plan, *self.callbacks.values()]
        needs = self.local.validate or any(getattr(part, "needs_validation", False) for part in parts)
        without = [client.name for client in clients if client.num_val == 0]
        if self.train and needs and without:
            raise ValueError(
                f"{self.name} chooses by validation data, but client {without[0]} has none"
                + (f" (and {len(without) - 1} more)" if len(without) > 1 else "")
                + "; train with data.val_fraction above 0, or leave this strategy out"
            )

    def choose_epoch(self, clients: Sequence[ClientInfo], module: FederatedModule) -> None:
        """Let fits end with their best epoch by validation, where that is wanted and all clients have such data.

        What a LightningModule as it is logs in its own validation is not known, so ``auto`` leaves it its last epoch.
        """
        wanted = self.settings.get("best_epoch")
        known = not isinstance(module, AdaptedModule) and all(client.num_val for client in clients)
        if wanted is True or (wanted == "auto" and known):
            self.local.validate = True
            self.parts["local"] = {**self.parts["local"], "validate": True}
            if "best_epoch" not in self.callbacks:
                self._add("best_epoch", {"_target_": _path(BestEpoch)})

    def send_models(self, every: int | None) -> None:
        """Let fits send their models after epochs; a plan of several fits has none on the way."""
        if self.train:
            every = every if type(self.local.plan) is FitPlan else None
            self._add("models", {"_target_": _path(EpochModels), "every": every})

    def _add(self, name: str, node: dict[str, Any]) -> None:
        self.callbacks[name] = named(name, instantiate(node, name))
        self.parts["callbacks"][name] = node


def build_strategies(cfg: DictConfig, training: Training | None = None) -> list[Strategy]:
    """Make all strategies of a run, each with every combination of values in the grid that changes it.

    Args:
        cfg: The composed configuration.
        training: How the global model was trained, if that is known.
    """
    grid = _grid(cfg)
    nodes = _resolved(cfg, {}, training)
    first = {key: values[0] for key, values in grid.items()}
    strategies = []
    for name, node in nodes.items():
        # What no value of the grid changes (the un-tuned model) runs once, under its plain name.
        changed = {key: values for key, values in grid.items() if _matters(cfg, name, key, values, training)}
        seen: list[dict[str, Any]] = []
        for values in product(*changed.values()):
            chosen = dict(zip(changed, values, strict=True))
            variant = _resolved(cfg, {**first, **chosen}, training)[name] if grid else node
            if variant not in seen:
                seen.append(variant)
                strategies.append(_build(name, chosen, variant))
    return strategies


def kept_by(run: RunModels) -> Strategy:
    """Return the row of a run's personal models, of which nothing is trained."""
    return Strategy(run.name, run.name, {}, "run", False, _untrained(), {}, {}, run=run)


def _untrained() -> LocalTraining:
    return LocalTraining(partial(Trainer, max_epochs=1), partial(torch.optim.SGD, lr=0.0))


def _grid(cfg: DictConfig) -> dict[str, list[Any]]:
    """Return the values of every key of the grid; below the name of a strategy are keys of its own node."""
    grid = cfg.get("grid")
    if grid is None:
        return {}
    if not isinstance(grid, DictConfig):
        raise ValueError(f"grid: expected keys with lists of values, such as {{lr: [0.005, 0.02]}}, got {grid!r}")
    nodes = {str(name): group for group in ("baselines", "personalization") for name in cfg[group]}
    named_values: dict[str, Any] = {}
    for key, values in ((str(key), values) for key, values in grid.items()):
        if isinstance(values, DictConfig) and key in nodes:
            named_values |= {f"{nodes[key]}.{key}.{inner!s}": chosen for inner, chosen in values.items()}
        else:
            named_values[key] = values
    for key, values in named_values.items():
        if not isinstance(values, ListConfig) or not values:
            raise ValueError(f"grid: expected a list of values for {key}, such as [0.005, 0.02], got {values!r}")
    return {key: list(values) for key, values in named_values.items()}


def _resolved(cfg: DictConfig, values: Mapping[str, Any], training: Training | None) -> dict[str, dict[str, Any]]:
    """Return the whole node of every strategy: the root's settings, and its own on top of them."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, True)
    for key, value in values.items():
        try:
            OmegaConf.update(cfg, key, value, merge=False)
        except (OmegaConfBaseException, ValueError) as error:
            # Below a key that holds a value, a longer one is no key either; then the error names the shorter one.
            if isinstance(error, ValidationError) and error.full_key == key:
                raise ValueError(f"grid: {key}: {str(error).splitlines()[0]}") from error
            close = get_close_matches(key, [str(name) for name in cfg])
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ValueError(f"grid: there is no key {key!r} in the configuration{hint}") from error
    config = plain(cfg)
    if config["trainer"].get("max_epochs") != config["epochs"]:
        raise ValueError("trainer.max_epochs is not set by itself in personalize.py; set epochs")
    return {
        name: _node(name, own, config, training)
        for name, own in {**config["baselines"], **config["personalization"]}.items()
        if own is not None  # switched off
    }


def _node(name: str, own: Mapping[str, Any], config: Mapping[str, Any], training: Training | None) -> dict[str, Any]:
    if not isinstance(own, Mapping):
        raise ValueError(f"personalization.{name} must be a node with settings of a strategy, got {own!r}")
    for key in own:
        if key not in (*SETTINGS, *OWN):
            close = get_close_matches(key, (*SETTINGS, *OWN))
            raise ValueError(
                f"personalization.{name}.{key} is no setting of a strategy; "
                + (f"did you mean {close[0]}?" if close else f"these are: {', '.join((*SETTINGS, *OWN))}")
            )
    for key in NODES:
        if key in own and not isinstance(own[key], Mapping):
            raise ValueError(f"personalization.{name}.{key} must be a node with settings, got {own[key]!r}")
    common = {key: config[key] for key in SETTINGS}
    if own.get("start") == "random" and training is not None:
        # Who trains alone does it as in the federation, for as long as that and the fine-tuning together.
        common["optimizer"] = training.config["optimizer"]
        common["epochs"] = config["epochs"] + (training.epochs or 0)
    if own.get("epochs", 0) is None:
        own = {key: value for key, value in own.items() if key != "epochs"}
    if (own.get("optimizer") or {"lr": 0}).get("lr", 0) is None:
        own = {**own, "optimizer": {key: value for key, value in own["optimizer"].items() if key != "lr"}}
    node = merge({"train": True, "start": "global", "fits_in_turn": 1, "best_epoch": False, **common}, own)
    if not node["train"]:  # what is not trained has no settings, so that no grid makes variants of it
        local = {"_target_": f"{LocalTraining.__module__}.{LocalTraining.__qualname__}"}
        trainer = {**node["trainer"], "max_epochs": 1}
        optimizer = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.0}
        parts = {"trainer": trainer, "optimizer": optimizer, "scheduler": None, "local": local}
        return {"train": False, "start": node["start"], **parts}
    for key in ("epochs", "batch_size", "fits_in_turn"):
        whole(f"personalization.{name}.{key}", node[key], 1, or_null=key == "batch_size")
    one_of(f"personalization.{name}.best_epoch", node["best_epoch"], ("auto", True, False))
    if "max_epochs" not in (own.get("trainer") or {}):
        node["trainer"] = {**node["trainer"], "max_epochs": max(1, node["epochs"] // node["fits_in_turn"])}
    return node


def _matters(cfg: DictConfig, name: str, key: str, values: Sequence[Any], training: Training | None) -> bool:
    group, _, rest = key.partition(".")
    if group in ("baselines", "personalization") and rest.partition(".")[0] != name:
        return False
    variants = [_resolved(cfg, {key: value}, training)[name] for value in values]
    return any(variant != variants[0] for variant in variants)


def merge(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Put a node over another, key by key; a node of a class that is no subclass takes the other's place whole."""
    merged = dict(common)
    for key, value in own.items():
        under = merged.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping) and extends(value, under):
            merged[key] = merge(under, value)
        else:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged


def extends(own: Mapping[str, Any], common: Mapping[str, Any]) -> bool:
    """Tell whether a node takes the arguments of another: it names the same class, a subclass of it, or none."""
    target, under = own.get("_target_"), common.get("_target_")
    if target is None or target == under:
        return True
    try:
        return under is not None and issubclass(get_class(target), get_class(under))
    except Exception:  # a function, or nothing that exists, of which the instantiation says more
        return False


def _build(name: str, values: dict[str, Any], node: Mapping[str, Any]) -> Strategy:
    if node.get("adapters") is not None and node["start"] == "random":
        raise ValueError(f"personalization.{name}.adapters must be null where start is random")
    label = name + "".join(f" {key.rpartition('.')[2]}={value}" for key, value in values.items())
    path = f"personalization.{name}"
    one_of(f"{path}.start", node["start"], STARTS)
    one_of(f"{path}.train", node["train"], (True, False))
    local = build_local(node, f"{path}.")
    parts = {key: node[key] for key in ("local", "trainer", "optimizer", "scheduler")}
    if not node["train"]:
        return Strategy(label, name, values, node["start"], False, local, {}, {}, {**parts, "callbacks": {}})
    nodes = {key: value for key, value in node["callbacks"].items() if value is not None}
    callbacks = instantiate_dict(nodes, f"{path}.callbacks")
    flooding = {"_target_": _path(LossFlooding), **node["flooding"]}
    # Made also where it is off, so that what is wrong beside the level is refused.
    made = instantiate({**flooding, "level": flooding.get("level") or 0.0}, f"{path}.flooding")
    if flooding.get("level") is not None:
        nodes["flooding"], callbacks["flooding"] = flooding, made
    for key, callback in callbacks.items():
        named(key, callback)
    return Strategy(
        name=label,
        base=name,
        values=values,
        start=node["start"],
        train=True,
        local=local,
        callbacks=callbacks,
        settings=dict(node),
        parts={**parts, "callbacks": nodes},
        adapters=node.get("adapters"),
    )


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def named(name: str, callback: Callback) -> Callback:
    """Tell a federated callback its name."""
    if isinstance(callback, FederatedCallback):
        callback.name = name
    return callback
