"""Which settings of the data a server says for all sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMMON = (
    *("seed", "batch_size", "eval_batch_size", "val_fraction", "test_fraction", "drop_last", "avoid_single"),
    *("augment", "mean", "std", "classes", "positive", "channels", "resize", "fit"),
)
"""Keys of ``data`` that the server says for all sites, where a site's data set has them."""


def common(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``data`` that the server says for all sites."""
    return {key: config["data"][key] for key in COMMON if key in config["data"]}
