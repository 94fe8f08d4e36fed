"""Every random decision comes from the seed and its own name, never from the order in which things happened to run."""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *keys: int | str) -> int:
    """Return the seed of one random decision.

    The same arguments give the same seed in every process, on every machine and in every version of Python, and no two
    decisions share one. So a client's fit draws the same numbers whether it runs first or last, here or in a worker.

    Args:
        seed: The seed of the run.
        keys: What the decision is, such as ``(round, client_id, "shuffle")``.

    Returns:
        A seed in [0, 2**63).
    """
    text = json.dumps([int(seed), *keys], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
