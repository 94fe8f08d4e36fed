"""The examples of a whole federation in one tensor, of which every client holds indices only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from fl_lightning.data.splits import ClientIndices


class Pool:
    """Holds examples and labels once, for all clients.

    A client is a tensor of indices into the pool, so a thousand clients cost a thousand short tensors and no copy of an
    example. There is no Python object per example: worker processes that are forked share the memory, and stay sharing
    it.

    Args:
        examples: (N, ...).
        labels: The classes, int64 (N,), or other targets: masks int64 (N, H, W), numbers or labels float32 (N, D).
    """

    what: ClassVar[str] = "examples"
    dtype: ClassVar[torch.dtype | None] = None
    dimensions: ClassVar[str] = ""
    """What examples are called; their dtype and dimensions, where they must be some, such as ``(N, F)``."""

    def __init__(self, examples: Tensor, labels: Tensor) -> None:
        if self.dtype is not None and examples.dtype != self.dtype:
            raise TypeError(f"{self.what} must be {str(self.dtype).removeprefix('torch.')}, got {examples.dtype}")
        if self.dimensions and examples.ndim != self.dimensions.count(",") + 1:
            raise ValueError(f"{self.what} must have the shape {self.dimensions}, got {tuple(examples.shape)}")
        if labels.dtype not in (torch.int64, torch.float32):
            raise TypeError(f"labels must be int64 or float32, got {labels.dtype}")
        if labels.shape[:1] != examples.shape[:1]:
            raise ValueError(f"there must be one label per example, got {len(examples)} and {tuple(labels.shape)}")
        self.examples = examples.contiguous()
        self.labels = labels.contiguous()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.examples.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the examples lie."""
        return self.examples.device

    @property
    def num_bytes(self) -> int:
        """Bytes of examples and labels."""
        return self.examples.nbytes + self.labels.nbytes

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Copy out some examples and their labels, to the pool's device.

        Args:
            indices: int64, (n,), on any device.
        """
        indices = indices.to(self.device, non_blocking=True)
        return self.examples.index_select(0, indices), self.labels.index_select(0, indices)

    def fingerprint(self) -> str:
        """SHA-256 over shapes, examples and labels: it changes when the data behind a partition changed."""
        if self._fingerprint is None:
            digest = hashlib.sha256(f"{tuple(self.examples.shape)}".encode())
            digest.update(self.examples.cpu().numpy().data)
            digest.update(self.labels.cpu().numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def fits(self, device: torch.device | str, fraction: float = 0.5) -> bool:
        """Whether the pool takes at most this fraction of the memory that is free on an accelerator."""
        device = torch.device(device)
        if device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(device)
        return self.num_bytes <= fraction * free

    def to(self, device: torch.device | str) -> Self:
        """Move the pool, and with it the examples of all clients. Batches are then made on that device."""
        self.fingerprint()  # while the bytes are where hashing them is free
        self.examples = self.examples.to(device)
        self.labels = self.labels.to(device)
        return self


class ImagePool(Pool):
    """Images, uint8 (N, C, H, W), H equal to W, and their classes."""

    what, dtype, dimensions = "images", torch.uint8, "(N, C, H, W)"

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"images must be square, got {images.shape[2]}x{images.shape[3]}; resize them first")


class TablePool(Pool):
    """Rows of numbers, float32 (N, F), and their targets."""

    what, dtype, dimensions = "rows", torch.float32, "(N, F)"

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        return (self.examples.shape[1], 1)  # as many channels of one pixel


class TokenPool(Pool):
    """Token sequences, int32 (N, T), and the token that follows each."""

    what, dtype, dimensions = "tokens", torch.int32, "(N, T)"


class SequencePool(TokenPool):
    """Token sequences, int32 (N, T), and a target for each token, int64 (N, T), of which those below 0 do not count.

    The label of an example, by which clients' parts are counted and divided, is its last target that counts.
    """

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        if targets.dtype != torch.int64:
            raise TypeError(f"targets must be int64, got {targets.dtype}")
        if targets.shape != tokens.shape:
            raise ValueError(
                f"there must be one target per token, got {tuple(targets.shape)} and {tuple(tokens.shape)}"
            )
        last = (targets >= 0).long().cumsum(1).argmax(1)
        super().__init__(tokens, targets.gather(1, last[:, None]).squeeze(1).clamp(min=0))
        self.targets = targets.contiguous()

    @property
    @override
    def num_bytes(self) -> int:
        return super().num_bytes + self.targets.nbytes

    @override
    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        indices = indices.to(self.device, non_blocking=True)
        return self.examples.index_select(0, indices), self.targets.index_select(0, indices)

    @override
    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256(super().fingerprint().encode())
            digest.update(self.targets.cpu().numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @override
    def to(self, device: torch.device | str) -> Self:
        super().to(device)
        self.targets = self.targets.to(device)
        return self


@dataclass
class TrainTest:
    """Examples with a training and a test part, of one client or of a whole data set.

    Args:
        x_train: As a pool has them: images uint8 (N, C, H, W), or tokens int32 (N, T).
        y_train: int64, (N,).
        x_test: (M, ...).
        y_test: int64, (M,).
        x_val: Examples for validation, (L, ...); ``None`` to take them out of those for training.
        y_val: int64, (L,), or ``None``.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    x_val: Tensor | None = None
    y_val: Tensor | None = None


def pool_clients(clients: Mapping[str, TrainTest]) -> tuple[Tensor, Tensor, list[ClientIndices]]:
    """Put the examples of clients behind one another, for a pool.

    Args:
        clients: By name; all examples of one shape.

    Returns:
        Examples and labels of all clients, and the places of each client's.
    """
    xs: list[Tensor] = []
    ys: list[Tensor] = []
    indices = []
    start = 0
    for name, data in clients.items():
        places = {}
        for split, x, y in (
            ("train", data.x_train, data.y_train),
            ("test", data.x_test, data.y_test),
            ("val", data.x_val, data.y_val),
        ):
            if x is not None and y is not None:
                places[split] = torch.arange(start, start + len(y))
                start += len(y)
                xs.append(x)
                ys.append(y)
        indices.append(ClientIndices(name, places["train"], places["test"], places.get("val")))
    return torch.cat(xs), torch.cat(ys), indices
