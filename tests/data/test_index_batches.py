from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from fl_lightning.data.batches import IndexBatches
from fl_lightning.data.transforms import Normalization, RandomCrop, RandomHorizontalFlip
from tests.data.made import numbered_pool, pool


def batches(num_images: int = 20, batch_size: int = 4, seed: int | None = 0, **options: Any) -> IndexBatches:
    return IndexBatches(
        numbered_pool(num_images),
        torch.arange(num_images),
        batch_size,
        normalization=Normalization(0.0, 1.0),
        seed=seed,
        **options,
    )


def epoch(loader: IndexBatches) -> list[int]:
    return torch.cat([y for _, y in loader]).tolist()


def test_an_epoch_holds_every_example_once_with_its_own_image() -> None:
    loader = batches()
    for _ in range(3):
        pairs = list(loader)
        assert sorted(torch.cat([y for _, y in pairs]).tolist()) == list(range(20))
        for x, y in pairs:
            assert x.dtype == torch.float32
            assert torch.allclose(x[:, 0, 0, 0] * 255, y.float(), atol=1e-4)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first, second = batches(seed=5), batches(seed=5)
    expected = [epoch(first), epoch(first), epoch(first)]
    got = [epoch(second)]
    torch.manual_seed(0)
    epoch(batches(seed=6))  # another client in between
    got += [epoch(second), epoch(second)]
    assert got == expected
    assert expected[0] != expected[1] != expected[2]
    assert epoch(batches(seed=6)) != expected[0]
    second.set_seed(5)
    assert epoch(second) == expected[0]


def test_shuffling_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    epoch(batches())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_iterator_that_is_not_used_costs_no_epoch() -> None:
    loader = batches()
    iter(loader)
    assert epoch(loader) == epoch(batches())


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    loader, reference = batches(), batches()
    pairs = list(zip(loader, loader, strict=True))
    assert torch.cat([one[1] for one, _ in pairs]).tolist() == epoch(reference)
    assert torch.cat([other[1] for _, other in pairs]).tolist() == epoch(reference)


def test_positions_of_examples_are_shuffled_uniformly() -> None:
    """Chi-square against the uniform distribution: example 0 is equally often at each of five places."""
    counts = torch.zeros(5)
    for seed in range(1000):
        counts[epoch(batches(5, seed=seed)).index(0)] += 1
    assert float(((counts - 200) ** 2 / 200).sum()) < 18.5  # 0.1 % point with four degrees of freedom


def test_evaluation_keeps_the_order_and_augments_nothing() -> None:
    loader = batches(seed=None, transforms=[RandomCrop(1)])
    assert epoch(loader) == epoch(loader) == list(range(20))
    assert all(torch.allclose(x * 255, y.float().view(-1, 1, 1, 1).expand_as(x), atol=1e-4) for x, y in loader)


@pytest.mark.parametrize("transforms", [(), (RandomHorizontalFlip(),), (v2.RandomHorizontalFlip(),)])
def test_batches_have_the_sizes_announced(transforms: tuple[Any, ...]) -> None:
    loader = batches(21, batch_size=4, avoid_single=True, transforms=transforms)
    assert [len(y) for _, y in loader] == [len(x) for x, _ in loader] == loader.sizes == [4, 4, 4, 4, 5]
    assert len(loader) == 5


@pytest.mark.parametrize("block_bytes", [1, 150, 10**9])
def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    expected = list(batches())
    monkeypatch.setattr("fl_lightning.data.batches.BLOCK_BYTES", block_bytes)
    for (x, y), (expected_x, expected_y) in zip(batches(), expected, strict=True):
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_that_of_torchvision(channels: int) -> None:
    source = pool(10, channels)
    mean, std = [0.1, 0.5, 0.9][:channels], [0.2, 0.25, 0.4][:channels]
    loader = IndexBatches(source, torch.arange(10), 10, normalization=Normalization(mean, std))
    ((x, _),) = list(loader)
    expected = v2.functional.normalize(source.examples.double() / 255, mean, std)
    assert torch.allclose(x.double(), expected, atol=1e-5)


def test_augmentation_is_seeded_and_changes_with_the_epoch() -> None:
    def images(loader: IndexBatches) -> Tensor:
        pairs = list(loader)
        return torch.cat([x for x, _ in pairs])[torch.cat([y for _, y in pairs]).argsort()]

    source = pool(20, num_classes=20)
    options: dict[str, Any] = {"normalization": Normalization(), "seed": 3, "transforms": [RandomCrop(1)]}
    one, other = (IndexBatches(source, torch.arange(20), 4, **options) for _ in range(2))
    first, second = images(one), images(one)
    assert torch.equal(first, images(other))
    assert not torch.equal(first, second)


def test_lightning_sees_the_epochs_that_a_plain_loop_sees() -> None:
    class Listener(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.seen: list[int] = []

        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.seen += batch[1].tolist()
            return self.weight * batch[0].mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Listener()
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches())
    plain = batches()
    assert module.seen == epoch(plain) + epoch(plain) + epoch(plain)


def test_bad_batch_size() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches(batch_size=0)
