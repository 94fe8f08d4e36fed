"""Any image model of timm by its name, and a small vision transformer for small images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from fl_lightning.checks import ArgumentError
from fl_lightning.models.export import BACKBONE, read_global_model
from fl_lightning.models.model import Model
from fl_lightning.state import difference, without_prefix

log = logging.getLogger(__name__)


class PointwiseClassifier(nn.Conv2d):
    """A 1x1 convolution that classifies features ``(N, D)``: what some timm models have in place of a linear head."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> PointwiseClassifier:
        """Return a classifier with the tensors of ``conv``, which keeps no reference to it but those."""
        classifier = cls(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
        classifier.weight, classifier.bias = conv.weight, conv.bias
        return classifier

    def forward(self, features: Tensor) -> Tensor:
        """Return logits ``(N, num_classes)`` for features ``(N, D)``."""
        return super().forward(features[..., None, None]).flatten(1)


def timm_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | None = None,
    pretrained: bool = False,
    weights: str | None = None,
) -> Model:
    """Build a timm model by name and take its classifier, found through timm's own ``get_classifier``, as the head.

    A model that is built for one image size (a transformer with position embeddings) is built for ``image_size``;
    others take any size.

    Args:
        name: Name of the architecture, with or without the tag of its weights, for example ``"resnet10t"``.
        num_classes: Number of classes, at least 1.
        in_channels: Channels of an image; timm adapts pretrained stems.
        image_size: Height and width of an image in pixels; ``None`` keeps the model's own.
        pretrained: Download and load timm's weights for the backbone.
        weights: A file to load the backbone from instead, of ``torch.save`` or safetensors: the state dict of the same
            model with any number of classes; nothing in it is executed.

    Raises:
        ValueError: If timm has no such model, cannot build it for this image size, or it has not one classifier; if
            the file holds another model's weights.
        RuntimeError: If the pretrained weights cannot be had.
    """
    import timm  # takes longer than a round of the default run, which has no model of it
    from timm.models import get_pretrained_cfg, is_model, list_models

    if pretrained and weights is not None:
        raise ArgumentError(f"weights must be null where pretrained is true, got {weights!r}")
    architecture = name.split(".")[0]
    if not is_model(architecture):
        close = get_close_matches(architecture, list_models(), n=5)
        hint = f"close names: {', '.join(close)}" if close else "see timm.list_models()"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}.")
    size: dict[str, Any] = {}
    defaults = get_pretrained_cfg(name)
    if image_size is not None and defaults is not None and defaults.fixed_input_size:
        size = {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, in_chans=in_channels, **size)
    except (AssertionError, ValueError, TypeError) as error:
        raise ValueError(
            f"timm could not build {name!r} for {num_classes} classes of {in_channels}x{image_size}x{image_size} "
            f"images: {error}. Choose another model, or another image size."
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"The pretrained weights of {name!r} cannot be loaded: {error}. "
            "Check the name's tag and the network, or set `model.pretrained=false`."
        ) from error
    parts = split_classifier(model, name)
    if weights is not None:
        load_backbone(parts, weights)
    return parts


def compare_normalization(model: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Warn where pixels are normalised otherwise than those that a model's pretrained weights were trained on.

    Args:
        model: The node ``model``.
        data: The node ``data``.
    """
    if not (model.get("pretrained") or model.get("weights")) or not {"mean", "std"} <= data.keys():
        return
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(model["name"])
    for key in ("mean", "std"):
        own = [] if known is None else list(getattr(known, key))
        given = list(data[key]) if isinstance(data[key], Sequence) else [data[key]]
        given = given * len(own) if len(given) == 1 else given
        if len(given) == len(own) and any(abs(a - b) > 0.02 for a, b in zip(given, own, strict=True)):
            values = ",".join(f"{value:g}" for value in own)
            log.warning(
                "the weights of %s were trained with data.%s=[%s], not %s", model["name"], key, values, data[key]
            )


def load_backbone(model: Model, path: str) -> None:
    """Load the backbone of a model from a file.

    Args:
        model: The model; its head stays as it is.
        path: As in :func:`~fl_lightning.models.export.read_global_model`.
    """
    given = without_prefix(BACKBONE, read_global_model(path, model.head_path))
    if words := difference(given, model.backbone.state_dict()):
        raise ArgumentError(f"weights must be a file of this model's backbone, got {path}: {words}")
    model.backbone.load_state_dict(given)


def vit(
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 32,
    patch_size: int = 8,
    embed_dim: int = 64,
    depth: int = 6,
    num_heads: int = 4,
    mlp_ratio: float = 2.0,
) -> Model:
    """Build a small vision transformer out of timm's `VisionTransformer`, for small images on a CPU.

    Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, https://arxiv.org/abs/2010.11929.

    Args:
        num_classes: Number of classes, at least 1.
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, a multiple of ``patch_size``.
        patch_size: Height and width of a patch in pixels.
        embed_dim: Width of a token, a multiple of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Width of a block's hidden layer in units of ``embed_dim``.
    """
    from timm.models.vision_transformer import VisionTransformer

    if image_size % patch_size:
        raise ValueError(
            f"`patch_size` must divide the image size {image_size}, got {patch_size}; set `model.patch_size`."
        )
    if embed_dim % num_heads:
        raise ValueError(f"`num_heads` must divide `embed_dim` {embed_dim}, got {num_heads}.")
    transformer = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
    )
    return split_classifier(transformer, "vit")


def split_classifier(model: nn.Module, name: str) -> Model:
    """Take the classifier out of a timm model and leave an identity in its place, so that the rest yields features.

    Args:
        model: A timm model; it becomes the backbone.
        name: What to call it in an error.
    """
    classifier = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear | nn.Conv2d):
        found = (
            f"{len(classifier)} classifiers" if isinstance(classifier, tuple | list) else f"{type(classifier).__name__}"
        )
        raise ValueError(
            f"the classifier of {name!r} must be one linear layer or 1x1 convolution, got {found}; choose another model"
        )
    head_path = next(path for path, module in model.named_modules() if module is classifier)
    parent, _, attribute = head_path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, nn.Identity())
    head = PointwiseClassifier.of(classifier) if isinstance(classifier, nn.Conv2d) else classifier
    return Model(model, head, head_path)
