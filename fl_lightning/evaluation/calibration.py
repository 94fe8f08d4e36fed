"""Whether a model is right as often as it says."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError
from typing_extensions import override


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits: mean gap between confidence and accuracy over equally wide bins.

    Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, https://arxiv.org/abs/1706.04599,
    equation (3). The base class takes logits for probabilities when all of them happen to lie in [0, 1], so the softmax
    is taken here.

    Args:
        num_classes: Classes, at least 2.
        n_bins: Bins of confidence, at least 1.
    """

    def __init__(self, num_classes: int, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(num_classes=num_classes, n_bins=n_bins, norm="l1", validate_args=False, **kwargs)

    @override
    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in logits (N, C) and classes (N,)."""
        super().update(preds.softmax(dim=-1), target)
