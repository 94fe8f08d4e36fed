"""Scores the kept models of a run of ``train.py``, writes ``results.json`` and makes the printed table."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from fl_lightning import files
from fl_lightning.callbacks.federated_evaluation import CHOOSING, VIEWS, FederatedEvaluation, View
from fl_lightning.client import ClientInfo, Scores
from fl_lightning.evaluation.results import write_json
from fl_lightning.executors.executor import Simulation
from fl_lightning.loop import DivergedError, FederatedLoop
from fl_lightning.methods.low_rank_clients import ClientRanks
from fl_lightning.models.adapters import ADAPTER, LOCAL, adapted_layers, merged, save_peft
from fl_lightning.models.export import export_state_dict
from fl_lightning.run.folder import RunFolder
from fl_lightning.state import State
from fl_lightning.terminal import UNCLEAR, prose, table

log = logging.getLogger(__name__)

KEPT_WITH: dict[View, View] = {
    "global": "global",
    "unseen": "global",
    "unseen_personal": "global",
    "personal": "personal",
}
"""Which view's best round each view is scored at."""

FEW = 30
"""Test examples below which a client's own score says little: 95% of accuracies are then off by up to 0.18."""

Views = dict[View, list[Scores]]


def finish(
    loop: FederatedLoop, run_folder: RunFolder, config: Mapping[str, Any], partition_hash: str
) -> dict[str, Any]:
    """Score the last and the best models on test data, keep those that validation chose, and write the results.

    Args:
        loop: The federation after its last round, still open.
        run_folder: Where files go.
        config: The configuration, plain.
        partition_hash: Of the data's partition.

    Returns:
        What is written to ``results.json``.
    """
    if loop.history and not any(row["round/trained"] for row in loop.history):
        raise DivergedError(f"every client failed or diverged in all {loop.round} rounds; see the warnings above")
    evaluation = next(c for c in loop.federated_callbacks if isinstance(c, FederatedEvaluation))
    last = evaluation.evaluate(loop, "test")
    kept, rounds = dict(last), dict.fromkeys(last, loop.round - 1)
    one_sided: list[str] = []
    # Personal models at last: what callbacks add to the results is of the models that are kept.
    for chooser in CHOOSING:
        if chooser in evaluation.best:
            evaluation.restore(loop, chooser)
            views = [view for view in VIEWS if KEPT_WITH[view] == chooser and view in last]
            kept.update(evaluation.evaluate(loop, "test", views))
            rounds.update(dict.fromkeys(views, evaluation.best[chooser]["round"]))
        if chooser == "personal" and "personal" in last:
            keep_adapters(loop, run_folder, None)
        if chooser == "global" and "global" in last and (state := loop.global_state()) is not None:
            plain_state = merged(loop.module, state)
            if not loop.sharing.merged:  # beside the base that the run began with
                save_peft(run_folder.path / "adapter", loop.module, state, loop.module.head_path)
                keep_adapters(loop, run_folder, state)
            files.save(run_folder.global_model, export_state_dict(plain_state, loop.module.head_path))
            one_sided = of_one_class(loop, evaluation)

    if evaluation.save_personal:
        save_personal_models(loop, run_folder)

    summaries = {view: evaluation.summaries(loop, view, scores, "test") for view, scores in kept.items()}
    last_summaries = {view: evaluation.summaries(loop, view, scores, "test") for view, scores in last.items()}
    metric = evaluation.metric
    results: dict[str, Any] = {
        "method": config["method"]["name"],
        "rounds": loop.round,
        "seed": loop.seed,
        "metric": metric,
        "one_class": one_sided,
        **{view: summaries[view][metric] if view in summaries else None for view in VIEWS},
        "metrics": summaries,
        "clients_scored": len(evaluation.people(loop, "global")),
        "clients": client_entries(loop, kept, metric),
        "bytes_up": loop.bytes_up,
        "bytes_down": loop.bytes_down,
        "seconds": loop.seconds,
        "seconds_per_round_median": median(row["time/seconds"] for row in loop.history) if loop.history else None,
        "kept": "best by validation" if evaluation.best else "last: no validation data",
        "kept_rounds": rounds,
        "validation": {
            view: {"metric": metric, "mode": evaluation.mode, "by": best["by"], "value": best["value"]}
            for view, best in evaluation.best.items()
        },
        "last": {view: last_summaries[view][metric] if view in last_summaries else None for view in VIEWS},
        # What a stage after the rounds begins with: the kept round as it was scored within them.
        "in_round": {
            name: value
            for view in CHOOSING
            for row in loop.history
            if row["round"] == rounds.get(view, loop.round - 1)
            for name, value in row.items()
            if name.startswith(f"test/{view}/")
        },
        "data": config["data"],
        "partition_hash": partition_hash,
    }
    if groups := {view: found for view in kept if (found := evaluation.group_means(loop, kept[view]))}:
        results["groups"] = groups
    for callback in loop.federated_callbacks:
        for key, value in callback.results(loop).items():
            if key in results:
                log.warning(
                    "results.json has an entry %r already; that of callbacks.%s gets its name", key, callback.name
                )
                key = f"{callback.name}.{key}"
            results[key] = value
    write_json(run_folder.results, results)
    if loop.logger is not None:
        # By this name TensorBoard shows the cards, of one point each, behind the curves.
        numbers = {
            f"test_final/{view}/{name}/{key}": value
            for view, by_metric in summaries.items()
            for name, summary in by_metric.items()
            for key, value in summary.items()
        }
        log_hyperparameters(loop, config, numbers, run_folder.started_with())
        loop.logger.finalize("success")
    return results


def save_personal_models(loop: FederatedLoop, run_folder: RunFolder) -> None:
    """Write every client's model, all its tensors under the plain model's names; clients hand them over for this."""
    folder = run_folder.path / "personal_models"
    for client in loop.clients:
        state = loop.personal_state(client)
        name = re.sub(r"[^\w.-]+", "_", client.name)
        save_peft(folder / f"{name}_adapter", loop.module, state, loop.module.head_path)
        files.save(folder / f"{name}.pt", export_state_dict(merged(loop.module, state), loop.module.head_path))


def client_entries(loop: FederatedLoop, kept: Views, metric: str) -> list[dict[str, Any]]:
    """Return who the clients are, how much they have, and how the kept models serve each."""
    values = {view: {one.client_id: one.values for one in scores} for view, scores in kept.items()}

    def of(view: View, client: ClientInfo) -> dict[str, float] | None:
        return values.get(view, {}).get(client.id)

    return [
        {
            "id": client.id,
            "name": client.name,
            "num_train": client.num_train,
            "num_val": client.num_val,
            "num_test": client.num_test,
            **{view: (of(view, client) or {}).get(metric) for view in CHOOSING},
            "metrics": {view: of(view, client) for view in CHOOSING},
        }
        for client in loop.clients
    ]


def log_hyperparameters(
    loop: FederatedLoop, config: Mapping[str, Any], numbers: Mapping[str, float], words: Sequence[str]
) -> None:
    """Log the choices of a run, what was said on the command line among them, beside its final numbers."""
    flat = {
        "method": config["method"]["name"],
        "seed": config["seed"],
        "rounds": loop.rounds,
        "model": config["model"].get("name", config["model"]["_target_"].rpartition(".")[2]),
        "data": config["data"]["_target_"].rpartition(".")[2],
        **{f"optimizer.{key}": value for key, value in config["optimizer"].items() if not key.startswith("_")},
        **{f"trainer.{key}": config["trainer"].get(key) for key in ("max_epochs", "precision")},
    }
    given = [word.lstrip("+~").partition("=")[::2] for word in words]
    flat |= {key: value for key, value in given if key not in flat}
    assert loop.logger is not None
    if isinstance(loop.logger, TensorBoardLogger):
        loop.logger.log_hyperparams(flat, dict(numbers), step=loop.round)
    else:
        loop.logger.log_hyperparams({**flat, "config": dict(config)})
        loop.logger.log_metrics(dict(numbers), step=loop.round)


def title_of(metric: str) -> str:
    """Return a metric's name at the beginning of a sentence."""
    return (
        metric.upper() if metric in ("auroc", "ece", "f1", "iou", "mae", "mse", "r2", "rmse") else metric.capitalize()
    )


def keep_adapters(loop: FederatedLoop, run_folder: RunFolder, state: State | None) -> None:
    """Write clients' own adapters as PEFT folders: of personal models, or of the global one cut to each client's rank.

    What is at sites stays there. Where a client mixes two adapters, its own is written.

    Args:
        loop: The federation.
        run_folder: Where ``adapters/client_<id>`` go.
        state: All tensors of the global model; None: personal models are meant.
    """
    ranks = next((one for one in loop.federated_callbacks if isinstance(one, ClientRanks)), None)
    if not adapted_layers(loop.module) or not isinstance(loop.executor, Simulation) or (state and not ranks):
        return
    for client in loop.clients:
        own = loop.personal_state(client) if state is None else state
        if ranks is not None:
            own = {**own, **ranks.cut(own, client.id)}
        adapter = LOCAL if any(f".{LOCAL}." in name for name in own) else ADAPTER
        save_peft(
            run_folder.path / "adapters" / f"client_{client.id}", loop.module, own, loop.module.head_path, adapter
        )


def of_one_class(loop: FederatedLoop, evaluation: FederatedEvaluation) -> list[str]:
    """Return the names of the clients for all of whose test data, of several classes, the global model predicts one."""
    exam = loop.global_exam("test", metrics=(), confusion=True)
    if exam is None or not loop.metrics.task.has_classes:
        return []
    people = evaluation.people(loop, "global")
    counts = [one.confusion for one in loop.score((client, exam) for client in people)]
    return [
        client.name
        for client, table in zip(people, counts, strict=True)
        if table is not None and int((table.sum(0) > 0).sum()) == 1 < int((table.sum(1) > 0).sum())
    ]


def result_table(results: Mapping[str, Any]) -> str:
    """Return the results of a run as text for a terminal."""
    last = results["rounds"] - 1
    shown: list[View] = [view for view in VIEWS if results[view] is not None]
    rounds = results["kept_rounds"]
    rows = [{"model": view, "round": rounds[view], **results[view]} for view in shown]
    earlier: list[View] = [view for view in shown if rounds[view] != last]
    rows += [{"model": f"{view}, last", "round": last, **results["last"][view]} for view in earlier]
    number, scored = len(results["clients"]), results["clients_scored"]
    people = f"{number} clients" + (f", {scored} of them scored" if scored < number else "")
    title = (
        f"{results['method']}, {people}, {results['rounds']} round(s), "
        f"seed {results['seed']}. Kept: {results['kept'] if results['rounds'] else 'the initial model'}.\n"
        f"{title_of(results['metric'])} on test data, which chose nothing:"
    )
    words = [f"{view}: {VIEWS[view]}" for view in shown]
    if names := results.get("one_class"):
        words.append(f"The global model predicts one class for all test data of {', '.join(names)}.")
    if earlier:
        words.append(f"last: the same after the last round, {last}")
    further = [
        {"model": view, "metric": name, **summary}
        for view in shown
        for name, summary in results["metrics"][view].items()
        if name != results["metric"]
    ]
    scores = [view for view in CHOOSING if results[view] is not None]
    clients = [
        {"client": entry["name"], **{key: entry[key] for key in ("num_train", "num_val", "num_test", *scores)}}
        for entry in results["clients"]
        if any(entry[view] is not None for view in scores)
    ]
    tables = [f"{prose(title)}\n\n{table(rows)}\n" + "\n".join(prose(line) for line in words) + "\n"]
    if further:
        tables.append(f"Further metrics of the kept models:\n\n{table(further)}")
    if len(clients) <= 20:
        tables.append(table(clients, tones=dict.fromkeys(("num_test", *scores), _few)))
        if few := [entry["name"] for entry in results["clients"] if _few(entry)]:
            tables[-1] += f"Fewer than {FEW} test examples, too few to go by: {', '.join(few)}.\n"
    if "groups" in results:
        rows = [{"model": v, "clients": g, **m} for v, of_view in results["groups"].items() for g, m in of_view.items()]
        tables.append(f"Means over groups of clients:\n\n{table(rows)}")
    if "personal_on" in results:
        served = results["personal_on"]
        rows = [{"client": "mean", **served["mean"]}, *({"client": c, **v} for c, v in served["clients"].items())]
        what = f"{title_of(results['metric'])} of each client's own model, on its own and on everyone's test data"
        tables.append(f"{what}:\n\n{table(rows if len(rows) <= 21 else rows[:1])}")
    return "\n".join(tables)


def _few(client: Mapping[str, Any]) -> str:
    """Return how a client's scores look in the table: pale if they are of few examples."""
    return UNCLEAR if 0 < client["num_test"] < FEW else ""
