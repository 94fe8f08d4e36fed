from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fl_lightning.data.partition import Partition
from fl_lightning.data.splits import ClientIndices


def partition() -> Partition:
    clients = (
        ClientIndices("a", torch.tensor([0, 1, 2]), torch.tensor([5]), torch.tensor([3])),
        ClientIndices("ß", torch.tensor([6, 7]), torch.tensor([8]), unseen=True),
    )
    return Partition("made", "f1", 9, 3, clients, {"partitioner": "by hand"})


def client(index: int, **changes: object) -> Callable[[Partition], Partition]:
    def change(given: Partition) -> Partition:
        clients = list(given.clients)
        clients[index] = replace(clients[index], **changes)  # type: ignore[arg-type]
        return replace(given, clients=tuple(clients))

    return change


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    given = partition()
    given.save(tmp_path / "partition.json")
    loaded = Partition.load(tmp_path / "partition.json")
    given.check_equal(loaded)
    assert loaded.hash == given.hash
    assert loaded.description == given.description
    assert [c.name for c in loaded.clients] == ["a", "ß"]
    assert loaded.to_json() == given.to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, fingerprint="f2"), "the images or labels of 'made' are not those"),
        (lambda p: replace(p, num_examples=10), "9 examples here, 10 there"),
        (lambda p: replace(p, num_classes=4), "3 classes here, 4 there"),
        (lambda p: replace(p, clients=p.clients[:1]), "2 clients here, 1 there"),
        (client(0, name="b"), r"client 0 'a': another name \('b' there\)"),
        (client(1, unseen=False), r"client 1 'ß': another role \(unseen or not\)"),
        (client(0, train=torch.tensor([0, 1, 4])), "client 0 'a': another train split"),
        (client(0, val=None), "client 0 'a': another val split"),
        (client(1, test=torch.tensor([5])), "client 1 'ß': another test split"),
    ],
)
def test_each_difference_changes_the_hash_and_is_named(change: Callable[[Partition], Partition], message: str) -> None:
    other = change(partition())
    assert other.hash != partition().hash
    with pytest.raises(ValueError, match=message):
        partition().check_equal(other)


def test_how_it_was_made_is_not_compared() -> None:
    partition().check_equal(replace(partition(), description={}, source="elsewhere"))


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    with pytest.raises(FileNotFoundError, match="partition.json"):
        Partition.load(path)
    text = partition().to_json()
    for damaged in (text[: len(text) // 2], "", "[]", "{}", text.replace('"train"', '"trein"')):
        path.write_text(damaged)
        with pytest.raises(ValueError, match="partition.json' is damaged or not a partition"):
            Partition.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="partition.json' is damaged"):
        Partition.load(path)
    path.write_text(text.replace("[0,1,2]", "[0,1,4]"))
    with pytest.raises(ValueError, match="was changed after it was written"):
        Partition.load(path)
    path.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="has format 7"):
        Partition.load(path)
