"""What is measured on one personalized model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from fl_lightning.adapted import AdaptedModule
from fl_lightning.client import ClientInfo, Exam, Scores, Split
from fl_lightning.evaluation.calibration import CalibrationError
from fl_lightning.evaluation.distortion import mean_distance, weight_norm
from fl_lightning.evaluation.predict import Forward, HasExamples, Logged, Metrics, batches_of, evaluating, predict
from fl_lightning.evaluation.resampling import resampled
from fl_lightning.evaluation.summary import mean
from fl_lightning.executors.executor import Outcome
from fl_lightning.models.export import HEAD
from fl_lightning.module import FederatedModule
from fl_lightning.personalization.predictions import PARTS, Examples, examples_of
from fl_lightning.seeding import derive_seed
from fl_lightning.state import State, all_finite, difference, load, snapshot
from fl_lightning.task import Classification, Task

ACCURACY, LOSS = "accuracy", "loss"
AT_HOME = ("ece", "one_class")
HEAD_NORM = "head_norm"
HOME = "personalized"
"""Name under which a client keeps the model that never leaves it."""

EXAMPLES = "examples"


@dataclass
class Measures:
    """One client's model in numbers; test data throughout unless said otherwise. A diverged model has NaN throughout.

    Attributes:
        values: By metric, its value on each client's test set: a row of the matrix, (C,). NaN where the model was not
            tried, or the metric has no value.
        feature_distortion: Mean l2 distance of its features from the global model's, on the client's own data; NaN of a
            model that is more than a backbone and a head.
        feature_distortion_all: The same over all data on which the model was tried.
        ece: Expected calibration error on the client's own data, in [0, 1]; NaN where examples have no classes.
        head_norm: Frobenius norm of the head's weights; 0 where the model has no head of its own, or is more than a
            backbone and a head.
        train_loss: Loss on the client's own training data, not augmented; of classes the cross-entropy in nats.
        one_class: 1 if it predicts one class for all of the client's own data, which has several; else 0.
        val_metric: The metric of the run on the client's own validation data; NaN where there are none, and of models
            on the way.
        val_loss: Cross-entropy on the same, in nats.
        val_elsewhere: Mean of the metric over the validation data of the other clients on which the model was tried,
            each client counting the same.
        examples: What the model predicted, by the position of the client whose test data it was tried on; empty of
            models on the way.
    """

    values: dict[str, Tensor]
    feature_distortion: float
    feature_distortion_all: float
    ece: float
    head_norm: float
    train_loss: float
    one_class: float
    val_metric: float = math.nan
    val_loss: float = math.nan
    val_elsewhere: float = math.nan
    examples: dict[int, Examples] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether the model holds NaN or an infinity."""
        return math.isnan(self.head_norm)

    def to_tensor(self) -> Tensor:
        """Return all numbers in one float64 tensor: :data:`SCALARS`, then a row for each metric."""
        scalars = torch.tensor([getattr(self, name) for name in SCALARS], dtype=torch.float64)
        return torch.cat([scalars, *self.values.values()])

    @classmethod
    def from_tensor(cls, tensor: Tensor, metrics: Sequence[str]) -> Measures:
        """Undo :meth:`to_tensor`, given the names of the metrics in order."""
        count = len(SCALARS)
        rows = tensor[count:].view(len(metrics), -1)
        return cls(dict(zip(metrics, rows, strict=True)), *tensor[:count].tolist())


SCALARS = tuple(one.name for one in fields(Measures) if one.name not in ("values", "examples"))
"""The names of all measures that are one number."""


class ModelMetrics(Metrics):
    """Measures a model where a client's data are: the metrics, and how it differs there from the global model.

    Args:
        makers: All metrics by name, with what makes them; None: the task has a metric of that name.
        backbone: Tensors of the global model's backbone.
        task: What the model is trained for.
        metric: What models are judged by, of which each example's part is kept (see
            :mod:`fl_lightning.evaluation.resampling`); None: accuracy.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[..., Metric] | Logged | None] | None,
        backbone: State,
        task: Task | None = None,
        metric: str | None = None,
    ) -> None:
        super().__init__(makers, task)
        self._metric = metric or ACCURACY
        own = (makers or {}).get(self._metric) is None
        self._resampled = resampled(self.task, self._metric) if own else None
        self._backbone = backbone
        self._known: dict[tuple[int, Split], Tensor] = {}

    @override
    def score(
        self,
        forward: Forward,
        data: HasExamples,
        split: Split = "test",
        names: Iterable[str] | None = None,
        confusion: bool = False,
    ) -> tuple[dict[str, float], dict[str, State], Tensor | None]:
        if split == "train":
            return {"train_loss": Metrics({LOSS: None}, self.task).score(forward, data, "train")[0][LOSS]}, {}, None
        chosen = self.names if names is None else tuple(names)
        if not chosen:
            return {}, {}, None
        batches = list(batches_of(data, split))
        if not batches:
            return dict.fromkeys(chosen, math.nan) | _own_norm(forward, chosen, True), {}, None
        module = _in_two_parts(forward)
        if module is None:
            features = None
            logits, targets = (tensor.cpu() for tensor in predict(forward, batches))
        else:
            features, targets = (tensor.cpu() for tensor in predict(module.features, batches))
            with evaluating(module.head), torch.inference_mode():
                logits = module.head(features.to(module.device)).float().cpu()
        values = self.logged(forward, data, split, chosen)[0]
        values |= self.of_outputs(logits, targets, [name for name in chosen if name in self.names], data.num_classes)
        totals = {}
        outputs, truths = self.task.flat(logits, targets)
        if LOSS in chosen and LOSS not in values:
            values[LOSS] = float(self.task.mean_loss(outputs, truths))
        if "feature_distortion" in chosen:
            known = None if module is None else self._global_features(module, data, split)
            moved = math.nan if known is None or features is None else mean_distance(known, features)
            values["feature_distortion"] = moved
        of_one_class = isinstance(self.task, Classification)
        if EXAMPLES in chosen and of_one_class:
            totals[EXAMPLES] = examples_of(logits, targets, data.num_classes)
        if EXAMPLES in chosen and self._resampled is not None:
            parts = self._resampled.parts(logits, targets)
            value = self._resampled.value(parts.double().numpy())
            # A loss that weighs examples by one another is not made of them one by one.
            if math.isclose(value, values[self._metric], rel_tol=1e-3, abs_tol=1e-4) or math.isnan(value):
                totals[EXAMPLES] = {**totals.get(EXAMPLES, {}), PARTS: parts}
        if "ece" in chosen and "ece" not in values:
            values["ece"] = math.nan
            if of_one_class:
                calibration = CalibrationError(num_classes=data.num_classes)
                calibration.update(logits, targets)
                values["ece"] = float(calibration.compute())
        if "one_class" in chosen:
            values["one_class"] = 0.0
            if self.task.has_classes:
                values["one_class"] = float(len(self.task.predicted(outputs).unique()) == 1 < len(truths.unique()))
        in_parts = not math.isnan(values.get("feature_distortion", math.nan))
        return values | _own_norm(forward, chosen, in_parts), totals, None

    def _global_features(self, module: FederatedModule, data: HasExamples, split: Split) -> Tensor | None:
        """Return the global model's features of a client's data, which are found once; None of another backbone."""
        if (id(data), split) not in self._known:
            own = snapshot(module.backbone.state_dict())
            if difference(own, self._backbone):
                return None
            load(module.backbone, self._backbone)
            self._known[id(data), split] = predict(module.features, batches_of(data, split))[0].cpu()
            load(module.backbone, own)
        return self._known[id(data), split]


def _in_two_parts(forward: Forward) -> FederatedModule | None:
    """Return the module behind a function whose outputs are those of its head on the features of its backbone."""
    module = _module_of(forward)
    if not isinstance(forward, FederatedModule) and module.has_personal_model:
        return None
    plain = type(module).forward is FederatedModule.forward or isinstance(module, AdaptedModule)
    return module if plain else None


def _module_of(forward: Forward) -> FederatedModule:
    module = forward if isinstance(forward, FederatedModule) else getattr(forward, "__self__", None)
    assert isinstance(module, FederatedModule)
    return module


def _head_norm(state: State, in_parts: bool) -> float:
    """Return the norm of the weights of a model's head; 0 where it has none of its own."""
    head = {name: tensor for name, tensor in state.items() if name.startswith(HEAD)}
    return weight_norm(head) if in_parts and any(tensor.ndim > 1 for tensor in head.values()) else 0.0


def _own_norm(forward: Forward, chosen: Iterable[str], in_parts: bool) -> dict[str, float]:
    """Return the norm of the head of a model that stays where it is, if it is asked for; NaN of a diverged model."""
    if HEAD_NORM not in chosen:
        return {}
    state = _module_of(forward).state_dict()
    return {HEAD_NORM: _head_norm(state, in_parts) if all_finite(state) else math.nan}


class Examiner(Protocol):
    """What answers exams: an executor, or the models of a run."""

    def run(self, tasks: Iterable[tuple[ClientInfo, Exam]]) -> Iterator[Outcome]:
        """Yield what came of each exam, in their order."""


class Measurement:
    """Measures personalized models at all clients, or some, by exams that an executor brings there.

    Args:
        clients: All clients.
        names: Metrics, of those that the exams' :class:`ModelMetrics` has.
        others: How many other clients' test data each model is tried on, the same for all models. None: all.
        seed: Of the draw of these clients.
        metric: What validation data are scored by.
    """

    def __init__(
        self,
        clients: Sequence[ClientInfo],
        names: Sequence[str] = (ACCURACY,),
        others: int | None = None,
        seed: int = 0,
        metric: str = ACCURACY,
    ) -> None:
        self.clients = list(clients)
        self.names = tuple(names)
        self.metric = metric
        self._sample = list(range(len(self.clients)))
        if others is not None and others < len(self.clients):
            generator = torch.Generator().manual_seed(derive_seed(seed, "matrix"))
            self._sample = sorted(torch.randperm(len(self.clients), generator=generator)[:others].tolist())

    @property
    def others(self) -> int:
        """The number of other clients' test sets that a model is tried on, at most."""
        return min(len(self._sample), len(self.clients) - 1)

    def measure(
        self, executor: Examiner, models: Sequence[tuple[int, State, bool]], personal: bool = False
    ) -> list[Measures]:
        """Measure models, each the one of a client, given by its position among the clients.

        Args:
            executor: Reaches the clients; its trainings have :class:`ModelMetrics`.
            models: Owners, each with all tensors of the model, and whether it is one that came out: it is scored on
                validation data too, and its predictions come back. Without tensors: the one that the owner has kept.
            personal: Whether they are personal models of their module, by its ``personal_forward``.
        """
        found, tasks = [], []
        for owner, state, ended in models:
            exams = list(self._exams(owner, state, ended, personal)) if all_finite(state) else []
            tasks += exams
            found.append([(self._position[client.id], exam.split) for client, exam in exams])
        answers = iter(self._ask(executor, tasks))
        return [
            self._measures(owner, state, {place: next(answers) for place in places})
            for (owner, state, _), places in zip(models, found, strict=True)
        ]

    def measure_all(self, executor: Examiner, state: State) -> list[Measures]:
        """Measure one model as every client's own, at its end: each client is asked once."""
        names = (*self.names, "feature_distortion", *AT_HOME, EXAMPLES)
        exams = [
            (client, exam)
            for client in self.clients
            for exam in (Exam("test", state, metrics=names), Exam("train", state), *self._validation(client, state))
        ]
        places = [(self._position[client.id], exam.split) for client, exam in exams]
        answers = dict(zip(places, self._ask(executor, exams), strict=True))
        return [
            self._measures(
                owner,
                state,
                {
                    (index, split): answer
                    for (index, split), answer in answers.items()
                    if index == owner or (index in self._tried(owner) and split != "train")
                },
            )
            for owner in range(len(self.clients))
        ]

    def _ask(self, executor: Examiner, tasks: Iterable[tuple[ClientInfo, Exam]]) -> list[Scores]:
        answers = []
        for ended in executor.run(tasks):
            if ended.scores is None:
                raise RuntimeError(f"a model could not be measured at client {ended.client.name}: {ended.error}")
            answers.append(ended.scores)
        return answers

    @cached_property
    def _position(self) -> dict[int, int]:
        return {client.id: index for index, client in enumerate(self.clients)}

    def _tried(self, owner: int) -> list[int]:
        return sorted({*self._sample, owner})

    def _exams(self, owner: int, state: State, ended: bool, personal: bool) -> Iterator[tuple[ClientInfo, Exam]]:
        if not state:
            names = (*self.names, "feature_distortion", *AT_HOME, HEAD_NORM, EXAMPLES)
            exams = Exam("test", metrics=names), Exam("train"), *self._validation(self.clients[owner], {})
            yield from ((self.clients[owner], replace(exam, personal=True, stage=HOME)) for exam in exams)
            return
        for index in self._tried(owner):
            names = (*self.names, "feature_distortion", *(AT_HOME if index == owner else ()))
            client = self.clients[index]
            yield client, Exam("test", state, personal, metrics=(*names, EXAMPLES) if ended else names)
            if ended:
                yield from ((client, exam) for exam in self._validation(client, state, personal))
        yield self.clients[owner], Exam("train", state, personal)

    def _validation(self, client: ClientInfo, state: State, personal: bool = False) -> list[Exam]:
        return [Exam("val", state, personal, metrics=tuple({self.metric, LOSS}))] if client.num_val else []

    def _measures(self, owner: int, state: State, answers: Mapping[tuple[int, Split], Scores]) -> Measures:
        """Put the answers of the clients tried, and the owner's about its training data, into one."""
        values = {name: torch.full((len(self.clients),), math.nan, dtype=torch.float64) for name in self.names}
        if not answers or (not state and math.isnan(answers[owner, "test"].values[HEAD_NORM])):
            unknown: dict[str, Any] = dict.fromkeys(SCALARS, math.nan)
            return Measures(values, **unknown)
        tests = {index: score for (index, split), score in answers.items() if split == "test"}
        validated = {index: score for (index, split), score in answers.items() if split == "val"}
        for index, score in tests.items():
            for name in self.names:
                values[name][index] = score.values[name]
        examples = [score.num_examples for score in tests.values()]
        moved = [score.values["feature_distortion"] for score in tests.values()]
        home = tests[owner].values
        own = validated.pop(owner).values if owner in validated else {}
        elsewhere = [score.values[self.metric] for score in validated.values()]
        # Where there are no features to compare, what is named `head` is the global model's.
        in_parts = not (math.isnan(home["feature_distortion"]) and self.clients[owner].num_test)
        return Measures(
            values,
            feature_distortion=home["feature_distortion"],
            feature_distortion_all=mean(moved, examples),
            ece=home["ece"],
            head_norm=_head_norm(state, in_parts) if state else home[HEAD_NORM],
            train_loss=answers[owner, "train"].values["train_loss"],
            one_class=home["one_class"],
            val_metric=own.get(self.metric, math.nan),
            val_loss=own.get(LOSS, math.nan),
            val_elsewhere=mean(elsewhere) if elsewhere else math.nan,
            examples={index: score.totals[EXAMPLES] for index, score in tests.items() if EXAMPLES in score.totals},
        )
