from __future__ import annotations

import pytest
import torch

from fl_lightning.data.pools import ImagePool
from fl_lightning.data.transforms import Normalization
from tests.data.made import pool


def test_gather_takes_copies() -> None:
    source = pool(5)
    images, labels = source.gather(torch.tensor([3, 0]))
    assert torch.equal(images[1], source.examples[0])
    assert labels.tolist() == [0, 0]
    images.zero_()
    assert source.examples[0].any()


def test_fingerprint_follows_images_labels_and_shape() -> None:
    source = pool(8, 1, 4)
    assert pool(8, 1, 4).fingerprint() == source.fingerprint()
    images = source.examples.clone()
    images[7, 0, 3, 3] += 1
    labels = source.labels.clone()
    labels[0] = 2
    others = [
        ImagePool(images, source.labels),
        ImagePool(source.examples, labels),
        ImagePool(source.examples.view(8, 4, 2, 2), source.labels),
    ]
    assert len({source.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_moving_keeps_the_contents() -> None:
    source = pool(5)
    expected = source.examples.clone()
    fingerprint = source.fingerprint()
    assert source.fits("cpu")
    source.to("cpu")
    assert torch.equal(source.examples, expected)
    assert source.fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), TypeError, "uint8, got torch.float32"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2).int(), TypeError, "labels .* int64 .*, got torch.int32"),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), ValueError, r"\(N, C, H, W\), got \(2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 5).byte(), torch.zeros(2).long(), ValueError, "square, got 4x5"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), ValueError, "one label per example, got 2"),
    ],
)
def test_bad_input(images: torch.Tensor, labels: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ImagePool(images, labels)


def test_bad_normalization() -> None:
    with pytest.raises(ValueError, match="std must be above 0"):
        Normalization(0.5, 0.0)
    with pytest.raises(ValueError, match="mean must be as long as std"):
        Normalization([0.5], [0.5, 0.5])
    with pytest.raises(ValueError, match="have 3 values, but the images have 1 channel"):
        Normalization([0.5] * 3, [0.5] * 3).check_channels(1)
