"""What all tests share. One thread: two beside a busy neighbour were measured to be eight times slower."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.federations import make_tiny_federation

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
    return make_tiny_federation(tmp_path_factory.mktemp("tiny"))
