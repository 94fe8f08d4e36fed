"""What a model is trained for: its loss, the form of its outputs and targets, and the metrics that they have."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric
from typing_extensions import override

from fl_lightning.checks import above, one_of, whole, within
from fl_lightning.evaluation.named_metrics import (
    CLASSES,
    LABELS,
    MASKS,
    R2,
    RANKING,
    THRESHOLDED,
    UNKNOWN,
    Mean,
    MultilabelMacroF1,
    Named,
)

Loss = Callable[[Tensor, Tensor], Tensor]


class Task:
    """What a model is trained for. Subclasses say what outputs and targets look like.

    Args:
        loss: The name of one of :attr:`losses`, or a callable that takes flat outputs and targets (see :meth:`flat`)
            and returns their mean loss, such as :class:`torch.nn.HuberLoss`. None: the first of :attr:`losses`.

    Attributes:
        name: As in ``task=``.
        defaults: Names of the metrics that are always there, that which chooses first.
        losses: Losses by name.
        has_classes: Whether a prediction is one of some classes, so that it can be confused with another.
    """

    name: ClassVar[str]
    defaults: ClassVar[tuple[str, ...]]
    losses: ClassVar[Mapping[str, Callable[..., Tensor]]]
    has_classes: ClassVar[bool] = False
    targets: ClassVar[str]

    def __init__(self, loss: str | Loss | None = None) -> None:
        if isinstance(loss, str):
            one_of("loss", loss, tuple(self.losses))
        elif loss is not None and not callable(loss):
            raise ValueError(f"task.loss must be the name of a loss or a node with _target_, got {loss!r}")
        self.loss_name = loss if isinstance(loss, str) else next(iter(self.losses))
        self._own = None if loss is None or isinstance(loss, str) else loss

    @property
    def metrics(self) -> Mapping[str, Named]:
        """All metrics that the task has, by name."""
        raise NotImplementedError

    @property
    def is_plain_cross_entropy(self) -> bool:
        """Whether the loss is the cross-entropy of one class for each example, all of one weight."""
        return False

    def mean_loss(self, outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """Return the mean loss of flat outputs and targets."""
        if self._own is None:
            return self.losses[self.loss_name](outputs, targets, **options)
        if isinstance(self._own, nn.Module):
            self._own.to(outputs.device)
        return self._own(outputs, targets)

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the training loss of a batch, a scalar.

        Args:
            outputs: What the model gives.
            targets: What it should give.
            label_smoothing: As in :func:`torch.nn.functional.cross_entropy`.
        """
        if label_smoothing:
            raise ValueError(f"module.label_smoothing must be 0 under task={self.name}, got {label_smoothing}")
        return self._training_loss(*self.flat(outputs, targets))

    def _training_loss(self, outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        # Of a batch whose targets are all ignored there is no mean, and nothing to learn.
        return self.mean_loss(outputs, targets, **options) if targets.numel() else outputs.sum() * 0.0

    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum over flat targets of their losses, without label smoothing."""
        return self.mean_loss(outputs, targets) * self.count(targets)

    def flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return outputs and targets side by side, without those that do not count."""
        return outputs, targets

    def count(self, targets: Tensor) -> int | Tensor:
        """Return the number of flat targets that count."""
        return targets.numel()

    def scores(self, outputs: Tensor) -> Tensor:
        """Return what metrics take of flat outputs: logits of classes, probabilities of labels, or values."""
        return outputs

    def truths(self, targets: Tensor) -> Tensor:
        """Return what metrics take of flat targets."""
        return targets

    def predicted(self, outputs: Tensor) -> Tensor:
        """Return the predicted class of each flat output."""
        raise TypeError(f"task={self.name} has no classes")

    def num_outputs(self, num_classes: int) -> int:
        """Return how many outputs a model needs for so many classes, labels or values."""
        return num_classes

    def label_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        """Count targets by class, int64 (num_classes,); (0,) where they are no classes."""
        return torch.zeros(0, dtype=torch.int64)

    def arguments(self, make: Callable[..., Metric], num_classes: int) -> dict[str, int]:
        """Return what the maker of a metric is told of the data."""
        return {}

    def check(self, outputs: Tensor, targets: Tensor, num_classes: int) -> None:
        """Check that a batch is one of this task.

        Raises:
            ValueError: If targets or outputs are of another kind, with what they should be.
        """
        problem = self.target_problem(targets, num_classes)
        if problem:
            raise ValueError(
                f"task={self.name} takes {self.targets}, got {problem}; choose another task, or correct the data"
            )
        expected = self.output_shape(targets, num_classes)
        if tuple(outputs.shape) not in expected:
            raise ValueError(
                f"the model answers with shape {tuple(outputs.shape)} for targets of shape {tuple(targets.shape)}; "
                f"task={self.name} expects {' or '.join(map(str, expected))}"
            )

    def target_problem(self, targets: Tensor, num_classes: int) -> str:
        """Say what is wrong with targets; empty if nothing is."""
        raise NotImplementedError

    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        """Return the shapes that outputs may have."""
        raise NotImplementedError


class _Classes(Task):
    """One of some classes for every target: logits with one entry a class."""

    losses = {"cross_entropy": functional.cross_entropy}
    defaults: ClassVar[tuple[str, ...]] = ("accuracy", "loss")
    has_classes = True

    def __init__(self, loss: str | Loss | None = None, class_weights: Sequence[float] | None = None) -> None:
        super().__init__(loss)
        for weight in class_weights or ():
            above("class_weights", weight, 0)
        if class_weights and self._own is not None:
            raise ValueError("task.class_weights must be null with a loss of one's own, which has its own weights")
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        return {"accuracy": Mean(self._right), "loss": Mean(self.loss_sum, higher_is_better=False), **CLASSES}

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).sum().float()

    @override
    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        if self._own is not None:
            return super().loss(outputs, targets, label_smoothing)
        return self._training_loss(*self.flat(outputs, targets), label_smoothing=label_smoothing)

    @override
    def mean_loss(self, outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        if self.class_weights is not None:
            options["weight"] = self.class_weights.to(outputs.device)
        return super().mean_loss(outputs, targets, **options)

    @override
    def loss_sum(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self._own is not None or self.class_weights is not None or self.loss_name != "cross_entropy":
            return super().loss_sum(outputs, targets)
        return functional.cross_entropy(outputs, targets, reduction="sum")

    @override
    def predicted(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(1)

    @override
    def label_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        known = targets.flatten()
        return torch.bincount(known[known >= 0], minlength=num_classes)

    @override
    def arguments(self, make: Callable[..., Metric], num_classes: int) -> dict[str, int]:
        return {"num_classes": num_classes} if takes(make, "num_classes") else {}


class Classification(_Classes):
    """One class for each example: logits (N, C), targets int64 (N,).

    Args:
        loss: ``cross_entropy``, or a callable.
        class_weights: A weight above 0 for each class in the cross-entropy, for rare ones.
    """

    name = "classification"
    targets = "one whole number for each example, from 0"

    @property
    @override
    def is_plain_cross_entropy(self) -> bool:
        return self._own is None and self.class_weights is None

    @override
    def target_problem(self, targets: Tensor, num_classes: int) -> str:
        if targets.is_floating_point() or targets.ndim != 1:
            return described(targets)
        return out_of_range(targets, num_classes)

    @override
    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        return [(len(targets), num_classes)]


class _Places(_Classes):
    """A class for each of several places of an example, of which some do not count."""

    dimensions: ClassVar[tuple[int, ...]]
    """How many dimensions targets may have."""

    def __init__(
        self, loss: str | Loss | None = None, class_weights: Sequence[float] | None = None, ignored: int = -100
    ) -> None:
        super().__init__(loss, class_weights)
        self.ignored = ignored

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        return {name: metric for name, metric in super().metrics.items() if isinstance(metric, Mean)}

    @override
    def flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        counted = targets.flatten() != self.ignored
        return outputs.flatten(0, -2)[counted], targets.flatten()[counted]

    @override
    def label_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        return super().label_counts(targets[targets != self.ignored], num_classes)

    @override
    def target_problem(self, targets: Tensor, num_classes: int) -> str:
        if targets.is_floating_point() or targets.ndim not in self.dimensions:
            return described(targets)
        return out_of_range(targets[targets != self.ignored], num_classes)


class Segmentation(_Places):
    """One class for each pixel: logits (N, C, H, W), targets int64 (N, H, W).

    Dice and IoU are those of all pixels of a client together, a mean over the classes that it has.

    Args:
        loss: ``cross_entropy``, ``dice`` (1 minus the mean over classes of the soft Dice coefficient of a batch:
            Milletari, Navab, Ahmadi, V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
            Segmentation, 3DV 2016, https://arxiv.org/abs/1606.04797), or a callable.
        class_weights: A weight for each class in the cross-entropy.
        ignored: Pixels of this value do not count.
    """

    name = "segmentation"
    defaults = ("dice", "iou", "accuracy", "loss")
    targets = "a whole number for each pixel, (N, H, W)"

    dimensions = (3,)

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        return {**super().metrics, **MASKS}

    @override
    def flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return super().flat(outputs.movedim(1, -1), targets)

    @override
    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        return [(len(targets), num_classes, *targets.shape[1:])]


def soft_dice(outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return 1 minus the mean over the classes present of the soft Dice coefficient of flat logits (M, C)."""
    shares = outputs.softmax(1)
    truth = functional.one_hot(targets, outputs.shape[1]).to(shares.dtype)
    dice = 2 * (shares * truth).sum(0) / (shares.sum(0) + truth.sum(0))
    return 1 - dice[truth.sum(0) > 0].mean()


Segmentation.losses = {**_Classes.losses, "dice": soft_dice}


class Language(_Places):
    """The next token: logits (N, T, V) for targets int64 (N, T), or (N, V) for (N,).

    The metric ``exact_match`` is the share of examples of which every target that counts has the largest logit: those
    whose answer the model, writing the likeliest token each time, would write to the letter.

    Args:
        loss: ``cross_entropy``, or a callable.
        ignored: Targets of this value do not count, such as padding and the words of a question.
        choices: Tokens that an answer is one of, such as those of its letters; with them there is the metric
            ``choice_accuracy``: the share of targets that have the largest logit among the choices.
    """

    name = "language"
    defaults = ("perplexity", "accuracy", "loss")
    has_classes = False
    targets = "a token for each position, (N, T) or (N,)"

    dimensions = (1, 2)

    def __init__(
        self, loss: str | Loss | None = None, ignored: int = -100, choices: Sequence[int] | None = None
    ) -> None:
        super().__init__(loss, ignored=ignored)
        for token in choices or ():
            whole("choices", token, 0)
        self.choices = torch.tensor(choices) if choices else None

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        choices = {} if self.choices is None else {"choice_accuracy": Mean(self._right_choices)}
        perplexity = Mean(self.loss_sum, torch.exp, higher_is_better=False)
        exact = Mean(self._exact, count=self._answers)
        return {"perplexity": perplexity, **super().metrics, **choices, "exact_match": exact}

    def _exact(self, outputs: Tensor, targets: Tensor) -> Tensor:
        right = (outputs.argmax(-1) == targets) | (targets == self.ignored)
        return (right.reshape(len(targets), -1).all(1) & self._counts(targets)).sum().float()

    def _answers(self, targets: Tensor) -> Tensor:
        return self._counts(targets).sum()

    def _counts(self, targets: Tensor) -> Tensor:
        return (targets != self.ignored).reshape(len(targets), -1).any(1)

    def _right_choices(self, outputs: Tensor, targets: Tensor) -> Tensor:
        assert self.choices is not None
        choices = self.choices.to(outputs.device)
        return (choices[outputs[:, choices].argmax(1)] == targets).sum().float()

    @override
    def check(self, outputs: Tensor, targets: Tensor, num_classes: int) -> None:
        super().check(outputs[..., :num_classes], targets, num_classes)  # a model may have more rows than tokens
        if self.choices is not None and int(self.choices.max()) >= num_classes:
            raise ValueError(f"task.choices must be tokens of {num_classes}, got {int(self.choices.max())}")

    @override
    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        return [(*targets.shape, num_classes)]


class Binary(Task):
    """Yes or no: one logit, (N,) or (N, 1), for targets 0 or 1.

    Args:
        loss: ``bce`` (binary cross-entropy), or a callable.
        positive_weight: What a positive counts in the loss, above 0; a negative counts 1.
        threshold: The operating point: the probability, in (0, 1), from which a prediction is positive. Accuracy,
            balanced accuracy, F1, precision, sensitivity and specificity depend on it; AUROC and average precision do
            not.
    """

    name = "binary"
    defaults = ("auroc", "balanced_accuracy", "sensitivity", "specificity", "accuracy", "loss")
    losses = {"bce": functional.binary_cross_entropy_with_logits}
    has_classes = True
    targets = "0 or 1 for each example"

    def __init__(
        self, loss: str | Loss | None = None, positive_weight: float | None = None, threshold: float = 0.5
    ) -> None:
        super().__init__(loss)
        above("positive_weight", positive_weight, 0, or_null=True)
        within("threshold", threshold, "(0, 1)")
        if positive_weight is not None and self._own is not None:
            raise ValueError("task.positive_weight must be null with a loss of one's own, which has its own weights")
        self.positive_weight = positive_weight
        self.threshold = threshold
        self._least = math.log(threshold / (1 - threshold))

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        return {
            **RANKING,
            **{name: partial(make, threshold=self.threshold) for name, make in THRESHOLDED.items()},
            "accuracy": Mean(self._right),
            "loss": Mean(self.loss_sum, higher_is_better=False),
        }

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.predicted(outputs) == targets).sum().float()

    @override
    def mean_loss(self, outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        if self.positive_weight is not None:
            options["pos_weight"] = torch.tensor(self.positive_weight, device=outputs.device)
        return super().mean_loss(outputs, targets, **options)

    @override
    def flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs.reshape(-1), targets.reshape(-1).to(outputs.dtype)

    @override
    def scores(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    @override
    def truths(self, targets: Tensor) -> Tensor:
        return targets.long()

    @override
    def predicted(self, outputs: Tensor) -> Tensor:
        return (outputs >= self._least).long()

    @override
    def num_outputs(self, num_classes: int) -> int:
        return 1

    @override
    def label_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        return torch.bincount(targets.flatten().long(), minlength=2)

    @override
    def target_problem(self, targets: Tensor, num_classes: int) -> str:
        if num_classes > 2:
            return f"{num_classes} classes"
        if targets.ndim > 2 or targets.numel() != len(targets):
            return described(targets)
        return (
            "" if bool(((targets == 0) | (targets == 1)).all()) else f"values other than 0 and 1, {described(targets)}"
        )

    @override
    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        return [(len(targets), 1), (len(targets),)]


class Multilabel(Task):
    """Yes or no for each of several labels: logits (N, L), targets (N, L) of 0, 1, or NaN where it is not known.

    Args:
        loss: ``bce``, or a callable; both see the known labels alone, (M,).
        threshold: The probability, in (0, 1), from which a label is predicted.
    """

    name = "multilabel"
    defaults = ("auroc", "f1", "accuracy", "loss")
    losses = {"bce": functional.binary_cross_entropy_with_logits}
    targets = "0, 1 or NaN for each label, (N, labels)"

    def __init__(self, loss: str | Loss | None = None, threshold: float = 0.5) -> None:
        super().__init__(loss)
        within("threshold", threshold, "(0, 1)")
        self.threshold = threshold

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        sums = {"accuracy": Mean(self._right), "loss": Mean(self.loss_sum, higher_is_better=False)}
        return {**LABELS, "f1": partial(MultilabelMacroF1, threshold=self.threshold), **sums}

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs.sigmoid() >= self.threshold).to(targets.dtype) == targets).sum().float()

    @override
    def mean_loss(self, outputs: Tensor, targets: Tensor, **options: Any) -> Tensor:
        known = ~targets.isnan()
        outputs, targets = outputs[known], targets[known]
        return super().mean_loss(outputs, targets, **options) if targets.numel() else outputs.sum()

    @override
    def count(self, targets: Tensor) -> Tensor:
        return (~targets.isnan()).sum()

    @override
    def flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return outputs, targets.to(outputs.dtype)

    @override
    def scores(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    @override
    def truths(self, targets: Tensor) -> Tensor:
        return targets.nan_to_num(nan=UNKNOWN).long()

    @override
    def label_counts(self, targets: Tensor, num_classes: int) -> Tensor:
        return (targets == 1).sum(0)

    @override
    def arguments(self, make: Callable[..., Metric], num_classes: int) -> dict[str, int]:
        return {"num_labels": num_classes} if takes(make, "num_labels") else {}

    @override
    def target_problem(self, targets: Tensor, num_classes: int) -> str:
        if targets.ndim != 2 or targets.shape[1] != num_classes:
            return described(targets)
        known = (targets == 0) | (targets == 1) | (targets != targets)
        return "" if bool(known.all()) else f"values other than 0, 1 and NaN, {described(targets)}"

    @override
    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        return [(len(targets), num_classes)]


class Regression(Task):
    """Numbers: outputs and targets float (N, D), or (N,) or (N, 1) for one number.

    Args:
        loss: ``mse``, ``mae``, ``huber``, or a callable.
    """

    name = "regression"
    defaults = ("rmse", "mae", "r2", "loss")
    losses = {"mse": functional.mse_loss, "mae": functional.l1_loss, "huber": functional.huber_loss}
    targets = "real numbers for each example"

    @property
    @override
    def metrics(self) -> Mapping[str, Named]:
        return {
            "rmse": Mean(self._squares, torch.sqrt, higher_is_better=False),
            "mse": Mean(self._squares, higher_is_better=False),
            "mae": Mean(self._distances, higher_is_better=False),
            "r2": R2,
            "loss": Mean(self.loss_sum, higher_is_better=False),
        }

    def _squares(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum()

    def _distances(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().sum()

    @override
    def flat(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs, targets = outputs.flatten(1) if outputs.ndim > 1 else outputs[:, None], targets.to(outputs.dtype)
        targets = targets.flatten(1) if targets.ndim > 1 else targets[:, None]
        return (outputs.squeeze(1), targets.squeeze(1)) if outputs.shape[1] == 1 else (outputs, targets)

    @override
    def target_problem(self, targets: Tensor, num_classes: int) -> str:
        if not targets.is_floating_point() or targets.ndim > 2:
            return described(targets)
        return "" if bool(targets.isfinite().all()) else f"NaN or an infinity, {described(targets)}"

    @override
    def output_shape(self, targets: Tensor, num_classes: int) -> list[tuple[int, ...]]:
        number = targets.numel() // len(targets)
        return [(len(targets), number), *([(len(targets),)] if number == 1 else [])]


TASKS: Mapping[str, type[Task]] = {
    kind.name: kind for kind in (Classification, Binary, Multilabel, Regression, Segmentation, Language)
}
"""All tasks by name."""


def guess(targets: Tensor) -> Task:
    """Return the task that targets are of, by their type and shape."""
    if targets.is_floating_point():
        known = targets[~targets.isnan()]
        if not bool(((known == 0) | (known == 1)).all()):
            return Regression()
        return Multilabel() if targets.ndim == 2 and targets.shape[1] > 1 else Binary()
    if targets.ndim == 2 and targets.shape[1] > 1:
        return Language()
    return Segmentation() if targets.ndim == 3 else Classification()


def described(targets: Tensor) -> str:
    """Say what targets are."""
    return f"{str(targets.dtype).removeprefix('torch.')} of shape {tuple(targets.shape)}"


def out_of_range(targets: Tensor, num_classes: int) -> str:
    """Say which target is no class; empty if all are."""
    if not targets.numel():
        return ""
    least, most = int(targets.min()), int(targets.max())
    return "" if least >= 0 and most < num_classes else f"the class {least if least < 0 else most} of {num_classes}"


def takes(make: Callable[..., Any], name: str) -> bool:
    """Tell whether a callable takes an argument that it was not given; a class passes to its parents what it lacks."""
    while isinstance(make, partial):
        if name in make.keywords:
            return False
        make = make.func
    if not inspect.isclass(make):
        known = inspect.signature(make).parameters
        return name in known or any(one.kind is one.VAR_KEYWORD for one in known.values())
    return any(
        name in inspect.signature(getattr(kind, method)).parameters
        for kind in make.__mro__[:-1]
        for method in ("__init__", "__new__")
        if method in vars(kind)
    )
