from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, roc_auc_score
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from fl_lightning.client import Scores
from fl_lightning.evaluation.predict import Metrics, evaluating, predict, score

NUM_CLASSES = 4


class FakeData:
    """A client whose test set comes in batches of a given size."""

    num_classes = NUM_CLASSES
    eval_batch_size = 16

    def __init__(self, seed: int, num_test: int, batch_size: int = 5, num_features: int = 6) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(num_test, num_features, generator=generator)
        self.y = torch.randint(NUM_CLASSES, (num_test,), generator=generator)
        self.batch_size = batch_size

    def test_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True)))

    def val_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([])


class CountedForwards(nn.Module):
    """A linear model that notes the sizes of its batches and whether gradients and eval mode were off and on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(6, NUM_CLASSES)
        self.dropout = nn.Dropout(0.5)
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        assert torch.is_inference_mode_enabled()
        assert not self.training
        return self.dropout(self.linear(x))


@pytest.fixture
def datas() -> list[FakeData]:
    sizes = [3, 10, 1, 0, 7, 40, 2, 2]
    return [FakeData(seed, size) if size else EmptyData(seed, 1) for seed, size in enumerate(sizes)]


class EmptyData(FakeData):
    def test_dataloader(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([])


def test_evaluating_gives_every_submodule_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    model.train()
    model[1].eval()
    model[2][1].eval()
    before = [module.training for module in model.modules()]

    def fail() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_evaluating_finds_the_module_behind_a_method() -> None:
    model = CountedForwards()
    with evaluating(model.forward) as found:
        assert found is model
        assert not model.training
    assert model.training


def test_predict_returns_everything_in_order_usable_for_training() -> None:
    data, model = FakeData(0, 12), CountedForwards()
    logits, targets = predict(model, data.test_dataloader())
    assert torch.equal(targets, data.y)
    torch.testing.assert_close(logits, model.linear(data.x))
    assert not logits.is_inference()  # an inference tensor could not be saved for backward
    assert model.training
    assert model.sizes == [5, 5, 2]


def test_predict_leaves_batches_usable_for_training() -> None:
    class Lazy:
        """Makes its tensor when first asked, as a pool that moves to the device late does."""

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.x = torch.ones(2, 6)
            yield self.x, torch.zeros(2, dtype=torch.long)

    lazy = Lazy()
    predict(CountedForwards(), lazy)
    assert not lazy.x.is_inference()


def test_predict_without_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one, got none"):
        predict(CountedForwards(), [])


def scored(metrics: Metrics, model: nn.Module, datas: list[FakeData]) -> list[Scores]:
    return [Scores(place, len(data.y), *metrics.score(model, data)) for place, data in enumerate(datas)]


def test_scores_equal_scikit_learn_client_by_client(datas: list[FakeData]) -> None:
    model, metrics = CountedForwards(), Metrics()
    scores = scored(metrics, model, datas)
    all_predictions, all_targets = [], []
    for data, found in zip(datas, (one.values for one in scores), strict=True):
        if isinstance(data, EmptyData):
            assert math.isnan(found["accuracy"])
            assert math.isnan(found["loss"])
            continue
        probabilities = model.linear(data.x).softmax(1).detach().double().numpy()
        probabilities /= probabilities.sum(1, keepdims=True)
        assert found["accuracy"] == pytest.approx(accuracy_score(data.y, probabilities.argmax(1)))
        assert found["loss"] == pytest.approx(log_loss(data.y, probabilities, labels=range(NUM_CLASSES)), rel=1e-5)
        all_predictions += probabilities.argmax(1).tolist()
        all_targets += data.y.tolist()
    pooled = metrics.pooled(scores, NUM_CLASSES)
    assert pooled["accuracy"] == pytest.approx(accuracy_score(all_targets, all_predictions))


def test_a_score_does_not_depend_on_who_else_is_scored(datas: list[FakeData]) -> None:
    model = CountedForwards()
    together = [one.values for one in scored(Metrics(), model, datas)]
    assert together[5] == score(model, datas[5])
    assert max(model.sizes) <= 5  # a client's own batches, never joined


def test_confusion_counts_true_and_predicted_classes(datas: list[FakeData]) -> None:
    model, data = CountedForwards(), datas[5]
    values, totals, confusion = Metrics().score(model, data, names=(), confusion=True)
    expected = confusion_matrix(data.y, model.linear(data.x).argmax(1), labels=range(NUM_CLASSES))
    assert values == totals == {}
    assert confusion is not None
    assert confusion.tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["f1", "auroc"])
def test_any_torchmetric_is_taken_and_pooled_over_examples(name: str, datas: list[FakeData]) -> None:
    makers = {
        "f1": partial(MulticlassF1Score, average="macro"),  # its states are sums
        "auroc": partial(MulticlassAUROC, average="macro"),  # its states are lists
    }
    model, data, metrics = CountedForwards(), datas[5], Metrics({name: makers[name]})

    def expected(x: Tensor, y: Tensor) -> float:
        logits = model.linear(x).detach()
        if name == "f1":
            return f1_score(y, logits.argmax(1), average="macro")
        return roc_auc_score(y, logits.softmax(1), multi_class="ovr", average="macro")

    scores = scored(metrics, model, [data, datas[1]])
    assert scores[0].values[name] == pytest.approx(expected(data.x, data.y), rel=1e-6)
    # Not a mean over examples: pooled differs from the weighted mean.
    everything = expected(torch.cat([data.x, datas[1].x]), torch.cat([data.y, datas[1].y]))
    assert metrics.pooled(scores, NUM_CLASSES)[name] == pytest.approx(everything, rel=1e-6)
    assert metrics.mode(name, NUM_CLASSES) == "max"


def test_a_metric_of_several_numbers_is_refused(datas: list[FakeData]) -> None:
    metrics = Metrics({"per_class": partial(MulticlassAccuracy, average="none")})
    with pytest.raises(ValueError, match="evaluation.metrics.per_class must compute one number"):
        metrics.score(CountedForwards(), datas[1])


def test_a_number_of_classes_that_was_given_stands(datas: list[FakeData]) -> None:
    """So that a wrong one is said, and not put right without a word."""
    metrics = Metrics({"few": partial(MulticlassAccuracy, num_classes=NUM_CLASSES - 1)})
    with pytest.raises(ValueError, match=r"number of classes|preds.shape\[1\]|num_classes"):
        metrics.score(CountedForwards(), datas[1])


def test_clients_without_any_example_score_nan(datas: list[FakeData]) -> None:
    metrics = Metrics()
    values, totals, _ = metrics.score(CountedForwards(), datas[1], "val")
    assert all(math.isnan(value) for value in values.values())
    assert math.isnan(metrics.pooled([Scores(0, 0, values, totals)], NUM_CLASSES)["accuracy"])


def test_the_training_split_is_asked_for_in_order_and_not_augmented(datas: list[FakeData]) -> None:
    class TrainData(FakeData):
        def eval_dataloader(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
            assert split == "train"
            return self.test_dataloader()

    model = CountedForwards()
    assert score(model, TrainData(1, 10), "train") == score(model, FakeData(1, 10))


def test_looking_at_the_training_loss_changes_no_training() -> None:
    """With the real client data: the order of the next epoch stays what it was."""
    from fl_lightning.data.sets.digits import Digits

    clients = Digits(seed=0).clients[:2]

    def epoch() -> Tensor:
        return torch.cat([y for _, y in clients[0].train_dataloader()])

    clients[0].seed(3)
    first, second = epoch(), epoch()
    assert not torch.equal(first, second)
    clients[0].seed(3)
    epoch()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    scores = [score(model, client, "train") for client in clients]
    assert torch.equal(epoch(), second)
    for client, found in zip(clients, scores, strict=True):
        logits, targets = predict(model, client.eval_dataloader("train"))
        assert len(targets) == client.num_train
        assert torch.equal(targets, client.examples("train")[1])
        assert found["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)))
