"""Scores each client's own model on the test data of all clients together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.callbacks.federated_evaluation import FederatedEvaluation
from fl_lightning.checks import at_least
from fl_lightning.client import Exam


class EveryoneEvaluation(FederatedCallback):
    """Scores every client's model on its own test data, and on everyone's: the test data of all clients together.

    Logs ``personal_on/own`` and ``personal_on/everyone``, means over clients of the metric that chooses, and adds
    both of every client to ``results.json`` and to the printed table, there for the models that are kept. Where there
    are no personal models, each client's model is the global one. The models travel to the data; this is not counted as
    traffic, since it is no part of the method.

    Args:
        every: Rounds between two evaluations, at least 1; the last round is always evaluated. It costs as many scores
            as there are clients, squared.
    """

    def __init__(self, every: int = 1) -> None:
        at_least("every", every, 1)
        self.every = every

    def score(self, loop: Server) -> dict[str, dict[str, float]]:
        """Return, for every client by name, what its model scores on its ``own`` data and on ``everyone``'s."""
        scores = {}
        chosen = [callback.metric for callback in loop.federated_callbacks if isinstance(callback, FederatedEvaluation)]
        metric = chosen[0] if chosen and chosen[0] else loop.metrics.names[0]
        for index, client in enumerate(loop.clients):
            exam = Exam("test", loop.personal_state(client), personal=True, metrics=(metric,))
            found = loop.score([(other, exam) for other in loop.clients])
            everywhere = loop.metrics.pooled(found, loop.num_classes)[metric]
            scores[client.name] = {"own": found[index].values[metric], "everyone": everywhere}
        return scores

    @override
    def on_round_end(self, loop: Server) -> None:
        if (loop.round + 1) % self.every and loop.round + 1 != loop.rounds:
            return
        loop.log({f"personal_on/{key}": value for key, value in means(self.score(loop)).items()})

    @override
    def results(self, loop: Server) -> dict[str, Any]:
        scores = self.score(loop)
        return {"personal_on": {"mean": means(scores), "clients": scores}}


def means(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the means over clients of what :meth:`EveryoneEvaluation.score` found."""
    return {key: math.fsum(score[key] for score in scores.values()) / len(scores) for key in ("own", "everyone")}
