"""Linear layers that nobody trains, kept in fewer bytes: bfloat16, or int8 with a scale for each output."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fl_lightning.checks import ArgumentError
from fl_lightning.state import State

Base = Literal["float32", "bfloat16", "int8"]


class _Product(torch.autograd.Function):
    """x W^T for a weight in few bytes: what backward needs of it is found again, not kept in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
        y = x @ weight.to(x.dtype).T
        return y if scale is None else y * scale.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, scale = inputs
        ctx.save_for_backward(weight, scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        [slope] = slopes
        if scale is not None:
            slope = slope * scale.to(slope.dtype)
        return slope @ weight.to(slope.dtype), None, None


class CompactLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in fewer bytes; it computes in the type of its inputs.

    ``int8``: row o of the weight (out, in) is s_o q_o with whole numbers q_o in -127 ... 127 and s_o a 127th of its
    largest absolute value, so that no entry is off by more than s_o / 2.

    Args:
        layer: A linear layer, or transformers' ``Conv1D``, whose weight is (in, out) and stays so.
        base: ``bfloat16`` or ``int8``.
    """

    def __init__(self, layer: Any, base: Base) -> None:
        nn.Module.__init__(self)
        self.transposed = not isinstance(layer, nn.Linear)
        rows, columns = layer.weight.shape
        self.in_features, self.out_features = (rows, columns) if self.transposed else (columns, rows)
        self.base = base
        for name, tensor in self.stored(layer.weight.detach()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = layer.bias
        self.train(layer.training)

    def stored(self, weight: Tensor) -> State:
        """Return the tensors of a weight in float32: ``weight``, and of int8 ``scale`` (out,)."""
        if self.base == "bfloat16":
            return {"weight": weight.to(torch.bfloat16)}
        along = 0 if self.transposed else 1
        largest = weight.float().abs().amax(along, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        return {"weight": (weight / scale).round().to(torch.int8), "scale": scale.flatten()}

    def restored(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """Return the weight in float32, in the layout of the layer that this one stands for."""
        if scale is None:
            return weight.float()
        return weight.float() * (scale if self.transposed else scale[:, None])

    @override
    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.T if self.transposed else self.weight
        y: Tensor = _Product.apply(input, weight, self._parameters.get("scale"))
        return y if self.bias is None else y + self.bias.to(y.dtype)


def compact(backbone: nn.Module, base: Base) -> None:
    """Put compact layers in the place of a backbone's linear layers."""
    if base == "float32":
        return
    for name, part in list(backbone.named_modules()):
        plain = type(part) is nn.Linear or is_conv1d(part)
        parent, _, attribute = name.rpartition(".")
        above = backbone.get_submodule(parent)
        # Its weight is used, but its forward is not.
        if plain and name and not isinstance(above, nn.MultiheadAttention) and "lora_" not in name:
            setattr(above, attribute, CompactLinear(part, base))
    if not _compact(backbone):
        raise ArgumentError(f"base must be float32 for a backbone without linear layers, got {base}")


def is_conv1d(part: nn.Module) -> bool:
    """Tell whether a layer is transformers' ``Conv1D``, a linear layer with a weight (in, out)."""
    return type(part).__name__ == "Conv1D" and type(part).__module__.startswith("transformers.")


def compact_state(module: nn.Module, state: State) -> State:
    """Return a state whose weights of compact layers, where they are in float32, are as these keep them."""
    found = dict(state)
    for name, part in _compact(module):
        weight = found.get(f"{name}.weight")
        if weight is not None and weight.dtype == torch.float32:
            found |= {f"{name}.{key}": tensor for key, tensor in part.stored(weight).items()}
    return found


def restored_state(module: nn.Module, state: State) -> State:
    """Undo :func:`compact_state`, but for what rounding has lost."""
    found = dict(state)
    for name, part in _compact(module):
        if f"{name}.weight" in found:
            scale = found.pop(f"{name}.scale", None)
            found[f"{name}.weight"] = part.restored(found[f"{name}.weight"], scale)
    return found


def _compact(module: nn.Module) -> list[tuple[str, CompactLinear]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, CompactLinear)]
