"""Divides a backbone into a chain of blocks, and finds where it can be cut."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fl_lightning.models.hf import TransformersBackbone
from fl_lightning.split.transformer_blocks import transformer_chain

if TYPE_CHECKING:
    from timm.models.resnet import ResNet
    from timm.models.vision_transformer import VisionTransformer
    from typing_extensions import TypeIs

Chain = dict[str, nn.Module]
"""Blocks by name, in the order in which they are applied; their tensors are the backbone's own."""


def chain(backbone: nn.Module, paths: Sequence[str | Sequence[str]] | None = None) -> Chain:
    """Return the blocks whose composition is the backbone. Nothing is copied: training a block trains the backbone.

    Without ``paths`` the blocks of an ``nn.Sequential`` are its children (those of an unnamed inner stage of residual
    blocks one by one), and those of timm's ``VisionTransformer`` and ``ResNet`` and of a causal language model of
    transformers are their stem, their blocks and what follows. Any other backbone needs its blocks declared.

    Args:
        backbone: The module to take apart.
        paths: Module paths in the order of application; several paths in one list are one block.

    Raises:
        ValueError: If the blocks of this kind of backbone must be declared, or a declared path does not exist.
    """
    if paths is not None:
        return _declared(backbone, paths)
    if isinstance(backbone, TransformersBackbone):
        return transformer_chain(backbone)
    if _is_vision_transformer(backbone):
        return _vision_transformer(backbone)
    if _is_resnet(backbone):
        stages = [[f"layer{stage}.{block}" for block in range(len(_stage(backbone, stage)))] for stage in range(1, 5)]
        return _declared(backbone, [["conv1", "bn1", "act1", "maxpool"], *sum(stages, []), "global_pool"])
    if isinstance(backbone, nn.Sequential):
        return _sequential(backbone)
    raise ValueError(
        f"the blocks of a {type(backbone).__name__} are not known; declare them in the order of application, for "
        f"example split.blocks=[{', '.join(name for name, _ in backbone.named_children())}]"
    )


def run(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply blocks one after the other."""
    for block in blocks:
        x = block(x)
    return x


def tensor_names(blocks: Sequence[nn.Module], named: Mapping[str, Tensor]) -> list[str]:
    """Return the names, among ``named``, of the tensors that the blocks hold, tied names included.

    Args:
        blocks: Some blocks of a chain.
        named: All named tensors of the whole module, without duplicates removed.
    """
    held = {id(tensor) for block in blocks for tensor in (*block.parameters(), *block.buffers())}
    return [name for name, tensor in named.items() if id(tensor) in held]


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what a module's ``state_dict`` holds, as the very tensors, so that they can be told by identity."""
    own = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}


def check(blocks: Chain, backbone: nn.Module, x: Tensor) -> None:
    """Make sure that the blocks are the backbone: same output, and every tensor in a block.

    Args:
        blocks: From `chain`.
        backbone: The whole.
        x: A small batch of inputs.

    Raises:
        ValueError: If the composition gives something else, or a tensor of the backbone is in no block.
    """
    named = named_tensors(backbone)
    missing = named.keys() - set(tensor_names(list(blocks.values()), named))
    if missing:
        raise ValueError(
            f"the declared blocks leave out {', '.join(sorted(missing)[:4])}; declare every module that has tensors."
        )
    modes = {module: module.training for module in backbone.modules()}
    backbone.eval()
    try:
        with torch.no_grad():
            whole = backbone(x)
            try:
                composed = run(list(blocks.values()), x)
            except (RuntimeError, TypeError, AttributeError, IndexError, ValueError) as error:
                raise ValueError(f"the blocks {', '.join(blocks)} cannot be applied in order: {error}") from error
    finally:
        for module, training in modes.items():
            module.training = training
    if isinstance(backbone, TransformersBackbone) and backbone.padding is not None and not backbone.last:
        whole = whole * backbone.real(x).unsqueeze(-1)  # what stands where padding is does not matter
    if whole.shape != composed.shape or not torch.allclose(whole, composed, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"the blocks {', '.join(blocks)} applied in order do not give what the backbone gives; "
            "declare them in the order of application, pooling and flattening included."
        )


def _declared(backbone: nn.Module, paths: Sequence[str | Sequence[str]]) -> Chain:
    blocks: Chain = {}
    for entry in paths:
        group = [entry] if isinstance(entry, str) else list(entry)
        try:
            modules = [backbone.get_submodule(path) for path in group]
        except AttributeError as error:
            raise ValueError(
                f"the model has no module {group}; its children are "
                f"{', '.join(name for name, _ in backbone.named_children())}."
            ) from error
        blocks[group[0]] = modules[0] if len(modules) == 1 else nn.Sequential(*modules)
    return blocks


def _sequential(backbone: nn.Sequential) -> Chain:
    blocks: Chain = {}
    for name, child in backbone.named_children():
        inner = list(child.named_children()) if type(child) is nn.Sequential else []
        if inner and all(list(block.children()) for _, block in inner):  # a stage of residual blocks
            blocks.update({f"{name}.{index}": block for index, block in inner})
        elif next(child.parameters(), None) is None and blocks:
            last = next(reversed(blocks))  # activation, pooling: a cut before them would only cost bytes
            blocks[last] = nn.Sequential(blocks[last], child)
        else:
            blocks[name] = child
    return blocks


# A backbone can be of a class of timm, which takes a second to import, only if timm was imported to make it.
def _is_vision_transformer(backbone: nn.Module) -> TypeIs[VisionTransformer]:
    module = sys.modules.get("timm.models.vision_transformer")
    return module is not None and isinstance(backbone, module.VisionTransformer)


def _is_resnet(backbone: nn.Module) -> TypeIs[ResNet]:
    module = sys.modules.get("timm.models.resnet")
    return module is not None and isinstance(backbone, module.ResNet)


def _stage(backbone: ResNet, stage: int) -> nn.Sequential:
    return backbone.get_submodule(f"layer{stage}")  # type: ignore[return-value]


class _Embedding(nn.Module):
    """What a vision transformer does before its first block."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.rest.forward_features(x)  # type: ignore[operator]
        return tokens


class _Readout(nn.Module):
    """What a vision transformer does after its last block, up to the classifier."""

    def __init__(self, rest: nn.Module) -> None:
        super().__init__()
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.rest.forward_head(self.rest.norm(x), pre_logits=True)  # type: ignore[operator]
        return features


_READOUT = ("norm", "attn_pool", "fc_norm", "head_drop")


def _vision_transformer(backbone: VisionTransformer) -> Chain:
    """Blocks of a transformer: itself without blocks, the blocks, and itself without all but the readout."""
    embedding = _without(backbone, {"blocks", "head", *_READOUT}, keep_parameters=True)
    readout = _without(backbone, {name for name, _ in backbone.named_children()} - set(_READOUT), keep_parameters=False)
    blocks: Chain = {"embed": _Embedding(embedding)}
    blocks.update({f"blocks.{index}": block for index, block in enumerate(backbone.blocks)})
    blocks["readout"] = _Readout(readout)
    return blocks


def _without(module: nn.Module, children: set[str], keep_parameters: bool) -> nn.Module:
    """Return a shallow twin of a module in which some children do nothing; the other tensors are the module's own."""
    twin = copy.copy(module)
    twin._modules = {
        name: nn.Identity() if name in children and child is not None else child
        for name, child in module._modules.items()
    }
    twin._parameters = dict(module._parameters) if keep_parameters else dict.fromkeys(module._parameters)
    return twin
