from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from fl_lightning.evaluation.predict import evaluating, joined_batches, predict, predict_clients, score_clients

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
    with pytest.raises(ValueError, match="at least one batch"):
        predict(CountedForwards(), [])


def test_scores_equal_scikit_learn_client_by_client(datas: list[FakeData]) -> None:
    model = CountedForwards()
    scores = score_clients(model, datas)
    all_probabilities, all_targets = [], []
    for data, found in zip(datas, scores.by_client, strict=True):
        if isinstance(data, EmptyData):
            assert math.isnan(found["accuracy"])
            assert math.isnan(found["loss"])
            continue
        probabilities = model.linear(data.x).softmax(1).detach().double().numpy()
        probabilities /= probabilities.sum(1, keepdims=True)
        assert found["accuracy"] == pytest.approx(accuracy_score(data.y, probabilities.argmax(1)))
        assert found["loss"] == pytest.approx(log_loss(data.y, probabilities, labels=range(NUM_CLASSES)), rel=1e-5)
        all_probabilities += probabilities.argmax(1).tolist()
        all_targets += data.y.tolist()
    assert scores.pooled["accuracy"] == pytest.approx(accuracy_score(all_targets, all_probabilities))
    assert scores.values("loss")[0] == scores.by_client[0]["loss"]


def test_small_clients_share_forward_passes(datas: list[FakeData]) -> None:
    model = CountedForwards()
    score_clients(model, datas, batch_size=1000)
    assert model.sizes == [65]
    joined = CountedForwards()
    score_clients(joined, datas)
    assert max(joined.sizes) <= 16
    assert sum(joined.sizes) == 65
    assert len(joined.sizes) <= 6  # 16 batches otherwise


def test_joining_changes_no_score(datas: list[FakeData]) -> None:
    model = CountedForwards()
    joined, alone = score_clients(model, datas, batch_size=1000), score_clients(model, datas, batch_size=1)
    for one, other in zip([*joined.by_client, joined.pooled], [*alone.by_client, alone.pooled], strict=True):
        assert one == pytest.approx(other, rel=1e-6, nan_ok=True)


def test_a_batch_larger_than_the_limit_passes_whole() -> None:
    batches = list(joined_batches([FakeData(0, 9, batch_size=9), FakeData(1, 2)], "test", batch_size=4))
    assert [len(batch.y) for batch in batches] == [9, 2]


def test_clients_of_different_image_size_are_not_joined() -> None:
    batches = list(joined_batches([FakeData(0, 3), FakeData(1, 3, num_features=7)], "test"))
    assert [tuple(batch.x.shape) for batch in batches] == [(3, 6), (3, 7)]


def test_any_torchmetric_is_taken_and_stays_as_it_was(datas: list[FakeData]) -> None:
    model, data = CountedForwards(), datas[5]
    metrics = {"f1": MulticlassF1Score(NUM_CLASSES, average="macro")}
    scores = score_clients(model, [data, datas[1]], metrics=metrics)
    expected = f1_score(data.y, model.linear(data.x).argmax(1), average="macro")
    assert scores.by_client[0]["f1"] == pytest.approx(expected, rel=1e-6)
    # Not a mean over examples: pooled differs from the weighted mean.
    everything = torch.cat([data.x, datas[1].x]), torch.cat([data.y, datas[1].y])
    expected = f1_score(everything[1], model.linear(everything[0]).argmax(1), average="macro")
    assert scores.pooled["f1"] == pytest.approx(expected, rel=1e-6)
    assert metrics["f1"]._update_count == 0


def test_a_metric_of_several_numbers_is_refused(datas: list[FakeData]) -> None:
    with pytest.raises(ValueError, match="'per_class' to compute one number"):
        score_clients(CountedForwards(), datas, metrics={"per_class": MulticlassAccuracy(NUM_CLASSES, average="none")})


def test_clients_without_any_example_score_nan(datas: list[FakeData]) -> None:
    scores = score_clients(CountedForwards(), datas, split="val")
    assert all(math.isnan(value) for value in scores.values("accuracy"))
    assert math.isnan(scores.pooled["accuracy"])


def test_bad_arguments_are_refused(datas: list[FakeData]) -> None:
    with pytest.raises(ValueError, match="'train', 'val' or 'test', but got 'valid'"):
        score_clients(CountedForwards(), datas, split="valid")
    with pytest.raises(ValueError, match="at least one client"):
        score_clients(CountedForwards(), [])


def test_outputs_of_each_client(datas: list[FakeData]) -> None:
    model = CountedForwards()
    for data, (outputs, targets) in zip(datas, predict_clients(model, datas), strict=True):
        if isinstance(data, EmptyData):
            assert len(outputs) == len(targets) == 0
        else:
            torch.testing.assert_close(outputs, model.linear(data.x))
            assert torch.equal(targets, data.y)
            assert not outputs.is_inference()
    assert sum(model.sizes) == 65


def test_the_training_split_is_asked_for_in_order_and_not_augmented(datas: list[FakeData]) -> None:
    class TrainData(FakeData):
        def eval_dataloader(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
            assert split == "train"
            return self.test_dataloader()

    model = CountedForwards()
    found = score_clients(model, [TrainData(1, 10)], split="train")
    assert found.by_client == score_clients(model, [FakeData(1, 10)]).by_client


def test_looking_at_the_training_loss_changes_no_training() -> None:
    """With the real client data: the order of the next epoch stays what it was."""
    from fl_lightning.data import Digits

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
    scores = score_clients(model, clients, "train")
    assert torch.equal(epoch(), second)
    for client, found in zip(clients, scores.by_client, strict=True):
        logits, targets = predict(model, client.eval_dataloader("train"))
        assert len(targets) == client.num_train
        assert torch.equal(targets, client.examples("train")[1])
        assert found["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)))
