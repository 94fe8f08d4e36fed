from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from fl_lightning.data.federated_data import Examples
from fl_lightning.data.transforms import RandomHorizontalFlip
from tests.data.made import Made, sizes


def test_a_data_set_says_what_it_holds() -> None:
    data = Made(sizes=((10, 4), (6, 3)), val_fraction=0.2)
    assert sizes(data) == [(8, 2, 4), (5, 1, 3)]
    assert (data.num_classes, data.class_names, data.in_channels, data.image_size) == (3, ["a", "b", "c"], 3, 4)
    assert data.name == "made"
    assert [client.label_counts("test").sum() for client in data.clients] == [4, 3]


def test_a_client_is_printed_with_its_counts() -> None:
    client = Made(sizes=((10, 4),), val_fraction=0.2).clients[0]
    assert str(client) == repr(client) == "ClientData(name='c0', num_classes=3, num_train=8, num_val=2, num_test=4)"


def test_unseen_clients_come_last_and_keep_their_ids() -> None:
    data = Made(sizes=((10, 4), (6, 4), (7, 4)), num_unseen=1)
    assert [(client.id, client.name) for client in data.clients] == [(0, "c1"), (1, "c2")]
    assert [(client.id, client.name) for client in data.unseen] == [(2, "c0")]


def test_validation_split_of_a_client_does_not_depend_on_the_others() -> None:
    alone = Made(sizes=((30, 4),)).partition.clients[0]
    together = Made(sizes=((30, 4), (50, 4))).partition.clients[0]
    assert torch.equal(alone.indices("val"), together.indices("val"))


def test_two_training_images_are_not_given_up_for_validation() -> None:
    data = Made(sizes=((2, 1), (3, 1)), val_fraction=0.9)
    assert sizes(data) == [(2, 0, 1), (2, 1, 1)]
    assert list(data.clients[0].val_dataloader()) == []


def test_client_batches() -> None:
    data = Made(sizes=((9, 4), (6, 3)), val_fraction=0.0, batch_size=4, eval_batch_size=3)
    client = data.clients[0]
    assert [len(y) for _, y in client.train_dataloader()] == [4, 5]
    assert [len(y) for _, y in client.test_dataloader()] == [3, 1]
    images, labels = client.examples("test")
    x = torch.cat([x for x, _ in client.test_dataloader()])
    assert torch.allclose(x, images.float() / 127.5 - 1, atol=1e-5)
    assert torch.equal(torch.cat([y for _, y in client.test_dataloader()]), labels)
    assert torch.equal(client.label_counts("test"), torch.bincount(labels, minlength=3))


def test_seeding_a_client() -> None:
    def order(client: object) -> list[int]:
        return torch.cat([x.flatten(1).sum(1) for x, _ in client.train_dataloader()]).tolist()  # type: ignore[attr-defined]

    client = Made().clients[0]
    client.seed(7)
    first, second = order(client), order(client)
    client.seed(7)
    assert order(client) == first
    assert second != first
    other = Made(seed=0).clients[0]
    other.seed(7)
    assert order(other) == first
    other.seed(8)
    assert order(other) != first


def test_clients_are_shuffled_differently_without_being_seeded() -> None:
    data = Made(sizes=((20, 4), (20, 4)), val_fraction=0.0)
    orders = []
    for client in data.clients:
        loader = client.train_dataloader()
        loader.indices = torch.arange(20)
        orders.append(torch.cat([x.flatten(1).sum(1) for x, _ in loader]).tolist())
    assert orders[0] != orders[1]


def test_another_batch_size_is_taken_up() -> None:
    client = Made(val_fraction=0.0, avoid_single=False).clients[0]
    assert len(client.train_dataloader()) == 1
    client.batch_size = 3
    assert len(client.train_dataloader()) == 4


def test_evaluation_is_not_augmented() -> None:
    data = Made(augment=[RandomHorizontalFlip(1.0)], val_fraction=0.0, batch_size=64)
    client = data.clients[0]
    (x, _), (plain, _) = next(iter(client.train_dataloader())), next(iter(client.eval_dataloader("train")))
    flipped = {tuple(image.flip(2).flatten().tolist()) for image in plain}
    assert {tuple(image.flatten().tolist()) for image in x} == flipped
    (tested, _) = next(iter(client.test_dataloader()))
    assert torch.allclose(tested, client.examples("test")[0].float() / 127.5 - 1, atol=1e-5)


def test_a_client_can_be_copied_and_sent() -> None:
    client = Made().clients[0]
    expected = [y.tolist() for _, y in client.test_dataloader()]
    for other in (copy.deepcopy(client), pickle.loads(pickle.dumps(client))):
        assert [y.tolist() for _, y in other.test_dataloader()] == expected


def test_moving_moves_all_clients_at_once() -> None:
    data = Made()
    assert data.to("meta")
    assert all(client.train_dataloader().source.examples.is_meta for client in data.clients)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sizes": ((0, 4),)}, "client 'c0' must have at least 2 training examples, got 0"),
        ({"sizes": ((8, 4), (1, 4))}, "client 'c1' must have at least 2 training examples, got 1"),
        ({"sizes": ((8, 0),)}, "client 'c0' must have a test example"),
        ({"names": ("x", "x")}, "different names, got 'x' more than once"),
        ({"num_unseen": 2}, "at least one client must take part"),
        ({"labels": torch.full((24,), 3)}, "'made' has the label 3, outside its 3 classes 0 to 2"),
        ({"labels": torch.full((24,), -1)}, "'made' has the label -1, outside"),
        ({"val_fraction": 1.0}, r"val_fraction must lie in \[0, 1\), got 1.0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"eval_batch_size": "many"}, "eval_batch_size must be a whole number of at least 1, got 'many'"),
        ({"mean": [0.5, 0.5], "std": [0.5, 0.5]}, "2 values, but the images have 3 channel"),
    ],
)
def test_bad_data_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Made(**settings)  # type: ignore[arg-type]


def test_batch_larger_than_the_client_trains_on_all_it_has() -> None:
    client = Made(batch_size=1000, drop_last=True, val_fraction=0.0).clients[1]
    ((x, y),) = list(client.train_dataloader())
    assert len(x) == len(y) == client.num_train == 6


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_client_is_tested_on_what_any_client_learns_from(split: str) -> None:
    class Leaking(Made):
        def read(self) -> Examples:
            examples = super().read()
            first, second = examples.clients
            taken = first.test[:2]
            own = {"train": torch.cat([second.train, taken])} if split == "train" else {"val": taken}
            return replace(examples, clients=[first, replace(second, **own)])

    with pytest.raises(ValueError, match="client 'c0' is tested on 2 example.s. that a client trains on or chooses by"):
        Leaking()
