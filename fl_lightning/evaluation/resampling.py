r"""Metrics of resampled examples: what each example adds to a metric, and the metric of any weights of the examples.

A metric that is no mean over examples (F1, AUROC, Dice, RMSE, perplexity, …) is still a function of a weighted sample:
of sums over examples (:math:`\sum_i w_i s_i`, as F1 is of true positives), or of weighted ranks (AUROC). With the
shares of a bootstrap resample as weights this gives the metric of the resample without forming it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_lightning.evaluation.named_metrics import UNKNOWN, Mean
from fl_lightning.evaluation.uncertainty import RESAMPLES
from fl_lightning.task import Binary, Classification, Multilabel, Regression, Segmentation, Task

Array = NDArray[np.float64]

BINS = 15
"""Of the calibration error."""


@dataclass(frozen=True)
class Resampled:
    """A metric as a function of weights of the examples.

    Attributes:
        parts: From outputs (n, ...) and targets (n, ...) what is kept of each example, float32 (n, S).
        values: From weights (R, n), each row of sum 1, and the parts (n, S), the metric (R,); NaN where it has none.
        resamples: How many are drawn of it.
    """

    parts: Callable[[Tensor, Tensor], Tensor]
    values: Callable[[Array, Array], Array]
    resamples: int = RESAMPLES

    def value(self, parts: Array) -> float:
        """Return the metric of all examples, each counting the same; NaN of none."""
        number = len(parts)
        return float(self.values(np.full((1, number), 1 / number), parts)[0]) if number else float("nan")


def resampled(task: Task, metric: str) -> Resampled | None:
    """Return a metric of a task as a function of weights of the examples; None where there is none.

    Args:
        task: The task.
        metric: One of its metrics by name. Accuracy and plain cross-entropy of one class for each example have none
            here: they are means of what :func:`fl_lightning.personalization.predictions.score_of` says.
    """
    named = task.metrics.get(metric)
    if isinstance(named, Mean):
        plain = isinstance(task, Classification) and (metric == "accuracy" or task.is_plain_cross_entropy)
        return None if plain else _of_mean(task, named)
    if isinstance(task, Binary) and metric in YES_OR_NO:
        return Resampled(partial(_outcomes, task, metric), YES_OR_NO[metric])
    if isinstance(task, (Classification, Segmentation)) and metric in OF_CLASSES:
        return Resampled(partial(_class_counts, task), OF_CLASSES[metric])
    if isinstance(task, Multilabel) and metric == "f1":
        return Resampled(partial(_label_counts, task), OF_CLASSES["f1"])
    if isinstance(task, Regression) and metric == "r2":
        return Resampled(partial(_moments, task), _r2)
    if isinstance(task, Classification) and metric == "ece":
        return Resampled(_gaps, _ece)
    if isinstance(task, (Binary, Multilabel, Classification)) and metric in RANKED:
        return Resampled(partial(_ranks, task), partial(_over_labels, RANKED[metric]), resamples=500)
    return None


def _of_mean(task: Task, named: Mean) -> Resampled:
    """A mean over targets or examples: each example adds its sum, and the number of what it is a mean over."""

    def parts(outputs: Tensor, targets: Tensor) -> Tensor:
        found = []
        for out, target in zip(outputs.split(1), targets.split(1), strict=True):
            flat = task.flat(out, target)
            number = task.count(flat[1]) if named.count is None else named.count(target)
            count = torch.as_tensor(number, dtype=torch.float32)
            added = named.sum((out, target), flat).float() if float(count) else torch.zeros(())
            found.append(torch.stack([added, count]))
        return torch.stack(found)

    def values(shares: Array, parts: Array) -> Array:
        total, count = (shares @ parts).T
        means = _ratio(total, count, empty=np.nan)
        if named.finish is None:
            return means
        return named.finish(torch.from_numpy(means)).numpy()

    return Resampled(parts, values)


def _ratio(above: Array, below: Array, empty: float = 0.0) -> Array:
    """Divide, with a value of its own where there is nothing to divide by."""
    return np.divide(above, below, out=np.full_like(above, empty), where=below > 1e-12)


def _mean_over(values: Array, present: NDArray[np.bool_]) -> Array:
    """Return the mean of each row over what is present; NaN where nothing is."""
    return _ratio(np.where(present, values, 0).sum(1), present.sum(1).astype(float), empty=np.nan)


def _class_counts(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """How often each class is right, predicted, and true in each example, (n, 3 C)."""
    classes = outputs.shape[1]
    found = []
    for out, target in zip(outputs.split(1), targets.split(1), strict=True):
        logits, truth = task.flat(out, target)
        guess = logits.argmax(1)
        counted = (truth[guess == truth], guess, truth)
        found.append(torch.cat([torch.bincount(one, minlength=classes) for one in counted]))
    return torch.stack(found).float()


def _label_counts(task: Multilabel, outputs: Tensor, targets: Tensor) -> Tensor:
    """The same of labels, of which several may hold: right, predicted, and true where it is known, (n, 3 L)."""
    known = ~targets.isnan()
    guess = (outputs.sigmoid() > task.threshold) & known
    truth = (targets == 1) & known
    return torch.cat([guess & truth, guess, truth], dim=1).float()


def _per_class(one: Callable[[Array, Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """A mean over the classes present of a function of how often each is right, predicted, true."""

    def values(shares: Array, parts: Array) -> Array:
        right, guess, truth = np.split(shares @ parts, 3, axis=1)
        return _mean_over(one(right, guess, truth), truth > 1e-12)

    return values


def _f1(right: Array, guess: Array, truth: Array) -> Array:
    return _ratio(2 * right, guess + truth)


OF_CLASSES: dict[str, Callable[[Array, Array], Array]] = {
    "balanced_accuracy": _per_class(lambda right, guess, truth: _ratio(right, truth)),
    "precision": _per_class(lambda right, guess, truth: _ratio(right, guess)),
    "f1": _per_class(_f1),
    "dice": _per_class(_f1),
    "iou": _per_class(lambda right, guess, truth: _ratio(right, guess + truth - right)),
}


def _outcomes(task: Binary, metric: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether each example is a true positive, a false one, a false negative, a true one, (n, 4)."""
    logits, truth = task.flat(outputs, targets)
    scores, yes = task.scores(logits), truth == 1
    # At the operating point itself torchmetrics says no.
    guess = scores >= task.threshold if metric == "balanced_accuracy" else scores > task.threshold
    return torch.stack([guess & yes, guess & ~yes, ~guess & yes, ~guess & ~yes], dim=1).float()


def _of_outcomes(one: Callable[[Array, Array, Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda shares, parts: one(*(shares @ parts).T)


YES_OR_NO: dict[str, Callable[[Array, Array], Array]] = {
    "balanced_accuracy": _of_outcomes(
        lambda tp, fp, fn, tn: _mean_over(
            np.stack([_ratio(tp, tp + fn), _ratio(tn, tn + fp)], axis=1),
            np.stack([tp + fn > 1e-12, tn + fp > 1e-12], axis=1),
        )
    ),
    "f1": _of_outcomes(lambda tp, fp, fn, tn: _ratio(2 * tp, 2 * tp + fp + fn)),
    "precision": _of_outcomes(lambda tp, fp, fn, tn: _ratio(tp, tp + fp)),
    "sensitivity": _of_outcomes(lambda tp, fp, fn, tn: _ratio(tp, tp + fn)),
    "specificity": _of_outcomes(lambda tp, fp, fn, tn: _ratio(tn, tn + fp)),
}


def _moments(task: Regression, outputs: Tensor, targets: Tensor) -> Tensor:
    """Of each value the target, its square and the squared error, (n, 3 D)."""
    guess, truth = task.flat(outputs, targets)
    guess, truth = guess.reshape(len(truth), -1), truth.reshape(len(truth), -1)
    return torch.cat([truth, truth.square(), (guess - truth).square()], dim=1).float()


def _r2(shares: Array, parts: Array) -> Array:
    first, second, error = np.split(shares @ parts, 3, axis=1)
    found: Array = (1 - _ratio(error, second - first**2, empty=np.nan)).mean(1)
    return found


def _gaps(outputs: Tensor, targets: Tensor) -> Tensor:
    """By bin of confidence, how much surer the model is than right, (n, bins)."""
    confidence, guess = outputs.softmax(1).max(1)
    gap = confidence - (guess == targets).float()
    place = (torch.ceil(confidence * BINS).long() - 1).clamp(0, BINS - 1)  # bins are open below, as in the metric
    return torch.zeros(len(gap), BINS).scatter_(1, place[:, None], gap[:, None])


def _ece(shares: Array, parts: Array) -> Array:
    found: Array = np.abs(shares @ parts).sum(1)
    return found


def _ranks(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Scores, then truths of each label (1, 0 or unknown), (n, 2 L)."""
    if isinstance(task, Classification):
        inside = bool(((outputs >= 0) & (outputs <= 1)).all())  # torchmetrics takes these for probabilities
        scores = outputs if inside else outputs.softmax(1)
        truths = torch.nn.functional.one_hot(targets, outputs.shape[1])
    else:
        logits, flat = task.flat(outputs, targets)
        scores, truths = task.scores(logits), task.truths(flat)
        scores, truths = scores.reshape(len(targets), -1), truths.reshape(len(targets), -1)
    return torch.cat([scores.float(), truths.float()], dim=1)


def _over_labels(one: Callable[[Array, Array, Array], Array], shares: Array, parts: Array) -> Array:
    """Return the mean over labels, of those that have a value in a resample."""
    scores, truths = np.split(parts, 2, axis=1)
    found = []
    for score, truth in zip(scores.T, truths.T, strict=True):
        known = np.flatnonzero(truth != UNKNOWN)
        order = known[np.argsort(score[known], kind="stable")]
        starts = np.flatnonzero(np.diff(score[order], prepend=np.nan) != 0)  # of equal scores
        if not len(order):
            found.append(np.full(len(shares), np.nan))
            continue
        weights = shares[:, order]
        positive = np.add.reduceat(weights * (truth[order] == 1), starts, axis=1)
        every = np.add.reduceat(weights, starts, axis=1)
        found.append(one(positive, every - positive, every))
    table = np.stack(found, axis=1)
    return _mean_over(np.nan_to_num(table), ~np.isnan(table))


def _auroc(positive: Array, negative: Array, every: Array) -> Array:
    """The share of pairs in which the positive scores more, a tie counting half: Mann and Whitney's statistic."""
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(1) * negative.sum(1)
    return _ratio((positive * (below + negative / 2)).sum(1), pairs, empty=np.nan)


def _average_precision(positive: Array, negative: Array, every: Array) -> Array:
    """The mean of the precision over the positives, from the highest score down."""
    above = np.cumsum(positive[:, ::-1], axis=1)[:, ::-1]
    taken = np.cumsum(every[:, ::-1], axis=1)[:, ::-1]
    return _ratio((positive * _ratio(above, taken)).sum(1), positive.sum(1), empty=np.nan)


RANKED = {"auroc": _auroc, "average_precision": _average_precision}
