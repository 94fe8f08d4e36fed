"""What a configuration that was read from a file may name: the code of known packages, and of those that are trusted.

A run folder may come from somebody else. Its ``_target_`` are called, so they are checked before anything is imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.utils import get_object

KNOWN = (
    *(f"fl_lightning.{room}" for room in ("aggregators", "callbacks", "cohort", "data", "executors", "fit", "loop")),
    *(
        f"fl_lightning.{room}"
        for room in (
            "evaluation.calibration",
            "evaluation.predict",
            "methods",
            "models",
            "module",
            "personalization",
            "sharing",
            "sites",
            "split",
            "task",
        )
    ),
    *(
        f"lightning.pytorch.{room}"
        for room in ("callbacks", "loggers", "plugins", "profilers", "strategies", "trainer")
    ),
    *("studies", "timm.models", "timm.optim", "timm.scheduler", "torch.nn", "torch.optim", "torchmetrics"),
    *("torchvision.models", "torchvision.ops", "torchvision.transforms"),
)
"""Where functions and classes that only compute are defined."""


def check_trusted(node: Any, path: str, trust: Sequence[str], source: str) -> None:
    """Refuse a node, or one in it, whose ``_target_`` is neither known nor trusted, and interpolations.

    Args:
        node: Plain, as read from a file.
        path: Its key in the configuration.
        trust: Names of packages or modules.
        source: The file, for the message.

    Raises:
        ValueError: If there is one, by its key.
    """
    for key, value in _leaves(node, path):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{key} must be a plain value, got {value!r} of {source}")
        if key.rpartition(".")[2] == "_target_" and not is_trusted(value, trust):
            module = str(value).partition(".")[0]
            raise ValueError(
                f"{key} must name code of a known package, got {value!r} of {source}; if you trust it, add "
                f"trust=[{module}]"
            )


def is_trusted(target: Any, trust: Sequence[str]) -> bool:
    """Tell whether a name stands for a function or class that is defined in a known or trusted module."""
    packages = {name.partition(".")[0] for name in KNOWN}
    if not isinstance(target, str) or not (target.partition(".")[0] in packages or _lies_in(target, trust)):
        return False
    # By way of what a module imports, a name may lead anywhere: torch.optim.sgd.torch.load.
    try:
        home = getattr(get_object(target), "__module__", None) or ""
    except Exception:
        return True  # there is nothing to call; that is said when it is called
    return _lies_in(home, KNOWN) or _lies_in(home, trust)


def _lies_in(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of everything in a node that holds nothing else."""
    if not isinstance(node, (Mapping, list, tuple)):
        yield path, node
        return
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        yield from _leaves(value, f"{path}.{key}" if path else str(key))
