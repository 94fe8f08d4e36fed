"""Trains a federation from a configuration: what ``train.py`` runs."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
from hydra.utils import get_object
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torchmetrics import Metric

from fl_lightning.adapted import AdaptedModule
from fl_lightning.callbacks.federated_evaluation import FederatedEvaluation
from fl_lightning.callbacks.round_log import RoundLog
from fl_lightning.checks import ArgumentError, one_of
from fl_lightning.client import Client
from fl_lightning.data.federated_data import FederatedData
from fl_lightning.evaluation.predict import Metrics, evaluating
from fl_lightning.evaluation.results import MetricsTable
from fl_lightning.executors import CohortExecutor, SerialExecutor
from fl_lightning.executors.executor import Simulation
from fl_lightning.fit.local import LocalTraining
from fl_lightning.fit.stock import QUIET, silence_lightning
from fl_lightning.loop import FederatedLoop
from fl_lightning.models.adapters import Adapters, with_adapters
from fl_lightning.models.export import read_global_model
from fl_lightning.models.model import Model
from fl_lightning.models.timm import compare_normalization
from fl_lightning.module import FederatedModule
from fl_lightning.run.config import check, check_node, instantiate, instantiate_dict, plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.own_module import adapted, arguments_of, check_adapted, takes_no_model
from fl_lightning.run.results import finish, result_table
from fl_lightning.seeding import derive_seed
from fl_lightning.task import Classification, Task, described, guess
from fl_lightning.terminal import closing, command, duration

if TYPE_CHECKING:
    from fl_lightning.models.prompts import Prompt

log = logging.getLogger(__name__)


@dataclass
class Federation:
    """A run that is ready to start: the loop, and what it is given."""

    loop: FederatedLoop
    module: FederatedModule
    clients: list[Client]
    unseen: list[Client]
    resume: dict[str, Any] | None
    partition_hash: str

    def open(self) -> AbstractContextManager[None]:
        """Open the way to the clients, for the rounds and for the final scores."""
        return self.loop.open(self.module, self.clients, self.unseen, self.resume)

    def fit(self) -> None:
        """Run the rounds that are left."""
        with self.open():
            self.loop.run_rounds()


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Train, print the result table, and leave everything in the run folder.

    Args:
        cfg: The composed configuration.
        folder: The run folder.

    Returns:
        What is written to ``results.json``.
    """
    config = plain(cfg)
    run_folder = RunFolder(folder)
    federation = assemble(config, run_folder)
    loop = federation.loop
    try:
        with federation.open():
            with stop_after_round(loop, run_folder):
                loop.run_rounds()
            if loop.interrupted:
                print(
                    f"stopped after round {loop.round} of {loop.rounds}; continue: {command('train')} resume={folder}"
                )
                return {}
            results = finish(loop, run_folder, config, federation.partition_hash)
    except Exception:
        if loop.round == 0 and config["resume"] is None:
            run_folder.give_up()
        raise
    finally:
        loop.executor.disconnect()
    print(result_table(results))
    here = quote(str(folder))
    last = {"run folder": here, "time": words_on_time(results)}
    if isinstance(loop.logger, TensorBoardLogger):
        last["curves"] = f"tensorboard --logdir {quote(str(comparable(folder, Path(config['paths']['log_dir']))))}"
    if run_folder.global_model.exists() and isinstance(loop.executor, Simulation):
        last["next"] = f"who gains from a model of its own, who is harmed: {command('personalize')} checkpoint={here}"
    print(closing(last))
    return results


def words_on_time(results: Mapping[str, Any]) -> str:
    """Say how long the rounds took, and how much of it was training."""
    if not results["rounds"]:
        return "no rounds"
    median = results["seconds_per_round_median"]
    return f"{duration(results['seconds'])}: {results['rounds']} round(s), {median:.2g} s of training each (median)"


def comparable(folder: Path, logs: Path) -> Path:
    """Return the folder that holds a run and those to compare it with: ``logs`` if the run is in it."""
    return logs if folder.absolute().is_relative_to(logs.absolute()) else folder.parent


def assemble(config: Mapping[str, Any], run_folder: RunFolder) -> Federation:
    """Make everything that a run needs, and check what can be checked before the first round.

    Args:
        config: The configuration, plain (see :func:`fl_lightning.run.config.plain`).
        run_folder: Where files go; with ``resume`` in the configuration, the run to go on with.
    """
    check({**config, "module": arguments_of(config["module"])})
    check_accelerator(config["trainer"])
    resume = None
    if config["resume"] is not None:
        resume = run_folder.resume(config)
        if resume is not None and resume["round"] > config["loop"]["rounds"]:
            raise ValueError(
                f"{run_folder.path} has done {resume['round']} rounds already, more than "
                f"loop.rounds={config['loop']['rounds']}; ask for at least as many"
            )
    loop = build_loop(config, run_folder, resume)
    try:
        return _with_data(loop, config, run_folder, resume)
    except Exception:
        loop.executor.disconnect()
        raise


def _with_data(
    loop: FederatedLoop, config: Mapping[str, Any], run_folder: RunFolder, resume: dict[str, Any] | None
) -> Federation:
    """Make what depends on the data, and check that it goes together."""
    loop.local.folder = run_folder.path
    data: FederatedData = loop.executor.find_data(config)
    module = fitting_module(loop, config, data)
    if isinstance(loop.executor, (SerialExecutor, CohortExecutor)):
        # Workers have memory of their own; here all clients share one pool, on the device where it fits.
        silence_lightning()
        data.to(loop.local.trainer(logger=False, enable_checkpointing=False, **QUIET).strategy.root_device)
    if config["dashboard"] is not None:
        given = {"evaluation": loop.callbacks["evaluation"], "class_names": data.class_names}
        text = OmegaConf.to_yaml(config)
        made = instantiate(config["dashboard"], "dashboard", folder=run_folder.figures, text=text, **given)
        loop.add_callback("dashboard", made)
    own = config if config["resume"] is None else run_folder.read_config()
    add_observers(loop, config, run_folder, resume, run_folder.identity(own, data.partition))
    if config["resume"] is None:
        run_folder.start(config)
    run_folder.keep_partition(data.partition)
    clients = [Client(item.id, item) for item in data.clients]
    unseen = [Client(item.id, item) for item in data.unseen]
    return Federation(loop, module, clients, unseen, resume, data.partition.hash)


def fitting_module(loop: FederatedLoop, config: Mapping[str, Any], data: FederatedData) -> FederatedModule:
    """Make the model with the weights that the run begins with, and settle the metrics of its task in the loop."""
    module = build_module(config, data)
    evaluation = loop.callbacks["evaluation"]
    assert isinstance(evaluation, FederatedEvaluation)
    loop.metrics.use(module.task, evaluation.metric)
    evaluation.choose_metric(loop.metrics, data.num_classes)
    loop.local.check_optimizer(module)
    check_metrics(loop.metrics, module, data)
    if config["init_from"] is not None:
        state = read_global_model(config["init_from"], module.head_path, module.global_names)
        module.start_from(with_adapters(module, state))
    return module


def check_metrics(metrics: Metrics, module: FederatedModule, data: FederatedData) -> None:
    """Try the metrics that torchmetrics computes on a client's data."""
    for name in metrics.names if data.clients else ():  # without data, sites try them
        client = data.clients[0]
        if metrics.is_mean(name):
            continue
        try:
            metrics.score(module, client, "val" if client.num_val else "test", [name])
        except Exception as error:
            must = f"take outputs for {data.num_classes} classes"
            if metrics.is_logged(name):
                must = "be logged by the module's own steps"
            raise ValueError(
                f"evaluation.metrics.{name} must {must}, got {type(error).__name__}: {str(error).splitlines()[0]}"
            ) from error


def check_accelerator(trainer: Mapping[str, Any]) -> None:
    """Check that there is a GPU where one is asked for."""
    check_node(trainer, "trainer")
    asked = trainer.get("accelerator")
    if isinstance(asked, str):
        own = set(AcceleratorRegistry.available_accelerators()) - {"cpu", "cuda", "mps", "tpu"}  # that users registered
        one_of("trainer.accelerator", asked, ("auto", "cpu", "gpu", "cuda", "mps", *sorted(own)))
    if asked in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError(f"trainer.accelerator={asked}, but torch finds no GPU on this machine; take trainer=cpu")


def build_module(config: Mapping[str, Any], data: FederatedData) -> FederatedModule:
    """Make the model for some data, from the run's seed, and try it on a few of its examples."""
    x = move_data_to_device(data.first_examples(2), torch.device("cpu"))  # where the model still is
    y = data.first_targets(2).to("cpu")
    task = task_of(config, y)
    if problem := task.target_problem(y, data.num_classes):
        raise ValueError(f"task={task.name} takes {task.targets}, got {problem}; choose another task=")
    module = new_module(config, data.num_classes, data.in_channels, data.image_size, task)
    if str((config["model"] or {}).get("_target_")).endswith("timm_model"):
        compare_normalization(config["model"], config["data"])
    if isinstance(x, Tensor):
        module.example_input_array = x[:1].clone()
    try:
        with evaluating(module), torch.inference_mode():
            outputs = module(x)
    except NotImplementedError:
        name = type(module.whole).__name__
        raise ValueError(f"{name} must have a forward, which gives the outputs to score") from None
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        what = f"of shape {tuple(x.shape[1:])}" if isinstance(x, Tensor) else f"in a {type(x).__name__}"
        raise ValueError(f"the model cannot take the data's examples {what}: {error}; choose another model") from error
    if not isinstance(outputs, Tensor):
        raise ValueError(f"{type(module.whole).__name__}.forward must return a tensor, got {type(outputs).__name__}")
    task.check(outputs, y, data.num_classes)
    if isinstance(module, AdaptedModule):
        check_adapted(module, x, outputs)
        if data.clients:  # else they are at sites
            module.try_step(next(iter(data.clients[0].train_dataloader())), config["local"]["validate"])
    try:
        module.criterion(outputs, y)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"task.loss must take outputs of shape {tuple(outputs.shape)} and targets {described(y)}, got "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    return module


def task_of(config: Mapping[str, Any], targets: Tensor) -> Task:
    """Make the task of a run; where none is chosen, the one that the data's targets are of."""
    if config.get("task") is not None:
        task: Task = instantiate(config["task"], "task")
        return task
    return guess(targets)


def new_module(
    config: Mapping[str, Any], num_classes: int, in_channels: int, image_size: int, task: Task | None = None
) -> FederatedModule:
    """Make the model with the initial weights that follow from the run's seed: the same in every process.

    What stands below ``module`` with a ``_target_`` is another model for the same data (FML's private one); a dict
    of such nodes is several, by name. A module whose arguments include facts of the data, as a model's do, is given
    these.
    """
    task = task or Classification()
    check_node(config["module"], "module")
    if takes_no_model(config["module"]):
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
        return adapted(config, sizes, task)
    data = {"num_classes": task.num_outputs(num_classes), "in_channels": in_channels, "image_size": image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config["seed"], "initial weights"))
        model = instantiate(config["model"], "model", **data)
        if not isinstance(model, Model):
            raise ValueError(
                f"model: {config['model']['_target_']} returned a {type(model).__name__}; expected "
                "fl_lightning.models.model.Model(backbone, head, head_path), see docs/python.md"
            )
        if (wanted := config["model"].get("adapters")) is not None:
            try:
                model = adapters(wanted).adapt(model)
            except ArgumentError as error:
                raise ArgumentError(f"model.adapters.{str(error).removeprefix('model.adapters.')}") from None
        more: dict[str, Any] = {}
        for key, node in config["module"].items():
            if isinstance(node, Mapping) and "_target_" in node:
                more[key] = instantiate(node, f"module.{key}", **data)
            elif isinstance(node, Mapping) and any(isinstance(one, Mapping) for one in node.values()):
                more[key] = {name: instantiate(n, f"module.{key}.{name}", **data) for name, n in node.items()}
        rest = {key: value for key, value in config["module"].items() if key not in more}
        takes = inspect.signature(get_object(config["module"]["_target_"])).parameters
        facts = {key: value for key, value in data.items() if key in takes and key not in rest}
        module: FederatedModule = instantiate(rest, "module", model=model, **more, **facts)
        if module.needs_classes and not isinstance(task, Classification):
            name = config["method"].get("name")
            raise ValueError(
                f"task must be classification for method={name}, whose loss is of classes, got {task.name}; "
                "choose another method"
            )
        module.task = task
    return module


def adapters(wanted: Any, path: str = "model.adapters") -> Adapters | Prompt:
    """Return what ``model.adapters``, or another node like it, asks for."""
    if not isinstance(wanted, Mapping):
        raise ValueError(f"{path} must be null or a mapping such as {{rank: 4, alpha: 8}}, got {wanted!r}")
    kind = "fl_lightning.models.prompts.Prompt" if "prompt" in wanted else f"{Adapters.__module__}.Adapters"
    made: Adapters | Prompt = instantiate({"_target_": kind, **wanted}, path)
    return made


def build_loop(config: Mapping[str, Any], run_folder: RunFolder, resume: Mapping[str, Any] | None) -> FederatedLoop:
    """Make the loop and its parts.

    Args:
        config: The configuration, plain.
        run_folder: Where files go.
        resume: The checkpoint to go on from, if any.
    """
    callbacks: dict[str, Callback] = instantiate_dict(config["callbacks"], "callbacks")
    evaluation = dict(config["evaluation"])
    metrics = Metrics()
    metrics.makers = metric_makers(evaluation.pop("metrics", None))
    callbacks["evaluation"] = instantiate(evaluation, "evaluation")
    place: dict[str, Any] = {"save_dir": str(run_folder.path)}
    if config["resume"] is not None and (config["logger"] or {}).get("_target_", "").endswith("TensorBoardLogger"):
        # Points after the checkpoint are dropped, so that a curve never runs twice over the same rounds.
        place["purge_step"] = resume["round"] if resume else 0
    logger = instantiate(config["logger"] or None, "logger", **place)
    loop: FederatedLoop = instantiate(
        config["loop"],
        "loop",
        seed=config["seed"],
        cohort=instantiate(config["cohort"], "cohort"),
        sharing=instantiate(config["sharing"], "sharing"),
        local=build_local(config),
        aggregator=instantiate(config["aggregator"], "aggregator"),
        executor=instantiate(config["executor"], "executor"),
        callbacks=callbacks,
        metrics=metrics,
        logger=logger,
    )
    return loop


def metric_makers(node: Any) -> dict[str, Callable[..., Metric] | None] | None:
    """Make what makes the metrics of ``evaluation.metrics``: names of the task's own, or nodes by name.

    Args:
        node: A name or a list of names of the task's own metrics, or a dict of nodes, in which ``auroc: auroc`` stands
            for the task's.

    Returns:
        Makers by name, None for a metric of the task; None where nothing is given.
    """
    if node is None or node in ([], {}):
        return None
    if isinstance(node, str):
        node = [node]
    if isinstance(node, (list, tuple)):
        return dict.fromkeys(map(str, node))
    if not isinstance(node, Mapping):
        raise ValueError(f"evaluation.metrics must be a list of names, or nodes by name, got {node!r}")
    nodes = {name: entry for name, entry in node.items() if isinstance(entry, Mapping)}
    for name, entry in node.items():
        if not (entry is None or name in nodes or entry == name):
            raise ValueError(f"evaluation.metrics.{name} must be a node with _target_, null or {name}, got {entry!r}")
    made = instantiate_dict(nodes, "evaluation.metrics")
    return {name: made.get(name) for name in node if name in made or node[name] == name}


def add_observers(
    loop: FederatedLoop,
    config: Mapping[str, Any],
    run_folder: RunFolder,
    resume: Mapping[str, Any] | None,
    identity: Mapping[str, str],
) -> None:
    """Add what looks on: the log of the rounds, the checkpoint, the bars; behind all others, whose numbers they see."""
    loop.add_callback("round_log", RoundLog(MetricsTable(run_folder.metrics, resume["history"] if resume else [])))
    if config["checkpoint"] is not None:
        given = {"folder": run_folder.checkpoints, "run": identity}
        loop.add_callback("checkpoint", instantiate(config["checkpoint"], "checkpoint", **given))
    if config["progress"] is not None:
        loop.add_callback("progress", instantiate(config["progress"], "progress"))


def build_local(config: Mapping[str, Any], path: str = "") -> LocalTraining:
    """Make what trains a client, from the nodes ``local``, ``trainer``, ``optimizer`` and ``scheduler``.

    Args:
        config: The configuration, plain, or a part of it that holds these nodes.
        path: Where they stand, with a dot at its end.
    """
    parts = {name: instantiate(config[name], path + name) for name in ("trainer", "optimizer", "scheduler")}
    for name in ("optimizer", "scheduler"):
        if parts[name] is not None and not callable(parts[name]):
            raise ValueError(f"{path}{name}._partial_ must be true, got {config[name].get('_partial_', False)}")
    local: LocalTraining = instantiate(config["local"], f"{path}local", **parts)
    return local


@contextmanager
def stop_after_round(loop: FederatedLoop, run_folder: RunFolder) -> Iterator[None]:
    """Let Ctrl-C end the run after the running round, saved; a second Ctrl-C ends it at once, saved as of the last."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        if loop.interrupted:
            raise KeyboardInterrupt
        loop.should_stop = loop.interrupted = True
        print(
            f"\nfinishing round {loop.round}, then saving; press Ctrl-C again to stop at once and lose only this round"
            f"\ncontinue with: {command('train')} resume={run_folder.path}",
            file=sys.stderr,
        )

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
