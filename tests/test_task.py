"""Losses and metrics of every task against scikit-learn, client by client and merged."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import BinaryAUROC

from fl_lightning.client import Scores
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.task import TASKS, Binary, Classification, Language, Multilabel, Regression, Segmentation, Task, guess

CLASSES = 4


class Data:
    """A client whose examples are what the model answers: outputs and targets, in batches of 7."""

    def __init__(self, outputs: Tensor, targets: Tensor, num_classes: int) -> None:
        self.outputs, self.targets, self.num_classes = outputs, targets, num_classes

    def test_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.outputs.split(7), self.targets.split(7), strict=True)

    def val_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.test_dataloader()


def draw(task: str, number: int, seed: int) -> Data:
    g = torch.Generator().manual_seed(seed)
    if task == "regression":
        return Data(torch.randn(number, 1, generator=g), torch.randn(number, generator=g), 1)
    if task == "binary":
        return Data(torch.randn(number, 1, generator=g), (torch.rand(number, generator=g) < 0.3).long(), 2)
    if task == "multilabel":
        y = (torch.rand(number, 3, generator=g) < 0.4).float()
        y[torch.rand(y.shape, generator=g) < 0.2] = math.nan
        return Data(torch.randn(number, 3, generator=g), y, 3)
    shape = {"classification": (number,), "segmentation": (number, 3, 3), "language": (number, 5)}[task]
    # Not all classes are there: a macro average is over those that are.
    y = torch.randint(0, CLASSES - 1, shape, generator=g)
    outputs = torch.randn(*shape, CLASSES, generator=g)
    if len(shape) > 1:
        y[torch.rand(shape, generator=g) < 0.2] = -100
    return Data(outputs.movedim(-1, 1) if task == "segmentation" else outputs, y, CLASSES)


def flat(data: list[Data], task: str) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and targets of clients together, without those that are ignored, by other means than the task's."""
    outputs, targets = torch.cat([d.outputs for d in data]), torch.cat([d.targets for d in data])
    if task in ("segmentation", "language"):
        outputs = outputs.permute(0, 2, 3, 1) if task == "segmentation" else outputs
        kept = targets.reshape(-1) != -100
        return outputs.reshape(-1, CLASSES)[kept].double().numpy(), targets.reshape(-1)[kept].numpy()
    return outputs.squeeze(1).double().numpy(), targets.numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def by_present(score: Callable[[Any, Any], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    """One class against the rest, mean over the classes that there are."""
    return lambda x, y: float(np.mean([score(y == c, softmax(x)[:, c]) for c in np.unique(y)]))


def by_label(score: Callable[[Any, Any], float]) -> Callable[[np.ndarray, np.ndarray], float]:
    def scored(x: np.ndarray, y: np.ndarray) -> float:
        known = [(x[~np.isnan(y[:, k]), k], y[~np.isnan(y[:, k]), k]) for k in range(y.shape[1])]
        return float(np.mean([score(b, sigmoid(a)) for a, b in known]))

    return scored


def hard(score: Callable[..., float], **options: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda x, y: float(score(y, x.argmax(1), **options))


def yes(score: Callable[..., float], **options: Any) -> Callable[[np.ndarray, np.ndarray], float]:
    return lambda x, y: float(score(y, sigmoid(x) >= 0.3, **options))


def nll(x: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(softmax(x)[np.arange(len(y)), y]).mean())


PRESENT = {"average": "macro", "labels": range(CLASSES - 1), "zero_division": 0}
OF_CLASSES = {
    "accuracy": hard(sk.accuracy_score),
    "loss": nll,
    "balanced_accuracy": lambda x, y: hard(sk.recall_score, **PRESENT)(x, y),
}
ORACLES: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], float]]] = {
    "classification": {
        **OF_CLASSES,
        "f1": hard(sk.f1_score, **PRESENT),
        "precision": hard(sk.precision_score, **PRESENT),
        "auroc": by_present(sk.roc_auc_score),
        "average_precision": by_present(sk.average_precision_score),
    },
    "segmentation": {
        **OF_CLASSES,
        "dice": hard(sk.f1_score, **PRESENT),
        "iou": hard(sk.jaccard_score, **PRESENT),
    },
    "language": {"perplexity": lambda x, y: math.exp(nll(x, y)), "accuracy": hard(sk.accuracy_score), "loss": nll},
    "binary": {
        "auroc": lambda x, y: float(sk.roc_auc_score(y, x)),
        "average_precision": lambda x, y: float(sk.average_precision_score(y, x)),
        "accuracy": yes(sk.accuracy_score),
        "balanced_accuracy": yes(sk.balanced_accuracy_score),
        "f1": yes(sk.f1_score),
        "precision": yes(sk.precision_score),
        "sensitivity": yes(sk.recall_score),
        "specificity": yes(sk.recall_score, pos_label=0),
        "loss": lambda x, y: float(sk.log_loss(y, sigmoid(x))),
    },
    "multilabel": {
        "auroc": by_label(sk.roc_auc_score),
        "average_precision": by_label(sk.average_precision_score),
        "f1": by_label(lambda y, p: sk.f1_score(y, p >= 0.5)),
        "accuracy": lambda x, y: float(((sigmoid(x) >= 0.5) == y)[~np.isnan(y)].mean()),
        "loss": lambda x, y: float(sk.log_loss(y[~np.isnan(y)], sigmoid(x)[~np.isnan(y)])),
    },
    "regression": {
        "rmse": lambda x, y: math.sqrt(sk.mean_squared_error(y, x)),
        "mse": lambda x, y: float(sk.mean_squared_error(y, x)),
        "mae": lambda x, y: float(sk.mean_absolute_error(y, x)),
        "r2": lambda x, y: float(sk.r2_score(y, x)),
        "loss": lambda x, y: float(sk.mean_squared_error(y, x)),
    },
}
MADE: dict[str, Task] = {name: Binary(threshold=0.3) if name == "binary" else kind() for name, kind in TASKS.items()}


@pytest.mark.parametrize("name", TASKS)
def test_every_metric_equals_scikit_learn_at_a_client_and_merged(name: str) -> None:
    task, datas = MADE[name], [draw(name, 40, 0), draw(name, 23, 1)]
    # Calibration and whole answers have oracles of their own: test_calibration.py, test_hf.py.
    assert set(ORACLES[name]) == set(task.metrics) - {"ece", "exact_match"}
    assert set(task.defaults) <= set(task.metrics)
    metrics = pickle.loads(pickle.dumps(Metrics(dict.fromkeys(ORACLES[name]), task)))  # as a worker gets it
    scores = [Scores(k, 1, *metrics.score(lambda x: x, data, confusion=True)) for k, data in enumerate(datas)]
    pooled = metrics.pooled(scores, datas[0].num_classes)
    for metric, oracle in ORACLES[name].items():
        assert scores[0].values[metric] == pytest.approx(oracle(*flat(datas[:1], name)), rel=1e-5), metric
        assert pooled[metric] == pytest.approx(oracle(*flat(datas, name)), rel=1e-5), metric
        again = metrics.of_outputs(datas[0].outputs, datas[0].targets, [metric], datas[0].num_classes)
        assert again[metric] == pytest.approx(scores[0].values[metric], rel=1e-5), metric
    worse = {"loss", "rmse", "mse", "mae", "perplexity"}
    assert {m for m in ORACLES[name] if metrics.mode(m, datas[0].num_classes) == "min"} == worse & set(ORACLES[name])
    if task.has_classes:
        x, y = flat(datas[:1], name)
        predicted = sigmoid(x) >= 0.3 if name == "binary" else x.argmax(1)
        expected = sk.confusion_matrix(y, predicted, labels=range(datas[0].num_classes))
        assert scores[0].confusion is not None
        assert scores[0].confusion.tolist() == expected.tolist()
    else:
        assert scores[0].confusion is None


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_is_torch_s_and_a_target_tells_its_task(name: str) -> None:
    data, task = draw(name, 12, 3), MADE[name]
    x, y = flat([data], name)
    out, target = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    if name == "multilabel":
        out, target = out[~target.isnan()], target[~target.isnan()]
    by_name: dict[str, Callable[..., Tensor]] = {
        "regression": functional.mse_loss,
        "binary": lambda a, b: functional.binary_cross_entropy_with_logits(a, b.float()),
        "multilabel": functional.binary_cross_entropy_with_logits,
    }
    loss = by_name.get(name, functional.cross_entropy)
    torch.testing.assert_close(task.loss(data.outputs, data.targets), loss(out, target))
    task.check(data.outputs, data.targets, data.num_classes)
    floats = data.targets.float() if name == "binary" else data.targets
    assert type(guess(floats)) is type(task)


def test_what_nobody_knows_teaches_nothing() -> None:
    outputs = torch.randn(3, 2, requires_grad=True)
    for task, x, y in (
        (Multilabel(), outputs, torch.full((3, 2), math.nan)),
        (Language(), outputs[:, None], torch.full((3, 1), -100)),
    ):
        loss = task.loss(x, y)
        assert loss == 0
        assert torch.autograd.grad(loss, outputs)[0].abs().sum() == 0


def test_weights_of_rare_classes_and_positives() -> None:
    x, y = torch.randn(6, 3), torch.tensor([0, 0, 1, 2, 1, 0])
    weights = [1.0, 2.0, 5.0]
    expected = functional.cross_entropy(x, y, weight=torch.tensor(weights))
    torch.testing.assert_close(Classification(class_weights=weights).loss(x, y), expected)
    yes_no = (y == 2).float()
    expected = functional.binary_cross_entropy_with_logits(x[:, 0], yes_no, pos_weight=torch.tensor(4.0))
    torch.testing.assert_close(Binary(positive_weight=4).loss(x[:, :1], yes_no), expected)
    torch.testing.assert_close(Regression(torch.nn.HuberLoss(delta=0.1)).loss(x, x + 1), torch.tensor(0.095))


def test_soft_dice_of_a_perfect_mask_is_0_and_of_an_empty_one_1() -> None:
    y = torch.randint(0, 2, (2, 4, 4))
    logits = 50.0 * functional.one_hot(y, 2).movedim(-1, 1).float()
    assert float(Segmentation("dice").loss(logits, y)) == pytest.approx(0, abs=1e-6)
    assert float(Segmentation("dice").loss(-logits, y)) == pytest.approx(1, abs=1e-6)


def test_auroc_of_one_class_alone_is_no_number_and_of_two_logits_is_that_of_the_second() -> None:
    one = Data(torch.randn(5, 1), torch.zeros(5, dtype=torch.long), 2)
    assert math.isnan(Metrics({"auroc": None}, Binary()).score(lambda x: x, one)[0]["auroc"])
    x, y = torch.randn(20, 2), torch.tensor([0, 1] * 10)
    found = Metrics({"auroc": None, "theirs": BinaryAUROC}).score(lambda x: x, Data(x, y, 2))[0]
    expected = pytest.approx(sk.roc_auc_score(y, x.softmax(1)[:, 1]))
    assert found == {"auroc": expected, "theirs": expected}


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "sentence"),
    [
        (Classification(), (4, 3), torch.zeros(4), "task=classification takes one whole number.*got float32"),
        (Classification(), (4, 3), torch.tensor([0, 1, 3, 1]), "got the class 3 of 3"),
        (Classification(), (4, 2), torch.tensor([0, 1, 2, 1]), r"answers with shape \(4, 2\).*\(4, 3\)"),
        (Regression(), (4, 1), torch.zeros(4, dtype=torch.long), "task=regression takes real numbers.*got int64"),
        (Regression(), (4, 1), torch.tensor([0.0, math.nan, 1, 2]), "got NaN"),
        (Multilabel(), (4, 3), torch.full((4, 3), 2.0), "values other than 0, 1 and NaN"),
        (Segmentation(), (4, 3), torch.zeros(4, dtype=torch.long), "a whole number for each pixel"),
        (Binary(), (4, 1), torch.tensor([0, 1, 3, 1]), "got 3 classes"),
    ],
)
def test_targets_of_another_kind_are_refused(
    task: Task, outputs: tuple[int, ...], targets: Tensor, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        task.check(torch.zeros(outputs), targets, 3)


def test_a_metric_that_the_task_has_not() -> None:
    with pytest.raises(ValueError, match="evaluation.metrics.auc must be a torchmetrics metric or one of rmse, mse"):
        Metrics({"auc": None}, Regression())
