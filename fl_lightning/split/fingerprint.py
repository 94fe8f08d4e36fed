"""What server and clients must have in common, as hashes that can be compared without telling the settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fl_lightning.split.module import SplitModule


def fingerprint(config: dict[str, Any], module: SplitModule) -> dict[str, str]:
    """Return hashes of what both ends must have in common, by the words that tell a user what differs."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    what = {
        "method": config["method"],
        "seed": config["seed"],
        "precision": config["trainer"].get("precision"),
        "model": config["model"],
        "module (where the model is cut, lr_factors)": config["module"],
        "callbacks.server (cuts, alignment)": config["callbacks"]["server"],
        "size of inputs or number of classes": [list(module.blocks), shapes],
    }
    return {
        part: hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
        for part, value in what.items()
    }


def differences(expected: Mapping[str, str], given: Any) -> str:
    """Return in words in what a fingerprint differs from another; nothing if it does not."""
    parts = given if isinstance(given, dict) else {}
    return ", ".join(f"another {part}" for part in expected if expected[part] != parts.get(part))
