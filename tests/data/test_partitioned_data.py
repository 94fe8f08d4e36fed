from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_lightning.data.client_data import ClientData
from fl_lightning.data.partitioners import Dirichlet, Iid, LabelCount
from tests.data.made import MadeSet


def everyone(data: MadeSet) -> list[ClientData]:
    return [*data.clients, *data.unseen]


def indices(data: MadeSet) -> list[int]:
    return torch.cat([i for c in data.partition.clients for i in (c.train, c.indices("val"), c.test)]).tolist()


@pytest.mark.parametrize("test_split", ["official", "pooled"])
def test_every_image_goes_to_one_split_of_one_client(test_split: str) -> None:
    data = MadeSet(num_clients=3, num_unseen=2, partitioner=Dirichlet(1.0), test_split=test_split)
    assert sorted(indices(data)) == list(range(260))
    assert [client.id for client in everyone(data)] == [0, 1, 2, 3, 4]
    assert (len(data.clients), len(data.unseen)) == (3, 2)


def test_official_test_images_are_only_tested_on() -> None:
    data = MadeSet(num_clients=4, partitioner=LabelCount(2))
    for client, part in zip(data.clients, data.partition.clients, strict=True):
        assert max(part.train.max(), part.indices("val").max()) < 200 <= part.test.min()
        trained = client.label_counts("train") + client.label_counts("val")
        # Each class has 50 training and 15 test images here, shared in the same proportions.
        assert (client.label_counts("test") - trained * 15 / 50).abs().max() < 1


def test_pooled_keeps_the_asked_share_for_testing() -> None:
    data = MadeSet(num_clients=4, partitioner=Iid(), test_split="pooled", test_fraction=0.4, val_fraction=0.0)
    assert [(client.num_train, client.num_val, client.num_test) for client in data.clients] == [(39, 0, 26)] * 4


def test_the_seed_decides() -> None:
    one, same, other = (MadeSet(num_clients=3, seed=seed) for seed in (1, 1, 2))
    one.partition.check_equal(same.partition)
    with pytest.raises(ValueError, match="client 0 'client 0' .*another train split"):
        one.partition.check_equal(other.partition)


def test_a_thousand_clients_share_one_pool() -> None:
    data = MadeSet(num_clients=1000, num_train=8000, num_test=2000, partitioner=Iid(min_size=2))
    pools = {client.train_dataloader().source.examples.data_ptr() for client in data.clients}
    assert len(pools) == 1


def test_a_client_without_official_test_images_is_an_error_that_names_the_way_out() -> None:
    with pytest.raises(ValueError, match="leave 17 of 20 clients without one; set data.test_split=pooled"):
        MadeSet(num_clients=20, num_test=3, partitioner=Iid())
    data = MadeSet(num_clients=20, num_test=3, partitioner=Iid(), test_split="pooled")
    assert min(client.num_test for client in data.clients) >= 1


def test_description_says_how_it_was_made() -> None:
    description = MadeSet(partitioner=Dirichlet(0.7), seed=5).partition.description
    assert description["partitioner"] == "Dirichlet(min_size=10, alpha=0.7, equal_sizes=False)"
    assert description["seed"] == 5


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="num_clients must be at least 1, got 0"):
        MadeSet(num_clients=0)
    with pytest.raises(ValueError, match="num_unseen must be at least 0, got -1"):
        MadeSet(num_unseen=-1)
    with pytest.raises(ValueError, match="test_split must be one of official, pooled, got 'both'"):
        MadeSet(test_split="both")
    with pytest.raises(ValueError, match=r"test_fraction must lie in \(0, 1\), got 1"):
        MadeSet(test_split="pooled", test_fraction=1)
    with pytest.raises(TypeError, match="data.partitioner must be .*alpha"):
        MadeSet(partitioner={"alpha": 0.1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'alpha'"):
        MadeSet(alpha=0.1)


def test_labels_of_all_splits_come_from_the_client_only() -> None:
    data = MadeSet(num_clients=5, partitioner=LabelCount(1))
    for client in data.clients:
        held = {
            split: np.flatnonzero(client.label_counts(split).numpy()).tolist() for split in ("train", "val", "test")
        }
        assert held["train"] == held["val"] == held["test"]
        assert len(held["train"]) == 1
