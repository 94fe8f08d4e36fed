"""Clients side by side against clients one after another."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import MODELS, Rounds, Workload
from fl_lightning.data.batches import IndexBatches
from fl_lightning.data.partitioners import Dirichlet
from fl_lightning.data.transforms import Normalization, RandomCrop, RandomHorizontalFlip
from fl_lightning.executors import SerialExecutor
from fl_lightning.executors.cohort import CohortExecutor
from fl_lightning.executors.cohort_batches import one_gather_will_do, padded_steps, stack_sizes
from fl_lightning.methods.scaffold import ControlVariates
from fl_lightning.models.model import Model
from fl_lightning.run.config import CONF, plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.training import assemble
from fl_lightning.state import State
from tests.data.made import pool
from tests.federations import add_recorder, federation, tiny_model

EVERY = pytest.mark.every

#: Clients have 26, 34 and 19 examples, so batches and numbers of steps differ.
PLAIN = ["model.batch_norm=false", "trainer.max_epochs=2", "data.val_fraction=0.0", "data.avoid_single=false"]


#: BatchNorm, dropout of numbers and of channels: what mixes examples, and what draws.
MIXING = ["model._target_=tests.executors.test_cohort.mixing_model", "~model.batch_norm", "data.batch_size=7"]
BY_STEP = [
    "scheduler={_target_: torch.optim.lr_scheduler.CosineAnnealingLR, _partial_: true, T_max: 7, eta_min: 0.001}",
    "local.scheduler_interval=step",
]


def mixing_model(num_classes: int, in_channels: int = 3, image_size: int = 8) -> Model:
    """The tiny model with BatchNorm in front and in the middle, one of them without momentum, and two dropouts.

    What dropout leaves of few examples may be all alike: a small epsilon would magnify what rounding makes of that.
    """
    model = tiny_model(num_classes, in_channels, image_size)
    parts = dict(model.backbone.named_children())
    parts = {**parts, "drop": nn.Dropout(0.4), "norm2": nn.BatchNorm1d(16, eps=0.1, momentum=None)}
    parts["act2"] = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.3))
    return Model(nn.Sequential(OrderedDict(parts)), model.head, model.head_path)


def overrides(*more: str) -> list[str]:
    words = [item if item != "model.batch_norm=false" else f"+{item}" for item in [*PLAIN, *more]]
    if "~model.batch_norm" in words:
        words = [item for item in words if not item.endswith("model.batch_norm=false") and item != "~model.batch_norm"]
    return words


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["executor.clients=2"],
        pytest.param(["sharing.personal=[head]", "module.label_smoothing=0.1"], marks=EVERY),
        pytest.param(["method=fedprox", "callbacks.proximal.mu=0.5"], marks=EVERY),
        pytest.param(["~optimizer", "+optimizer={_target_: torch.optim.Adam, _partial_: true, lr: 0.01}"], marks=EVERY),
        [
            "method=fedprox",
            "callbacks.proximal.mu=0.5",
            "+callbacks.freeze._target_=fl_lightning.callbacks.freeze_schedule.FreezeSchedule",
            "+callbacks.freeze.phases=[{train: [head], epochs: 1, lr: 0.1}, {train: ['*']}]",
        ],
        pytest.param([*MIXING, "sharing.buffers=local"], marks=EVERY),
        [
            *MIXING,
            "+callbacks.freeze._target_=fl_lightning.callbacks.freeze_schedule.FreezeSchedule",
            "+callbacks.freeze.phases=[{train: [head], epochs: 1}, {train: ['*'], batch_norm: frozen, lr: 0.02}]",
            *BY_STEP,
        ],
        pytest.param(
            ["scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.5}"], marks=EVERY
        ),
        ["method=scaffold"],
        pytest.param(["method=feddyn", "sharing.personal=[head]"], marks=EVERY),
    ],
    ids=[
        "fedavg", "in groups", "personal head", "fedprox", "adam", "freezing", "BatchNorm and dropout",
        "frozen BatchNorm and a rate of each step", "a rate of each epoch", "scaffold", "feddyn",
    ],
)  # fmt: skip
def test_equals_one_after_another(more: list[str], tiny_root: Path, tmp_path: Path) -> None:
    runs = []
    for executor in ("serial", "cohort"):
        chosen = [item for item in more if executor == "cohort" or not item.startswith("executor.")]
        run = federation(tiny_root, tmp_path / executor, f"executor={executor}", *overrides(*chosen))
        recorder = add_recorder(run)
        run.fit()
        runs.append((run, recorder.updates))
    (serial, ones), (cohort, others) = runs

    def alike(state: State, other: State) -> bool:
        return state.keys() == other.keys() and all(torch.allclose(state[n], other[n], atol=2e-6) for n in state)

    assert alike(serial.loop.state, cohort.loop.state)
    for name, tensor in serial.loop.state.items():
        # A bias before BatchNorm has no gradient.
        assert (
            not torch.equal(tensor, serial.loop.local.initial[name]) or "norm" in name or name == "backbone.conv1.bias"
        )
    for one, other in zip(ones, others, strict=True):
        assert (one.client_id, one.num_examples, one.state.keys()) == (
            other.client_id,
            other.num_examples,
            other.state.keys(),
        )
        assert one.metrics["train_loss"] == pytest.approx(other.metrics["train_loss"], abs=1e-5)
        assert alike(one.state, other.state)
        assert alike(one.extra, other.extra)
    for one, other in zip(serial.clients, cohort.clients, strict=True):
        assert alike(one.personal, other.personal)
        assert alike(one.memory, other.memory)


@pytest.fixture(autouse=True)
def tiny_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", partial(tiny_model, batch_norm=False))
    monkeypatch.setitem(MODELS, "mixing", mixing_model)


@pytest.mark.parametrize("kind", ["sgd", "adam", "scaffold"])
def test_so_it_does_where_the_stack_shrinks_and_updates_stay_rows_of_it(kind: str) -> None:
    """Eighteen clients of one to nine steps: some are over before the stack becomes smaller, and momentum goes on."""
    work = Workload("", 18, 0, 18, batch_size=2, model="tiny", uneven=(*range(1, 19),))
    runs = [Rounds(work, executor, "fedprox") for executor in (SerialExecutor(), CohortExecutor())]
    for run in runs:
        if kind == "adam":
            run.loop.local.optimizer = partial(torch.optim.Adam, lr=0.01)
            run.loop.local.batch_size = 3
        if kind == "scaffold":  # behind the pull, which goes on for those that are over
            run.loop.callbacks["proximal"].mu = 1.0
            use_scaffold(run)
        assert run.loop.local.keeps_updates
        for _ in range(2):
            run()
    serial, cohort = (run.loop for run in runs)
    for name, tensor in serial.state.items():
        assert torch.allclose(tensor, cohort.state[name], atol=2e-6), name
        assert not torch.equal(tensor, serial.local.initial[name])


def test_mixed_precision_is_the_same_but_for_its_own_rounding() -> None:
    """Bfloat16 keeps 8 bits; in float32 both differ by two millionths of the change."""
    work = Workload("", 8, 24, 8, batch_size=8, model="tiny")
    makers = [(SerialExecutor, "32-true"), (SerialExecutor, "bf16-mixed"), (CohortExecutor, "bf16-mixed")]
    changes = []
    for executor, precision in makers:
        run = Rounds(work, executor(), precision=precision)
        run()
        start = run.loop.local.initial
        changes.append(torch.cat([(run.loop.state[name] - start[name]).flatten() for name in start]))
    exact, serial, cohort = changes
    one, other = ((change - exact).norm() / exact.norm() for change in (serial, cohort))
    assert 1e-3 < other < 1.5 * one < 0.02
    assert (cohort - serial).norm() < 0.02 * exact.norm()


def use_scaffold(run: Rounds) -> None:
    run.loop.add_callback("scaffold", ControlVariates())
    run.loop.local.callbacks.append(run.loop.callbacks["scaffold"])


class Recording(TorchDispatchMode):
    """Writes operations down as a CUDA graph does: which, on which memory, with which numbers of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert operation is not torch.ops.aten._local_scalar_dense.default, "the host waits for a number"
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for operation, args, kwargs, result in self.done:
                aliases = [returned.alias_info for returned in operation._schema.returns]
                if any(alias is not None and not alias.is_write for alias in aliases):
                    continue  # a view is where it was
                again = operation(*args, **kwargs)
                if not any(aliases):
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)


class RecordedCohort(CohortExecutor):
    """Replays steps on a CPU, where no graph is to be had."""

    recordings = 0

    def _check_graph(self, local: Any) -> None:
        pass

    def _record(self, work: Any) -> Any:
        self.recordings += 1
        work()
        with Recording() as recording:
            work()
        return recording.replay


@pytest.mark.parametrize("kind", ["plain", "scaffold", "mixing"])
def test_a_replayed_step_is_the_step(kind: str) -> None:
    """To the bit, over rounds and numbers of clients; what is recorded once must serve ever after."""
    work = Workload(
        "", 9, 0, 9, batch_size=2, model="mixing" if kind == "mixing" else "tiny", uneven=(*range(2, 20, 2),)
    )
    executors = [CohortExecutor(), RecordedCohort(graph=True)]
    runs = [Rounds(work, executor) for executor in executors]
    for run in runs:
        if kind == "scaffold":
            use_scaffold(run)
        if kind == "mixing":
            run.loop.local.scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
            run.loop.local.scheduler_interval = "step"
        for _ in range(3):
            run()
    one, other = (run.loop.state for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], runs[0].loop.local.initial[name]) for name in one)
    assert executors[1].recordings == len(set(stack_sizes([*range(9, 0, -1)])))


def test_a_graph_is_refused_without_cuda(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "executor=cohort", "executor.graph=true", *overrides())
    with pytest.raises(ValueError, match=r"^executor.graph must be false without CUDA, got true on cpu; set"):
        run.fit()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("clients", [20, 100])
def test_few_client_steps_are_computed_for_nothing(alpha: float, clients: int) -> None:
    """CIFAR-10's labels, divided by Dirichlet draws; one stack for as long as the longest client took up to 3.35."""
    parts = Dirichlet(alpha, min_size=1)(np.arange(50_000) % 10, clients, seed=0)
    numbers = sorted((-(-len(part) // 10) for part in parts), reverse=True)
    sizes = stack_sizes(numbers)
    assert len(sizes) == numbers[0]
    assert all(size >= sum(number > step for number in numbers) for step, size in enumerate(sizes))
    assert sum(sizes) <= 1.2 * sum(numbers)
    assert len(set(sizes)) <= 30


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    number = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return operation(*args, **(kwargs or {}))


def operations(clients: int) -> int:
    run = Rounds(Workload("", clients, 4, clients, batch_size=2, model="tiny"), CohortExecutor())
    run()
    with Operations() as counted:
        run()
    return counted.number


def test_a_client_more_costs_its_order_and_one_addition() -> None:
    few, many = operations(3), operations(7)
    assert (many - few) / 4 <= 5


def test_augmented_batches_of_more_clients_are_as_many_operations() -> None:
    transforms = [RandomCrop(1), RandomHorizontalFlip()]
    source, normalization = pool(40, image_size=8), Normalization()

    def step(clients: int) -> int:
        own = torch.arange(40).split(4)[:clients]
        loaders = [
            IndexBatches(source, part, 2, normalization=normalization, seed=0, transforms=transforms) for part in own
        ]
        steps = padded_steps(loaders, 1, [clients, clients], torch.device("cpu"))
        next(steps)
        with Operations() as counted:
            next(steps)
        return counted.number

    assert step(2) == step(10)


def test_clients_share_the_base_of_their_adapters(tiny_root: Path, tmp_path: Path) -> None:
    """The base is there once, and its pass is one for the examples of all clients."""
    pytest.importorskip("peft")
    more = overrides("+model.adapters={rank: 2}")
    serial, cohort = (
        federation(tiny_root, tmp_path / name, f"executor={name}", *more) for name in ("serial", "cohort")
    )
    serial.fit()
    seen: list[tuple[set[str], set[str]]] = []
    executor = cohort.loop.executor
    step = executor._step
    executor._step = lambda place, layout, rows, *more: (
        seen.append(({name for name, _, _ in layout.parts} | set(rows.rest), set(rows.common))),
        step(place, layout, rows, *more),
    )[1]
    cohort.fit()
    base = serial.loop.local.module.base_names
    assert base
    assert all(common == set(base) and not own & set(base) for own, common in seen)
    for name, tensor in serial.loop.state.items():
        assert torch.allclose(tensor, cohort.loop.state[name], atol=2e-6), name
        assert name.endswith("lora_A.default.weight") or not torch.equal(tensor, serial.loop.local.initial[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention on a CPU goes client by client
def test_tokens_equal_one_after_another(tmp_path: Path) -> None:
    """All clients' sequences lie in one pool too, and are not normalised."""
    root = tmp_path / "texts"
    root.mkdir()
    for name, letters in {"ann": "abcdefgh" * 30, "bob": "hgfedcba" * 20, "cid": "acegbdfh" * 9}.items():
        (root / f"{name}.txt").write_text(letters)
    settings = [
        "data=tokens", f"data.root={root}", "data.length=6", "data.batch_size=4", "model=gpt_tiny", "model.width=16",
        "model.depth=2", "loop.rounds=2", "logger=none", "dashboard=null",
    ]  # fmt: skip
    runs = []
    for executor in ("serial", "cohort"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*settings, f"executor={executor}"])
        runs.append(assemble(plain(cfg), RunFolder(tmp_path / executor)))
        runs[-1].fit()
    serial, cohort = runs
    assert one_gather_will_do([client.data.train_dataloader() for client in cohort.clients])
    for name, tensor in serial.loop.state.items():
        assert torch.allclose(tensor, cohort.loop.state[name], atol=1e-5), name
        assert not torch.equal(tensor, serial.loop.local.initial[name])


AUGMENT = {
    "nothing": [],
    "per image": [
        "{_target_: fl_lightning.data.transforms.RandomCrop, padding: 2}",
        "{_target_: fl_lightning.data.transforms.RandomHorizontalFlip}",
    ],
    "torchvision": ["{_target_: torchvision.transforms.v2.RandomHorizontalFlip}"],
}


@pytest.mark.parametrize("augment", AUGMENT)
def test_batches_are_filled_up_with_examples_that_count_nothing(augment: str, tiny_root: Path, tmp_path: Path) -> None:
    more = [f"data.augment=[{', '.join(AUGMENT[augment])}]"]
    run = federation(tiny_root, tmp_path, *overrides(*more))
    datas = sorted((client.data for client in run.clients), key=lambda data: -data.num_train)
    expected = []
    for data in datas:
        data.seed(5)
        expected.append([batch for _ in range(2) for batch in data.train_dataloader()])
        data.seed(5)
    seen: list[list] = [[] for _ in datas]
    loaders = [data.train_dataloader() for data in datas]
    assert one_gather_will_do(loaders) is (augment != "torchvision")
    sizes = stack_sizes([2 * len(loader) for loader in loaders])
    for (x, y, weight), size in zip(padded_steps(loaders, 2, sizes, torch.device("cpu")), sizes, strict=True):
        assert len(x) == len(y) == len(weight) == size
        for index in range(size):
            real = weight[index] > 0
            if real.any():
                seen[index].append((x[index][real], y[index][real]))
    for own, batches in zip(seen, expected, strict=True):
        assert len(own) == len(batches)
        for (x, y), (expected_x, expected_y) in zip(own, batches, strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(y, expected_y)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["trainer.gradient_clip_val=1.0"], "trainer.gradient_clip_val is 1.0"),
        (["trainer.precision=16-mixed"], "trainer.precision is 16-mixed"),
        (["local.validate=true"], "local.validate is true"),
        (["local.channels_last=true"], "local.channels_last is true"),
        (["local.engine=stock"], "local.engine is stock"),
        (
            ["scheduler={_target_: torch.optim.lr_scheduler.OneCycleLR, _partial_: true, max_lr: 1.0, total_steps: 9}"],
            "OneCycleLR changes .*momentum",
        ),
        (["+callbacks.rate._target_=lightning.pytorch.callbacks.LearningRateMonitor"], "acts on one client at a time"),
        (["method=apfl"], "overrides|BatchNorm|acts on"),
    ],
)
def test_what_is_not_elementwise_is_refused(more: list[str], reason: str, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "executor=cohort", *overrides(*more))
    with pytest.raises(ValueError, match=f"executor=cohort cannot train this, because .*({reason})"):
        run.fit()


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


def test_draws_outside_of_dropout_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(num_classes: int, **size: int) -> Model:
        plain = tiny_model(num_classes, batch_norm=False)
        return Model(nn.Sequential(plain.backbone, Draws()), plain.head, "head")

    monkeypatch.setitem(MODELS, "draws", model)
    run = Rounds(Workload("", 2, 4, 2, batch_size=2, model="draws"), CohortExecutor())
    with pytest.raises(RuntimeError, match="draws random numbers outside of its dropout layers; take"):
        run()


def test_number_of_clients_is_checked() -> None:
    with pytest.raises(ValueError, match="clients must be at least 1"):
        CohortExecutor(0)
