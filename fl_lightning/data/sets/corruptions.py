"""Common corruptions of small images at five severities, made with torchvision.

These are **our own**, in the spirit of Hendrycks and Dietterich, Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations, ICLR 2019, https://arxiv.org/abs/1903.12261, and bear the names of the published types
that they resemble. Their images differ from the published ones, and so do accuracies on them: use the published files
to compare with the literature. Strengths are for images of about 32x32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from fl_lightning.checks import one_of

SEVERITIES = (1, 2, 3, 4, 5)

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def _gaussian_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return _to_bytes(_to_floats(images) + strength * torch.randn(images.shape, generator=generator))


def _shot_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Poisson noise of a camera that counts ``strength`` photons on a white pixel."""
    return _to_bytes(torch.poisson(_to_floats(images) * strength, generator=generator) / strength)


def _impulse_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A share of values becomes black or white."""
    draw = torch.rand(images.shape, generator=generator)
    return torch.where(draw < strength / 2, 0, torch.where(draw > 1 - strength / 2, 255, images)).to(torch.uint8)


def _gaussian_blur(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    blurred: Tensor = vision.gaussian_blur(images, kernel_size=[9, 9], sigma=[strength, strength])
    return blurred


def _pixelate(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Shrunk to a share of the size, and enlarged again without smoothing."""
    height, width = images.shape[-2:]
    small = vision.resize(images, [max(1, round(height * strength)), max(1, round(width * strength))], antialias=True)
    large: Tensor = vision.resize(small, [height, width], interpolation=vision.InterpolationMode.NEAREST_EXACT)
    return large


def _jpeg_compression(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    return torch.stack([vision.jpeg(image, quality=int(strength)) for image in images])


def _brightness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    adjusted: Tensor = vision.adjust_brightness(images, strength)
    return adjusted


def _contrast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    adjusted: Tensor = vision.adjust_contrast(images, strength)
    return adjusted


def _saturate(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    adjusted: Tensor = vision.adjust_saturation(images, strength)
    return adjusted


def _elastic_transform(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Each image is moved by a smooth random field, of up to about ``strength`` of its size."""
    height, width = images.shape[-2:]
    fields = vision.gaussian_blur(
        2 * torch.rand(len(images), 2, height, width, generator=generator) - 1, kernel_size=[15, 15], sigma=[3.0, 3.0]
    )
    fields = fields / fields.abs().amax(dim=(1, 2, 3), keepdim=True) * 2 * strength  # coordinates run from -1 to 1
    moved = [
        vision.elastic(image, field.permute(1, 2, 0).unsqueeze(0)) for image, field in zip(images, fields, strict=True)
    ]
    return torch.stack(moved)


#: For each type, what is done and how strongly at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (_gaussian_noise, (0.03, 0.06, 0.09, 0.13, 0.18)),
    "shot_noise": (_shot_noise, (200, 80, 40, 20, 10)),
    "impulse_noise": (_impulse_noise, (0.01, 0.03, 0.06, 0.1, 0.17)),
    "gaussian_blur": (_gaussian_blur, (0.5, 0.8, 1.1, 1.5, 2.0)),
    "pixelate": (_pixelate, (0.85, 0.7, 0.55, 0.4, 0.3)),
    "jpeg_compression": (_jpeg_compression, (60, 40, 25, 15, 8)),
    "brightness": (_brightness, (1.2, 1.45, 1.75, 2.1, 2.6)),
    "contrast": (_contrast, (0.75, 0.6, 0.45, 0.3, 0.18)),
    "saturate": (_saturate, (1.6, 2.2, 3.0, 4.5, 7.0)),
    "elastic_transform": (_elastic_transform, (0.02, 0.035, 0.05, 0.07, 0.09)),
}


def corrupt(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Corrupt images.

    Args:
        images: uint8, (N, 3, H, W).
        kind: A name of :data:`CORRUPTIONS`.
        severity: 1 (slight) to 5 (strong).
        generator: Of what is random about it.

    Returns:
        uint8, (N, 3, H, W).
    """
    one_of("corruptions", kind, CORRUPTIONS)
    one_of("severities", severity, SEVERITIES)
    change, strengths = CORRUPTIONS[kind]
    return change(images, strengths[severity - 1], generator)


def _to_floats(images: Tensor) -> Tensor:
    return images.float() / 255


def _to_bytes(images: Tensor) -> Tensor:
    return (images * 255).round().clamp(0, 255).to(torch.uint8)
