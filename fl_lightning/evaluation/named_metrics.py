"""Metrics by name: means over targets, whose sums merge, and torchmetrics that average over the classes present.

A client with two of ten classes has no F1, recall or AUROC of the other eight. torchmetrics counts some of them as 0,
which a macro average then takes for a failure; here a class counts where the client has targets of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, R2Score
from torchmetrics.classification import (
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryPrecision,
    BinaryRecall,
    BinarySpecificity,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MulticlassPrecision,
    MulticlassRecall,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from typing_extensions import override

from fl_lightning.evaluation.calibration import CalibrationError

#: What stands in a multi-label target, as torchmetrics sees it, for a label that nobody knows.
UNKNOWN = -1


@dataclass(frozen=True)
class Mean:
    """A metric that is a mean over targets, or a function of one.

    Attributes:
        add: From flat outputs and targets (see :meth:`fl_lightning.task.Task.flat`) the sum over the targets.
        finish: From the mean the metric; None: the mean itself.
        higher_is_better: Whether more is better.
        count: Of a mean over examples with several targets each: from targets, not flat, the number of examples.
            ``add`` then takes outputs and targets that are not flat either. None: a mean over flat targets.
    """

    add: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], Tensor] | None = None
    higher_is_better: bool = True
    count: Callable[[Tensor], Tensor] | None = None

    def sum(self, whole: tuple[Tensor, Tensor], flat: tuple[Tensor, Tensor]) -> Tensor:
        """Return the sum over a batch, given as it is and flat."""
        return self.add(*(flat if self.count is None else whole))

    def value(self, mean: Tensor) -> float:
        """Return the metric of a mean."""
        return (mean if self.finish is None else self.finish(mean)).item()


Named = Mean | Callable[..., Metric]


def mean_over(values: Tensor, present: Tensor) -> Tensor:
    """Mean of the values of the classes that are present; NaN if none is."""
    return values[present.to(values.device)].mean()


def class_counts(target: Tensor | list[Tensor], num_classes: int) -> Tensor:
    """Count the targets of each class, (num_classes,)."""
    found = torch.cat(target) if isinstance(target, list) else target
    return torch.bincount(found.flatten(), minlength=num_classes)


def quietly(compute: Callable[[], Any]) -> Any:
    """Compute without torchmetrics' warnings of absent classes, which are left out here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute()


class _ByClass:
    """Makes a torchmetrics metric one value for each class."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(average="none", validate_args=False, **kwargs)  # type: ignore[call-arg]


class _OfCounts(_ByClass):
    tp: Tensor
    fn: Tensor

    def compute(self) -> Tensor:
        return mean_over(quietly(super().compute), self.tp + self.fn > 0)  # type: ignore[misc]


class BalancedAccuracy(_OfCounts, MulticlassRecall):  # type: ignore[misc]
    """Mean of the recall of the classes present, as scikit-learn's ``balanced_accuracy_score``."""


class MacroPrecision(_OfCounts, MulticlassPrecision):  # type: ignore[misc]
    """Mean of the precision over the classes present."""


class MacroF1(_OfCounts, MulticlassF1Score):  # type: ignore[misc]
    """Mean of F1 over the classes present; of masks this is the Dice coefficient of all pixels together."""


class MacroIoU(_ByClass, MulticlassJaccardIndex):
    """Mean over the classes present of the intersection over the union, of all pixels together."""

    @override
    def compute(self) -> Tensor:
        return mean_over(quietly(super().compute), self.confmat.sum(1) > 0)


class MacroAUROC(_ByClass, MulticlassAUROC):
    """Mean over the classes present of the area under the ROC curve of one class against the rest."""

    @override
    def compute(self) -> Tensor:  # type: ignore[override]
        counts = class_counts(self.target, self.num_classes)
        return mean_over(quietly(super().compute), (counts > 0) & (counts < counts.sum()))


class MacroAveragePrecision(_ByClass, MulticlassAveragePrecision):
    """Mean over the classes present of the average precision."""

    @override
    def compute(self) -> Tensor:  # type: ignore[override]
        return mean_over(quietly(super().compute), class_counts(self.target, self.num_classes) > 0)


class _OfLabels(_ByClass):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(ignore_index=UNKNOWN, **kwargs)


class MultilabelMacroF1(_OfLabels, _OfCounts, MultilabelF1Score):  # type: ignore[misc]
    """Mean of F1 over the labels that some example has."""


class _OfLabelLists(_OfLabels):
    target: list[Tensor]

    def compute(self) -> Tensor:
        target = torch.cat(self.target) if isinstance(self.target, list) else self.target
        present = (target == 1).any(0) & (target == 0).any(0)
        return mean_over(quietly(super().compute), present)  # type: ignore[misc]


class MultilabelMacroAUROC(_OfLabelLists, MultilabelAUROC):  # type: ignore[misc]
    """Mean of AUROC over the labels that some examples have and others have not."""


class MultilabelMacroAveragePrecision(_OfLabelLists, MultilabelAveragePrecision):  # type: ignore[misc]
    """Mean of the average precision over the labels that some examples have and others have not."""


class _OfBoth:
    target: list[Tensor]

    def compute(self) -> Tensor:
        counts = class_counts(self.target, 2)
        value: Tensor = quietly(super().compute)  # type: ignore[misc]
        return value if bool((counts > 0).all()) else torch.full_like(value, torch.nan)


class AUROC(_OfBoth, BinaryAUROC):  # type: ignore[misc]
    """Area under the ROC curve; NaN where all targets are of one class."""


class AveragePrecision(_OfBoth, BinaryAveragePrecision):  # type: ignore[misc]
    """Average precision; NaN where all targets are of one class."""


class BinaryBalancedAccuracy(BalancedAccuracy):
    """Mean of sensitivity and specificity, of those that have targets."""

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__(num_classes=2)
        self.threshold = threshold

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update((preds >= self.threshold).long(), target)


class R2(R2Score):
    """The share of the variance of the targets that is explained; NaN of fewer than two examples."""

    @override
    def compute(self) -> Tensor:
        return super().compute() if bool(self.total >= 2) else torch.tensor(torch.nan)


#: Of outputs and targets that are classes: logits (M, C), int64 (M,).
CLASSES: Mapping[str, Named] = {
    "balanced_accuracy": BalancedAccuracy,
    "precision": MacroPrecision,
    "f1": MacroF1,
    "auroc": MacroAUROC,
    "average_precision": MacroAveragePrecision,
    "ece": CalibrationError,
}

#: Of masks.
MASKS: Mapping[str, Named] = {"dice": MacroF1, "iou": MacroIoU, "balanced_accuracy": BalancedAccuracy}

#: Of several labels: probabilities (N, L), int64 (N, L).
LABELS: Mapping[str, Named] = {
    "auroc": MultilabelMacroAUROC,
    "average_precision": MultilabelMacroAveragePrecision,
}

#: Of one label: probabilities (N,), int64 (N,). Those of the second kind depend on the operating point.
RANKING: Mapping[str, Named] = {"auroc": AUROC, "average_precision": AveragePrecision}
THRESHOLDED: Mapping[str, Callable[..., Metric]] = {
    "balanced_accuracy": BinaryBalancedAccuracy,
    "f1": BinaryF1Score,
    "precision": BinaryPrecision,
    "sensitivity": BinaryRecall,
    "specificity": BinarySpecificity,
}
