"""What a personalization run leaves behind: results, tables, matrices, curves and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf

from fl_lightning import files
from fl_lightning.evaluation.frontier import area, pareto, points_of
from fl_lightning.evaluation.harm import PairedComparison, change, compare, harm
from fl_lightning.evaluation.matrix import AccuracyMatrix
from fl_lightning.evaluation.records import END, Record, curves_of, figures_of, write_records
from fl_lightning.evaluation.results import read_json, write_json
from fl_lightning.evaluation.summary import mean
from fl_lightning.evaluation.tables import MeanStd, Row, latex_table, markdown_table, mean_std
from fl_lightning.evaluation.uncertainty import Interval, holm
from fl_lightning.personalization.evidence import LINEAR, Change, Evidence, Groups, over_clients
from fl_lightning.personalization.measurement import SCALARS, Measurement, Measures
from fl_lightning.personalization.newcomers import Arrivals
from fl_lightning.personalization.outcome import Outcome, by_strategy, file_name, matrix_of, summary_of
from fl_lightning.personalization.page import Facts, page
from fl_lightning.personalization.selection import BEST_OF, WHO, Choice, Selection, select, wrong
from fl_lightning.run.config import differences
from fl_lightning.run.folder import RunFolder
from fl_lightning.terminal import HURT, Tone, closing, of_change, prose, table

if TYPE_CHECKING:
    from lightning.pytorch.loggers.logger import Logger
    from matplotlib.figure import Figure

    from fl_lightning.client import ClientInfo
    from fl_lightning.personalization.decision import Decision
    from fl_lightning.personalization.scoring import Scoring
    from fl_lightning.personalization.source import Source

HARM = (
    "Who gains and who is harmed: changes of what each client's own model scores at home, from the un-tuned global\n"
    "model (none) and from plain fine-tuning (ft). A client gains, or is hurt, where its paired 95% interval over\n"
    "test examples lies on one side of 0; else it is unclear. Wins and losses are signs of means over seeds; p is\n"
    "Wilcoxon's signed-rank test over clients (two-sided), corrected for all pairs of strategies by Holm; with few\n"
    "clients it cannot be small."
)

INTERVALS = {
    "examples": "[low, high]: 95% bootstrap interval over test examples, of these models at these clients; other seeds "
    "and other\nfederations are not in it (python -m fl_lightning.deviations).",
    "clients": "[low, high]: 95% bootstrap interval over clients, as if others like them were drawn; of few clients it "
    "is too narrow.",
    None: "±: standard deviation over the seeds of the fine-tuning of one global model; of others says more "
    "python -m\nfl_lightning.deviations.",
}

BEYOND = "better than every other row beyond the paired 95% intervals, which hold together (Bonferroni)."

SCORES = ("local", "global_others", "global_all", "avg2", "avg3", "worst_row")
TRAINING = ("epochs", "steps", "models", "train_loss")
BUDGET = ("epochs", "steps", "models")
COLUMNS = (*TRAINING, *SCORES, "cstd_row", "feature_distortion", "ece", "share_hurt")
"""The columns of the printed table; ``results.json`` holds many more."""

HEADS = {"epochs": "epochs trained", "models": "models trained", "train_loss": "training loss"}

DEFINITIONS = (
    "A[i, j] is the test {metric} of client i's model on client j's data; every mean counts each client the same.\n"
    "local: mean of A[i, i]. global_others: mean of A[i, j], j != i; global_all: with j = i. "
    "avg2: mean of local and global_others;\navg3: of these two and worst_row, the mean over i of the worst A[i, j]. "
    "cstd_row: mean over i of the std over j of A[i, j].\n"
    "feature_distortion: mean l2 distance of the features from the global model's, on own test data. "
    "ece: expected calibration error,\nown test data. share_hurt: share of clients whose local {metric} is worse than "
    "the un-tuned global model's beyond the\npaired 95% interval over test examples. "
    "epochs trained, steps: of one client, all its models together, mean over clients. "
    "training loss: on own training data, at the end."
)


def report(
    outcomes: Sequence[Outcome],
    source: Source,
    clients: Sequence[ClientInfo],
    scoring: Scoring,
    measurement: Measurement,
    config: Mapping[str, Any],
    run_folder: RunFolder,
    logger: Logger | None,
    selection: Selection,
    arrived: Arrivals | None = None,
) -> dict[str, Any]:
    """Write everything and print the table.

    Args:
        outcomes: Of every strategy, client and seed.
        source: What was personalized.
        clients: All clients, as outcomes number them.
        scoring: The metrics.
        measurement: What has measured the models.
        config: The configuration, plain.
        run_folder: Where files go.
        logger: Gets the curves, and the figures if it is TensorBoard's; None: none.
        selection: How settings of a grid, and strategies, are chosen.
        arrived: What clients that never took part would gain; None: there are none.

    Returns:
        What is written to ``results.json``.
    """
    settings = by_strategy(outcomes)
    chosen, choices = select(settings, selection)
    groups = {**settings, **chosen}
    shown = in_the_table(groups, choices)
    given = clients, scoring.metric, scoring.higher_is_better, config["seed"], scoring.resampled
    evidence = Evidence(groups, *given)
    each = [Evidence({name: [runs[n]] for name, runs in groups.items()}, *given) for n in range(config["seeds"])]
    pairs = comparisons({name: groups[name] for name in shown}, scoring, evidence)
    corrected = {frozenset((pair["first"], pair["second"])): pair["p_holm"] for pair in pairs}
    methods = {name: _method(name, groups, clients, scoring, evidence, each, corrected) for name in groups}
    for name, choice in choices.items():
        methods[name]["choice"] = {**asdict(selection), **asdict(choice), **asdict(wrong(choice, each))}
    definitions = DEFINITIONS.format(metric=scoring.metric)
    if measurement.others < len(clients) - 1:
        definitions += f"\nThe others are {measurement.others} of the {len(clients)} clients, the same for all models."
    results: dict[str, Any] = {
        "seeds": list(range(config["seeds"])),
        "methods": methods,
        "source": source.description,
        "seed": config["seed"],
        "metric": scoring.metric,
        "epochs": config["epochs"],
        "grid": config["grid"] or {},
        "comparisons": pairs,
        "partition_hash": source.data.partition.hash,
        "models_stay_at": [client.name for client in clients if client.stays],
        "definitions": definitions,
    }
    for name, runs in groups.items():
        for metric in scoring.names:
            matrices = [matrix_of([one.measures for one in run], clients, metric) for run in runs]
            place = run_folder.path / "matrix" / ("" if metric == scoring.metric else metric)
            save_matrices(name, matrices, place)
    others = [metric for metric in scoring.names if metric != scoring.metric]
    rows = [_row(name, methods[name], others, config["intervals"], choices.get(name)) for name in shown]
    if choices:
        rows = [{"strategy": row["strategy"], "chosen": None, "of": None, **row} for row in rows]
    best = beyond_all(shown, evidence)
    times = f"{config['seeds']} run{'s' if config['seeds'] > 1 else ''}"
    title = (
        f"{source.data.name}, {len(clients)} clients, each with the {'mean' if source.start else 'global'} model of "
        f"{source.description['checkpoint']}; {scoring.metric}; {config['epochs']} epochs, "
        f"seed {config['seed']}, {times}"
    )
    lines = remarks_on({name: groups[name] for name in shown}, source, config, scoring)
    staying = [client.name for client in clients if client.stays]
    if staying:
        lines.append(
            f"{', '.join(staying)}: the model stays at the site and was tried on its own data alone; its row of the "
            "matrix has no other value, its column those of the others' models."
        )
    for name, runs in groups.items():
        if (run := runs[0][0].strategy.run) is not None and run.stay:
            lines.append(f"{name}: its models stay at their sites, and each was tried on its own site's data alone.")
    if evidence.only_at_home:
        lines.append(f"Of so many models on so many clients {scoring.metric} has intervals at home alone.")
    remarks = "".join(f"{line}\n" for line in [*lines, *words_on_choices(choices, methods, selection)])
    harmed = [harm_row(name, methods[name], evidence) for name in shown if name != "none"]
    foot = f"{definitions}\n{INTERVALS[config['intervals']]}\n{remarks}\n{HARM}\n\n"
    newcomers = "" if arrived is None else f"\n{words_on_newcomers(arrived, scoring, markdown_table)}"
    text = f"{title}\n\n{markdown_table(rows, best=best)}\nBold: {BEYOND} {foot}{markdown_table(harmed)}{newcomers}"
    files.write_text(run_folder.path / "table.md", text)
    if len(shown) < len(groups):
        members = [_row(name, methods[name], others, config["intervals"], None) for name in settings]
        files.write_text(run_folder.path / "grid.md", f"{title}\n\n{markdown_table(members)}\n{foot}")
    files.write_text(run_folder.path / "table.tex", latex_table(rows, best=best))
    records = records_of(groups, clients, scoring)
    write_records(run_folder.path / "records.csv", records)
    results["frontier"] = fronts(records, scoring.higher_is_better)
    clear_events(run_folder.path)
    if isinstance(logger, TensorBoardLogger):
        logger = board_logger(run_folder.path, "all strategies")
    if config["figures"]:
        model = source.model_config.get("name") or source.model_config["_target_"].rpartition(".")[2]
        where = f"{source.data.name}, {model}; {len(clients)} clients, {times}"
        visible = {name: groups[name] for name in shown}
        drawn = figures(visible, clients, records, where, scoring, evidence)
        if arrived is not None:
            drawn["newcomers"] = draw_newcomers(arrived, scoring, f"{source.data.name}, {model}; {times}")
        show(drawn, run_folder, logger)
    if logger is not None:
        log_numbers(records, results, config, text, logger)
        logger.finalize("success")
    facts = Facts(
        f"{source.data.name}: {len(clients)} clients, {scoring.metric}, {times}",
        groups,
        shown,
        choices,
        selection,
        evidence,
        scoring,
        clients,
        methods,
        [*lines, *words_on_choices(choices, methods, selection)],
        about(source, config, run_folder),
        commands(source, run_folder),
        arrived,
    )
    html, decisions = page(facts)
    files.write_text(run_folder.path / "report.html", html)
    results["decisions"] = {one.name: found.to_dict() for one, found in zip(clients, decisions, strict=True)}
    if arrived is not None:
        results["newcomers"] = arrived.to_dict()
    write_json(run_folder.results, results)
    results = read_json(run_folder.results)  # where NaN is null
    tones: dict[str, Tone] = {name: of_change(name) for name in ("mean change", "worst change")}
    tones["gain, unclear, hurt"] = _anyone_hurt
    words = f"*: {BEYOND} {foot}"
    print(f"{prose(title)}\n\n{table(rows, best=best)}\n{prose(words)}{table(harmed, tones=tones)}")
    if len(clients) <= 20:
        advice = [advice_row(one, found) for one, found in zip(clients, decisions, strict=True)]
        tones = dict.fromkeys(("advice", "change at home"), of_change("change at home"))
        print(f"What each client is advised, by the candidate that validates best:\n\n{table(advice, tones=tones)}")
    if arrived is not None:
        results["newcomers"] = read_json(run_folder.results)["newcomers"]
        print(words_on_newcomers(arrived, scoring, table))
    place = run_folder.path
    last = {"run folder": str(place), "curves": f"tensorboard --logdir {quote(str(place))}"}
    if config["figures"]:
        last["pictures"] = str(run_folder.figures)
    last["next"] = f"what each client is advised, and why: open {place / 'report.html'} in a browser"
    print(closing(last))
    return results


def about(source: Source, config: Mapping[str, Any], run_folder: RunFolder) -> list[tuple[str, str]]:
    """Return what a run was made from, for the page."""
    made = run_folder.environments()[-1]
    machine = ", ".join(f"{key} {made[key]}" for key in ("fl_lightning", "commit", "torch", "lightning") if key in made)
    training = {"method": "trained by", "training_seed": "seed of its training", "start": "what strategies start from"}
    return [
        ("run" if source.start else "global model", str(source.description["checkpoint"])),
        *((word, str(source.description[key])) for key, word in training.items() if key in source.description),
        ("partition", f"{source.data.partition.hash} (SHA-256 of who holds which examples)"),
        ("seed", f"{config['seed']}, {config['seeds']} runs of fine-tuning"),
        ("made with", f"{machine}; {made.get('machine', '')}"),
        ("run folder", str(run_folder.path)),
    ]


def commands(source: Source, run_folder: RunFolder) -> list[str]:
    """Return the commands of the global model and of this run, as far as they are known."""
    folder = Path(source.description["checkpoint"])
    runs = [RunFolder(folder), run_folder] if folder.is_dir() else [run_folder]
    known = [made[0]["command"] for run in runs if (made := run.environments()) and "command" in made[0]]
    return [typed(command) for command in known]


def typed(command: str) -> str:
    """Return a command as it is typed: ``fl-train …`` or ``python train.py …``."""
    program, _, rest = command.partition(" ")
    name = Path(program).name
    return f"{name} {rest}".strip() if name.startswith("fl-") else f"python {command}"


def in_the_table(groups: Groups, choices: Mapping[str, Choice]) -> list[str]:
    """Return the rows of the table: for settings from which one was chosen, the chosen one in their place."""
    members = _members(choices)
    rows = [runs[0][0].strategy.base if name in members else name for name, runs in groups.items()]
    return list(dict.fromkeys(rows))


def _members(choices: Mapping[str, Choice]) -> set[str]:
    return {name for row, choice in choices.items() if row != BEST_OF for name in choice.candidates}


def words_on_choices(
    choices: Mapping[str, Choice], methods: Mapping[str, Mapping[str, Any]], selection: Selection
) -> list[str]:
    """Say in sentences what was chosen by what, who could know it, and how often it was wrong on test data."""
    lines = []
    if any(row != BEST_OF for row in choices):
        sizes = {len(choice.candidates) for row, choice in choices.items() if row != BEST_OF}
        whose = "each client takes its own" if selection.per == "client" else "all clients take the same"
        lines.append(
            f"chosen: of {max(sizes)} settings of each strategy, {whose}, by {WHO[selection.by]}. Epochs, steps and "
            "models are of the chosen one; all settings stand in grid.md."
        )
    for name, choice in choices.items():
        found, rule = methods[name]["choice"], ""
        if name == BEST_OF:
            rule = f"of {', '.join(choice.candidates)} each client keeps the best by {WHO[selection.by]}"
            if selection.margin:
                rule += f", if better than {choice.candidates[0]} by more than {selection.margin:g}"
            rule += "; "
        lines.append(
            f"{name}: {rule}on test data another choice was better beyond chance for {found['beyond_chance']:.0%} of "
            f"clients and seeds, better at all for {found['at_all']:.0%}, by {found['regret']:.3f} on average."
        )
    return lines


def beyond_all(names: Sequence[str], evidence: Evidence) -> dict[str, list[int]]:
    """Return by column the row that is better than all others beyond chance, if there is one."""
    found = {metric: evidence.best(names, metric) for metric in LINEAR}
    return {metric: [names.index(name)] for metric, name in found.items() if name is not None}


def remarks_on(groups: Groups, source: Source, config: Mapping[str, Any], scoring: Scoring) -> list[str]:
    """Say in sentences what a reader of the table should know of single rows."""
    lines = []
    if not scoring.has_intervals:
        lines.append(
            f"{scoring.metric} is a metric of your own, which cannot be resampled: it has no intervals over examples, "
            f"and nobody is said to be hurt. The task's own have them: {', '.join(source.module.task.metrics)}."
        )
    lines += [source.start] if source.start else []
    strategies = {name: runs[0][0].strategy for name, runs in groups.items()}
    for name, strategy in strategies.items():
        if strategy.run is not None:
            lines.append(
                f"{name}: the clients' own models of {strategy.run.path}, as it kept them; nothing trained here."
            )
    reference: dict[str, Any] = {key: config[key] for key in ("epochs", "batch_size", "optimizer", "scheduler")}
    for name, strategy in strategies.items():
        own = {key: strategy.settings[key] for key in reference if key in strategy.settings}
        known = {key: reference[key] for key in own}
        if changed := [line.replace(" was ", " is ").split(", now ") for line in differences(known, own)]:
            words = (f"{was.partition(' is ')[0]} {now} instead of {was.partition(' is ')[2]}" for was, now in changed)
            lines.append(f"{name}: {'; '.join(words)}.")
        if "best_epoch" in strategy.callbacks:
            lines.append(f"{name}: the model of the epoch with the least loss on the client's validation data.")
    if source.training is None or source.training.epochs is None:
        alone = [name for name, strategy in strategies.items() if strategy.start == "random"]
        if alone:
            lines.append(
                f"{alone[0]}: how long the federation trained is not known, so this trained for {config['epochs']} "
                f"epochs; for a fair bar set baselines.{alone[0]}.epochs to its rounds x local epochs + epochs."
            )
    for name, runs in groups.items():
        models = [outcome for run in runs for outcome in run]
        if lost := sum(one.measures.diverged for one in models):
            lines.append(f"{name}: {lost} of {len(models)} models have diverged (NaN); lower the learning rate.")
        if lopsided := sum(one.measures.one_class == 1 for one in models):
            lines.append(
                f"{name}: {lopsided} of {len(models)} models predict one class for all of their client's test data."
            )
    return lines


def _method(
    name: str,
    groups: Groups,
    clients: Sequence[ClientInfo],
    scoring: Scoring,
    evidence: Evidence,
    each: Sequence[Evidence],
    corrected: Mapping[frozenset[str], float],
) -> dict[str, Any]:
    """Everything that ``results.json`` says about one strategy: means over seeds, deviations, seeds, clients."""
    runs = groups[name]
    higher = scoring.higher_is_better
    per_seed = []
    for number, run in enumerate(runs):
        measures = [one.measures for one in run]
        summary = summary_of(measures, clients, scoring.metric, higher) | _harm(run, groups, name, number, scoring)
        summary |= hurt(name, groups, each[number])
        for metric in scoring.names:
            if metric != scoring.metric:
                matrix = matrix_of(measures, clients, metric)
                summary |= {f"{metric}/{key}": matrix.metric(key) for key in ("local", "global_others", "global_all")}
        summary |= {key: mean([getattr(one, key) for one in run]) for key in BUDGET}
        per_seed.append(summary)
    summaries = {key: mean_std([seed[key] for seed in per_seed]) for key in per_seed[0]}
    values = client_values(runs, scoring)
    entries: list[dict[str, Any]] = [
        {"id": client.id, "name": client.name, "local": value, "interval": evidence.client(name, index)[1:]}
        for index, (client, value) in enumerate(zip(clients, values.tolist(), strict=True))
    ]
    paired = {}
    sign = 1 if higher else -1
    for against, baseline in _baselines(groups, name).items():
        before = client_values(baseline, scoring)
        for entry, difference in zip(entries, change((sign * values).tolist(), (sign * before).tolist()), strict=True):
            entry[f"change_from_{against}"] = float(difference)
        for entry, found in zip(entries, evidence.changes(name, name_of(baseline)), strict=True):
            entry |= {f"change_from_{against}_interval": found.interval[1:]}
            entry |= {f"change_from_{against}_p": found.p_value, f"change_from_{against}_p_holm": found.p_holm}
        if baseline is not runs:
            paired[f"against_{against}"] = _compare(sign * values, sign * before)
            paired[f"against_{against}"]["p_holm"] = corrected.get(frozenset((name, name_of(baseline))), math.nan)
    return {
        **{key: summary.mean for key, summary in summaries.items()},
        **hurt(name, groups, evidence),
        "intervals": {
            "examples": {metric: evidence.interval(name, metric)[1:] for metric in LINEAR},
            "clients": {metric: over[1:] for metric, over in intervals_over_clients(runs, clients, scoring).items()},
        },
        "std": {key: summary.std for key, summary in summaries.items()},
        "per_seed": per_seed,
        "diverged": sum(one.measures.diverged for run in runs for one in run),
        "settings": runs[0][0].strategy.settings,
        "clients": entries,
        **paired,
    }


def _baselines(groups: Groups, name: str) -> dict[str, Sequence[Sequence[Outcome]]]:
    """What a strategy is compared with: the un-tuned model, and plain fine-tuning with the same values of the grid."""
    values = groups[name][0][0].strategy.values
    found: dict[str, Sequence[Sequence[Outcome]]] = {}
    # What was chosen from a grid is compared with what was chosen from it, one setting with the same setting.
    for runs in sorted(groups.values(), key=lambda runs: bool(runs[0][0].strategy.values) != bool(values)):
        other = runs[0][0].strategy
        common = all(
            values.get(k, None if k.startswith("personalization.") else v) == v for k, v in other.values.items()
        )
        if other.base in ("none", "ft") and common:
            found.setdefault(other.base, runs)
    return dict(sorted(found.items(), reverse=True))


def _harm(run: Sequence[Outcome], groups: Groups, name: str, number: int, scoring: Scoring) -> dict[str, float]:
    values, higher = locals_of(run, scoring), scoring.higher_is_better
    numbers: dict[str, float] = {}
    for against, baseline in _baselines(groups, name).items():
        found = harm(values, locals_of(baseline[number], scoring), higher_is_better=higher)
        if any(one.measures.diverged for one in (*run, *baseline[number])):
            found = dict.fromkeys(found, math.nan)
        numbers |= found if against == "none" else {f"share_worse_vs_{against}": found["share_worse"]}
    return numbers


def name_of(runs: Sequence[Sequence[Outcome]]) -> str:
    """Return the name of the strategy of some outcomes."""
    return runs[0][0].strategy.name


def hurt(name: str, groups: Groups, evidence: Evidence) -> dict[str, float]:
    """Return the shares of clients that lose beyond chance against the un-tuned model and against plain fine-tuning."""
    return {
        "share_hurt" if against == "none" else f"share_hurt_vs_{against}": evidence.share_hurt(name, name_of(baseline))
        for against, baseline in _baselines(groups, name).items()
    }


def intervals_over_clients(
    runs: Sequence[Sequence[Outcome]], clients: Sequence[ClientInfo], scoring: Scoring
) -> dict[str, Interval]:
    """Return the means over clients of what is said of each, with intervals over clients; as means over seeds."""
    by_seed = [
        matrix_of([one.measures for one in run], clients, scoring.metric, scoring.higher_is_better).by_client()
        for run in runs
    ]
    keys = [key for key in by_seed[0][0] if key in SCORES]
    return {
        key: over_clients(
            np.mean([[client[key] for client in run] for run in by_seed], axis=0).tolist()
            if not any(one.measures.diverged for run in runs for one in run)
            else []
        )
        for key in keys
    }


def locals_of(run: Sequence[Outcome], scoring: Scoring) -> list[float]:
    """Return what each client's own model scores on its own test data."""
    return [float(outcome.measures.values[scoring.metric][outcome.client]) for outcome in run]


def client_values(runs: Sequence[Sequence[Outcome]], scoring: Scoring) -> np.ndarray:
    """Return the same as a mean over seeds, (C,)."""
    means: np.ndarray = np.mean([locals_of(run, scoring) for run in runs], axis=0)
    return means


def comparisons(groups: Groups, scoring: Scoring, evidence: Evidence) -> list[dict[str, Any]]:
    """Compare any two strategies: client by client on means over seeds, and with paired intervals over test examples.

    A difference is positive where the first is better.
    """
    sign = 1 if scoring.higher_is_better else -1
    values = {name: sign * client_values(runs, scoring) for name, runs in groups.items()}
    pairs = [(first, second, _compare(values[first], values[second])) for first, second in combinations(groups, 2)]
    corrected = holm([math.nan if found["p_value"] is None else found["p_value"] for _, _, found in pairs])
    return [
        {
            "first": first,
            "second": second,
            **found,
            "p_holm": p_holm,
            "differences": {
                metric: evidence.difference(first, second, metric)._asdict() for metric in ("local", "global_others")
            },
        }
        for (first, second, found), p_holm in zip(pairs, corrected, strict=True)
    ]


def _compare(values: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Compare client by client; nothing is known of models that have diverged everywhere."""
    if not np.isfinite(values - before).any():
        return dict.fromkeys(PairedComparison._fields)
    return compare(values.tolist(), before.tolist())._asdict()


def _row(
    name: str, method: Mapping[str, Any], others: Sequence[str], intervals: str | None, choice: Choice | None
) -> dict[str, Any]:
    row: dict[str, Any] = {"strategy": name}
    if choice is not None:
        row |= {"chosen": choice.words(name), "of": str(len(choice.candidates))}
    keys = [*COLUMNS, *(f"{metric}/{key}" for metric in others for key in ("local", "global_others"))]
    ends = method["intervals"].get(intervals, {})
    for key in keys:
        if key not in method:
            continue
        whole = key in BUDGET and not math.isnan(method[key])
        std = math.nan if key == "share_hurt" else method["std"][key]  # whose seeds are in its intervals
        cell: Any = f"{method[key]:.4g}" if whole else MeanStd(method[key], std)
        known = key in ends and not math.isnan(ends[key][0])
        row[HEADS.get(key, key)] = Interval(method[key], *ends[key]) if known else cell
    return row | ({"local": "diverged"} if method["diverged"] else {})


def harm_row(name: str, method: Mapping[str, Any], evidence: Evidence) -> dict[str, Any]:
    """Return one strategy's row of the table of gains and harm."""
    row: dict[str, Any] = {"strategy": name}
    if method["diverged"]:
        return row | {"mean change": "diverged"}
    if "against_none" in method:
        worst = min(method["clients"], key=lambda client: client["change_from_none"])
        row |= {
            "mean change": Interval(method["mean_change"], *evidence.difference(name, "none", "local")[1:]),
            "gain, unclear, hurt": counted(evidence.changes(name, "none")),
            "worst change": Interval(worst["change_from_none"], *worst["change_from_none_interval"]),
            "of client": worst["name"],
        }
    if "against_ft" in method:
        pair = method["against_ft"]
        row |= {
            "hurt by leaving ft": MeanStd(method["share_hurt_vs_ft"], math.nan),
            "wins, ties, losses against ft": f"{pair['wins']}, {pair['ties']}, {pair['losses']}",
            "p": pair["p_holm"],
        }
    return row


def advice_row(client: ClientInfo, found: Decision) -> dict[str, Any]:
    """Return one client's row of the table of advice."""
    candidate = f"{found.candidate} {found.setting}".strip() if found.candidate else "-"
    return {
        "client": client.name,
        "advice": found.verdict,
        "candidate": candidate,
        "change at home": found.change.interval,
        "test examples": client.num_test,
        "needed to tell": found.examples,
    }


def _anyone_hurt(row: Row) -> str:
    return "" if str(row.get("gain, unclear, hurt", "-")).endswith((" 0", "-")) else HURT


def counted(changes: Sequence[Change]) -> str:
    """Return how many clients gain beyond chance, how many do not show, and how many lose beyond chance."""
    gains, losses = sum(one.interval.above for one in changes), sum(one.interval.below for one in changes)
    known = sum(not math.isnan(one.interval.low) for one in changes)
    return f"{gains}, {known - gains - losses}, {losses}" if known else "-"


def save_matrices(name: str, matrices: Sequence[AccuracyMatrix], folder: Path) -> None:
    """Write the mean matrix of a strategy, and, of several seeds, each one's."""
    first = matrices[0]
    average = AccuracyMatrix(np.mean([matrix.values for matrix in matrices], axis=0), first.num_test, first.names)
    average.save(folder / f"{file_name(name)}.csv")
    if len(matrices) > 1:
        for number, matrix in enumerate(matrices):
            matrix.save(folder / f"seed_{number}" / f"{file_name(name)}.csv")


def records_of(groups: Groups, clients: Sequence[ClientInfo], scoring: Scoring) -> list[Record]:
    """Return every number as a record.

    Args:
        groups: Of all outcomes.
        clients: All clients.
        scoring: The metrics.
    """
    start = groups.get("none")
    records = []
    for name, runs in groups.items():
        strategy = runs[0][0].strategy
        grid = name.removeprefix(strategy.base).strip()
        for number, run in enumerate(runs):
            points: dict[int | str, list[Measures]] = {}
            if start is not None and strategy.start == "global" and strategy.train:
                points[0] = [outcome.measures for outcome in start[number]]
            # Of a model that stays at its site nobody knows how it was on the way.
            whole = all(outcome.curve for outcome in run)
            for reached in sorted({epoch for outcome in run for epoch in outcome.curve if whole}):
                # A fit that ended early stays where it ended.
                points[reached] = [outcome.curve[max(e for e in outcome.curve if e <= reached)] for outcome in run]
            points[END] = [outcome.measures for outcome in run]
            for epoch, measures in points.items():
                rows = matrix_of(measures, clients, scoring.metric, scoring.higher_is_better).by_client()
                for index, client in enumerate(clients):
                    numbers = rows[index] | {key: getattr(measures[index], key) for key in SCALARS}
                    if epoch == END:
                        numbers |= {key: getattr(run[index], key) for key in BUDGET}
                    records += [
                        Record(strategy.base, grid, number, client.name, epoch, key, value)
                        for key, value in numbers.items()
                    ]
    return records


def log_numbers(
    records: Sequence[Record], results: Mapping[str, Any], config: Mapping[str, Any], text: str, logger: Logger
) -> None:
    """Log the curves with the epoch as step; in TensorBoard each strategy is a run, a line in charts that all share."""
    keys = ("local", "global_others", *SCALARS)
    curves = curves_of(records)
    for name, method in results["methods"].items():
        board = isinstance(logger, TensorBoardLogger)
        line = board_logger(logger.save_dir, file_name(name)) if isinstance(logger, TensorBoardLogger) else logger
        for epoch, summary in curves.get(name, {}).items():
            line.log_metrics({key if board else f"{key}/{file_name(name)}": summary[key] for key in keys}, step=epoch)
        if isinstance(line, TensorBoardLogger):
            settings = {"strategy": name, **settings_of(method["settings"])}
            line.log_hyperparams(settings, {f"end/{key}": method[key] for key in keys if key in method})
            line.finalize("success")
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("table", text)
        logger.experiment.add_text(
            "configuration", f"```yaml\n{OmegaConf.to_yaml(OmegaConf.create(dict(config)))}\n```"
        )


def board_logger(folder: str | Path, name: str) -> TensorBoardLogger:
    """Return what logs to TensorBoard under a name, beside others."""
    return TensorBoardLogger(str(folder), "curves", name, default_hp_metric=False)


def settings_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a strategy was trained with, flat."""
    if not node:
        return {}
    optimizer = {f"optimizer.{key}": value for key, value in node["optimizer"].items() if not key.startswith("_")}
    kind = node["optimizer"]["_target_"].rpartition(".")[2]
    return {"epochs": node["epochs"], "batch_size": node["batch_size"] or "", "optimizer": kind, **optimizer}


def figures(
    groups: Groups,
    clients: Sequence[ClientInfo],
    records: Sequence[Record],
    place: str,
    scoring: Scoring,
    evidence: Evidence,
) -> dict[str, Figure]:
    """Draw everything that the run's outcomes allow, by name."""
    from fl_lightning.evaluation import figures as draw  # matplotlib takes half a second to import

    names = [client.name for client in clients]
    metric, start = scoring.metric, groups.get("none")
    matrices = {
        name: np.mean([matrix_of([one.measures for one in run], clients, metric).values for run in runs], axis=0)
        for name, runs in groups.items()
    }
    drawn: dict[str, Figure] = {}
    known = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices.values()])
    for name, matrix in matrices.items():
        if np.isfinite(matrix).any():
            limits = float(known.min()), float(known.max())
            drawn[f"matrix/{name}"] = draw.draw_matrix(matrix, names, f"{name}: {place}", metric, limits)
        if start is not None and name != "none" and np.isfinite(np.diagonal(matrix)).any():
            sign = 1 if scoring.higher_is_better else -1
            changes = sign * (np.diagonal(matrix) - np.diagonal(matrices["none"]))
            title = f"{name} against none: {place}"
            ends = [found.interval[1:] for found in evidence.changes(name, "none")]
            drawn[f"gains/{name}"] = draw.draw_gains(changes, names, title, f"change of {metric}", ends)
    drawn |= figures_of(records, place, metric, higher_is_better=scoring.higher_is_better)
    if frontier := draw_fronts(records, place, scoring.metric, scoring.higher_is_better):
        drawn["frontier"] = frontier
    return {file_path(name): figure for name, figure in drawn.items()}


def fronts(records: Sequence[Record], higher_is_better: bool) -> dict[str, dict[str, Any]]:
    """Return by strategy its front over settings and epochs, and the area below it, for ``results.json``.

    Rows that were chosen, and clients alone, are no settings of a strategy.
    """
    found = points_of(settings_in(records), higher_is_better)
    return {
        name: {"area": area(points) if higher_is_better else None, "front": [p._asdict() for p in pareto(points)]}
        for name, points in found.items()
    }


def settings_in(records: Sequence[Record]) -> list[Record]:
    """Return the records of single settings: where a strategy has a grid, not of the row that was chosen from it."""
    gridded = {one.strategy for one in records if one.grid}
    return [
        one for one in records if one.strategy not in (BEST_OF, "local") and (one.grid or one.strategy not in gridded)
    ]


def draw_fronts(records: Sequence[Record], place: str, metric: str, higher_is_better: bool) -> Figure | None:
    """Draw the fronts of all strategies, the one with the largest area first; None where nothing has two values."""
    from fl_lightning.evaluation import figures as draw

    found = points_of(settings_in(records), higher_is_better)
    sign = 1 if higher_is_better else -1
    kept = {name: points for name, points in found.items() if len(pareto(points)) > 1}
    if not kept:
        return None
    order = sorted(kept, key=lambda name: -area(kept[name]))
    named = {f"{name} (area {area(kept[name]):.3f})" if sign == 1 else name: kept[name] for name in order}
    clouds = {name: [(sign * p.elsewhere, sign * p.local) for p in points] for name, points in named.items()}
    lines = {name: [(sign * p.elsewhere, sign * p.local) for p in pareto(points)] for name, points in named.items()}
    bare = [one for one in records if one.strategy == "none" and one.epoch == END]
    start = {key: mean([one.value for one in bare if one.measure == key]) for key in ("global_others", "local")}
    where = (start["global_others"], start["local"]) if bare else None
    return draw.draw_frontier(clouds, lines, where, f"settings and epochs: {place}", metric)


def words_on_newcomers(arrived: Arrivals, scoring: Scoring, table: Callable[..., str]) -> str:
    """Return the tables of what clients that never took part would gain, with what they say in sentences."""
    lines = "\n".join(arrived.sentences())
    return (
        f"New clients, which never took part ({', '.join(arrived.names)}): {scoring.metric} on their own test data, by "
        f"labelled\nexamples of their own (training and validation together, mean of {arrived.plan.draws} draws); 95% "
        f"intervals over test examples.\n\n{table(arrived.rows(gains=False))}\nBetter than the global model by, "
        f"paired:\n\n{table(arrived.rows(gains=True))}\n{lines}\n"
    )


def draw_newcomers(arrived: Arrivals, scoring: Scoring, place: str) -> Figure:
    """Draw what clients that never took part reach by their number of examples."""
    from fl_lightning.evaluation import figures as draw

    lines = {
        name: [(one.score.mean, one.score.low, one.score.high) for one in by_size.values()]
        for name, by_size in arrived.found.items()
    }
    sizes = [arrived.plan.words(size) for size in arrived.plan.sizes]
    title = f"new clients ({len(arrived.names)}): {place}"
    return draw.draw_newcomers(arrived.plan.numbers(), sizes, lines, title, scoring.metric)


def file_path(figure: str) -> str:
    """Return a figure's name as a path."""
    return "/".join(file_name(part) for part in figure.split("/", 1))


def clear_events(folder: Path) -> None:
    """Delete what an earlier end of this run has left for TensorBoard, which would show every point twice."""
    for file in folder.glob("curves/*/events.out.tfevents.*"):
        file.unlink()


def show(drawn: Mapping[str, Figure], run_folder: RunFolder, logger: Logger | None) -> None:
    """Write figures as PNG files, and to the logger."""
    from fl_lightning.evaluation.figures import log_image, save_png

    for name, figure in drawn.items():
        log_image(logger, name, save_png(figure, run_folder.figures / f"{name}.png"))
