"""Scores the models of a federation as it runs, and chooses those to keep."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.checks import at_least, one_of
from fl_lightning.client import ClientInfo, Scores, Split
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.evaluation.summary import mean, summarize
from fl_lightning.seeding import derive_seed

View = Literal["global", "personal", "unseen", "unseen_personal"]

VIEWS: dict[View, str] = {
    "global": "the global model on every client's test data",
    "personal": "each client's own model on its own test data",
    "unseen": "the global model on the test data of clients that never trained",
    "unseen_personal": "the personal models of clients that never trained, on their own test data",
}
"""Which model is scored on whose data."""

CHOOSING: tuple[View, View] = ("global", "personal")

log = logging.getLogger(__name__)


class FederatedEvaluation(FederatedCallback):
    """Scores the models of a federation, each kind under a name of its own.

    ``<split>/global/<metric>/mean`` is the global model on every client, ``<split>/personal/...`` the clients' models
    on their own data, ``test/unseen/...`` the global model on clients that never took part, and
    ``test/unseen_personal/...`` their own models, where a method makes them. Groups of
    clients that a callback names are also scored apart: ``test/global/accuracy/benign``.

    Each view keeps its own best round: the global model is kept from the round with its best mean validation score, the
    personal models from the round with theirs. Test scores are logged but choose nothing. Where no client has
    validation data, the last models are kept.

    Args:
        every: Rounds between two evaluations, at least 1; the last round is always evaluated.
        metric: The metric that chooses; all metrics of the run are logged. None: the first of them.
        mode: ``max`` or ``min``: which of its values is better. None: what the metric says of itself.
        chooses: ``global`` or ``personal``: whose validation score chooses for both views. None: each its own.
        clients: Number of clients to score, at least 1, of those that train and of those that never do; None: all. They
            are drawn once, by the run's seed, so that rounds can be compared; those with validation and test data come
            first. All scores of the run, final ones too, are then of these clients.
        save_personal: Whether the personal models that are kept are written at the end, each whole, as the plain model
            loads it: ``personal_models/<client>.pt``, and a peft folder beside it where there are adapters.
    """

    saved = ("best",)

    def __init__(
        self,
        every: int = 1,
        metric: str | None = None,
        mode: Literal["max", "min"] | None = None,
        chooses: Literal["global", "personal"] | None = None,
        clients: int | None = None,
        save_personal: bool = False,
    ) -> None:
        at_least("every", every, 1)
        at_least("clients", clients, 1, or_null=True)
        one_of("mode", mode, (None, "max", "min"))
        one_of("chooses", chooses, (None, *CHOOSING))
        self.every = every
        if metric == "":
            raise ValueError("evaluation.metric must be a name or null, got ''")
        self.metric = metric or ""
        self.mode = mode
        self.chooses = chooses
        self.clients = clients
        self.save_personal = save_personal
        self.best: dict[str, dict[str, Any]] = {}
        self.by_client: dict[View, list[float]] = {}
        """The newest test scores by view, a client of :meth:`people` each."""
        self._warned = False

    @override
    def on_federation_start(self, loop: Server) -> None:
        self.choose_metric(loop.metrics, loop.num_classes)
        if loop.rounds and not any(client.num_val for client in loop.clients):
            log.warning("no client has validation data, so the last model is kept; set data.val_fraction above 0")

    def choose_metric(self, metrics: Metrics, num_classes: int) -> None:
        """Settle which metric chooses, and which of its values are better."""
        self.metric = self.metric or metrics.names[0]
        if self.metric not in metrics.names:
            known = dict.fromkeys((*metrics.names, *metrics.task.metrics))
            raise ValueError(
                f"evaluation.metric must be one of {', '.join(known)}, got {self.metric!r}; "
                "name another torchmetrics metric under evaluation.metrics"
            )
        natural = metrics.mode(self.metric, num_classes)
        if metrics.is_mean(self.metric) and self.mode not in (None, natural):
            raise ValueError(
                f"evaluation.mode={self.mode} would keep the model with the worst {self.metric}; leave it null"
            )
        self.mode = self.mode or natural  # type: ignore[assignment]

    @override
    def on_round_end(self, loop: Server) -> None:
        self.by_client = {}
        if (loop.round + 1) % self.every and loop.round + 1 != loop.rounds:
            return
        splits: tuple[Split, Split] = ("val", "test")
        for split in splits:
            means: dict[View, float] = {}
            for view, scores in self.evaluate(loop, split).items():
                summaries = self.summaries(loop, view, scores, split)
                means[view] = summaries[self.metric]["mean"]
                for metric, summary in summaries.items():
                    loop.log({f"{split}/{view}/{metric}/{key}": number for key, number in summary.items()})
                for name, group in self.group_means(loop, scores).items():
                    loop.log({f"{split}/{view}/{metric}/{name}": number for metric, number in group.items()})
                if split == "test" and view in CHOOSING:
                    self.by_client[view] = [one.values[self.metric] for one in scores]
            if split == "val":
                self._choose(loop, {view: means[view] for view in CHOOSING if view in means})

    def _choose(self, loop: Server, values: dict[View, float]) -> None:
        for view in values:
            decider = self.chooses if self.chooses in values else view
            value = values[decider]
            if math.isnan(value):
                continue
            best = self.best.get(view)
            if best is None or (value > best["value"] if self.mode == "max" else value < best["value"]):
                # References are enough: states are replaced from round to round, never written to.
                fixed = loop.sharing.fixed_names(loop.module)
                complete = loop.global_state() or {}
                self.best[view] = {
                    "round": loop.round,
                    "value": value,
                    "by": decider,
                    "state": dict(loop.state),
                    "global": {name: tensor for name, tensor in complete.items() if name not in fixed},
                }
                loop.executor.keep(view)
            loop.log({f"val/{view}/best": self.best[view]["value"]})

    def restore(self, loop: Server, view: View) -> None:
        """Put the models of the round that a view keeps in the place of the last ones."""
        best = self.best[view]
        loop.state, loop.state_round = dict(best["state"]), best["round"]
        fixed = {name: loop.initial[name] for name in loop.sharing.fixed_names(loop.module)}
        known = fixed | best["global"]
        loop.kept_global = {name: known[name] for name in loop.module.global_names} if best["global"] else None
        loop.executor.restore(view)

    def evaluate(self, loop: Server, split: Split, views: Sequence[View] = tuple(VIEWS)) -> dict[View, list[Scores]]:
        """Score the models that the method has on one split.

        Args:
            loop: The federation.
            split: ``val`` or ``test``.
            views: Which of :data:`VIEWS`; clients that never trained are scored on test data alone.

        Returns:
            The scores of each view, a client each; a view that the method does not have is absent.
        """
        if not any(client.count(split) for client in self.people(loop, "global")):
            return {}
        found: dict[View, list[Scores]] = {}
        exam = loop.global_exam(split)
        if exam is None and not self._warned:
            self._warned = True
            unseen = ", and no score on unseen clients" if loop.unseen else ""
            log.info("this method has no global model%s; only personal models are scored", unseen)
        for view in views:
            people = self.people(loop, view)
            if not people or (view.startswith("unseen") and split != "test"):
                continue
            if view in ("global", "unseen"):
                if exam is not None:
                    found[view] = loop.score((client, exam) for client in people)
            elif loop.has_personal:
                found[view] = loop.score((client, loop.personal_exam(client, split)) for client in people)
        return found

    def people(self, loop: Server, view: View) -> list[ClientInfo]:
        """Return the clients that a view is scored on."""
        unseen = view.startswith("unseen")
        people = loop.unseen if unseen else loop.clients
        if self.clients is not None and self.clients < len(people):
            generator = torch.Generator().manual_seed(derive_seed(loop.seed, "scored clients", int(unseen)))
            drawn = [people[place] for place in torch.randperm(len(people), generator=generator).tolist()]
            drawn.sort(key=lambda one: (one.num_test > 0, one.num_val > 0), reverse=True)  # the order drawn stays
            chosen = {client.id for client in drawn[: self.clients]}
            people = [client for client in people if client.id in chosen]
        return [client for client in people if loop.personalizes(client)] if view == "unseen_personal" else people

    def group_means(self, loop: Server, scores: Sequence[Scores]) -> dict[str, dict[str, float]]:
        """Return the mean of each metric over each group of clients that a callback names."""
        found = {}
        for callback in loop.federated_callbacks:
            for name, ids in callback.groups(loop).items():
                members = [one for one in scores if one.client_id in ids and one.num_examples]
                if members:
                    found[name] = {m: mean([one.values[m] for one in members]) for m in loop.metrics.names}
        return found

    def summaries(
        self, loop: Server, view: View, scores: Sequence[Scores], split: Split
    ) -> dict[str, dict[str, float]]:
        """Summarize every metric of a view over its clients, by the metric's name."""
        pooled = loop.metrics.pooled(scores, loop.num_classes)
        counts = [client.count(split) for client in self.people(loop, view)]
        summaries = {}
        for name in loop.metrics.names:
            values, weights = [one.values[name] for one in scores], counts
            if not loop.metrics.is_mean(name):
                # A client that has no such score (the AUROC of one class alone) is no client of score NaN.
                weights = [0 if math.isnan(value) else count for value, count in zip(values, counts, strict=True)]
            mode = self.mode if name == self.metric else loop.metrics.mode(name, loop.num_classes)
            summaries[name] = summarize(values, weights, pooled[name], higher_is_better=mode == "max")
        return summaries
