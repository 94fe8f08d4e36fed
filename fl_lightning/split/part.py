"""Makes the part of a model that a client holds, and never the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fl_lightning.split.cut import Cut
from fl_lightning.split.module import SplitModule


@contextmanager
def without_weights() -> Iterator[None]:
    """Let modules made meanwhile have parameters of a shape and without memory; buffers are what they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # one that is tied stays one
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def keep_part(module: SplitModule, cut: Cut) -> None:
    """Give memory to what the client of a cut holds of a module made :func:`without_weights`; drop the server's part.

    The values are undefined.
    """
    module.leave_out(cut)
    for parameter in module.parameters():
        if parameter.is_meta:  # in its place: blocks may hold it, too
            own = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
            torch.utils.swap_tensors(parameter, own)
