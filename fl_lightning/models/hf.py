"""Models of the transformers library: causal language models, classifiers of sequences and of images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from fl_lightning.checks import ArgumentError, one_of
from fl_lightning.models.model import Model

Kind = Literal["causal", "sequence", "image"]

CLASSES = {
    "causal": "AutoModelForCausalLM",
    "sequence": "AutoModelForSequenceClassification",
    "image": "AutoModelForImageClassification",
}


class TransformersBackbone(nn.Module):
    """A model of transformers whose last layer was taken out, as a module from tensors to features.

    Its tensors have the names that they have in the model.

    Args:
        model: The model; an identity stands where its last linear layer was.
        kind: What it reads.
        padding: The token that fills up shorter sequences, which no other sees; None: all tokens are seen.
        last: Whether a language model answers for the last position alone. Padding then stands at the left: behind a
            real token it is one, too.
    """

    def __init__(self, model: nn.Module, kind: Kind, padding: int | None, last: bool = False) -> None:
        super().__init__()
        if any(True for _ in model.parameters(recurse=False)):
            raise ValueError(f"{type(model).__name__} has parameters beside its parts; take another model")
        # One dict of children for both: whoever replaces one here (as adapters do) replaces it there.
        self._modules = model._modules
        self.__dict__["_model"] = model
        self.kind = kind
        self.padding = padding
        self.last = last

    @override
    def train(self, mode: bool = True) -> TransformersBackbone:
        self.__dict__["_model"].training = mode
        super().train(mode)
        return self

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.__dict__["_model"].config

    @property
    def embeddings(self) -> Any:
        """The layer that turns tokens into vectors."""
        return self.__dict__["_model"].get_input_embeddings()

    def real(self, tokens: Tensor) -> Tensor:
        """Return which tokens are no padding, bool like ``tokens``."""
        return real_tokens(tokens, self.padding, self.last)

    def forward(self, x: Tensor) -> Tensor:
        """Return features ``(N, D)`` of images ``(N, C, H, W)`` or tokens ``(N, T)``; ``(N, T, D)`` where causal."""
        model: Any = self.__dict__["_model"]
        if self.kind == "image":
            return _tensor(model(pixel_values=x).logits)
        if not self.training and int(x.max()) >= (size := model.config.vocab_size):
            raise ValueError(
                f"the data hold the token {int(x.max())}, and the model knows {size}; give data.tokenizer the "
                "model's own"
            )
        mask = None if self.padding is None else self.real(x).long()
        # A row of padding alone would attend to nothing.
        if mask is not None and self.kind == "sequence":
            mask[:, 0] = 1
        more = {"use_cache": False} if self.kind == "causal" else {}
        prompt = self._parameters.get("prompt")
        if prompt is None or not bool(prompt.any()):
            out = _tensor(model(input_ids=x, attention_mask=mask, **more).logits)
            return out[:, -1] if self.last else out
        words = self.embeddings(x)
        if mask is not None:
            mask = torch.cat([mask.new_ones(len(x), len(prompt)), mask], dim=1)
        found = torch.cat([prompt.to(words.dtype).expand(len(x), -1, -1), words], dim=1)
        out = _tensor(model(inputs_embeds=found, attention_mask=mask, **more).logits)
        return out[:, -1] if self.last else out[:, len(prompt) :] if self.kind == "causal" else out


def real_tokens(tokens: Tensor, padding: int | None, left: bool) -> Tensor:
    """Return which tokens are no padding, bool like ``tokens``.

    Args:
        tokens: int64 (N, T).
        padding: The token that fills up shorter sequences; None: there is none.
        left: Whether it stands at the left alone: behind a real token it is one, too.
    """
    if padding is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    found = tokens != padding
    return found.cumsum(1).bool() if left else found


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def is_missing(name: str) -> bool:
    """Tell whether a name is the path of something that is not there, which the hub need not be asked for."""
    return (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).expanduser().exists()


def is_folder(path: str | Path) -> bool:
    """Tell whether a path is a folder that holds a model of transformers."""
    try:
        return "model_type" in json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def kind_of(folder: str | Path) -> tuple[Kind | None, int]:
    """Return what the model of a folder reads, None where it has no head that answers, and its number of classes."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto

    known = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    names: dict[str, Any] = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "sequence": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    own = set(known.get("architectures") or ())
    found = [kind for kind in get_args(Kind) if own & {*names[kind].values()}]
    config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    kind = found[0] if found else None
    return kind, config.vocab_size if kind == "causal" else config.num_labels


def hf(
    num_classes: int,
    in_channels: int = 1,
    image_size: int = 64,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    kind: Kind = "causal",
    padding: int | None = None,
    pretrained: bool = True,
    tied: bool = True,
    last: bool = False,
) -> Model:
    """Build a model of transformers; its last linear layer becomes the head.

    A causal language model answers ``(N, T, V)`` for tokens ``(N, T)`` and is trained with ``task=language``. Nothing
    that a model brings is executed: code of its own is refused, and weights are read as safetensors.

    Args:
        num_classes: Classes, or the size of the vocabulary where ``kind`` is ``causal``.
        in_channels: Channels of an example; a sequence has 1.
        image_size: Tokens of the longest sequence, or height and width of an image in pixels.
        name: A folder that holds a model, or its name on the hub: its weights are loaded, all but a classifier of other
            classes. None: a new model.
        config: Of a new model: ``model_type``, such as ``gpt2``, ``llama``, ``bert`` or ``vit``, and what its
            configuration takes.
        kind: ``causal``, ``sequence`` (one class for each) or ``image``.
        padding: The token that fills up shorter sequences; None: that of the model's configuration, if it has one.
        pretrained: Whether a model with a name brings its weights, or its form alone.
        tied: False: a head that shares its weights with the model's embeddings gets a copy of its own, so that it can
            train by itself.
        last: Whether a causal model answers ``(N, V)`` for the token after the sequence alone, as data=tokens asks.

    Raises:
        ImportError: If transformers is not installed.
        RuntimeError: If the weights cannot be had.
        ValueError: If there is no such kind of model, its vocabulary is another, sequences are too long for it, or its
            last layer is no linear layer.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("model=hf needs transformers: pip install 'fl_lightning[text]'") from error
    one_of("kind", kind, Kind)
    if kind != "image" and in_channels != 1:
        raise ArgumentError(f"kind must be image for images of {in_channels} channels, got {kind}")
    if last and kind != "causal":
        raise ArgumentError(f"last must be false where kind is {kind}, got true")
    maker: Any = getattr(transformers, CLASSES[kind])
    sizes: dict[str, Any] = {"vocab_size": num_classes} if kind == "causal" else {"num_labels": num_classes}
    if name is not None and is_missing(name):
        raise ArgumentError(
            f"name must be a folder, or a name on the hub, got {name}, which is not there; set model.name=null for a "
            "new model"
        )
    if name is not None:
        labels = {} if kind == "causal" else sizes
        own = {"trust_remote_code": False, **labels}
        try:
            if pretrained:
                more = {} if kind == "causal" else {"ignore_mismatched_sizes": True}
                model = maker.from_pretrained(name, use_safetensors=True, **own, **more)
            else:
                model = maker.from_config(transformers.AutoConfig.from_pretrained(name, **own))
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"model.name={name} cannot be loaded as {CLASSES[kind]}: {str(error).splitlines()[0]} Give a folder "
                "that holds the model, or set model.name=null for a new one"
            ) from error
    else:
        if not config or "model_type" not in config:
            raise ArgumentError(f"config must hold a model_type, such as gpt2, where name is null, got {config}")
        if kind == "causal":  # the usual ones may lie beyond this vocabulary
            sizes |= {"bos_token_id": None, "eos_token_id": None}
        if kind == "image":
            sizes |= {"image_size": image_size, "num_channels": in_channels}
        own = {key: value for key, value in config.items() if key != "model_type"}
        try:
            model = maker.from_config(transformers.AutoConfig.for_model(config["model_type"], **{**sizes, **own}))
        except (ValueError, TypeError, KeyError) as error:
            raise ArgumentError(
                f"config must describe a model of kind={kind}, got {dict(config)}: {str(error).splitlines()[0][:160]}"
            ) from error
    model.float()
    known = model.config
    # Some models have more rows than their tokenizer has tokens, so that sizes divide.
    if kind == "causal" and not 0.95 * known.vocab_size <= num_classes <= known.vocab_size:
        raise ValueError(
            f"model.name={name} knows {known.vocab_size} tokens, and the data have {num_classes}; give data.tokenizer "
            "the model's own"
        )
    longest = getattr(known, "max_position_embeddings", None)
    if kind != "image" and longest is not None and image_size > longest:
        raise ValueError(
            f"sequences must have at most {longest} tokens for this model, got {image_size}; set data.length"
        )
    padding = getattr(known, "pad_token_id", None) if padding is None else padding
    if kind == "sequence" and known.pad_token_id is None:
        if padding is None:
            raise ArgumentError(
                "padding must be the token that fills up shorter texts for a model that names none, such as 0 for "
                "bytes, got null"
            )
        known.pad_token_id = padding
    path = _last_linear(model, known.vocab_size if kind == "causal" else num_classes, kind)
    head = model.get_submodule(path)
    if not tied and any(other is head.weight for other in _all_but(model, path)):
        head.weight = nn.Parameter(head.weight.detach().clone())
        known.tie_word_embeddings = False
    x = _example(kind, known, in_channels, image_size, padding)
    with torch.no_grad():
        model.eval()
        tried = not head.weight.is_meta  # a model made without weights computes nothing
        whole = TransformersBackbone(model, kind, padding, last).eval()(x) if tried else None
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, nn.Identity())
        backbone = TransformersBackbone(model, kind, padding, last).eval()
        if whole is not None and not torch.allclose(head(backbone(x)), whole, atol=1e-4):
            raise ValueError(f"{type(model).__name__} does more with its last layer {path} than apply it; take another")
    model.train()
    return Model(backbone.train(), head, path)


def _all_but(model: nn.Module, path: str) -> list[nn.Parameter]:
    """Return the parameters of all parts of a model but one."""
    named = model.named_parameters(remove_duplicate=False)
    return [parameter for name, parameter in named if not name.startswith(f"{path}.")]


def _last_linear(model: Any, num_classes: int, kind: Kind) -> str:
    """Return the name of the layer that gives the logits."""
    wanted = model.get_output_embeddings() if kind == "causal" else None
    linear: list[str] = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    if wanted is not None:
        linear = [name for name in linear if model.get_submodule(name) is wanted]
    fits = [name for name in linear if model.get_submodule(name).out_features == num_classes]
    if not fits:
        raise ValueError(f"{type(model).__name__} must end in a linear layer with {num_classes} outputs, and has none")
    return fits[-1]


def _example(kind: Kind, config: Any, in_channels: int, image_size: int, padding: int | None) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        if kind == "image":
            return torch.rand(2, in_channels, image_size, image_size)
        tokens = torch.randint(0, config.vocab_size, (2, min(image_size, 8)))
    return tokens if padding is None else torch.where(tokens == padding, (padding + 1) % config.vocab_size, tokens)
