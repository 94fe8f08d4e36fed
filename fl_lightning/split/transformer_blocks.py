"""Divides a causal language model of transformers into its embedding, its blocks, and what follows them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fl_lightning.models.hf import TransformersBackbone, real_tokens


class Part(nn.Module):
    """A part of a language model: the model itself, in which all other parts do nothing.

    So masks and positions are made by the model's own code, whatever its architecture. Hidden states go in and out
    alone. Padding is a row of zeros and stays one through all parts: an activation carries its own mask wherever a
    model is cut, and none need be sent beside it.

    Args:
        twin: The model with one block that does something, or with none.
        backbone: The backbone whose part it is.
        last: Whether only the last position is wanted.
    """

    def __init__(self, twin: nn.Module, backbone: TransformersBackbone, last: bool = False) -> None:
        super().__init__()
        self.twin = twin
        self.padding = backbone.padding
        self.left = backbone.last
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden states ``(N, T, D)`` of tokens ``(N, T)`` or hidden states; ``(N, D)`` of the last one."""
        tokens = not x.is_floating_point()
        real = None
        if self.padding is not None:
            real = real_tokens(x, self.padding, self.left) if tokens else x.detach().ne(0).any(-1)
        mask = None if real is None else real.long()
        given: dict[str, Any] = {"input_ids": x} if tokens else {"inputs_embeds": x}
        for stand_in in self.twin.modules():
            if isinstance(stand_in, _Only):
                stand_in.__dict__["x"] = x
        out: Tensor = self.twin(**given, attention_mask=mask, use_cache=False).logits
        if self.last:
            return out[:, -1]
        return out if real is None else torch.where(real.unsqueeze(-1), out, out.new_zeros(()))


class _Only(nn.Module):
    """The one block of a part: it takes what the part was given, whatever the model did to it before."""

    def __init__(self, block: nn.Module | None) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # such as which kind of attention it has

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        x = self.__dict__.pop("x")
        return x if self.block is None else self.block(x, *args, **kwargs)


class _Nothing(nn.Module):
    """In the place of what stands before the blocks: adds nothing."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros((), device=x.device)


class _Same(nn.Module):
    """In the place of what follows the blocks, or of other blocks."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def transformer_chain(backbone: TransformersBackbone) -> dict[str, nn.Module]:
    """Return the blocks whose composition is the backbone; their tensors are the backbone's own.

    Dropout is switched off: the halves of a model, and its copies, could not agree on it.

    Raises:
        ValueError: If it is no causal language model, or has no list of blocks.
    """
    model: nn.Module = backbone.__dict__["_model"]
    if backbone.kind != "causal":
        raise ValueError(
            f"model.kind must be causal for a model of transformers that is cut, got {backbone.kind}; for images take "
            "model=timm"
        )
    _without_dropout(model)
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks to cut between; take another model")
    path = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    blocks = lists[path]

    def part(only: list[nn.Module], before: bool, after: bool) -> nn.Module:
        return _twin(model, path.split("."), nn.ModuleList(only), before, after)

    chain: dict[str, nn.Module] = {"embed": Part(part([], True, False), backbone)}
    for index, block in enumerate(blocks):
        before: list[nn.Module] = [_Same()] * index  # a model may ask how many blocks stand before
        chain[f"blocks.{index}"] = Part(part([*before, _Only(block)], False, False), backbone)
    chain["readout"] = Part(part([_Only(None)], False, True), backbone, backbone.last)
    return chain


def _twin(model: nn.Module, path: list[str], blocks: nn.ModuleList, before: bool, after: bool) -> nn.Module:
    """Return a shallow twin of a model with other blocks.

    Args:
        model: The model.
        path: To its list of blocks.
        blocks: What stands there in the twin.
        before: Whether what has weights and stands before the list stays.
        after: Whether what has weights and stands behind it stays.
    """
    twin = copy.copy(model)
    names = list(model._modules)
    place = names.index(path[0])
    make: Callable[[], nn.Module]
    children: dict[str, nn.Module | None] = {}
    for index, (name, child) in enumerate(model._modules.items()):
        stays, make = (before, _Nothing) if index < place else (after, _Same)
        if index == place:
            assert child is not None
            children[name] = _twin(child, path[1:], blocks, before, after) if len(path) > 1 else blocks
        elif child is None or stays or next(child.parameters(), None) is None:
            children[name] = child
        else:
            children[name] = make()
    twin._modules = children
    return twin


def _without_dropout(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
