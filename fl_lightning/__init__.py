"""Personalised federated learning with PyTorch Lightning."""

from __future__ import annotations

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    # A CPU build of one beside a CUDA build of the other fails here, deep inside torchvision, with no hint at why.
    if "torchvision::" not in str(error):
        raise
    import torch

    raise ImportError(
        f"torch {torch.__version__} and the installed torchvision come from different builds; install the pair from "
        "one index in one command: pip install --force-reinstall torch torchvision"
    ) from error

__version__ = "0.1.0"
