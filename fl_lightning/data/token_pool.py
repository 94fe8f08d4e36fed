"""Sequences of tokens in the place of images, for language models."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from fl_lightning.data.image_pool import ImagePool
from fl_lightning.data.index_batches import IndexBatches


class TokenPool(ImagePool):
    """Holds token sequences and the token that follows each, for all clients.

    To the rest a sequence looks like an image of one channel whose size is its length.

    Args:
        tokens: int32, (N, T), at least 0.
        labels: int64, (N,): the token after each sequence.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If the shapes do not fit together.
    """

    def __init__(self, tokens: Tensor, labels: Tensor) -> None:
        if tokens.dtype != torch.int32 or labels.dtype != torch.int64:
            raise TypeError(f"Expected tokens as int32 and labels as int64, got {tokens.dtype} and {labels.dtype}.")
        if tokens.ndim != 2 or labels.shape != tokens.shape[:1]:
            raise ValueError(
                f"Expected tokens (N, T) and labels (N,), got {tuple(tokens.shape)} and {tuple(labels.shape)}."
            )
        self.images = tokens.contiguous()
        self.labels = labels.contiguous()
        self._fingerprint = None

    @property
    @override
    def channels(self) -> int:
        return 1

    @property
    @override
    def image_size(self) -> int:
        """Tokens of a sequence."""
        return self.images.shape[1]

    @property
    @override
    def num_bytes(self) -> int:
        return 4 * self.images.numel() + 8 * self.labels.numel()


class TokenBatches(IndexBatches):
    """Batches of token sequences int64 (N, T) and the tokens int64 (N,) that follow; nothing is normalised."""

    @override
    def _prepare(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        return images.to(torch.int64)
