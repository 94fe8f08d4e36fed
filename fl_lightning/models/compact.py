"""Linear layers that nobody trains, kept in fewer bytes: bfloat16, int8 with a scale for each output, or four bits."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from fl_lightning.checks import ArgumentError
from fl_lightning.state import State

Base = Literal["float32", "bfloat16", "int8", "nf4"]

BLOCK = 64
"""Entries of a weight that share a scale in ``nf4``."""


class _Product(torch.autograd.Function):
    """x W^T for a weight in few bytes: what backward needs of it is found again, not kept in float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor | None, packed: tuple[int, int, bool] | None) -> Tensor:
        weight, scale = _Product.factors(weight, scale, packed, x.dtype)
        y = x @ weight.T
        return y if scale is None else y * scale.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, scale, ctx.packed = inputs
        ctx.save_for_backward(weight, scale)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        [slope] = slopes
        weight, scale = _Product.factors(weight, scale, ctx.packed, slope.dtype)
        if scale is not None:
            slope = slope * scale.to(slope.dtype)
        return slope @ weight, None, None, None

    @staticmethod
    def factors(
        weight: Tensor, scale: Tensor | None, packed: tuple[int, int, bool] | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Return a matrix (out, in), and what each of its rows is still to be multiplied by.

        Args:
            weight: (out, in), or four bits an entry.
            scale: Of outputs, or of blocks.
            packed: Rows and columns of a weight in four bits, and whether it is (in, out); None: it is not.
            dtype: Of the matrix.
        """
        if packed is None or scale is None:
            return weight.to(dtype), scale
        rows, columns, transposed = packed
        found = unpacked(weight, scale, (rows, columns), dtype)
        return found.T if transposed else found, None


class CompactLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in fewer bytes; it computes in the type of its inputs.

    ``int8``: row o of the weight (out, in) is s_o q_o with whole numbers q_o in -127 ... 127 and s_o a 127th of its
    largest absolute value, so that no entry is off by more than s_o / 2.

    ``nf4``: each entry is one of 16 quantiles of the normal distribution, times the largest absolute value of the 64
    entries that it stands among, in the order of memory. Dettmers, Pagnoni, Holtzman, Zettlemoyer, QLoRA: Efficient
    Finetuning of Quantized LLMs, NeurIPS 2023, https://arxiv.org/abs/2305.14314.

    Args:
        layer: A linear layer, or transformers' ``Conv1D``, whose weight is (in, out) and stays so.
        base: ``bfloat16``, ``int8`` or ``nf4``.
    """

    def __init__(self, layer: Any, base: Base) -> None:
        nn.Module.__init__(self)
        self.transposed = not isinstance(layer, nn.Linear)
        self.shape: tuple[int, int] = tuple(layer.weight.shape)
        rows, columns = self.shape
        self.in_features, self.out_features = (rows, columns) if self.transposed else (columns, rows)
        self.base = base
        for name, tensor in self.stored(layer.weight.detach()).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.bias = layer.bias
        self.train(layer.training)

    def stored(self, weight: Tensor) -> State:
        """Return the tensors of a weight in float32: ``weight``, of int8 ``scale`` (out,), of nf4 ``scale`` (blocks,).

        Those of nf4 are flat: two entries in a byte of ``weight``.
        """
        if self.base == "bfloat16":
            return {"weight": weight.to(torch.bfloat16)}
        if self.base == "nf4":
            four = need_bitsandbytes()
            flat, state = four.quantize_4bit(weight.float().flatten().contiguous(), blocksize=BLOCK, quant_type="nf4")
            return {"weight": flat.flatten(), "scale": state.absmax}
        along = 0 if self.transposed else 1
        largest = weight.float().abs().amax(along, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        return {"weight": (weight / scale).round().to(torch.int8), "scale": scale.flatten()}

    def restored(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """Return the weight in float32, in the layout of the layer that this one stands for."""
        if scale is None:
            return weight.float()
        if self.base == "nf4":
            return unpacked(weight, scale, self.shape)
        return weight.float() * (scale if self.transposed else scale[:, None])

    @override
    def forward(self, input: Tensor) -> Tensor:
        packed = (*self.shape, self.transposed) if self.base == "nf4" else None
        weight = self.weight.T if self.transposed and packed is None else self.weight
        y: Tensor = _Product.apply(input, weight, self._parameters.get("scale"), packed)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def unpacked(weight: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what ``nf4`` keeps of a weight.

    Args:
        weight: Two entries in a byte, uint8 (entries / 2 rounded up,).
        scale: Of each 64 entries, (entries / 64 rounded up,).
        shape: Of the weight.
        dtype: Of the weight.
    """
    four = need_bitsandbytes()
    told = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
    # As one row of even length: on a CPU the library mistakes the blocks of rows that are no whole number of these.
    entries = shape[0] * shape[1]
    state = four.QuantState(
        scale.float(), shape=torch.Size([entries + entries % 2]), dtype=told, blocksize=BLOCK, quant_type="nf4"
    )
    found: Tensor = four.dequantize_4bit(weight[:, None], state)
    return found.flatten()[:entries].reshape(shape).to(dtype)


def need_bitsandbytes() -> Any:
    """Return the library's functions.

    Raises:
        ImportError: If it is not installed, or too old for CPUs, with the extra to install.
    """
    try:
        import bitsandbytes
        from bitsandbytes import functional
    except ImportError as error:
        raise ImportError("base=nf4 needs bitsandbytes: pip install 'fl_lightning[bitsandbytes]'") from error
    version = bitsandbytes.__version__
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 46):
        raise ImportError(
            f"base=nf4 needs bitsandbytes 0.46 or newer, got {version}: pip install -U 'fl_lightning[bitsandbytes]'"
        )
    return functional


def weight_shape(layer: Any) -> tuple[int, ...]:
    """Return the shape of a layer's weight in float32."""
    return layer.shape if isinstance(layer, CompactLinear) else tuple(layer.weight.shape)


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
