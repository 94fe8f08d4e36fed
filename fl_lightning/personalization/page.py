"""``report.html``: who gains, who is harmed, how sure it is, and which model each client should use."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fl_lightning.client import ClientInfo
from fl_lightning.evaluation import svg
from fl_lightning.evaluation.summary import bottom_decile, std, worst
from fl_lightning.evaluation.svg import GAIN, HURT, UNCLEAR
from fl_lightning.evaluation.tables import format_cell
from fl_lightning.evaluation.uncertainty import Interval
from fl_lightning.personalization.decision import Decision, decide
from fl_lightning.personalization.evidence import Evidence, Groups
from fl_lightning.personalization.newcomers import Arrivals
from fl_lightning.personalization.scoring import Scoring
from fl_lightning.personalization.selection import WHO, Choice, Selection

BINS = 10
_MOST = 200  # clients with a row of their own; of more, those are shown that lose or gain most

STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;color:#1f2937;
background:#fff;margin:0 auto;padding:28px 20px 60px;max-width:1120px}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .3rem}h2{font-size:1.2rem;margin:2.4rem 0 .5rem}
p,ul{max-width:46rem;margin:.5rem 0}.sub{color:#4b5563;margin:0 0 1.2rem}small,.note{color:#4b5563;font-size:.875rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px;margin:1.2rem 0}
.card{border:1px solid #d1d5db;border-left-width:6px;border-radius:6px;padding:10px 14px}
.card b{font-size:1.9rem;line-height:1.15;display:block}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;width:100%}
th,td{padding:5px 9px;text-align:left;border-bottom:1px solid #e5e7eb;vertical-align:middle}
th{font-weight:600;border-bottom:1px solid #6b7280;vertical-align:bottom}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td.v{white-space:nowrap}td svg,th svg{display:block;max-width:none}
figure{margin:0;overflow-x:auto}figure svg{min-width:560px}
.chip{display:inline-block;border-radius:4px;padding:1px 8px;border:1px solid;font-weight:600;white-space:nowrap}
.heat td,.heat th{text-align:center;white-space:nowrap;font-variant-numeric:tabular-nums}
.heat td:first-child,.heat th:first-child{text-align:left}
svg{max-width:100%;height:auto}.row{display:flex;flex-wrap:wrap;gap:14px}
pre{background:#f6f7f8;border:1px solid #e5e7eb;border-radius:5px;padding:10px 12px;white-space:pre-wrap;
overflow-wrap:anywhere;font-size:.82rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:.4rem 0}
dt{color:#4b5563}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:560px){body{font-size:15px;padding:18px 12px}dl{grid-template-columns:1fr}dd{margin-bottom:6px}}
@media screen and (max-width:760px){.who thead{display:none}.who tr{display:block;border-bottom:1px solid #6b7280;
padding:8px 0}.who td{display:flex;border:0;padding:3px 0;text-align:left;white-space:normal;gap:10px}
.who td::before{content:attr(data-k);color:#4b5563;flex:0 0 104px;font-size:.85rem}}
@media print{body{font-size:10.5pt;padding:0;max-width:none}h2{break-after:avoid}tr,.card,figure{break-inside:avoid}
.scroll{overflow:visible}table{font-size:8.5pt}th,td{padding:3px 5px}a{color:inherit}}
"""

MARKS = {"personal": ("▲", GAIN), "global": ("▼", HURT), "undecided": ("○", UNCLEAR)}


@dataclass(frozen=True)
class Facts:
    """What the page is about.

    Attributes:
        title: Data, in words.
        groups: Outcomes by strategy, seed and client.
        shown: Rows of the table.
        choices: What was chosen from grids, and by ``best_of``.
        selection: What decides on validation data.
        evidence: Intervals over test examples.
        scoring: The metrics.
        clients: All clients.
        methods: What ``results.json`` says of each strategy.
        remarks: Sentences on single rows.
        about: What the run was made from, in pairs of a word and a value.
        commands: Which made it, in order.
        arrived: What clients that never took part would gain; None: there are none.
    """

    title: str
    groups: Groups
    shown: Sequence[str]
    choices: Mapping[str, Choice]
    selection: Selection
    evidence: Evidence
    scoring: Scoring
    clients: Sequence[ClientInfo]
    methods: Mapping[str, Mapping[str, Any]]
    remarks: Sequence[str]
    about: Sequence[tuple[str, str]]
    commands: Sequence[str]
    arrived: Arrivals | None = None


def page(facts: Facts) -> tuple[str, list[Decision]]:
    """Return the page as HTML, which needs nothing beside itself, and the decisions that it shows."""
    decisions = decide(facts.groups, facts.shown, facts.choices, facts.selection, facts.evidence)
    parts = [
        f"<h1>Which model should each client use?</h1><p class=sub>{escape(facts.title)}</p>",
        _answer(facts, decisions),
        _clients(facts, decisions),
        _harm(facts),
        _trade(facts),
        _newcomers(facts),
        _fairness(facts),
        _calibration(facts, decisions),
        _chosen(facts),
        _reproduce(facts),
        _method(facts),
    ]
    body = "\n".join(part for part in parts if part)
    html = (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>Decision: {escape(facts.title)}</title><style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )
    return html, decisions


def _answer(facts: Facts, decisions: Sequence[Decision]) -> str:
    counts = {verdict: sum(one.verdict == verdict for one in decisions) for verdict in MARKS}
    words = {
        "personal": "better off with a personal model",
        "global": "better off with the global model",
        "undecided": "undecided: these test data show no difference",
    }
    cards = "".join(
        f'<div class=card style="border-left-color:{colour}"><b>{counts[verdict]}</b>of {len(decisions)} clients: '
        f"{words[verdict]}</div>"
        for verdict, (_, colour) in MARKS.items()
    )
    sure = sum(one.verdict == "personal" and one.certain for one in decisions)
    lines = [
        f"“Better off” means: the paired 95% interval of the difference at home, over the client's own test examples, "
        f"lies above 0. {sure} of the {counts['personal']} gains stand{'s' if sure == 1 else ''} also after "
        f"Holm's correction for {len(decisions)} clients."
    ]
    if not facts.scoring.has_intervals:
        lines = [f"{facts.scoring.metric}, a metric of your own, has no intervals, so nothing is decided."]
    elif not any(one.candidate for one in decisions):
        lines = ["There are no validation data to choose a personal model by, so nobody is advised to take one."]
    gains = [one.change.interval.mean for one in decisions if one.verdict == "personal"]
    costs = [
        one.elsewhere.mean for one in decisions if one.verdict == "personal" and not math.isnan(one.elsewhere.mean)
    ]
    if gains:
        lines.append(
            f"Those who take a personal model gain {np.mean(gains):.3f} {escape(facts.scoring.metric)} at home on "
            "average"
            + (f", and their models change by {np.mean(costs):+.3f} on the other clients' data." if costs else ".")
        )
    alone = [one for one in decisions if one.verdict == "personal" and _is_alone(facts, one.candidate)]
    if alone:
        lines.append(
            f"{len(alone)} of them by a model that the client trained alone, without the federation: none that begins "
            "with the global model validated better there."
        )
    lines.append("Where undecided, keep the global model: it costs nothing and serves guests, too.")
    return f"<div class=cards>{cards}</div>" + "".join(f"<p>{line}</p>" for line in lines)


def _clients(facts: Facts, decisions: Sequence[Decision]) -> str:
    order = sorted(
        range(len(decisions)),
        key=lambda i: (["global", "undecided", "personal"].index(decisions[i].verdict), _order(decisions[i])),
    )
    if len(order) > _MOST:
        order = [*order[: _MOST // 2], *order[-_MOST // 2 :]]
    kept = [decisions[i] for i in order]
    home_scale = svg.around([end for one in kept for end in one.change.interval], 8, 132, zero=True)
    away_scale = svg.around([end for one in kept for end in one.elsewhere], 8, 132, zero=True)
    rows = "".join(
        _client(facts.clients[i], decisions[i], home_scale, away_scale, _is_alone(facts, decisions[i].candidate))
        for i in order
    )
    left_out = len(decisions) - len(order)
    note = f"{left_out} clients between the two ends are left out; see results.json." if left_out else ""
    return (
        "<h2>Each client</h2><p>The candidate is the personal model that is best by "
        f"{escape(WHO[facts.selection.by])}. It is then held against the global model on test data, once. What it "
        "changes elsewhere is its score on the other clients' test data, against the global model's. In brackets: 95% "
        "intervals.</p>"
        "<div class=scroll><table class=who><thead><tr><th>client<th>advice"
        "<th class=n>at home:<br>global,<br>candidate"
        f"<th>change at home{svg.forest_axis(home_scale)}<th class=n>p (Holm)"
        f"<th>change elsewhere{svg.forest_axis(away_scale)}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div><p class=note>{note}</p>"
    )


def _is_alone(facts: Facts, name: str | None) -> bool:
    """Tell whether a strategy trains a client alone, from random weights."""
    return name is not None and facts.groups[name][0][0].strategy.start == "random"


def _client(client: ClientInfo, one: Decision, home: svg.Scale, away: svg.Scale, alone: bool) -> str:
    mark, colour = MARKS[one.verdict]
    candidate = f"{one.candidate} {one.setting}".strip() if one.candidate else ""
    candidate += " (trained alone, without the federation)" if alone else ""
    advice = f"personal: {candidate}" if one.verdict == "personal" else one.verdict
    more = f"candidate: {candidate}" if candidate and one.verdict != "personal" else ""
    if one.examples is not None:
        more += f"; some {one.examples:,} test examples would tell" if one.examples < 100_000 else "; no difference"
    abroad = GAIN if one.elsewhere.above else HURT if one.elsewhere.below else UNCLEAR
    p_value = one.change.p_holm
    p_text = "&lt;0.001" if p_value < 0.001 else _cell(p_value)
    return (
        f"<tr><td data-k=client><div><b>{escape(client.name)}</b><br>"
        f"<small>{client.num_test} test, {client.num_val} validation</small></div>"
        f'<td data-k=advice><div><span class=chip style="color:{colour}">{mark} {escape(advice)}</span>'
        + (f"<br><small>{escape(more)}</small>" if more else "")
        + f"</div><td class=n data-k='global, candidate'><div>{_cell(one.global_score.mean)}<br>"
        f"{_cell(one.score.mean)}</div>"
        f"<td class=v data-k='change at home'><div>{svg.forest_row(one.change.interval, home, colour)}"
        f"{_signed(one.change.interval)}</div><td class=n data-k='p (Holm)'><div>{p_text}</div>"
        f"<td class=v data-k='change elsewhere'><div>{svg.forest_row(one.elsewhere, away, abroad)}"
        f"{_signed(one.elsewhere)}</div></tr>"
    )


def _order(one: Decision) -> float:
    mean = one.change.interval.mean
    return 0.0 if math.isnan(mean) else mean


def _harm(facts: Facts) -> str:
    names = [name for name in facts.shown if name != "none"]
    changes = {name: facts.evidence.changes(name, "none") for name in names}
    if not names or "none" not in facts.shown:
        return ""
    rows = []
    for name in names:
        known = [one.interval for one in changes[name] if not math.isnan(one.interval.low)]
        gain, hurt = sum(one.above for one in known), sum(one.below for one in known)
        least = min(range(len(facts.clients)), key=lambda i: _or_zero(changes[name][i].interval.mean))
        rows.append(
            f"<tr><td><b>{escape(name)}</b><td class=n>{_signed(facts.evidence.difference(name, 'none', 'local'))}"
            f"<td class=n>{gain}<td class=n>{len(known) - gain - hurt}"
            f'<td class=n style="color:{HURT if hurt else "inherit"}">{hurt}'
            f"<td class=n>{_signed(changes[name][least].interval)}<td>{escape(facts.clients[least].name)}</tr>"
        )
    heads = "".join(f"<th>{escape(name)}" for name in names)
    order = list(range(len(facts.clients)))
    if len(order) > 60:
        order = sorted(order, key=lambda i: min(_or_zero(changes[name][i].interval.mean) for name in names))[:60]
    body = "".join(
        f"<tr><td>{escape(facts.clients[i].name)}"
        + "".join(_heat(changes[name][i].interval) for name in names)
        + "</tr>"
        for i in order
    )
    few = " (the 60 that lose most)" if len(order) < len(facts.clients) else ""
    title = f"Change at home, client by strategy{few}"
    return (
        "<h2>Who gains and who is harmed</h2><p>Against the global model as it is (<b>none</b>), on own test data. "
        "A client counts as harmed only where its whole paired interval lies below 0.</p>"
        "<div class=scroll><table><thead><tr><th>strategy<th class=n>mean change<th class=n>gain<th class=n>unclear"
        f"<th class=n>harmed<th class=n>least of any client<th>which</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        f"</div><p class=note><b>{title}</b>: ▲ gain, ▼ harm, beyond chance; pale: within chance.</p>"
        f"<div class=scroll><table class=heat><thead><tr><th>client{heads}</tr></thead><tbody>{body}</tbody></table>"
        "</div>"
    )


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value


def _heat(found: Interval) -> str:
    if math.isnan(found.mean):
        return "<td>-"
    mark, colour = ("▲ ", GAIN) if found.above else ("▼ ", HURT) if found.below else ("", UNCLEAR)
    weight = "600" if mark else "400"
    return f'<td style="color:{colour};font-weight:{weight}">{mark}{found.mean:+.3f}'


def _trade(facts: Facts) -> str:
    points = {
        name: (facts.evidence.interval(name, "global_others"), facts.evidence.interval(name, "local"))
        for name in facts.shown
    }
    points = {name: point for name, point in points.items() if not any(math.isnan(one.mean) for one in point)}
    if len(points) < 2:
        return ""
    metric = facts.scoring.metric
    drawing = svg.scatter(points, f"{metric} on the other clients' data", f"{metric} at home", line="none")
    return (
        "<h2>At home and elsewhere</h2><p>Each strategy as a mean over clients, with 95% intervals over test examples. "
        "The dashed lines go through the global model: up is a gain at home, left is something forgotten of the others."
        f"</p><figure>{drawing}</figure>"
    )


def _newcomers(facts: Facts) -> str:
    arrived = facts.arrived
    if arrived is None:
        return ""
    plan, metric = arrived.plan, facts.scoring.metric
    heads = [plan.words(size) for size in plan.sizes]
    lines = {name: [one.score for one in by_size.values()] for name, by_size in arrived.found.items()}
    drawing = svg.curves(plan.numbers(), heads, lines, "labelled examples of the new client", f"{metric} at home")
    rows = "".join(
        f"<tr><td><b>{escape(name)}</b>"
        + "".join(
            f'<td class=n style="color:{GAIN if one.gain.above else HURT if one.gain.below else UNCLEAR}">'
            f"{_signed(one.gain)}"
            for one in by_size.values()
        )
        + "</tr>"
        for name, by_size in arrived.found.items()
        if name != "none"
    )
    said = "".join(f"<li>{escape(line)}" for line in arrived.sentences())
    who = f"{len(arrived.names)} client{'s' if len(arrived.names) > 1 else ''} that never took part"
    return (
        f"<h2>What would a new client gain?</h2><p>{who} ({escape(', '.join(arrived.names[:8]))}"
        f"{', …' if len(arrived.names) > 8 else ''}) got the global model and some labelled examples of their own, "
        f"drawn {plan.draws} times; <b>none</b> is the global model as it is, <b>local</b> trains alone. Their own "
        f"test data judge.</p><figure>{drawing}</figure><p class=note><b>Better than the global model by</b>, with "
        "paired 95% intervals over test examples:</p><div class=scroll><table><thead><tr><th>strategy"
        + "".join(f"<th class=n>{escape(head)}" for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table></div><ul class=note>{said}</ul>"
    )


def _fairness(facts: Facts) -> str:
    higher = facts.scoring.higher_is_better
    rows = []
    for name in facts.shown:
        values = [one["local"] for one in facts.methods[name]["clients"]]
        known = [value for value in values if value is not None and not math.isnan(value)]
        if not known:
            rows.append(f"<tr><td><b>{escape(name)}</b><td class=n colspan=6>diverged</tr>")
            continue
        least = min(known) if higher else max(known)
        who = facts.clients[values.index(least)].name
        rows.append(
            f"<tr><td><b>{escape(name)}</b><td class=n>{_cell(float(np.mean(known)))}"
            f"<td class=n>{_cell(worst(known, higher))}<td>{escape(who)}"
            f"<td class=n>{_cell(bottom_decile(known, higher))}<td class=n>{_cell(std(known))}"
            f"<td class=n>{_cell(facts.methods[name].get('jain'))}</tr>"
        )
    return (
        "<h2>Fairness</h2><p>What the clients are served with, at home: a better mean can hide a worse end.</p>"
        "<div class=scroll><table><thead><tr><th>strategy<th class=n>mean<th class=n>worst client<th>which"
        "<th class=n>bottom decile<th class=n>spread (std)<th class=n>Jain's index</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _calibration(facts: Facts, decisions: Sequence[Decision]) -> str:
    used = [one.candidate for one in decisions if one.candidate]
    names = ["none", *sorted(set(used), key=lambda name: (-used.count(name), name))]
    drawings = []
    for name in [name for name in names if name in facts.groups][:4]:
        bins = reliability_bins(facts.groups, name)
        if bins:
            ece = facts.methods[name].get("ece", math.nan)
            colour = svg.COLOURS[list(facts.shown).index(name) % len(svg.COLOURS)]
            drawings.append(svg.reliability(bins, name, colour, f"mean ECE {format_cell(ece)}"))
    if not drawings:
        return ""
    return (
        "<h2>Calibration</h2><p>How often predictions are right against how sure the model is of them, at home, all "
        "clients together; on the dashed line a model that says 0.8 is right in 80% of the cases, below it it promises "
        "too much. ECE: the mean gap.</p>"
        f"<div class=row>{''.join(drawings)}</div>"
    )


def reliability_bins(groups: Groups, name: str) -> list[tuple[float, float, int]]:
    """Return for each of ten bins of confidence its mean, the share that is right, and how many; at home, all seeds."""
    confidences, rights = [], []
    for run in groups[name]:
        for outcome in run:
            examples = outcome.measures.examples.get(outcome.client, {})
            if "confidence" in examples:
                confidences.append(examples["confidence"].double().numpy())
                rights.append((examples["prediction"] == examples["target"]).numpy())
    if not confidences:
        return []
    confidence, right = np.concatenate(confidences), np.concatenate(rights)
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return [
        (float(confidence[places == n].mean()), float(right[places == n].mean()), int((places == n).sum()))
        for n in range(BINS)
        if (places == n).any()
    ]


def _chosen(facts: Facts) -> str:
    rows = []
    for name in facts.shown:
        method, choice = facts.methods[name], facts.choices.get(name)
        trained = facts.groups[name][0][0].strategy.train and name != "local"
        text = choice.words(name) if choice else "not tuned" if trained else "-"
        tried = len(choice.candidates) if choice else 1
        rows.append(
            f"<tr><td><b>{escape(name)}</b><td>{escape(text)}<td class=n>{tried}"
            + "".join(f"<td class=n>{method[key]:.4g}" for key in ("epochs", "steps", "models"))
            + f"<td class=n>{_cell(method.get('val_metric'))}<td class=n>{_cell(method.get('val_loss'))}"
            + f"<td class=n>{_cell(method.get('val_elsewhere'))}</tr>"
        )
    remarks = "".join(f"<li>{escape(line)}" for line in facts.remarks)
    return (
        f"<h2>What was chosen, on what, at what cost</h2><p>Candidates are chosen by "
        f"{escape(WHO[facts.selection.by])}. Test data chose nothing. Epochs, steps and models "
        "are those of one client; in brackets: how many clients and seeds chose it.</p>"
        "<div class=scroll><table><thead><tr><th>strategy<th>setting chosen<th class=n>settings<br>tried"
        "<th class=n>epochs<th class=n>steps<th class=n>models<br>trained<th class=n>validation<br>score"
        "<th class=n>validation<br>loss<th class=n>validation<br>elsewhere</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>" + (f"<ul class=note>{remarks}</ul>" if remarks else "")
    )


def _reproduce(facts: Facts) -> str:
    pairs = "".join(f"<dt>{escape(key)}<dd>{escape(value)}" for key, value in facts.about)
    commands = escape("\n".join(facts.commands))
    return (
        f"<h2>How to reproduce</h2><dl>{pairs}</dl><pre>{commands}</pre><p class=note>Beside this page: results.json "
        "(every number), predictions/ (what every model predicted for every test example), matrix/, records.csv, "
        "config.yaml.</p>"
    )


def _method(facts: Facts) -> str:
    return (
        "<h2>How sure is this?</h2><ul>"
        "<li>Intervals are 95% bootstrap intervals over test examples, paired: both models are scored on the same "
        "examples. They are about these models at these clients; another seed of training, other clients or later data "
        "are not in them.<li>p is McNemar's exact test (a sign test over examples where there are several seeds), of a "
        "metric that no example has by itself (AUROC, F1) twice the smaller share of resamples on either side of 0; "
        "corrected by Holm for the number of clients.<li>With fewer than some 30 test examples, or where nothing is "
        "wrong, these intervals are too narrow.<li>The numbers of test examples that would tell assume that the "
        "difference seen is the true one.</ul>"
    )


def _cell(value: float | None) -> str:
    return format_cell(None if value is None else float(value))


def _signed(found: Interval) -> str:
    if math.isnan(found.mean):
        return "-"
    if math.isnan(found.low):
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} <small>[{found.low:+.3f}, {found.high:+.3f}]</small>"
