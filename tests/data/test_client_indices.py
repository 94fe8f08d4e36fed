"""Clients as positions: their splits follow from their names, and who is held out stays held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fl_lightning.data.splits import ClientIndices, hold_out, with_test, with_validation


def client(name: str, unseen: bool = False) -> ClientIndices:
    return ClientIndices(name, torch.arange(100, 150), torch.tensor([7]), unseen=unseen)


def test_held_out_are_those_named_and_those_that_were() -> None:
    clients = [client("a"), client("b", unseen=True), client("c")]
    assert [one.unseen for one in hold_out(clients, ["c"])] == [False, True, True]
    assert [one.unseen for one in clients] == [False, True, False]
    with pytest.raises(ValueError, match="`unseen_clients` names 'd', but the clients are a, b, c"):
        hold_out(clients, ["d"])


def test_a_validation_split_follows_from_the_name_alone() -> None:
    labels = np.arange(50) % 5
    first, again, other = (with_validation(client(name), labels, 0.2, seed=3) for name in ("a", "a", "b"))
    assert torch.equal(first.indices("val"), again.indices("val"))
    assert not torch.equal(first.indices("val"), other.indices("val"))
    assert sorted([*first.train.tolist(), *first.indices("val").tolist()]) == list(range(100, 150))
    assert np.bincount(labels[first.indices("val").numpy() - 100]).tolist() == [2] * 5
    assert with_validation(first, labels, 0.5, seed=4) is first  # it has one


def test_a_test_split_follows_from_the_name_alone() -> None:
    indices, labels = torch.arange(100, 150), np.arange(50) % 5
    first, again, other = (with_test(name, indices, labels, 0.2, seed=3) for name in ("a", "a", "b"))
    assert torch.equal(first.test, again.test)
    assert not torch.equal(first.test, other.test)
    assert sorted([*first.train.tolist(), *first.test.tolist()]) == indices.tolist()
    assert np.bincount(labels[first.test.numpy() - 100]).tolist() == [2] * 5
