"""Every method has settings at which it is another one; no reference numbers are needed to know what must come out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fl_lightning.run.training import Federation
from fl_lightning.state import State
from tests.federations import add_recorder, assert_same, every, federation

PLAIN = ["trainer.max_epochs=1", "aggregator.weights=examples"]
CLIPPED = ["trainer.gradient_clip_val=0.05"]
ALIGNED = [f"callbacks.alignment.{setting}" for setting in ("interpolation=1", "mu=0", "rise=1")]
TWO = ["trainer.max_epochs=2"]
UNIFORM = ["aggregator.weights=uniform"]
PROBE = [
    "+callbacks.probe._target_=fl_lightning.callbacks.freeze_schedule.FreezeSchedule",
    "+callbacks.probe.phases=[{train:[head]}]",
]


EVERY = pytest.mark.every

REFERENCES: dict[tuple[str, ...], Federation] = {}


def train(tiny_root: Path, folder: Path, *overrides: str) -> Federation:
    run = federation(tiny_root, folder, "seed=5", "optimizer.weight_decay=0.01", *overrides)
    run.fit()
    return run


def reference_run(tiny_root: Path, folder: Path, *overrides: str) -> Federation:
    """A run that several cases are compared with; it is trained once."""
    if overrides not in REFERENCES:
        REFERENCES[overrides] = train(tiny_root, folder, *overrides)
    return REFERENCES[overrides]


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (["method=fedper", "sharing.personal=[]"], []),
        (["method=fedftha", "sharing.personal=[]", "method.tau_sync=1", "method.tau_head=0", *PLAIN], []),
        pytest.param(
            ["method=fedftha", "sharing.personal=[]", "method.tau_sync=1", "method.tau_head=0", "trainer.max_epochs=1"],
            UNIFORM,
            marks=EVERY,
        ),
        pytest.param(["method=lg_fedavg", "sharing.shared=['*']", *PLAIN], [], marks=EVERY),
        (["method=apfl", "module.alpha=0", "module.adaptive=false"], []),
        pytest.param(["method=apfl", "module.mix=outputs"], [], marks=EVERY),
        pytest.param(["method=apfl", *CLIPPED], CLIPPED, marks=EVERY),
        (["method=ditto"], []),
        pytest.param(["method=ditto", *CLIPPED], CLIPPED, marks=EVERY),
        pytest.param(["method=reptile"], [], marks=EVERY),
        (["method=fedbn", "+model.batch_norm=false"], ["+model.batch_norm=false", *UNIFORM]),
        pytest.param(["method=fedala", "module.rate=0"], [], marks=EVERY),
        pytest.param(["method=fml", "module.beta=1"], UNIFORM, marks=EVERY),
        pytest.param(["method=fedrod", "module.gamma=0"], [], marks=EVERY),
        pytest.param(["method=fedrod", "module.gamma=0", *CLIPPED], CLIPPED, marks=pytest.mark.slow),
        pytest.param(["method=fedppa", *ALIGNED], [], marks=EVERY),
        pytest.param(["method=dypfl"], [], marks=EVERY),
        pytest.param(["method=pfedpt", "module.width=0", "method.prompt_epochs=0"], [], marks=EVERY),
        (["method=feddyn", "callbacks.regularization.alpha=0"], UNIFORM),
        pytest.param(["method=moon", "callbacks.contrast.mu=0"], [], marks=EVERY),
        (["method=scaffold", "loop.rounds=1"], ["optimizer.momentum=0", "loop.rounds=1", *UNIFORM]),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_global_model_is_that_of_fedavg(
    settings: list[str], reference: list[str], tiny_root: Path, tmp_path: Path
) -> None:
    run = train(tiny_root, tmp_path / "run", *settings)
    fedavg = reference_run(tiny_root, tmp_path / "fedavg", "method=fedavg", *reference)
    assert_same(run.loop.state, fedavg.loop.state)
    assert_same(run.loop.global_state(), fedavg.loop.global_state())


@pytest.mark.parametrize(
    ("settings", "prefix", "reference"),
    [
        (["method=fedper", "sharing.shared=[]"], "", []),
        (["method=ditto", "module.lam=0"], "personal.", []),
        pytest.param(["method=ditto", "module.lam=0", *CLIPPED], "personal.", CLIPPED, marks=EVERY),
        pytest.param(["method=apfl", "module.alpha=1", "module.adaptive=false"], "personal.", [], marks=EVERY),
        pytest.param(["method=fml", "module.alpha=1"], "personal.", [], marks=EVERY),
        (["method=l2gd", "callbacks.averaging.p=0"], "", ["optimizer.momentum=0"]),
        pytest.param(["method=mocha", "callbacks.relations.lam=0"], "", [], marks=EVERY),
        (["method=fedfomo", "callbacks.others.models=0"], "", []),
        pytest.param(
            ["method=dypfl", "callbacks.opt_in.willing=1", "callbacks.opt_in.incentive=0", "module.lam=0"],
            "personal.",
            [],
            marks=pytest.mark.slow,
        ),
        pytest.param(["method=fedproto", "module.lam=0", "module.predict=head"], "", [], marks=EVERY),
        pytest.param(
            ["method=fedrep", "callbacks.final=null", "method.head_epochs=2", "method.body_epochs=0", *TWO],
            "",
            [*PROBE, *TWO],
            marks=EVERY,
        ),
        pytest.param(
            ["method=fedftha", "method.tau_sync=0", "method.tau_head=2", *TWO], "", [*PROBE, *TWO], marks=EVERY
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_the_personal_model_is_that_of_local_training(
    settings: list[str], prefix: str, reference: list[str], tiny_root: Path, tmp_path: Path
) -> None:
    run = train(tiny_root, tmp_path / "run", *settings)
    local = reference_run(tiny_root, tmp_path / "local", "method=local", *reference)
    for client, other in zip(run.clients, local.clients, strict=True):
        mine = {prefix + name: tensor for name, tensor in other.personal.items()}
        whole: State = run.loop.personal_state(client)
        assert_same({name: whole[name] for name in mine}, mine)


def test_fedftha_without_head_epochs_is_fedper_when_all_take_part(tiny_root: Path, tmp_path: Path) -> None:
    settings = ["method=fedftha", "method.tau_sync=2", "method.tau_head=0", "trainer.max_epochs=2"]
    run = train(tiny_root, tmp_path / "run", *settings)
    fedper = train(tiny_root, tmp_path / "fedper", "method=fedper", "trainer.max_epochs=2", *UNIFORM)
    assert_same(run.loop.state, fedper.loop.state)
    for client, other in zip(run.clients, fedper.clients, strict=True):
        assert_same(client.personal, other.personal)


@pytest.mark.parametrize("method", ["fedrep", "fedftha"])
def test_without_body_epochs_the_body_stays(method: str, tiny_root: Path, tmp_path: Path) -> None:
    zero = "method.body_epochs=0" if method == "fedrep" else "method.tau_sync=0"
    epochs = "trainer.max_epochs=10" if method == "fedrep" else "trainer.max_epochs=5"
    run = train(tiny_root, tmp_path / "run", f"method={method}", zero, epochs)
    for name, tensor in run.loop.state.items():
        torch.testing.assert_close(tensor, run.loop.local.initial[name])


def test_fedrep_fits_the_head_before_the_body(tiny_root: Path, tmp_path: Path) -> None:
    """What the head learns from the body that came does not depend on whether the body trains afterwards."""
    runs = []
    for body_epochs in (0, 1):
        settings = [
            "method.head_epochs=2",
            f"method.body_epochs={body_epochs}",
            "callbacks.final=null",
            "loop.rounds=1",
        ]
        epochs = f"trainer.max_epochs={2 + body_epochs}"
        runs.append(train(tiny_root, tmp_path / str(body_epochs), "method=fedrep", *settings, epochs))
    for one, other in zip(runs[0].clients, runs[1].clients, strict=True):
        assert_same(one.personal, other.personal)
    name = "backbone.conv1.weight"
    assert torch.equal(runs[0].loop.state[name], runs[0].loop.local.initial[name])
    assert not torch.equal(runs[1].loop.state[name], runs[1].loop.local.initial[name])


def test_fedbabu_keeps_the_head_and_sends_the_body_alone(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "method=fedbabu", "callbacks.final=null")
    initial = run.loop.local.initial
    state = run.loop.global_state()
    assert state is not None
    assert_same(
        {n: state[n] for n in state if n.startswith("head.")}, {n: initial[n] for n in initial if n.startswith("head.")}
    )
    assert all(not client.personal for client in run.clients)
    body = sum(tensor.nbytes for name, tensor in initial.items() if name.startswith("backbone."))
    assert run.loop.bytes_up == run.loop.bytes_down == 2 * 3 * body
    assert any(not torch.equal(state[name], initial[name]) for name in state if name.startswith("backbone."))


@pytest.mark.parametrize(
    "method",
    [
        every(name, fast=name in ("fedper", "fedfomo"))
        for name in ("fedper", "fedft", "fedrep", "lg_fedavg", "mocha", "fedfomo", "fedproto", "virtual")
    ],
)
def test_methods_without_a_global_head_report_none(
    method: str, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        run = train(tiny_root, tmp_path / "run", f"method={method}")
    assert sum("no global model" in message for message in caplog.messages) == 1
    assert not any("/global/" in key for row in run.loop.history for key in row)
    assert all("test/personal/accuracy/mean" in row for row in run.loop.history)


@pytest.mark.parametrize(
    ("method", "settings", "uniform"),
    [
        ("fedrep", ["method.head_epochs=1", "trainer.max_epochs=2", "callbacks.final=null"], False),
        ("lg_fedavg", [], True),
        ("fedbabu", ["callbacks.final=null"], True),
        ("per_fedavg", ["callbacks.adaptation=null"], True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_clients_weigh_what_the_method_says(
    method: str, settings: list[str], uniform: bool, tiny_root: Path, tmp_path: Path
) -> None:
    """Those that no case above compares with FedAvg or with its uniform mean."""
    run = federation(tiny_root, tmp_path, f"method={method}", *settings, "loop.rounds=1", "seed=5")
    recorder = add_recorder(run)
    run.fit()
    shares = [1.0 if uniform else client.num_examples for client in run.clients]
    assert len(set(shares)) == (1 if uniform else 3)
    for name, tensor in run.loop.state.items():
        if tensor.is_floating_point():
            terms = [share * update.state[name] for share, update in zip(shares, recorder.updates, strict=True)]
            torch.testing.assert_close(tensor, torch.stack(terms).sum(0) / sum(shares))
