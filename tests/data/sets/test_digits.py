from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from fl_lightning.data.sets.digits import DOMAINS, Digits
from fl_lightning.data.splits import SPLITS
from tests.data.made import sizes


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_five_domains_share_out_the_digits(digits: Digits) -> None:
    assert [client.name for client in digits.clients] == list(DOMAINS)
    assert np.sum(sizes(digits)) == 1797
    indices = torch.cat(
        [part for client in digits.partition.clients for part in (client.train, client.indices("val"), client.test)]
    )
    assert sorted(indices.tolist()) == list(range(1797))
    assert (digits.num_classes, digits.in_channels, digits.image_size) == (10, 3, 32)
    counts = [sum(client.label_counts(split) for split in SPLITS) for client in digits.clients]
    assert (torch.stack(counts) - torch.from_numpy(np.bincount(load_digits().target)) / 5).abs().max() < 2


def test_plain_digits_are_those_of_scikit_learn(digits: Digits) -> None:
    images, labels = digits.clients[0].examples("test")
    bundle = load_digits()
    indices = digits.partition.clients[0].test.numpy()
    assert np.array_equal(bundle.target[indices], labels.numpy())
    small = images.float().mean(1).view(-1, 8, 4, 8, 4).mean((2, 4)).numpy() / 255 * 16
    assert np.corrcoef(small.ravel(), bundle.images[indices].ravel())[0, 1] > 0.97


def test_inverted_digits_are_dark_on_bright(digits: Digits) -> None:
    means = {client.name: client.examples("train")[0].float().mean().item() for client in digits.clients}
    assert means["plain"] < 100
    assert means["inverted"] == pytest.approx(255 - means["plain"], abs=5)


def test_only_noise_and_background_are_coloured(digits: Digits) -> None:
    for client in digits.clients:
        images = client.examples("train")[0]
        assert bool((images == images[:, :1]).all()) == (client.name in ("plain", "inverted", "rotated"))


def test_the_seed_changes_splits_and_not_images(digits: Digits) -> None:
    other = Digits(seed=1)
    assert other.partition.fingerprint == digits.partition.fingerprint
    assert other.partition.hash != digits.partition.hash
    assert Digits().partition.hash == digits.partition.hash


def test_domains_can_be_held_out() -> None:
    data = Digits(unseen_clients=["noisy"])
    assert [client.name for client in data.unseen] == ["noisy"]
    assert len(data.clients) == 4
    with pytest.raises(ValueError, match="`unseen_clients` names 'loud', but the clients are plain"):
        Digits(unseen_clients=["loud"])
