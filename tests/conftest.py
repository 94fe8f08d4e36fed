"""What all tests share. One thread: two beside a busy neighbour were measured to be eight times slower."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real images: ``FL_LIGHTNING_DATA``, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("FL_LIGHTNING_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not (folder / "digits5").is_dir():
        pytest.skip(f"needs real images: no digits5 in {folder}; set FL_LIGHTNING_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation of three clients of different sizes and shifts, learnable, as ``data=folder`` reads it."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (3, 8, 8, 3))
    for number, (name, size) in enumerate({"ann": 26, "bob": 34, "cid": 19}.items()):
        split = {}
        for part, count in (("train", size), ("test", 12)):
            y = np.arange(count) % 3
            x = prototypes[y] * (0.6 + 0.2 * number) + rng.normal(0, 25, (count, 8, 8, 3))
            split[f"x_{part}"], split[f"y_{part}"] = np.clip(x, 0, 255).astype(np.uint8), y.astype(np.uint8)
        np.savez(root / f"{name}.npz", **split)
    return root
