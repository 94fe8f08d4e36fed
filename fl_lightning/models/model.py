"""What a model is to the rest of the library: a backbone, a head, and where the head sits in the model it came from."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Model(NamedTuple):
    """A model in its two parts, so that "share the backbone, keep the head" needs no guess about names.

    ``head(backbone(x))`` gives the logits. The backbone keeps the tensor names of the model it was taken from, so a
    state dict travels to and from plain timm or torchvision by way of ``head_path`` (see ``export.py``).

    Attributes:
        backbone: Maps inputs ``(N, C, H, W)`` to features ``(N, D)``, or tokens ``(N, T)`` to ``(N, T, D)``.
        head: Maps features to logits over the classes or the vocabulary.
        head_path: Module path of the head in the whole model, for example ``"fc"`` or ``"head.fc"``.
    """

    backbone: nn.Module
    head: nn.Module
    head_path: str
