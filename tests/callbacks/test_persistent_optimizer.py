"""Optimizer state that outlives a fit: two short fits are one long one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl_lightning.client import Client
from tests.federations import federation

KEEP = "+callbacks.keep={_target_: fl_lightning.callbacks.persistent_optimizer.PersistentOptimizer}"


def personal(tiny_root: Path, folder: Path, *overrides: str) -> list[Client]:
    """Clients after local training on full batches, whose order does not matter. Without BatchNorm: a bias before one
    has no gradient but rounding, which Adam turns into full steps."""
    run = federation(
        tiny_root, folder, "method=local", "data.batch_size=64", "seed=3", "+model.batch_norm=false", *overrides
    )
    run.fit()
    return run.clients


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_fits_equal_one_of_twice_the_length(optimizer: str, tiny_root: Path, tmp_path: Path) -> None:
    chosen = f"optimizer={optimizer}"
    kept = personal(tiny_root, tmp_path / "kept", chosen, KEEP, "loop.rounds=2")
    long = personal(tiny_root, tmp_path / "long", chosen, "loop.rounds=1", "trainer.max_epochs=2")
    fresh = personal(tiny_root, tmp_path / "fresh", chosen, "loop.rounds=2")
    for one, other, third in zip(kept, long, fresh, strict=True):
        for name, tensor in one.personal.items():
            torch.testing.assert_close(tensor, other.personal[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(one.personal["head.weight"], third.personal["head.weight"], rtol=1e-4, atol=1e-5)
        assert all(name.startswith("optimizer|") for name in one.memory)
        assert one.memory
        assert not third.memory
