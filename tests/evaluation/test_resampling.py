"""Metrics of weighted examples: scikit-learn's with sample weights, closed forms, torchmetrics, and plain loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fl_lightning.evaluation.predict import Metrics
from fl_lightning.evaluation.resampling import resampled
from fl_lightning.task import TASKS, Binary, Classification, Language, Multilabel, Regression, Segmentation, Task

N, C = 40, 4
RNG = np.random.default_rng(0)
COUNTS = np.stack([np.bincount(RNG.integers(N, size=N), minlength=N) for _ in range(6)])


def draw(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and targets of a task, with ties and targets that do not count."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 4).round() / 4  # ties

    def classes(*shape: int) -> torch.Tensor:
        return torch.randint(C, shape, generator=generator)

    if isinstance(task, Classification):
        y = classes(N)
        return normal(N, C) + torch.eye(C)[y], y
    if isinstance(task, Segmentation):
        y = classes(N, 3, 3)
        outputs = normal(N, C, 3, 3) + torch.eye(C)[y].movedim(-1, 1)
        return outputs, torch.where(torch.rand(y.shape, generator=generator) < 0.2, -100, y)
    if isinstance(task, Language):
        y = classes(N, 5)
        outputs = normal(N, 5, C) + 3 * torch.eye(C)[y]  # so that some answers are right as a whole
        return outputs, torch.where(torch.rand(y.shape, generator=generator) < 0.2, -100, y)
    if isinstance(task, Multilabel):
        y = torch.randint(2, (N, 3), generator=generator).float()
        return normal(N, 3) + y, torch.where(torch.rand(y.shape, generator=generator) < 0.2, torch.nan, y)
    if isinstance(task, Binary):
        y = torch.randint(2, (N, 1), generator=generator).float()
        return normal(N, 1) + y, y
    y = normal(N, 2)
    return y + normal(N, 2), y


PAIRS = [(name, metric) for name, kind in TASKS.items() for metric in kind().metrics]


@pytest.mark.parametrize(("name", "metric"), PAIRS)
def test_of_a_resample_it_is_the_metric_of_the_resample(name: str, metric: str) -> None:
    """Weights of counts give what torchmetrics gives of the examples, each as often as it was drawn."""
    task = TASKS[name]()
    how = resampled(task, metric)
    if how is None:
        assert (name, metric) in {("classification", "accuracy"), ("classification", "loss")}
        return
    outputs, targets = draw(task)
    parts = how.parts(outputs, targets).double().numpy()
    found = how.values(COUNTS / N, parts)
    measure = Metrics({metric: None}, task)
    number = 2 if name == "regression" else 3 if name == "multilabel" else C
    for counts, value in zip(COUNTS, found, strict=True):
        drawn = torch.from_numpy(np.repeat(np.arange(N), counts))
        expected = measure.of_outputs(outputs[drawn], targets[drawn], [metric], number)[metric]
        assert value == pytest.approx(expected, rel=2e-5, abs=1e-6)
    assert how.value(parts) == pytest.approx(measure.of_outputs(outputs, targets, [metric], number)[metric], rel=2e-5)


@pytest.mark.parametrize(
    ("metric", "reference"),
    [
        ("auroc", sk.roc_auc_score),
        ("average_precision", sk.average_precision_score),
        ("f1", lambda y, s, sample_weight: sk.f1_score(y, s > 0, sample_weight=sample_weight)),
        ("sensitivity", lambda y, s, sample_weight: sk.recall_score(y, s > 0, sample_weight=sample_weight)),
    ],
)
def test_any_weights_as_scikit_learn(metric: str, reference: Any) -> None:
    task = Binary()
    outputs, targets = draw(task)
    outputs = outputs + 0.01  # none at the threshold itself
    how = resampled(task, metric)
    assert how is not None
    weights = RNG.dirichlet(np.ones(N), size=4)
    found = how.values(weights, how.parts(outputs, targets).double().numpy())
    truth, scores = targets[:, 0].numpy(), outputs[:, 0].double().numpy()
    expected = [reference(truth, scores, sample_weight=row) for row in weights]
    assert found == pytest.approx(expected, rel=1e-6)


def test_root_mean_square_in_closed_form() -> None:
    how = resampled(Regression(), "rmse")
    assert how is not None
    parts = how.parts(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [0.0]])).double().numpy()
    assert how.values(np.array([[0.25, 0.75]]), parts) == pytest.approx([np.sqrt(0.25 + 0.75 * 9)])


def test_without_both_classes_there_is_no_auroc() -> None:
    how = resampled(Binary(), "auroc")
    assert how is not None
    parts = np.array([[0.2, 1.0], [0.7, 1.0], [0.4, 0.0]])
    assert np.isnan(how.values(np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]), parts)).tolist() == [True, False]
