"""Which metrics a personalization reports, and which of them it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchmetrics import Metric

from fl_lightning.callbacks.federated_evaluation import FederatedEvaluation
from fl_lightning.evaluation.predict import Logged, Metrics
from fl_lightning.evaluation.resampling import Resampled, resampled
from fl_lightning.personalization.predictions import MEANS
from fl_lightning.personalization.source import Training
from fl_lightning.run.training import metric_makers
from fl_lightning.task import Classification, Task


@dataclass(frozen=True)
class Scoring:
    """The metrics of a run.

    Attributes:
        metric: What the matrix is made of and the table compares.
        higher_is_better: Whether more of it is better.
        makers: All metrics by name, with what makes them; None: the task has a metric of that name.
        directions: Whether more of each metric is better.
        task: What the model is trained for.
        nodes: The configuration of the metrics that were listed.
    """

    metric: str
    higher_is_better: bool
    makers: Mapping[str, Callable[..., Metric] | Logged | None]
    directions: Mapping[str, bool] = field(default_factory=dict)
    task: Task = field(default_factory=Classification)
    nodes: Any = None

    @classmethod
    def of(cls, given: Mapping[str, Any], training: Training | None, task: Task, num_classes: int) -> Scoring:
        """Take the metrics that are given, and for the rest those that the global model was trained with.

        Args:
            given: The node ``evaluation``: ``metric``, ``mode`` and ``metrics``, each of which may be None.
            training: How the global model was trained, if that is known.
            task: What for.
            num_classes: The number of classes.
        """
        before = training.config["evaluation"] if training is not None else {}
        chosen = {key: before.get(key) for key in ("metric", "mode", "metrics")}
        if given.get("metric") is not None or given.get("metrics"):
            chosen["mode"] = None  # it was of another metric
        chosen |= {key: given[key] for key in chosen if given.get(key) is not None}
        listed = metric_makers(chosen["metrics"]) or {}
        # The task's own are always there, but for the loss, which is there where it is asked for.
        own = [name for name in task.defaults if name != "loss" or "loss" in (chosen["metric"], *listed)]
        metrics = Metrics({**dict.fromkeys(own), **listed}, task)
        metrics.use(task, chosen["metric"])
        metric = next(iter(listed), None) if chosen["metric"] is None else chosen["metric"]
        evaluation = FederatedEvaluation(metric=metric, mode=chosen["mode"])
        evaluation.choose_metric(metrics, num_classes)
        directions = {name: metrics.mode(name, num_classes) == "max" for name in metrics.names}
        makers = {name: (metrics.makers or {}).get(name) for name in metrics.names}
        return cls(evaluation.metric, evaluation.mode == "max", makers, directions, task, chosen["metrics"])

    @property
    def resampled(self) -> Resampled | None:
        """The metric as a function of weights of the examples; None: a mean of predictions, or one of a user's own."""
        return resampled(self.task, self.metric) if self.makers.get(self.metric) is None else None

    @property
    def has_intervals(self) -> bool:
        """Whether there are intervals over test examples of the metric."""
        of_one_class = isinstance(self.task, Classification) and self.makers.get(self.metric) is None
        return self.resampled is not None or (of_one_class and self.metric in MEANS)

    @property
    def names(self) -> tuple[str, ...]:
        """All metrics, the task's own first."""
        return tuple(self.makers)
