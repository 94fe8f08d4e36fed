"""The lean fit against Lightning's own loop: the same hooks, the same numbers, to the bit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from fl_lightning.callback import FederatedCallback
from fl_lightning.data.client_data import ClientData
from fl_lightning.fit.lean import HOOKS, overridden, use_fused_kernel
from fl_lightning.module import Batch, FederatedModule
from fl_lightning.run.config import CONF
from tests.federations import Federation, add_recorder, assert_same, by_name, every, federation, outcome
from tests.own import Anneals

#: One of each kind of client half.
KINDS = ("fedavg", "ditto", "fedftha", "flora")
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))


def both(tiny_root: Path, folder: Path, *overrides: str, plant: Any = None) -> tuple[Federation, Federation]:
    """Run the same federation with either engine, and check that all that is left of them is the same."""
    runs, left = [], []
    for engine in ("stock", "lean"):
        run = federation(tiny_root, folder / engine, "seed=3", f"local.engine={engine}", *overrides)
        if plant is not None:
            plant(run)
        recorder = add_recorder(run)
        run.fit()
        runs.append(run)
        left.append((outcome(run), [dict(vars(update)) for update in recorder.updates]))
    assert_same(left[0], left[1])
    return runs[0], runs[1]


@pytest.mark.parametrize("method", [every(one, one in KINDS) for one in METHODS])
def test_every_method(method: str, tiny_root: Path, tmp_path: Path) -> None:
    runs, left = [], []
    for engine in ("stock", "auto"):
        run = federation(tiny_root, tmp_path / engine, *by_name(method), "seed=3", "loop.rounds=1")
        local = run.loop.local
        assert local.engine == "auto"
        local.engine = engine
        recorder = add_recorder(run)
        run.fit()
        runs.append(run)
        left.append((outcome(run), [dict(vars(update)) for update in recorder.updates]))
    assert_same(left[0], left[1])
    if runs[1].loop.local._needs_stock:
        pytest.skip(f"{method} runs in Lightning's own loop, because {runs[1].loop.local._needs_stock}")


@pytest.mark.every
@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"],
        ["trainer.max_epochs=2", "trainer.gradient_clip_val=0.3", "+trainer.gradient_clip_algorithm=value"],
        ["trainer.gradient_clip_val=0.3", "trainer.precision=bf16-mixed"],
        ["trainer.max_epochs=-1", "+trainer.max_steps=5"],
        ["trainer.max_epochs=0"],
        [
            "optimizer=adamw",
            "scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.5}",
        ],
        ["optimizer.momentum=0.5", "optimizer.weight_decay=0.01", "sharing.buffers=reset", "trainer.max_epochs=2"],
    ],
    ids=lambda overrides: " ".join(overrides)[:60],
)
def test_trainer_options(overrides: list[str], tiny_root: Path, tmp_path: Path) -> None:
    both(tiny_root, tmp_path, *overrides)


class Journal(FederatedCallback):
    """Writes down every hook with its arguments and what the Trainer says at that moment."""

    name = "journal"

    def __init__(self) -> None:
        self.entries: list[Any] = []

    def write(self, name: str, trainer: Trainer, module: LightningModule, *args: Any, **kwargs: Any) -> None:
        grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
        weights = [p.detach().clone() for p in module.parameters()]
        facts = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "last": trainer.is_last_batch,
            "batches": trainer.num_training_batches if name not in ("setup", "on_fit_start", "teardown") else None,
            "batch": (trainer.fit_loop.batch_idx, trainer.fit_loop.total_batch_idx),
            "stage": str(trainer.state.stage),
            "stop": trainer.should_stop,
            "lr": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
            if name.startswith("on_") and name not in ("on_fit_end", "on_exception")
            else None,
            "mode": module.training,
            "attached": module.trainer is trainer and trainer.lightning_module is module,
        }
        self.entries.append((type(module).__name__, name, facts, _plain(args), _plain(kwargs), grads, weights))


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, torch.optim.Optimizer):
        return type(value).__name__, _plain(value.state_dict()["state"])
    if isinstance(value, Tensor):
        return value.detach().clone()
    return str(value) if isinstance(value, (str, int, float)) or value is None else type(value).__name__


def _entry(name: str) -> Any:
    def hook(self: Journal, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        self.write(name, trainer, pl_module, *args, **kwargs)

    return hook


for _name in HOOKS:
    setattr(Journal, _name, _entry(_name))


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    """A callback that writes everything down, hooks of module and data module included."""
    journal = Journal()

    def watch(kind: type, name: str, where: str) -> None:
        original = getattr(kind, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            journal.entries.append((where, name, _plain(args), _plain(kwargs)))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, name, hook)

    from fl_lightning.module import FederatedModule

    for name in HOOKS:
        if hasattr(FederatedModule, name):
            watch(FederatedModule, name, "module")
    for name in ("configure_optimizers", "training_step", "configure_gradient_clipping", "lr_scheduler_step"):
        watch(FederatedModule, name, "module")
    for name in ("prepare_data", "setup", "train_dataloader", "teardown", "on_exception"):
        watch(ClientData, name, "data")
    overridden.cache_clear()
    yield journal
    overridden.cache_clear()


def test_hooks_fire_in_the_same_order_with_the_same_arguments(
    journal: Journal, tiny_root: Path, tmp_path: Path
) -> None:
    entries = []

    def plant(run: Federation) -> None:
        run.loop.callbacks["journal"] = journal

    for engine in ("stock", "lean"):
        run = federation(
            tiny_root,
            tmp_path / engine,
            f"local.engine={engine}",
            "method=fedprox",
            "trainer.max_epochs=2",
            "trainer.accumulate_grad_batches=2",
            "trainer.gradient_clip_val=0.5",
            "scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.5}",
        )
        plant(run)
        run.fit()
        entries.append(journal.entries[:])
        journal.entries.clear()
    names = [[entry[:2] for entry in one] for one in entries]
    assert names[0] == names[1]
    seen = {name for _, name in names[0]}
    assert seen >= set(HOOKS) - {"on_exception"}
    for stock, lean in zip(*entries, strict=True):
        assert_same(stock, lean, stock[1])


class Stop(FederatedCallback):
    """Stops a fit at a step, raises at it, or looks at what only Lightning's own loop has."""

    name = "stop"

    def __init__(self, what: str, step: int) -> None:
        self.what = what
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step != self.step:
            return
        if self.what == "stop":
            trainer.should_stop = True
        if self.what == "raise":
            raise ValueError("enough")
        if self.what == "look":
            trainer.callback_metrics.get("train_loss")


def test_fit_that_is_told_to_stop(tiny_root: Path, tmp_path: Path) -> None:
    both(tiny_root, tmp_path, "trainer.max_epochs=3", plant=lambda run: _add(run, Stop("stop", 4)))


def test_exception_reaches_the_same_hooks(journal: Journal, tiny_root: Path, tmp_path: Path) -> None:
    entries = []
    for engine in ("stock", "lean"):
        run = federation(tiny_root, tmp_path / engine, f"local.engine={engine}")
        run.loop.callbacks["journal"] = journal
        _add(run, Stop("raise", 2))
        with pytest.raises(RuntimeError, match="enough"):
            run.fit()
        entries.append([entry[:2] for entry in journal.entries])
        journal.entries.clear()
    assert entries[0] == entries[1]
    assert entries[0][-2:] == [("FederatedModule", "on_exception"), ("data", "on_exception")]


def test_what_shows_only_within_a_fit_falls_back_and_fits_again(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = []
    for engine in ("stock", "auto"):
        run = federation(tiny_root, tmp_path / engine, f"local.engine={engine}", "sharing.personal=[head]")
        _add(run, Stop("look", 2))
        with caplog.at_level(logging.INFO, "fl_lightning"):
            run.fit()
        runs.append(outcome(run))
    assert_same(runs[0], runs[1])
    lines = [record.message for record in caplog.records if "Lightning's own loop" in record.message]
    assert len(lines) == 1
    assert "callback_metrics" in lines[0]


class Logs(FederatedModule):
    """Logs in every way that Lightning reduces, and leaves plain attributes behind."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("latest", loss)
        self.log("mean", loss, on_step=False, on_epoch=True)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("sum", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("epoch_end", float(self.current_epoch))


class LogsToo(FederatedCallback):
    """Logs from a callback, not in every batch."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if args[-1] == 1:
            pl_module.log("callback", float(trainer.global_step))


@pytest.mark.parametrize(
    "overrides", [[], pytest.param(["trainer.accumulate_grad_batches=2"], marks=pytest.mark.every)]
)
def test_what_is_logged_is_reduced_as_lightning_does(overrides: list[str], tiny_root: Path, tmp_path: Path) -> None:
    settings = ["module._target_=tests.fit.test_lean.Logs", "trainer.max_epochs=2", *overrides]
    lean = both(tiny_root, tmp_path, *settings, plant=lambda run: _add(run, LogsToo()))[1]
    names = ("latest", "mean", "both_step", "both_epoch", "most", "sum", "epoch_end", "callback")
    missing = {f"fit/{name}" for name in names} - lean.loop.history[0].keys()
    assert not missing, missing


class Counts(FederatedModule):
    """Keeps plain attributes that change what it trains on, and late in a fit returns what the lean fit cannot take."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.number = 0
        self.seen: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        self.number += 1
        self.seen.append(batch_idx)
        self.late = batch_idx
        loss = super().training_step(batch, batch_idx) * (1 + 0.1 * self.number)
        return {"loss": loss} if len(self.seen) > 2 else loss


def test_an_attempt_leaves_no_attribute_behind(tiny_root: Path, tmp_path: Path) -> None:
    runs = []
    for engine in ("stock", "auto"):
        settings = ["module._target_=tests.fit.test_lean.Counts", f"local.engine={engine}"]
        runs.append(federation(tiny_root, tmp_path / engine, *settings))
        runs[-1].fit()
    assert_same(outcome(runs[0]), outcome(runs[1]))
    assert runs[0].module.seen == runs[1].module.seen
    assert runs[1].loop.local._needs_stock == "training_step returns a dict instead of a loss"


def test_somebodys_own_module_has_the_same_bits(tiny_root: Path, tmp_path: Path) -> None:
    """With its own optimizer, schedule, metric and logging, and a loss by attributes that begin anew in every fit."""
    Anneals.begun.clear()
    both(tiny_root, tmp_path, "module._target_=tests.own.Anneals", "+module.head=fc", "trainer.max_epochs=2")
    assert Anneals.begun == [0] * len(Anneals.begun)
    assert len(Anneals.begun) >= 2 * 2 * 3


class EverySecond(FederatedModule):
    """Lets its scheduler step at every second step."""

    def configure_optimizers(self) -> Any:
        found = super().configure_optimizers()
        found["lr_scheduler"]["frequency"] = 2
        return found


@pytest.mark.parametrize("kind", ["fl_lightning.module.FederatedModule", "tests.fit.test_lean.EverySecond"])
def test_schedulers_step_as_lightnings_do(kind: str, tiny_root: Path, tmp_path: Path) -> None:
    class Rates(FederatedCallback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates[-1].append(trainer.optimizers[0].param_groups[0]["lr"])

    rates: list[list[float]] = []
    for engine in ("stock", "lean"):
        scheduler = "scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.5}"
        settings = [f"module._target_={kind}", f"local.engine={engine}", scheduler, "local.scheduler_interval=step"]
        run = federation(tiny_root, tmp_path / engine, "optimizer.lr=0.1", "loop.rounds=1", *settings)
        rates.append([])
        _add(run, Rates())
        run.fit()
    assert rates[0] == rates[1]
    falls = 2 if kind.endswith("EverySecond") else 1
    assert rates[0][:3] == pytest.approx([0.1 * 0.5 ** (step // falls) for step in range(3)])


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as Opacus has it: the base class knows nothing of it."""

    def __init__(self, parameters: Any, lr: float) -> None:
        self.inner = SGD(parameters, lr)
        self.param_groups, self.state, self.defaults = self.inner.param_groups, self.inner.state, self.inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


def test_an_optimizer_around_another_falls_back(tiny_root: Path, tmp_path: Path) -> None:
    wrapped = "optimizer={_target_: tests.fit.test_lean.Wrapper, _partial_: true, lr: 0.1}"
    run = federation(tiny_root, tmp_path, "~optimizer", f"+{wrapped}", "loop.rounds=1")
    run.fit()
    assert run.loop.local._needs_stock == "Wrapper wraps another optimizer"


def _add(run: Federation, callback: Callback) -> None:
    run.loop.callbacks["added"] = callback


@pytest.mark.every
@pytest.mark.parametrize(
    ("make", "lean"),
    [
        (partial(GradientAccumulationScheduler, {0: 1, 1: 3}), True),
        (partial(EMAWeightAveraging, decay=0.5), True),
        (partial(Timer, duration="00:01:00:00"), True),
        (partial(LearningRateMonitor, "step"), False),
        (partial(EarlyStopping, "train_loss", patience=1), False),
        (partial(ModelCheckpoint, monitor="train_loss"), False),
        (LambdaCallback, False),
    ],
    ids=lambda value: getattr(getattr(value, "func", value), "__name__", str(value)),
)
def test_lightnings_own_callbacks(
    make: Any, lean: bool, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    left = []
    for engine in ("stock", "auto"):
        run = federation(tiny_root, tmp_path / engine, f"local.engine={engine}", "trainer.max_epochs=2")
        _add(run, make())
        recorder = add_recorder(run)
        run.fit()
        left.append((outcome(run), [dict(vars(update)) for update in recorder.updates]))
    assert_same(left[0], left[1])
    assert bool(run.loop.local._needs_stock) is not lean


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["+trainer.limit_train_batches=1"], "trainer.limit_train_batches is set"),
        (["local.validate=true"], "local.validate is true"),
        (
            ["~optimizer", "+optimizer={_target_: torch.optim.LBFGS, _partial_: true, lr: 0.1}"],
            "LBFGS evaluates the loss",
        ),
    ],
)
def test_engine_lean_refuses_and_auto_says_why(
    overrides: list[str], reason: str, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"local.engine=lean cannot run this fit, because {reason}"):
        federation(tiny_root, tmp_path / "lean", "local.engine=lean", *overrides).fit()
    with caplog.at_level(logging.INFO, "fl_lightning"):
        federation(tiny_root, tmp_path / "auto", *overrides).fit()
    assert f"because {reason}" in caplog.text


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_weights_of_another_type_are_refused(precision: str, tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"precision={precision} would change .* one of 32-true, bf16-mixed, 16-mixed"):
        federation(tiny_root, tmp_path, f"trainer.precision={precision}").fit()


def test_unknown_engine_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="local.engine"):
        federation(tiny_root, tmp_path, "local.engine=fast")


def _parameters() -> Iterator[Tensor]:
    torch.manual_seed(0)
    for shape in [(6, 3, 5, 5), (6,), (40, 33), (17,), (1,)]:
        yield torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"weight_decay": 0.01}, True),
        ({"momentum": 0.5}, True),
        ({"momentum": 0.25, "nesterov": True, "weight_decay": 0.003}, True),
        ({"momentum": 0.9}, False),
        ({"momentum": 0.5, "dampening": 0.1}, False),
        ({"momentum": 0.5, "foreach": True}, False),
    ],
)
def test_fused_kernel_is_taken_only_where_bits_stay_the_same(options: dict[str, Any], fused: bool) -> None:
    plain = SGD(_parameters(), lr=0.03, **options)
    other = SGD(_parameters(), lr=0.03, **options)
    use_fused_kernel(other)
    assert bool(other.param_groups[0]["fused"]) is fused
    for seed in range(4):
        for optimizer in (plain, other):
            torch.manual_seed(seed)
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
    for one, two in zip(plain.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        assert torch.equal(one, two)


def test_loader_of_another_kind_falls_back(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ClientData.train_dataloader
    monkeypatch.setattr(ClientData, "train_dataloader", lambda self: DataLoader(list(original(self)), batch_size=None))
    run = federation(tiny_root, tmp_path)
    run.fit()
    assert run.loop.local._needs_stock == "training batches come from a DataLoader"
