"""Prompt tokens: a frozen transformer reads a few learnt vectors before its own inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fl_lightning.checks import ArgumentError, whole
from fl_lightning.models.hf import TransformersBackbone
from fl_lightning.models.model import Model

PROMPT = "prompt"
"""Name of the tokens in a backbone."""


@dataclass(frozen=True)
class Prompt:
    """Prompt tokens of a backbone: what trains in the place of its weights.

    Lester, Al-Rfou, Constant, The Power of Scale for Parameter-Efficient Prompt Tuning, EMNLP 2021,
    https://arxiv.org/abs/2104.08691, for tokens: the vectors stand before the embeddings of the text and begin as
    those of random words. Jia, Tang, Chen, Cardie, Belongie, Hariharan, Lim, Visual Prompt Tuning, ECCV 2022,
    https://arxiv.org/abs/2203.12119 (its shallow form), for images: they stand behind the class token, and begin as
    normal noise. A prompt of zeros is none: the model is then the plain one.

    Args:
        prompt: Number of tokens, at least 1.
    """

    prompt: int = 8

    def __post_init__(self) -> None:
        whole("prompt", self.prompt, 1)

    def adapt(self, model: Model) -> Model:
        """Return the model with a prompt ``backbone.prompt``, ``(K, D)``; a classifier's head trains as before."""
        backbone: Any = model.backbone
        if isinstance(backbone, TransformersBackbone) and backbone.kind != "image":
            words = backbone.embeddings.weight.detach()
            start = words[torch.randint(len(words), (self.prompt,))].float()
            if backbone.kind == "causal":
                model.head.requires_grad_(False)
        elif isinstance(backbone, VisionTransformer):
            start = 0.02 * torch.randn(self.prompt, backbone.embed_dim)
            place = _Place(backbone)
            backbone.blocks.register_forward_pre_hook(place.insert)
            backbone.blocks.register_forward_hook(place.take_out)
        else:
            raise ArgumentError(
                "prompt must be null but for texts with model=hf and for vision transformers of timm, got "
                f"{type(backbone).__name__}"
            )
        backbone.requires_grad_(False)
        backbone.register_parameter(PROMPT, nn.Parameter(start))
        return model


class _Place:
    """Puts a backbone's prompt behind the class token of all blocks, and takes it out after them."""

    def __init__(self, backbone: VisionTransformer, prompt: Tensor | None = None) -> None:
        self.backbone = backbone
        self.prompt = prompt

    @property
    def _tokens(self) -> Tensor:
        tokens = self.backbone.get_parameter(PROMPT) if self.prompt is None else self.prompt
        return tokens if self.prompt is not None or bool(tokens.any()) else tokens[:0]

    def insert(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        [z] = inputs
        first, tokens = self.backbone.num_prefix_tokens, self._tokens
        return torch.cat([z[:, :first], tokens.to(z.dtype).expand(len(z), -1, -1), z[:, first:]], dim=1)

    def take_out(self, _: nn.Module, inputs: tuple[Tensor, ...], z: Tensor) -> Tensor:
        first = self.backbone.num_prefix_tokens
        return torch.cat([z[:, :first], z[:, first + len(self._tokens) :]], dim=1)


@contextmanager
def inserted(backbone: VisionTransformer, prompt: Tensor) -> Iterator[None]:
    """Put tokens ``(K, D)`` behind the class token of all blocks, for as long as the context lasts."""
    place = _Place(backbone, prompt)
    hooks = [
        backbone.blocks.register_forward_pre_hook(place.insert),
        backbone.blocks.register_forward_hook(place.take_out),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
