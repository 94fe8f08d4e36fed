"""What is personalized: a global model, and the clients it was trained on."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fl_lightning.adapted import AdaptedModule
from fl_lightning.checks import ArgumentError
from fl_lightning.data.federated_data import FederatedData
from fl_lightning.data.partition import Partition
from fl_lightning.executors import Executor, SerialExecutor
from fl_lightning.models import hf
from fl_lightning.models.adapters import with_adapters
from fl_lightning.models.export import HEAD, read_global_model
from fl_lightning.models.model import Model
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.run_models import AT_SITES as AT_SITES_EXECUTOR
from fl_lightning.personalization.run_models import RunModels, keeps_personal_models, path_of
from fl_lightning.run.config import instantiate, plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.own_module import takes_no_model
from fl_lightning.run.training import adapters, build_module
from fl_lightning.run.trust import check_trusted
from fl_lightning.seeding import derive_seed
from fl_lightning.state import all_finite, difference, load

NEEDED = ("data", "model", "method", "loop", "trainer", "optimizer", "evaluation", "seed")
"""What the configuration of a run of ``train.py`` holds, of which something is used here."""

AT_SITES = "fl_lightning.sites.executor.SiteData"
"""The data of ``data=sites``."""

HF = "fl_lightning.models.hf.hf"
"""The model of ``model=hf``."""


@dataclass
class Source:
    """A global model in its module, and the data of the clients.

    Attributes:
        module: Holds the global model.
        data: The clients.
        model_config: What the model was made from.
        description: Where they come from, in words for ``results.json``.
        training: How the global model was trained, if that is known.
        parts: What the task and the module were made from.
        runs: Runs of ``train.py`` whose personal models are rows, too: the checkpoint's own first.
        start: What strategies start from, in words, where it is no global model of the run.
    """

    module: FederatedModule
    data: FederatedData
    model_config: dict[str, Any]
    description: dict[str, Any]
    training: Training | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    runs: list[RunModels] = field(default_factory=list)
    start: str = ""

    def adapted(self, wanted: Mapping[str, Any], path: str, seed: int) -> Source:
        """Return the same with adapters beside the model, which shares its weights with this one.

        Args:
            wanted: As in ``model.adapters``.
            path: Where that stands in the configuration.
            seed: What adapters begin with follows from it.
        """
        if self.module.base_names:
            raise ValueError(f"{path} needs a model without adapters of its own; leave this strategy out")
        memo: dict[int, Any] = {
            id(one): nn.Parameter(one.detach(), requires_grad=one.requires_grad) for one in self.module.parameters()
        }
        module = copy.deepcopy(self.module, memo)
        module._base = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "adapters", path))
            try:
                adapters(wanted, path).adapt(Model(module.backbone, module.head, module.head_path))
            except ArgumentError as error:
                raise ArgumentError(f"{path}.{str(error).removeprefix(f'{path}.')}") from None
        return replace(self, module=module, model_config={**self.model_config, "adapters": dict(wanted)})


@dataclass
class Training:
    """How a global model was trained.

    Attributes:
        config: The configuration of the run.
        epochs: Epochs of its rounds together; None where they are counted in steps.
    """

    config: dict[str, Any]
    epochs: int | None


def read_training(checkpoint: str) -> Training | None:
    """Read how a global model was trained; None where ``checkpoint=`` is no run folder."""
    if not checkpoint.strip():
        raise ValueError(
            "checkpoint must be a run folder of train.py, a file of weights, a folder of transformers or the name of a "
            f"timm model, got {checkpoint!r}"
        )
    if not Path(checkpoint).is_dir() or hf.is_folder(checkpoint):
        return None
    run = RunFolder(checkpoint)
    config = run.read_config()
    if "personalization" in config:
        raise ValueError(
            f"checkpoint={checkpoint} is a run of personalize.py, which has no global model; give the run of train.py "
            f"that it began with: checkpoint={config.get('checkpoint')}"
        )
    if missing := [key for key in NEEDED if not isinstance(config.get(key), (Mapping, int))]:
        raise ValueError(f"{run.config} is no configuration of a run of train.py: there is no {missing[0]} in it")
    rounds, length = config["loop"].get("rounds"), config["trainer"].get("max_epochs")
    if run.results.is_file():  # a run that went on may have more than its first configuration asked for
        rounds = json.loads(run.results.read_text()).get("rounds", rounds)
    counted = isinstance(rounds, int) and isinstance(length, int) and length > 0
    return Training(config, rounds * length if counted else None)


def open_source(
    config: Mapping[str, Any], training: Training | None = None, executor: Executor | None = None
) -> Source:
    """Read what ``checkpoint=`` names, and check that it fits the data and the model.

    Args:
        config: The configuration, plain. ``data`` and ``model`` are the run's own where the checkpoint is a run folder,
            unless they are given.
        training: What :func:`read_training` says of it; by default it is read here.
        executor: The way to the clients; None: they are in this process.

    Raises:
        FileNotFoundError: If there is neither such a path nor such a timm model, or the run left no global model.
        ValueError: If data or model must be given and are not, the partition is not the run's, the model is another
            one, or a file is damaged.
    """
    checkpoint = str(config["checkpoint"])
    path = Path(checkpoint)
    given = {"data": config["data"], "model": config["model"]}
    training = training or read_training(checkpoint)
    executor = executor or SerialExecutor()
    if training is not None:
        if (given["data"] or {}).get("_target_") == AT_SITES:
            _check_data_at_sites(config)
            given["data"] = None  # executor=sites brings it, and the run says how its sites read their data
        return _from_run_folder(RunFolder(path), training, given, config, executor)
    if path.is_dir():
        return _from_transformers(checkpoint, given, config, executor)
    if path.exists():
        for key, value in given.items():
            if value is None:
                raise ValueError(
                    f"{checkpoint} is a file, which does not say what {key} it belongs to; add {key}=..., or give the "
                    "run folder"
                )
        data = executor.find_data(given)
        module = build_module({**config, **given}, data)
        put(module, path, config["new_head"])
        return Source(
            module, data, given["model"], {"checkpoint": checkpoint, "kind": "file"}, None, {"task": config.get("task")}
        )
    from timm.models import is_model

    if is_model(checkpoint.split(".")[0]):
        if given["data"] is None:
            raise ValueError(f"checkpoint={checkpoint} is a model of timm, without clients; add data=...")
        if given["model"] is not None:
            raise ValueError(f"checkpoint={checkpoint} is a model of timm; leave out model=")
        model = {"_target_": "fl_lightning.models.timm_model", "name": checkpoint, "pretrained": True}
        data = executor.find_data(given)
        try:
            module = build_module({**config, "model": model}, data)
        except RuntimeError as error:
            raise RuntimeError(
                f"checkpoint={checkpoint}: {str(error).partition(', or set')[0]}; without the network "
                "give a file of the weights, with data=... model=timm model.name=..., and new_head=true if they are of "
                "other classes"
            ) from error
        return Source(
            module,
            data,
            model,
            {"checkpoint": checkpoint, "kind": "timm, pretrained"},
            None,
            {"task": config.get("task")},
        )
    raise FileNotFoundError(
        f"checkpoint={checkpoint} is neither a run folder of train.py, nor a file, nor a folder of transformers, nor "
        "the name of a timm model"
    )


def _check_data_at_sites(config: Mapping[str, Any]) -> None:
    """Refuse settings of data at sites, which the run that is personalized has set already."""
    usual = plain(composed("train", ["executor=sites", f"seed={config['seed']}"]))["data"]
    for key, value in config["data"].items():
        if key not in usual or usual[key] != value:
            raise ValueError(
                f"data.{key} must be left out, got {value!r}; sites read their data as the run of checkpoint= says"
            )


def _from_run_folder(
    run: RunFolder, training: Training, given: Mapping[str, Any], config: Mapping[str, Any], executor: Executor
) -> Source:
    before = training.config
    own = keeps_personal_models(run)
    for key in ("data", "task", "model", "module"):
        if (key == "module" or config.get(key) is None) and before.get(key) is not None:
            check_trusted(before[key], key, config["trust"], str(run.config))
    data: FederatedData = executor.find_data({"data": given["data"] or before["data"]})
    partition = Partition.load(run.partition)
    data.partition.check_equal(partition)
    model = given["model"] or before["model"]
    parts = {"task": config.get("task") or before.get("task"), "module": config["module"]}
    if "module" in before and takes_no_model(before["module"]):
        parts["module"] = before["module"]
    module = build_module({**config, "model": model, **parts}, data)
    if isinstance(module, AdaptedModule):
        module.own_optimizer = False  # every strategy has an optimizer, whose learning rate it says
        if not module.whole.automatic_optimization:
            raise ValueError(
                f"{type(module.whole).__name__} optimizes by hand, which no strategy of personalize.py can direct"
            )
    at_sites = before["executor"]["_target_"] == AT_SITES_EXECUTOR
    method, start = before["method"]["name"], ""
    at_hand = not given["data"] and at_sites == (path_of(executor) == AT_SITES_EXECUTOR)
    at_hand = at_hand and not (at_sites and "server" in before["callbacks"])  # a site holds a part of a split model
    runs = [RunModels(run, before, data, config["trust"], executor)] if own and at_hand else []
    if run.global_model.is_file():
        try:
            put(module, run.global_model, config["new_head"])
        except ValueError as error:
            if not runs or before["model"] != model:
                raise
            raise ValueError(
                f"{error}. If method={method} has a global model of its own kind, which cannot be fine-tuned here, "
                f"give checkpoint= another run, and beside=[{run.path}]"
            ) from error
    elif not runs or at_sites:
        raise FileNotFoundError(
            f"{run.path} holds no {run.global_model.name} (method={method}), and no personal models that can be had "
            "here, whose mean would take its place (not with data=, nor of sites); give a run with a global model"
        )
    else:
        with runs[0].open() as models:
            load(module, models.mean(module))
        start = (
            f"method={method} has no global model: none, the strategies and what clients are compared with start from "
            "the mean of its clients' models, weighted by training examples."
        )
    description = {
        "checkpoint": str(run.path),
        "kind": "run folder",
        "method": method,
        "training_seed": before["seed"],
        "partition_hash": partition.hash,
        **({"start": "mean of the clients' models"} if start else {}),
    }
    return Source(module, data, model, description, training, parts, runs, start)


def beside(
    source: Source, folders: Sequence[str], trust: Sequence[str], taken: Collection[str], executor: Executor
) -> None:
    """Add the runs whose personal models are rows beside the strategies, and name all rows of runs.

    Args:
        source: What is personalized; :attr:`Source.runs` are added to.
        folders: Run folders of ``train.py``.
        trust: Packages of one's own that their configurations may name.
        taken: Names of rows that are there.
        executor: The way to the clients.
    """
    for folder in folders:
        run = RunFolder(folder)
        config = run.read_config()
        if "personalization" in config:
            raise ValueError(f"beside must name runs of train.py, got {folder}, which is one of personalize.py")
        known = [one for one in source.runs if one.data_config == config["data"]]
        check_trusted(config["data"], "data", trust, str(run.config))
        try:
            if config["executor"]["_target_"] == AT_SITES_EXECUTOR:
                data = source.data
            else:
                data = known[0].data if known else instantiate(config["data"], "data")
            source.data.partition.check_equal(data.partition)
            source.runs.append(RunModels(run, config, data, trust, executor))
        except (ValueError, OSError) as error:
            raise type(error)(f"beside: {error}") from error
    methods = [one.method for one in source.runs]
    for one in source.runs:
        several = methods.count(one.method) > 1
        one.name = f"{one.method} ({one.path.name})" if several else one.method
        if one.name in taken:
            one.name = f"{one.method} (run)"


def _from_transformers(
    checkpoint: str, given: Mapping[str, Any], config: Mapping[str, Any], executor: Executor
) -> Source:
    """Take the model of a folder of transformers, which says itself what it reads."""
    if given["data"] is None:
        raise ValueError(f"checkpoint={checkpoint} is a model of transformers, without clients; add data=...")
    wanted = dict(given["model"] or {"_target_": HF})
    if wanted["_target_"] != HF or wanted.get("name") not in (None, checkpoint):
        raise ValueError(f"checkpoint={checkpoint} is a model of transformers; leave out model=, or set model=hf")
    try:
        kind, classes = hf.kind_of(checkpoint)
    except ImportError as error:
        raise ImportError(f"checkpoint={checkpoint} needs transformers: pip install 'fl_lightning[text]'") from error
    if given["model"] is None:
        if kind is None:
            raise ValueError(
                f"checkpoint={checkpoint} has no head for classes or tokens; set model=hf model.kind=sequence or "
                "image, and new_head=true"
            )
        wanted["kind"] = kind
    model = {**wanted, "name": checkpoint, "config": None, "pretrained": True}
    data = executor.find_data({**given, "model": model})
    if config["new_head"] and model["kind"] == "causal":
        raise ValueError("new_head must be false for a language model, whose head holds its tokens")
    if not config["new_head"] and model["kind"] != "causal" and (kind, classes) != (model["kind"], data.num_classes):
        has = f"a head of {classes} classes" if kind == model["kind"] else "no head for classes"
        raise ValueError(
            f"checkpoint={checkpoint} has {has}, and the data have {data.num_classes}; set new_head=true for a new head"
        )
    module = build_module({**config, "model": model}, data)
    if config["new_head"]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config["seed"], "new head"))
            head: Any = module.head
            head.reset_parameters()
    description = {"checkpoint": checkpoint, "kind": "folder of transformers"}
    return Source(module, data, model, description, None, {"task": config.get("task")})


def put(module: FederatedModule, file: Path, new_head: bool = False) -> None:
    """Put the global model of a file into a module.

    Args:
        module: The module.
        file: The file.
        new_head: Whether the module keeps its own head.
    """
    state = with_adapters(module, read_global_model(file, module.head_path, module.state_dict()))
    own = module.state_dict()
    if new_head:
        heads = {name: tensor for name, tensor in own.items() if name.startswith(HEAD)}
        state = {name: tensor for name, tensor in state.items() if not name.startswith(HEAD)} | heads
    words = difference(state, own)
    if words:
        found, known = ({n: t for n, t in one.items() if not n.startswith(HEAD)} for one in (state, own))
        advice = (
            "give the model it was trained with" if difference(found, known) else "set new_head=true for a new head"
        )
        raise ValueError(f"{file} is a checkpoint of another model: {words}; {advice}")
    for name, tensor in state.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise ValueError(f"{file}: {name} must be of type {own[name].dtype}, got {tensor.dtype}")
    if not all_finite(state):
        raise ValueError(f"{file} holds NaN or an infinity: its training has diverged; give another checkpoint")
    load(module, state)
