from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fl_lightning.client import Update
from fl_lightning.methods.variational import MEMORY, ProductOfExperts, VariationalModule, kl, natural, random_parts
from fl_lightning.state import State
from tests.federations import federation, tiny_model


def gaussian(mean: float, std: float) -> State:
    return {"backbone.a": torch.tensor([mean]), "log_std.backbone/a": torch.tensor([std]).log()}


def test_the_divergence_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mean, other, log, other_log = (torch.randn(5) for _ in range(4))
    expected = kl_divergence(Normal(mean, log.exp()), Normal(other, other_log.exp())).sum()
    torch.testing.assert_close(kl(mean, log, other, other_log), expected)


def test_precisions_add_up() -> None:
    """s = N(0, 1); clients add factors of precision 3 at 2 and precision 1 at -1: 5 in all, at (6 - 1) / 5."""
    updates = [Update(0, 1, gaussian(6 / 4, 0.5)), Update(1, 1, gaussian(-1 / 2, 0.5**0.5))]
    merged = ProductOfExperts(damping=1.0).aggregate(gaussian(0.0, 1.0), updates)
    torch.testing.assert_close(merged, gaussian(1.0, 0.2**0.5))


def test_damping_by_the_number_of_clients_is_the_mean_of_natural_parameters() -> None:
    updates = [Update(i, 1, gaussian(float(i), 0.5 + i)) for i in range(3)]
    merged = ProductOfExperts(damping=1 / 3).aggregate(gaussian(0.3, 1.0), updates)
    parts = [natural(u.state["backbone.a"], u.state["log_std.backbone/a"]) for u in updates]
    expected = [torch.stack(column).mean(0) for column in zip(*parts, strict=True)]
    torch.testing.assert_close(list(natural(merged["backbone.a"], merged["log_std.backbone/a"])), expected)


def test_the_server_is_its_start_times_what_clients_remember_to_have_added(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "method=virtual", "loop.rounds=3", "module.std=0.5")
    run.fit()
    initial, state = run.loop.local.initial, run.loop.state
    for name, log in random_parts(state).items():
        start, end = natural(initial[name], initial[log]), natural(state[name], state[log])
        for key, one, other in zip((log, name), start, end, strict=True):
            total = one + sum(client.memory[MEMORY + key] for client in run.clients)
            torch.testing.assert_close(other, total, atol=1e-4, rtol=1e-4)
    assert not any(name.startswith("log_std.head") for name in state)


def test_a_heavy_prior_holds_the_means(tiny_root: Path, tmp_path: Path) -> None:
    moved = []
    for weight in (0.0, 3.0):
        run = federation(
            tiny_root, tmp_path / str(weight), "method=virtual", f"module.kl_weight={weight}", "module.std=0.05"
        )
        run.fit()
        start = run.loop.local.initial
        moved.append(sum(float((run.loop.state[n] - start[n]).square().sum()) for n in random_parts(run.loop.state)))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize(("key", "value"), [("std", 0.0), ("kl_weight", -1.0)])
def test_wrong_arguments_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        VariationalModule(tiny_model(3), partial(torch.optim.SGD, lr=0.1), **{key: value})
    with pytest.raises(ValueError, match="damping"):
        ProductOfExperts(damping=0)
