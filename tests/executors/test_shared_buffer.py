from __future__ import annotations

import multiprocessing

import pytest
import torch

from fl_lightning.executors.shared_buffer import SharedBuffer

TENSORS = [
    torch.randn(3, 5),
    torch.tensor(7),
    torch.empty(0, 4),
    torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    torch.tensor([True, False, True]),
    torch.randn(9).to(torch.bfloat16),
    torch.randn(4, 6, dtype=torch.float64).t(),
]


def _double(buffer: SharedBuffer, connection) -> None:
    tensors = buffer.read(connection.recv())
    connection.send(buffer.write([tensor * 2 for tensor in tensors] + [torch.ones(100_000)]))
    connection.close()


def test_tensors_of_every_kind_come_back_as_copies() -> None:
    buffer = SharedBuffer()
    first = buffer.read(buffer.write({"tensors": TENSORS, "name": "ä"}))
    buffer.write([torch.full((1000,), -1.0)])
    assert first.pop("name") == "ä"
    first = first["tensors"]
    for tensor, came in zip(TENSORS, first, strict=True):
        assert came.dtype == tensor.dtype
        assert torch.equal(came, tensor)
    buffer.close()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_other_process_reads_writes_and_grows_it(method: str) -> None:
    context = multiprocessing.get_context(method)
    buffer = SharedBuffer()
    ours, theirs = context.Pipe()
    process = context.Process(target=_double, args=(buffer, theirs))
    process.start()
    ours.send(buffer.write([torch.arange(10.0)]))
    doubled, ones = buffer.read(ours.recv())
    process.join()
    assert torch.equal(doubled, 2 * torch.arange(10.0))
    assert torch.equal(ones, torch.ones(100_000))
    buffer.close()
