from __future__ import annotations

import torch
from torch import nn

from fl_lightning.client import Update
from fl_lightning.executors.tensor_pickle import dumps, loads
from fl_lightning.state import pack


def test_value_without_tensors_and_tensors_make_the_value_again() -> None:
    weight = torch.arange(6.0).view(2, 3)
    update = Update(3, 10, {"a": weight, "b": weight}, {"c": torch.tensor([True])}, {"loss": 0.5})
    data, tensors = dumps([update, nn.Parameter(torch.ones(1000)), None])
    assert [tuple(tensor.shape) for tensor in tensors] == [(2, 3), (1,), (1000,)]  # two names, one tensor
    again, parameter, nothing = loads(data, [tensor.clone() for tensor in tensors])
    assert nothing is None
    assert isinstance(parameter, nn.Parameter)
    assert (again.client_id, again.num_examples, again.metrics) == (3, 10, {"loss": 0.5})
    assert torch.equal(again.state["a"], weight)
    assert again.state["a"] is again.state["b"]
    assert again.extra["c"].tolist() == [True]


def test_what_lies_side_by_side_travels_as_one() -> None:
    packed = pack({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([7.0]), "n": torch.tensor(8)})
    data, tensors = dumps(packed)
    assert [tensor.tolist() for tensor in tensors] == [[0, 1, 2, 3, 4, 5, 7], [8]]
    again = loads(data, [tensor.clone() for tensor in tensors])
    assert list(again) == ["a", "b", "n"]
    assert again.vectors is not None
    assert all(torch.equal(again[name], tensor) for name, tensor in packed.items())
    packed["b"] = torch.tensor([9.0])  # no view of the vector any more
    data, tensors = dumps(packed)
    assert len(tensors) == 3
    assert loads(data, tensors)["b"].tolist() == [9.0]


def test_bytes_hold_no_weights() -> None:
    assert len(dumps({"w": torch.zeros(10**6)})[0]) < 200
