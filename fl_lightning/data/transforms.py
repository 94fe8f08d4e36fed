"""Random transforms of whole batches, drawn for each image, and their normalisation.

The transforms of ``torchvision.transforms.v2`` draw *one* set of random parameters per call: given a batch, they crop
or flip all its images alike, which is a much weaker augmentation than the usual one, where a data loader calls them
image by image. The two that nearly every small-image recipe uses are therefore written here for batches, with
parameters per image. Their numbers come from an explicit generator, so that a client's batches do not depend on who ran
before it. Any transform of torchvision can stand beside them (see :func:`augment`); it then draws once per batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from typing_extensions import override

from fl_lightning.checks import ArgumentError, above, at_least, finite, within


class PerImageTransform(ABC):
    """A random transform of a batch that draws its parameters for each image.

    Drawing is apart from applying: images of many clients are transformed at once, with what each client has drawn.
    """

    @abstractmethod
    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        """Draw the parameters of some images, (number, ...), on the CPU, so that a GPU sees what a CPU sees."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Transform uint8 images (N, C, H, W) where they are by parameters (N, ...); each image by its own alone."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Transform uint8 images (N, C, H, W), drawing from a generator on the CPU."""
        return self.apply(images, self.draw(len(images), generator).to(images.device, non_blocking=True))


class RandomCrop(PerImageTransform):
    """Pads each image with black and cuts a window of the original size at a random place.

    Args:
        padding: Pixels added on each side, at least 1. Each shift of up to so many pixels is equally likely.
    """

    def __init__(self, padding: int = 4) -> None:
        at_least("padding", padding, 1)
        self.padding = padding

    @override
    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, 2 * self.padding + 1, (2, number), generator=generator).T

    @override
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        num_images, channels, height, width = images.shape
        top, left = drawn.T.reshape(2, num_images, 1, 1)
        padded = F.pad(images, [self.padding] * 4)
        # Where in memory each row of each window starts: copying rows is several times as fast as indexing pixels.
        device = images.device
        planes = torch.arange(num_images * channels, device=device).view(num_images, channels, 1) * padded.shape[2]
        starts = (planes + top + torch.arange(height, device=device)) * padded.shape[3] + left
        return padded.view(-1).unfold(0, width, 1).index_select(0, starts.view(-1)).view(images.shape)


class RandomHorizontalFlip(PerImageTransform):
    """Mirrors each image left to right with a probability.

    Args:
        probability: In [0, 1].
    """

    def __init__(self, probability: float = 0.5) -> None:
        within("probability", probability, "[0, 1]")
        self.probability = probability

    @override
    def draw(self, number: int, generator: torch.Generator) -> Tensor:
        return torch.rand(number, generator=generator) < self.probability

    @override
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        chosen = torch.arange(len(images), device=images.device) + len(images) * drawn
        return torch.cat([images, images.flip(3)]).index_select(0, chosen)


#: One of our own transforms, or a torchvision v2 transform (or anything else from uint8 images to images).
Transform = PerImageTransform | Callable[[Tensor], Tensor]


def check_transforms(transforms: Sequence[Transform]) -> None:
    """Raise unless each can be applied to a batch of images.

    Raises:
        TypeError: If one is not callable, or changes labels too (MixUp, CutMix).
    """
    for transform in transforms:
        if isinstance(transform, (v2.MixUp, v2.CutMix)):
            raise TypeError(
                f"{type(transform).__name__} mixes labels, and `augment` sees images only; mix in the module's loss."
            )
        if not callable(transform):
            raise TypeError(
                f"Each entry of `augment` must be a transform with a `_target_`, got {transform!r} "
                f"of type {type(transform).__name__}."
            )


def is_per_image(transforms: Sequence[Transform]) -> bool:
    """Whether all transforms draw for each image, so that it does not matter how images are grouped."""
    return all(isinstance(transform, PerImageTransform) for transform in transforms)


def augment(images: Tensor, transforms: Sequence[Transform], generator: torch.Generator) -> Tensor:
    """Apply transforms in order to uint8 images (N, C, H, W).

    Torchvision's transforms draw from torch's global generator. It is seeded from ``generator`` for the call and put
    back afterwards, so the result depends on ``generator`` alone and nothing outside notices.
    """
    for transform in transforms:
        if isinstance(transform, PerImageTransform):
            images = transform(images, generator)
            continue
        seed = int(torch.randint(0, 2**62, (), generator=generator))
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            images = transform(images)
    return images


class Normalization:
    """Turns uint8 images into float32 ``(x / 255 - mean) / std``, as one multiplication and one addition.

    It has no randomness, so it is applied to blocks of many batches at once.

    Args:
        mean: One value for all channels or one per channel, of images scaled to [0, 1].
        std: Likewise, above 0.
    """

    def __init__(self, mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5) -> None:
        self.mean = [float(mean)] if isinstance(mean, (int, float)) else [float(value) for value in mean]
        self.std = [float(std)] if isinstance(std, (int, float)) else [float(value) for value in std]
        for value in self.mean:
            finite("mean", value)
        for value in self.std:
            above("std", value, 0)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ArgumentError(f"mean must be as long as std, and not empty, got {mean} and {std}")
        std_C11 = torch.tensor(self.std, dtype=torch.float64).view(-1, 1, 1)
        mean_C11 = torch.tensor(self.mean, dtype=torch.float64).view(-1, 1, 1)
        self._scale = (1 / (255 * std_C11)).float()
        self._shift = (-mean_C11 / std_C11).float()

    def check_channels(self, channels: int) -> None:
        """Raise unless there is one value for all channels, or one for each."""
        if len(self.mean) not in (1, channels):
            raise ValueError(
                f"`mean` and `std` have {len(self.mean)} values, but the images have {channels} channel(s); "
                "give one value, or one per channel."
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 images (N, C, H, W) to float32 of the same shape, on their device."""
        if self._scale.device != images.device:  # once, for waiting for a copy would stop an accelerator every batch
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        return images.float().mul_(self._scale).add_(self._shift)
