"""Personalization from a configuration: what ``personalize.py`` runs."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fl_lightning import files
from fl_lightning.adapted import AdaptedModule
from fl_lightning.callbacks.low_rank_adaptation import LowRankAdaptation
from fl_lightning.checks import above, at_least, one_of, whole
from fl_lightning.client import Broadcast, Client, Update
from fl_lightning.evaluation.summary import mean, present
from fl_lightning.executors.executor import Executor
from fl_lightning.executors.serial import SerialExecutor
from fl_lightning.models.adapters import merged, save_peft, save_peft_change, without_prompt
from fl_lightning.models.export import export_state_dict
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.epoch_models import models_of
from fl_lightning.personalization.measurement import Measurement, Measures, ModelMetrics
from fl_lightning.personalization.newcomers import Arrivals, Plan, arrivals, settled
from fl_lightning.personalization.outcome import KeptOutcomes, Outcome, by_strategy, file_name
from fl_lightning.personalization.report import report
from fl_lightning.personalization.run_models import RunModels
from fl_lightning.personalization.scoring import Scoring
from fl_lightning.personalization.selection import Selection
from fl_lightning.personalization.source import Source, Training, beside, open_source, read_training
from fl_lightning.personalization.strategy import Strategy, build_strategies, kept_by
from fl_lightning.run.config import check, instantiate, plain
from fl_lightning.run.folder import NO_INFLUENCE, RunFolder
from fl_lightning.run.own_module import arguments_of
from fl_lightning.run.training import build_module, check_accelerator
from fl_lightning.seeding import derive_seed
from fl_lightning.sharing import Sharing
from fl_lightning.state import State, load, match, same, snapshot
from fl_lightning.terminal import Bar, command

log = logging.getLogger(__name__)

FREE_TO_CHANGE = tuple({*NO_INFLUENCE} - {"checkpoint"})
"""What may differ when a run goes on; ``checkpoint`` is what is personalized here."""

AT_ONCE = 16
"""Clients whose models are held at once, before they are measured."""


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Personalize every client with every strategy, print the table, and leave everything in the run folder.

    Args:
        cfg: The composed configuration.
        folder: The run folder.

    Returns:
        What is written to ``results.json``.
    """
    config = plain(cfg)
    check({**config, "module": arguments_of(config["module"])})
    run_folder = RunFolder(folder)
    at_least("seeds", config["seeds"], 1)
    whole("lp_epochs", config["lp_epochs"], 0)
    for name in ("lp_lr", "ft_lr"):
        above(name, config[name], 0, or_null=True)
    one_of("intervals", config["intervals"], ("examples", "clients", None))
    check_accelerator(config["trainer"])
    others = tried_on(config["matrix"])
    training = read_training(config["checkpoint"])
    strategies = build_strategies(cfg, training)
    executor: Executor = instantiate(config["executor"], "executor")
    try:
        return _run(config, run_folder, training, strategies, executor, others)
    finally:
        executor.disconnect()


def _run(
    config: dict[str, Any],
    run_folder: RunFolder,
    training: Training | None,
    strategies: Sequence[Strategy],
    executor: Executor,
    others: int | None,
) -> dict[str, Any]:
    """Do it, on what was read from the configuration."""
    folder = run_folder.path
    source = open_source(config, training, executor)
    check_head(source.module, config["head"])
    scoring = Scoring.of(config["evaluation"], training, source.module.task, source.data.num_classes)
    clients = [Client(data.id, data) for data in source.data.clients]
    known = [] if clients else executor.describe()
    infos = [client.describe() for client in clients] or [one for one in known if not one.unseen]
    taken = {name for strategy in strategies for name in (strategy.name, strategy.base)}
    beside(source, config["beside"], config["trust"], taken, executor)
    strategies = [*strategies, *(kept_by(one) for one in source.runs)]
    plan = Plan.of(config["newcomers"], source.data.unseen or [one for one in known if one.unseen])
    measurement = Measurement(infos, scoring.names, others, config["seed"], scoring.metric)
    selection = Selection.of(config, scoring)
    selection.check(strategies, infos, measurement.others)
    if config["save_models"] and (staying := [one.name for one in infos if one.stays]):
        log.warning("the models of %s stay at their sites and are not saved", ", ".join(staying))
    for strategy in strategies:
        if strategy.run is not None:
            continue
        strategy.choose_epoch(infos, source.module)
        strategy.check_clients(infos)
        strategy.send_models(config["curves"]["every"])
        strategy.prepare(strategy.of(source, config["seed"]).module, config["seed"])
    logger = instantiate(config["logger"] or None, "logger", save_dir=str(folder))
    if isinstance(executor, SerialExecutor):
        # Workers have memory of their own; here all clients share one pool.
        source.data.to(next((one.local.device for one in strategies if one.run is None), source.module.device))
    if config["resume"] is not None or _is_personalization(run_folder):
        run_folder.resume(config, FREE_TO_CHANGE)
    else:
        run_folder.start(config)
    run_folder.keep_partition(source.data.partition)
    kept = KeptOutcomes(folder / "outcomes", snapshot(source.module.state_dict()), scoring.names)
    try:
        with bar_of("clients personalized", strategies, config["seeds"] * len(infos)) as bar:
            outcomes = personalize(
                source, clients, strategies, scoring, measurement, executor, config, folder, kept, bar
            )
        given = settled(strategies, outcomes, selection)
        arrived = None
        if plan.newcomers:
            arrived = _try_newcomers(plan, source, given, scoring, executor, config, folder)
    except Exception:
        if not len(kept):
            run_folder.give_up()
        raise
    except KeyboardInterrupt:
        again = f"{command('personalize')} resume={folder}"
        print(f"\nstopped; what has ended is kept; continue: {again}", file=sys.stderr)
        raise
    return report(outcomes, source, infos, scoring, measurement, config, run_folder, logger, selection, arrived)


def _try_newcomers(
    plan: Plan,
    source: Source,
    strategies: Sequence[Strategy],
    scoring: Scoring,
    executor: Executor,
    config: Mapping[str, Any],
    folder: Path,
) -> Arrivals:
    """Run every strategy at the clients that never took part, with as many examples as planned."""
    clients = plan.clients(config["seed"])
    place = folder / "newcomers"
    own = {**config, "save_models": False}
    infos = plan.infos()
    tried = [one.describe() for one in clients] or infos
    measurement = Measurement(tried, scoring.names, 0, config["seed"], scoring.metric)
    kept = KeptOutcomes(place / "outcomes", snapshot(source.module.state_dict()), scoring.names)
    log.info("clients that never took part: %s", ", ".join(one.name for one in plan.newcomers))
    with bar_of("new clients personalized", strategies, own["seeds"] * len(tried)) as bar:
        outcomes = personalize(source, clients, strategies, scoring, measurement, executor, own, place, kept, bar)
    return arrivals(plan, by_strategy(outcomes), infos, scoring, config["seed"])


def tried_on(matrix: Any) -> int | None:
    """Return on how many other clients' data each model is tried, as ``matrix=`` says; None: on all."""
    if isinstance(matrix, bool):
        return None if matrix else 0
    if isinstance(matrix, Mapping) and list(matrix) == ["clients"]:
        whole("matrix.clients", matrix["clients"], 1)
        return int(matrix["clients"])
    raise ValueError(f"matrix must be true, false or {{clients: N}} with N of at least 1, got {matrix!r}")


def check_head(module: FederatedModule, patterns: Sequence[str]) -> None:
    """Check that every pattern of ``head=`` fits a tensor of the model."""
    if isinstance(module, AdaptedModule) and not module.head_path:
        return  # whatever needs one says so
    try:
        match(module.state_dict(), patterns)
    except ValueError as error:
        raise ValueError(f"head: {error}") from error


def _is_personalization(folder: RunFolder) -> bool:
    """Tell whether a folder holds a run of this script, which the same command goes on with."""
    return folder.config.exists() and "personalization" in folder.read_config()


def personalize(
    source: Source,
    clients: Sequence[Client],
    strategies: Sequence[Strategy],
    scoring: Scoring,
    measurement: Measurement,
    executor: Executor,
    config: Mapping[str, Any],
    folder: Path,
    kept: KeptOutcomes,
    shown: Bar,
) -> list[Outcome]:
    """Run every strategy at every client, as often as there are seeds, but for what was kept by a run before.

    Args:
        source: The global model and the clients' data.
        clients: The clients; reached through the executor alone.
        strategies: What to run; the order changes no result.
        scoring: The metrics.
        measurement: What measures the models.
        executor: Where clients are fitted and models are measured.
        config: The configuration, plain.
        folder: Where models go, if they are kept.
        kept: Takes the outcomes of each strategy and seed as they end.
        shown: Counts the clients.

    Returns:
        One outcome for each strategy, client and seed.
    """
    start = snapshot(source.module.state_dict())
    metrics = ModelMetrics(scoring.makers, snapshot(source.module.backbone.state_dict()), scoring.task, scoring.metric)
    numbers = range(config["seeds"])
    infos = measurement.clients
    outcomes = []
    for strategy in strategies:
        work = work_of(strategy)
        done = {number: found for number in numbers if (found := kept.load(strategy, number)) is not None}
        if done:
            log.info("%s: kept from before, seeds %s", strategy.name, ", ".join(map(str, done)))
        shown.skip(len(done) * len(infos), len(done) * len(infos) * work)
        shown.show(strategy.name)
        todo = [number for number in numbers if number not in done]
        began = time.perf_counter()
        if todo and strategy.run is not None:
            with strategy.run.open(measured_by(scoring)) as models:
                models.measured_by(metrics)
                for outcome, state in _models_of_run(strategy, models, measurement):
                    for number in todo:  # one model for all seeds
                        done.setdefault(number, []).append(replace(outcome, number=number))
                        if config["save_models"]:
                            _save(folder, strategy, done[number][-1], models.module, state)
                    shown.advance(len(todo), len(todo) * work)
            for number in todo:
                kept.save(done[number])
        elif todo:
            load(source.module, start)
            own = strategy.of(source, config["seed"])
            module = own.module
            strategy.prepare(module, config["seed"])
            strategy.local.metrics = metrics
            if own is not source:
                before = {name: without_prompt(name, t) for name, t in module.backbone.state_dict().items()}
                strategy.local.metrics = ModelMetrics(scoring.makers, before, scoring.task, scoring.metric)
            # What nobody trains is at every client already.
            base = {name: tensor for name, tensor in module.state_dict().items() if name in module.base_names}
            sent = snapshot({name: tensor for name, tensor in module.state_dict().items() if name not in base})
            executor.recipe = recipe(strategy, own, scoring, config)
            try:
                executor.setup(strategy.local, clients)
                starts = {n: sent if strategy.start == "global" else _fresh_weights(source, config, n) for n in todo}
                for outcome, state in _models(strategy, starts, executor, measurement):
                    if outcome.measures.diverged:
                        owner = infos[outcome.client].name
                        log.warning("%s, client %s: its model has diverged", strategy.name, owner)
                    if config["save_models"] and state:
                        _save(folder, strategy, outcome, module, {**base, **state}, start)
                    done.setdefault(outcome.number, []).append(outcome)
                    if len(done[outcome.number]) == len(infos):
                        kept.save(done[outcome.number])
                    shown.advance(1, work)
            finally:
                executor.close()
        ended = [outcome for number in numbers for outcome in done[number]]
        at_home = mean(present([float(one.measures.values[scoring.metric][one.client]) for one in ended])[0])
        seconds = time.perf_counter() - began
        log.info("%s: local %s %.3f, %.1f s", strategy.name, scoring.metric, at_home, seconds)
        outcomes += ended
    load(source.module, start)
    return outcomes


def work_of(strategy: Strategy) -> float:
    """Return how long one client takes, in epochs; measuring what comes out counts as one."""
    return 1.0 + float(strategy.settings.get("epochs") or 1) if strategy.train else 1.0


def bar_of(words: str, strategies: Sequence[Strategy], each: int) -> Bar:
    """Return what draws how many models are made, ``each`` with every strategy."""
    return Bar(words, each * len(strategies), work=each * sum(work_of(strategy) for strategy in strategies))


def _save(
    folder: Path,
    strategy: Strategy,
    outcome: Outcome,
    module: FederatedModule,
    state: State,
    start: State | None = None,
) -> None:
    """Keep a client's model: all tensors as the plain model has them, and adapters or prompts for peft.

    Args:
        folder: Of the run.
        strategy: Which made the model.
        outcome: Whose it is.
        module: What the strategy trained.
        state: All its tensors.
        start: The global model's; None: the model has not come of it.
    """
    path = folder / "models" / file_name(strategy.name) / f"seed_{outcome.number}/client_{outcome.client}.pt"
    files.save(path, export_state_dict(merged(module, state), module.head_path))
    save_peft(path.with_suffix(""), module, state, module.head_path)
    added = [part.adapters for part in strategy.callbacks.values() if isinstance(part, LowRankAdaptation)]
    if start is not None and strategy.start == "global" and len(added) == 1:
        count = getattr(strategy.local.plan, "ingredients", 1)
        save_peft_change(path.with_suffix(""), module, start, state, added[0], count, module.head_path)


def recipe(strategy: Strategy, source: Source, scoring: Scoring, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration from which a strategy's fits and measurements can be made anew elsewhere."""
    return {
        **strategy.parts,
        "method": strategy.name,
        "model": source.model_config,
        "module": config["module"],
        "sharing": {"_target_": f"{Sharing.__module__}.{Sharing.__qualname__}"},
        "task": config.get("task"),
        **measured_by(scoring),
        "batch_size": strategy.settings.get("batch_size"),
    }


def measured_by(scoring: Scoring) -> dict[str, Any]:
    """Return what of a recipe says by what models are measured."""
    return {"metric": scoring.metric, "metrics": scoring.nodes, "measures": list(scoring.names)}


def _models(
    strategy: Strategy, starts: Mapping[int, State], executor: Executor, measurement: Measurement
) -> Iterator[tuple[Outcome, State]]:
    """Make and measure the models of one strategy, seed by seed: what came of each, and all its tensors."""
    measured: dict[int, list[Measures]] = {}
    for number, start in starts.items():
        if not strategy.train:
            # One model for all clients, and where it is the global one, for all seeds.
            same_start = next((other for other in measured if starts[other] is start), None)
            measured[number] = measurement.measure_all(executor, start) if same_start is None else measured[same_start]
            for index, measures in enumerate(measured[number]):
                yield Outcome(strategy, index, number, measures, {}), start
            continue
        for first in range(0, len(measurement.clients), AT_ONCE):
            members = measurement.clients[first : first + AT_ONCE]
            # A seed is a round of its own to whatever draws random numbers within a fit.
            updates = []
            tasks = [(client, Broadcast(number, start)) for client in members]
            for client, ended in zip(members, executor.run(tasks), strict=True):
                if ended.update is None:
                    raise RuntimeError(f"{strategy.name}, client {client.name}: {ended.error}") from ended.error
                updates.append(ended.update)
            yield from _measured(strategy, number, first, updates, executor, measurement)


def _models_of_run(strategy: Strategy, run: RunModels, measurement: Measurement) -> Iterator[tuple[Outcome, State]]:
    """Measure the personal models of a run of ``train.py``, client by client."""
    for index, state in enumerate(run.models(measurement.clients)):
        [measures] = measurement.measure(run, [(index, state, True)], personal=True)
        yield Outcome(strategy, index, 0, measures, {}), state


def _measured(
    strategy: Strategy,
    number: int,
    first: int,
    updates: Sequence[Update],
    executor: Executor,
    measurement: Measurement,
) -> Iterator[tuple[Outcome, State]]:
    """Measure the models that some clients have sent, at the end of their fits and on the way."""
    sent = [models_of(update) for update in updates]
    members = [
        (first + index, models, update, bool(models) and same(models[max(models)], update.state))
        for index, (models, update) in enumerate(zip(sent, updates, strict=True))
    ]
    todo: list[tuple[int, State, bool]] = []
    for index, models, update, last in members:  # the last on the way may be the one that came out
        todo += [(index, state, last and epoch == max(models)) for epoch, state in models.items()]
        todo += [] if last else [(index, update.state, True)]
    found = iter(measurement.measure(executor, todo))
    for index, models, update, last in members:
        curve = {epoch: next(found) for epoch in models}
        measures = curve[max(curve)] if last else next(found)
        trained = (update.metrics[key] for key in ("epochs", "steps", "models"))
        yield Outcome(strategy, index, number, measures, curve, *trained), update.state


def _fresh_weights(source: Source, config: Mapping[str, Any], number: int) -> State:
    """Return the weights that a client without a federation starts from: the same for all clients."""
    seed = derive_seed(config["seed"], "random start", number)
    model = {**source.model_config}
    if "pretrained" in model:
        model["pretrained"] = False
    given = {**config, "seed": seed, "model": model, **source.parts}
    fresh: FederatedModule = build_module(given, source.data)
    return snapshot(fresh.state_dict(), [name for name in fresh.state_dict() if name not in fresh.base_names])
