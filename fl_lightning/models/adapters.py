"""Low-rank adapters as parts of a model: its own weights stay, small matrices beside them train and travel."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl_lightning.checks import ArgumentError, above, one_of, whole, within
from fl_lightning.models.compact import (
    Base,
    CompactLinear,
    compact,
    compact_state,
    is_conv1d,
    need_bitsandbytes,
    restored_state,
    weight_shape,
)
from fl_lightning.models.hf import TransformersBackbone
from fl_lightning.models.model import Model
from fl_lightning.state import State

ADAPTER = "default"
"""The name that peft gives to a layer's only adapter; it stands in the tensors' names."""

LOCAL = "local"
"""The name of an adapter that stays with its client, beside one that does not."""

PREFIX = "base_model.model."
"""Of the tensors' names in a PEFT folder."""

KINDS = ("auto", "attention", "linear")

#: What attention's linear layers are called in timm, in transformers and here.
ATTENTION = {
    *("qkv", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    *("query", "key", "value", "q_lin", "k_lin", "v_lin", "out_lin", "c_attn", "Wqkv"),
}


@dataclass(frozen=True)
class Adapters:
    """Which layers of a model's backbone get adapters, and of which size.

    Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen, LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022,
    https://arxiv.org/abs/2106.09685: a weight W (out, in) becomes W + alpha/rank B A with A (rank, in) random and
    B (out, rank) zero at the start. A convolution's weight counts as (out, in x height x width).

    Args:
        rank: Rank of each change, at least 1 and at most the smaller side of every adapted weight.
        alpha: The change is scaled by ``alpha / rank``; above 0.
        targets: ``attention``: its linear layers. ``linear``: all linear layers. ``auto``: the attention's where there
            is any, else all linear and convolutional layers. Or a list of names, or last parts of names, of linear
            layers; a convolution is named in full.
        dropout: Of the adapters' inputs, in [0, 1).
        train: ``both`` matrices, or ``B`` alone: A then stays as it was drawn, the same everywhere.
        dora: Whether the length of each output's weights is trained too. Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen,
            DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, https://arxiv.org/abs/2402.09353.
        base: What the backbone's frozen linear layers are kept in: ``float32``, ``bfloat16``, ``int8`` with a scale
            for each output, or ``nf4``, four bits with a scale for each 64 entries, which needs bitsandbytes (see
            :class:`~fl_lightning.models.compact.CompactLinear`).
    """

    rank: int = 4
    alpha: float = 8.0
    targets: str | Sequence[str] = "auto"
    dropout: float = 0.0
    train: Literal["both", "B"] = "both"
    dora: bool = False
    base: Base = "float32"

    def __post_init__(self) -> None:
        whole("rank", self.rank, 1)
        above("alpha", self.alpha, 0)
        within("dropout", self.dropout, "[0, 1)")
        one_of("train", self.train, ("both", "B"))
        one_of("base", self.base, Base)
        if self.dora and self.base != "float32":
            raise ArgumentError(f"base must be float32 with dora=true, which needs lengths of weights, got {self.base}")
        if isinstance(self.targets, str):
            one_of("targets", self.targets, KINDS)
        elif not self.targets:
            raise ArgumentError("targets must name a layer, or be auto, attention or linear, got []")

    def inject(self, backbone: nn.Module, name: str = ADAPTER) -> None:
        """Put adapters beside the chosen layers of a backbone, in place; nothing else of it trains from now on.

        Args:
            backbone: The backbone.
            name: Of the adapters, where a layer gets more than one.

        Raises:
            ImportError: If peft is not installed.
            ArgumentError: If a target fits no layer, or the rank exceeds a side of a layer's weight.
        """
        peft = need_peft()
        chosen = self.layers(backbone)
        compact(backbone, self.base)
        config = peft.LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_dora=self.dora,
            target_modules="|".join(map(re.escape, chosen)),
            fan_in_fan_out=all(is_conv1d(_own(backbone.get_submodule(layer))) for layer in chosen),
        )
        peft.inject_adapter_in_model(config, backbone, name)
        if hasattr(backbone, "peft_config"):
            del backbone.peft_config
        for key, parameter in backbone.named_parameters():
            if "lora_" in key:  # peft gives them the type of the weight
                parameter.data = parameter.data.float()
            parameter.requires_grad_("lora_" in key and not (self.train == "B" and ".lora_A." in key))

    def check(self, backbone: nn.Module) -> None:
        """Check what can be checked before :meth:`inject`, which raises the same."""
        need_peft()
        if self.base == "nf4":
            need_bitsandbytes()
        if any(".base_layer." in name for name, _ in backbone.named_parameters()):
            raise ValueError("adapters of a fit need a model without adapters of its own; leave out model.adapters")
        self.layers(backbone)

    def layers(self, backbone: nn.Module) -> list[str]:
        """Return the names of the layers that are adapted, in the backbone's order.

        Raises:
            ArgumentError: As :meth:`inject`.
        """
        known = _weights(backbone)
        linear = {name: part for name, part in known.items() if not isinstance(part, nn.Conv2d)}
        attention = [name for name in linear if _is_attention(name, linear)]
        if isinstance(self.targets, str):
            chosen = {"auto": attention or list(known), "attention": attention, "linear": list(linear)}[self.targets]
            if not chosen:
                raise ArgumentError(
                    f"targets must fit a layer of the backbone, got {self.targets}, of which it has "
                    f"none; name some of its layers: {', '.join(list(known)[:6]) or 'it has none that can be adapted'}"
                )
        else:
            chosen = [name for target in self.targets for name in _fits(target, known, linear)]
            chosen = [name for name in known if name in set(chosen)]
        for name in chosen:
            sides = layer_sides(known[name])
            if self.rank > min(sides):
                raise ArgumentError(
                    f"rank must be at most {min(sides)}, the smaller side of {name} "
                    f"({sides[0]} x {sides[1]}), got {self.rank}; lower it, or name other targets"
                )
        return chosen

    def adapt(self, model: Model) -> Model:
        """Return the model with adapters in its backbone; the head trains as before."""
        self.inject(model.backbone)
        return model


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer with an adapter, and the names of its tensors.

    Attributes:
        name: Name of the layer in its module.
        scale: What B A is multiplied by.
        shape: Shape of the layer's own weight.
        transposed: Whether that weight is (in, out), as in GPT-2's.
    """

    name: str
    scale: float
    shape: tuple[int, ...]
    transposed: bool

    @property
    def weight(self) -> str:
        """Name of the layer's own weight."""
        return f"{self.name}.base_layer.weight"

    @property
    def a(self) -> str:
        """Name of A, (rank, in), or (rank, in, height, width) for a convolution."""
        return f"{self.name}.lora_A.{ADAPTER}.weight"

    @property
    def b(self) -> str:
        """Name of B, (out, rank), or (out, rank, 1, 1) for a convolution."""
        return f"{self.name}.lora_B.{ADAPTER}.weight"

    @property
    def lengths(self) -> str:
        """Name of the lengths of each output's weights, where these train (DoRA); (out,) or (1, out, 1, 1)."""
        return f"{self.name}.lora_magnitude_vector.{ADAPTER}.weight"

    def product(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return scale x B A of a state, (out, in), in float64."""
        return self.scale * state[self.b].double().flatten(1) @ state[self.a].double().flatten(1)

    def as_weight(self, change: Tensor) -> Tensor:
        """Return a change (out, in) in the shape of the layer's own weight."""
        return (change.T if self.transposed else change).reshape(self.shape)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return the layer's own weight as (out, in): the inverse of :meth:`as_weight`."""
        return weight.T if self.transposed else weight.flatten(1)


def adapted_layers(module: nn.Module) -> list[AdaptedLayer]:
    """Return the layers of a module that have adapters; none where peft was never used."""
    found = []
    for name, part in module.named_modules():
        if hasattr(part, "lora_A") and ADAPTER in part.lora_A:
            base: Any = part.get_base_layer()
            found.append(AdaptedLayer(name, float(part.scaling[ADAPTER]), weight_shape(base), is_transposed(base)))
    return found


def merged(module: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Return the tensors of the plain model that computes the same: adapters are added to the weights they change.

    Args:
        module: The module, for its layers with adapters.
        state: Its tensors, or those of a part of it.
    """
    layers = {layer.weight: layer for layer in adapted_layers(module)}
    plain: State = {}
    for name, tensor in restored_state(module, dict(state)).items():
        if ".lora_" in name:
            continue
        if name in layers and layers[name].a in state:
            layer = layers[name]
            changed = layer.as_matrix(tensor.double()) + layer.product(state)
            if layer.lengths in state:
                changed *= (state[layer.lengths].double().flatten() / changed.norm(dim=1))[:, None]
            tensor = layer.as_weight(changed).to(tensor.dtype)
        plain[name.replace(".base_layer.", ".")] = tensor
    return plain


def with_adapters(module: nn.Module, state: Mapping[str, Tensor]) -> State:
    """Return a plain model's tensors under the names that they have in a module with adapters, and its own adapters.

    Lengths that train (DoRA) are those of the plain model's weights. A state that has adapters already, and one for a
    module without any, come back as they are.
    """
    own = module.state_dict()
    added = [name for name in own if ".lora_" in name or name == "backbone.prompt"]
    if not added or any(name in state for name in added):
        return dict(state)
    names = {name.replace(".base_layer.", "."): name for name in own}
    found = compact_state(module, {names.get(name, name): tensor for name, tensor in state.items()})
    found |= {name: own[name] for name in added if name.startswith(("backbone.", "head."))}
    for layer in adapted_layers(module):
        if layer.lengths in found and layer.weight in found:
            weight = layer.as_matrix(found[layer.weight].double()) + layer.product(found)
            found[layer.lengths] = weight.norm(dim=1).to(own[layer.lengths].dtype).view_as(own[layer.lengths])
    return found


def without_prompt(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of a backbone's tensor; of a prompt, zeros, which are none."""
    return torch.zeros_like(tensor) if name == "prompt" else tensor.detach().clone()


def save_peft(
    folder: Path, module: nn.Module, state: Mapping[str, Tensor], head_path: str, adapter: str = ADAPTER
) -> bool:
    """Write adapters or a prompt, and the head, for ``peft.PeftModel.from_pretrained(plain_model, folder)``.

    Args:
        folder: Made if it is not there.
        module: The module, for its layers with adapters; its parts are ``backbone`` and ``head``.
        state: All its tensors.
        head_path: Module path of the head in the plain model.
        adapter: Which adapter, where layers have more than one.

    Returns:
        Whether it was written: not for a model without adapters, nor where the folder could not say all that was
        trained (BatchNorm's statistics, prompts for images).
    """
    if "backbone.prompt" in state:
        return _save_prompt(folder, module, state, head_path)
    layers = [layer for layer in adapted_layers(module) if layer.name.startswith("backbone.")]
    named = {
        (layer.name, part): name.replace(f".{ADAPTER}.", f".{adapter}.")
        for layer in layers
        for part, name in (
            ("lora_A.weight", layer.a),
            ("lora_B.weight", layer.b),
            ("lora_magnitude_vector", layer.lengths),
        )
        if name in state
    }
    own = {name for name, _ in module.named_parameters() if name in state and name.startswith(("backbone.", "head."))}
    trained = own - set(getattr(module, "base_names", ()))
    told = {name for layer in layers for name in (layer.a, layer.b, layer.lengths)} | {*named.values()}
    head = {name for name in trained if name.startswith("head.")}
    statistics = any(isinstance(part, _BatchNorm) for part in module.modules())
    if not layers or statistics or not trained <= told | head:
        return False
    plain = {layer.name: layer.name.removeprefix("backbone.") for layer in layers}
    tensors = {f"{PREFIX}{plain[layer]}.{part}": state[name] for (layer, part), name in named.items()}
    tensors |= {f"{PREFIX}{head_path}.{name.removeprefix('head.')}": state[name] for name in head}
    rank = state[named[layers[0].name, "lora_A.weight"]].shape[0]
    config = need_peft().LoraConfig(
        r=rank,
        lora_alpha=layers[0].scale * rank,
        target_modules=sorted(plain.values()),
        use_dora=layers[0].lengths in state,
        modules_to_save=[head_path] if head else None,
        fan_in_fan_out=layers[0].transposed,
    )
    _write(folder, config, tensors)
    return True


def save_peft_change(
    folder: Path,
    module: nn.Module,
    start: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    adapters: Adapters,
    count: int,
    head_path: str,
) -> bool:
    """Write what adapters have added to a plain model, for ``peft.PeftModel.from_pretrained(model_before, folder)``.

    The mean of several products B A is no product of their means, but it has at most the sum of their ranks: the
    change of each weight is split into factors of that rank by its singular values, so that nothing is cut but
    rounding.

    Args:
        folder: Made if it is not there.
        module: The plain module; its parts are ``backbone`` and ``head``.
        start: All its tensors before.
        state: All its tensors after.
        adapters: What stood beside it in each fit.
        count: Number of the fits.
        head_path: Module path of the head in the plain model.

    Returns:
        Whether it was written: not where more has changed than the adapted weights and the head, nor for DoRA, whose
        lengths change weights by a full rank.
    """
    backbone = module.get_submodule("backbone")
    layers = {f"backbone.{name}.weight": name for name in adapters.layers(backbone)}
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, start[name].to(tensor))}
    head = {name for name in changed if name.startswith("head.")}
    if adapters.dora or not changed <= layers.keys() | head:
        return False
    rank = adapters.rank * count
    tensors: State = {}
    for weight, name in layers.items():
        turned = is_conv1d(backbone.get_submodule(name))
        change = (state[weight].double() - start[weight].to(state[weight]).double()).flatten(1)
        left, values, right = torch.linalg.svd(change.T if turned else change, full_matrices=False)
        missing = max(0, rank - len(values))
        roots = values[:rank].sqrt()
        a = nn.functional.pad(roots[:, None] * right[:rank], (0, 0, 0, missing))
        b = nn.functional.pad(left[:, :rank] * roots, (0, missing))
        image = state[weight].dim() == 4
        for side, factor, shape in (("A", a, state[weight].shape[1:]), ("B", b, (rank, 1, 1))):
            shaped = factor.reshape(len(factor), *shape) if image else factor
            tensors[f"{PREFIX}{name}.lora_{side}.weight"] = shaped.float()
    config = need_peft().LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(layers.values()),
        modules_to_save=[head_path] if head else None,
        fan_in_fan_out=all(is_conv1d(backbone.get_submodule(name)) for name in layers.values()),
    )
    whole = {name for name in state if name.startswith("head.")} if head else ()
    tensors |= {f"{PREFIX}{head_path}.{name.removeprefix('head.')}": state[name] for name in whole}
    _write(folder, config, tensors)
    return True


def _write(folder: Path, config: Any, tensors: State) -> None:
    """Write a PEFT folder of tensors under peft's names."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")


def _save_prompt(folder: Path, module: nn.Module, state: Mapping[str, Tensor], head_path: str) -> bool:
    """Write a prompt and what trained of the head; not for images, for which peft has no prompts."""
    backbone: Any = module.get_submodule("backbone")
    if not isinstance(backbone, TransformersBackbone):
        return False
    tensors: State = {"prompt_embeddings": state["backbone.prompt"]}
    if backbone.kind == "sequence":
        tensors |= {
            f"base_model.{head_path}.{name.removeprefix('head.')}": tensor
            for name, tensor in state.items()
            if name.startswith("head.")
        }
    tokens, width = tensors["prompt_embeddings"].shape
    known = backbone.config
    config = need_peft().PromptTuningConfig(
        task_type="SEQ_CLS" if backbone.kind == "sequence" else "CAUSAL_LM",
        num_virtual_tokens=tokens,
        token_dim=width,
        num_transformer_submodules=1,
        num_attention_heads=known.num_attention_heads,
        num_layers=known.num_hidden_layers,
        modules_to_save=[head_path] if backbone.kind == "sequence" else None,
    )
    _write(folder, config, tensors)
    return True


def _weights(backbone: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that can be adapted, by name: linear ones, transformers' ``Conv1D``, plain convolutions."""
    modules = dict(backbone.named_modules())
    inside = {name for name, part in modules.items() if _own(part) is not part}  # a layer that has an adapter already
    layers = {name: _own(part) for name, part in modules.items() if not any(name.startswith(f"{x}.") for x in inside)}
    return {
        name: part
        for name, part in layers.items()
        if (isinstance(part, nn.Linear) or is_transposed(part) or (isinstance(part, nn.Conv2d) and part.groups == 1))
        # Its weight is used, but its forward is not.
        and not isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)
    }


def _is_attention(name: str, linear: Mapping[str, nn.Module]) -> bool:
    *parents, last = name.split(".")
    beside = {other.rpartition(".")[2] for other in linear if other.split(".")[:-1] == parents}
    return last in ATTENTION or "qkv" in beside or any("attn" in part or "attention" in part for part in parents)


def _fits(target: str, known: Mapping[str, nn.Module], linear: Mapping[str, nn.Module]) -> list[str]:
    fits = [name for name in linear if f".{name}".endswith(f".{target}")] or [name for name in known if name == target]
    if not fits:
        lasts = {name.rpartition(".")[2] for name in linear}
        close = get_close_matches(target, [*sorted(lasts), *known], n=4, cutoff=0.4) or list(known)[:6]
        raise ArgumentError(
            f"targets must fit layers of the backbone, got {target!r}; "
            f"{'close names: ' + ', '.join(close) if close else 'it has none that can be adapted'}"
        )
    return fits


def layer_sides(part: Any) -> tuple[int, int]:
    """Return how many numbers leave a layer, and how many come in."""
    rows, *rest = weight_shape(part)
    columns = prod(rest)
    return (columns, rows) if is_transposed(part) else (rows, columns)


def _own(part: Any) -> Any:
    """Return the layer itself, where adapters stand beside it."""
    return part.get_base_layer() if hasattr(part, "lora_A") else part


def is_transposed(part: nn.Module) -> bool:
    """Tell whether a layer's weight is (in, out)."""
    return is_conv1d(part) or (isinstance(part, CompactLinear) and part.transposed)


def need_peft() -> Any:
    """Return the library.

    Raises:
        ImportError: If it is not installed, with the extra to install.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("adapters need the peft library: pip install 'fl_lightning[lora]'") from error
    return peft
