"""Split training through the federated loop: degenerate cases, accounts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fl_lightning.split.latency import batch_bytes
from fl_lightning.split.split_server import SplitServer
from tests.federations import Federation, assert_same, federation
from tests.split.halves import make_module


def train(tiny_root: Path, folder: Path, method: str, *overrides: str) -> Federation:
    run = federation(tiny_root, folder, f"method={method}", "seed=3", *overrides)
    run.fit()
    return run


def test_splitfed_is_fedavg_to_the_bit(tiny_root: Path, tmp_path: Path) -> None:
    split = train(tiny_root, tmp_path / "split", "splitfed")
    plain = train(tiny_root, tmp_path / "plain", "fedavg")
    assert_same(split.loop.state, plain.loop.state)


def test_flexp_sfl_with_equal_cuts_and_no_alignment_is_split_learning(tiny_root: Path, tmp_path: Path) -> None:
    plain = train(tiny_root, tmp_path / "sl", "sl")
    flexible = train(
        tiny_root,
        tmp_path / "flexp",
        "flexp_sfl",
        "callbacks.server.policy.cuts=[1]",
        "callbacks.server.alignment.weight=0",
    )
    assert_same(plain.loop.state, flexible.loop.state)
    for one, other in zip(plain.clients, flexible.clients, strict=True):
        assert_same(one.personal, other.personal)


def test_bytes_and_seconds_are_what_the_formulas_say(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "flexp_sfl", "callbacks.server.schedule=sequential")
    server = run.loop.callbacks["server"]
    up = down = 0
    seconds = 0.0
    for client in run.clients:
        sizes = [len(y) for _, y in client.data.train_dataloader()]
        for size in sizes:
            formula = batch_bytes(server.cuts[client.id], server.latency.model, size, "server")
            up, down = up + 2 * formula.up, down + 2 * formula.down
            profile = server.profiles[client.id % len(server.profiles)]
            seconds += 2 * server.latency.batch(server.cuts[client.id], profile, size).total
    assert (run.loop.bytes_up, run.loop.bytes_down) == (up, down)
    assert server.simulated_seconds == pytest.approx(seconds)
    assert run.loop.history[-1]["split/simulated_seconds"] == server.simulated_seconds
    result = server.results(run.loop)["split"]
    assert result["cuts"] == {client.name: server.cuts[client.id].at for client in run.clients}
    assert sum(result["bytes"].values()) == up + down


def test_splitfed_counts_the_clients_ends_beside_the_activations(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "splitfed")
    server = run.loop.callbacks["server"]
    held = run.module.parts(server.cuts[0])
    ends = sum(run.loop.state[name].numel() * run.loop.state[name].element_size() for name in held.client)
    fits = len(run.clients) * run.loop.round
    assert run.loop.bytes_up == server.traffic.up + fits * ends
    assert run.loop.bytes_down == server.traffic.down + fits * ends


def test_momentum_lives_on_at_clients_and_server(tiny_root: Path, tmp_path: Path) -> None:
    kept = train(tiny_root, tmp_path / "kept", "sl")
    fresh = train(
        tiny_root, tmp_path / "fresh", "sl", "callbacks.server.keep_optimizer=false", "callbacks.client_optimizer=null"
    )
    memory = kept.clients[0].memory
    parameters = dict(kept.module.named_parameters())
    held = kept.module.parts(kept.loop.callbacks["server"].cuts[0])
    assert {name.split("|")[1] for name in memory} == set(held.client) & parameters.keys()
    assert kept.loop.callbacks["server"].state_dict()["optimizers"]["body"]
    assert not fresh.clients[0].memory
    assert any(not torch.equal(kept.loop.state[name], fresh.loop.state[name]) for name in kept.loop.state)


def test_body_is_one_copy_that_clients_train_in_turn(tiny_root: Path, tmp_path: Path) -> None:
    """With the learning rate of the body at 0 nothing moves; and the next client starts where the last one stopped."""
    still = train(
        tiny_root,
        tmp_path / "still",
        "sl",
        "+callbacks.server.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.0}",
    )
    parameters = dict(still.module.named_parameters())
    for name in still.loop.state.keys() & parameters.keys():
        assert torch.equal(still.loop.state[name], still.loop.local.initial[name])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["executor=processes", "executor.workers=1"], "set executor=serial"),
        (["~module", "+module._target_=fl_lightning.module.FederatedModule"], "needs a SplitModule"),
        (["module.start=0"], "1 <= start"),
        (["callbacks.server.policy.cuts=[5]"], "got start 1, cut 5, end 2"),
        (["module.lr_factors={middle: 1}"], "`lr_factors` must give base, top, tail, head"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(
    overrides: list[str], sentence: str, tiny_root: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        train(tiny_root, tmp_path / "run", "flexp_sfl", *overrides)


def test_scaled_gradients_are_refused() -> None:
    """On a CPU Lightning itself turns 16-mixed into bf16-mixed, so the check is asked directly."""
    with pytest.raises(ValueError, match="trainer.precision=bf16-mixed"):
        SplitServer().check(make_module("lenet"), SimpleNamespace(precision="16-mixed"))
