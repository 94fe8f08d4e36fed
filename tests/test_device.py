"""Everything on another device than the CPU: nothing is mixed, the bits are the same, no step waits for the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.bare import BareRounds
from benchmarks.workloads import Rounds, Workload
from fl_lightning import personalization
from fl_lightning.executors import CohortExecutor, Executor, SerialExecutor
from fl_lightning.fit.local import LocalTraining
from fl_lightning.run import training
from fl_lightning.run.config import CONF
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.training import Federation, assemble
from fl_lightning.state import num_bytes
from tests import simulated_device
from tests.federations import assert_same, by_name, config, outcome
from tests.personalization.conftest import compose_personalization
from tests.simulated_device import calls, in_a_process_of_its_own, traffic

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))

# Plain; memory at the client and messages beside the model; the server's body. The slow ones are all others.
FAST = {"fedavg", "scaffold", "splitfed"}

pytestmark = pytest.mark.skipif(
    not simulated_device.is_possible(), reason=f"torch {torch.__version__} has no backends in Python"
)


def train(tiny_root: Path, folder: Path, *overrides: str, there: bool = True, **loop: int) -> Federation:
    # Changed after composing, which takes longer than the run and is remembered.
    settings = config(tiny_root, "seed=3", *overrides)
    settings["loop"].update(loop)
    if there:
        settings["trainer"]["accelerator"] = simulated_device.NAME
    run = assemble(settings, RunFolder(folder))
    run.fit()
    return run


def same_bits(tiny_root: Path, folder: Path, *overrides: str) -> None:
    here = outcome(train(tiny_root, folder / "cpu", *overrides, there=False))
    assert not calls
    run = train(tiny_root, folder / "device", *overrides)
    assert run.loop.local.device.type == simulated_device.NAME
    # With workers, the counts are theirs.
    assert calls["aten::convolution"] or "executor=processes" in overrides, "nothing was computed there"
    assert_same(here, outcome(run))


@pytest.mark.parametrize(
    "method", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_method_ends_with_the_bits_of_the_cpu(method: str, tiny_root: Path, tmp_path: Path) -> None:
    in_a_process_of_its_own(same_bits, tiny_root, tmp_path, *by_name(method))


VARIANTS = {
    "Lightning's own loop": ["local.engine=stock"],
    "many clients in one pass": ["executor=cohort", "+model.batch_norm=false", "callbacks.proximal.mu=0.1"],
    "accumulation, clipping, Adam": [
        "optimizer=adam",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=0.1",
    ],
    "statistics of each client": ["sharing.buffers=local"],
    "a fused optimizer that lives on": [
        "optimizer=adam",
        "+optimizer.fused=true",
        "+callbacks.persistent._target_=fl_lightning.callbacks.persistent_optimizer.PersistentOptimizer",
    ],
    "in two worker processes": ["executor=processes", "executor.workers=2"],
}


@pytest.mark.every
@pytest.mark.parametrize(
    "variant",
    [name if place < 3 else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate(VARIANTS)],
)
def test_so_does_every_way_to_train(variant: str, tiny_root: Path, tmp_path: Path) -> None:
    in_a_process_of_its_own(same_bits, tiny_root, tmp_path, "method=fedprox", *VARIANTS[variant])


def resumed(tiny_root: Path, folder: Path) -> None:
    whole = train(tiny_root, folder / "whole", "method=scaffold")
    train(tiny_root, folder / "part", "method=scaffold", rounds=1)
    rest = train(tiny_root, folder / "part", "method=scaffold", f"resume='{folder / 'part'}'")
    assert_same(outcome(whole), outcome(rest))


def test_a_run_resumes_there(tiny_root: Path, tmp_path: Path) -> None:
    in_a_process_of_its_own(resumed, tiny_root, tmp_path)


def same_reads(tiny_root: Path, folder: Path, *words: str) -> None:
    counts = []
    for epochs in "14":
        before = calls["read"]
        overrides = [*words, f"trainer.max_epochs={epochs}", "optimizer.lr=0.01"]
        train(tiny_root, folder / epochs, *overrides, rounds=1)
        counts.append(calls["read"] - before)
    assert 0 < counts[0] == counts[1]


@pytest.mark.parametrize(
    "method", ["fedavg", "apfl", *(pytest.param(name, marks=pytest.mark.slow) for name in ("scaffold", "virtual"))]
)
def test_no_step_waits_for_the_device(method: str, tiny_root: Path, tmp_path: Path) -> None:
    in_a_process_of_its_own(same_reads, tiny_root, tmp_path, f"method={method}")


def test_no_step_of_many_clients_does(tiny_root: Path, tmp_path: Path) -> None:
    """With all that a step may hold: statistics, draws, rates of their own, gradients edited."""
    words = [
        "method=scaffold",
        "executor=cohort",
        "model._target_=tests.executors.test_cohort.mixing_model",
        "scheduler={_target_: torch.optim.lr_scheduler.ExponentialLR, _partial_: true, gamma: 0.9}",
        "local.scheduler_interval=step",
    ]
    in_a_process_of_its_own(same_reads, tiny_root, tmp_path, *words)


def operations(make: Callable[[Workload], Callable[[], None]], **workload: int) -> tuple[float, float]:
    """How many operations a step of a round sends to the device, and how many the rest of the round does."""
    counts = []
    for epochs in (1, 3):
        train_round = make(Workload("", examples=40, batch_size=10, epochs=epochs, **workload))
        train_round()
        before = calls.total() - calls["read"]
        train_round()
        counts.append(calls.total() - calls["read"] - before)
    each = (counts[1] - counts[0]) / 8  # four steps an epoch
    return each, counts[0] - 4 * each


def few_operations() -> None:
    bare, _ = operations(lambda work: BareRounds(work, device=simulated_device.NAME), clients=1, per_round=1)
    lean, around = operations(
        lambda work: Rounds(work, SerialExecutor(), engine="lean", device=simulated_device.NAME), clients=1, per_round=1
    )
    assert 50 < lean <= bare
    assert around < 1.5 * bare
    cohorts = [
        operations(
            lambda work, number=number: Rounds(work, CohortExecutor(number), device=simulated_device.NAME),
            clients=number,
            per_round=number,
        )
        for number in (2, 8)
    ]
    assert cohorts[0][0] == cohorts[1][0] < 4 * bare
    assert (cohorts[1][1] - cohorts[0][1]) / 6 <= 5


def little_traffic(executor: Callable[[], Executor], model: str) -> None:
    work = Workload("", clients=3, examples=8, per_round=3, batch_size=4, model=model)
    run = Rounds(work, executor(), device=simulated_device.NAME)
    run()
    traffic.clear()
    reads = calls["read"]
    run()
    size = num_bytes(run.loop.state)
    # The model goes up and its mean comes down once a round, whatever the number of clients. Beside them go the places
    # of examples up (an int64 each), and losses and whether numbers are finite down.
    assert size <= traffic["up"] <= size + 16 * 3 * 8
    assert size <= traffic["down"] <= size + 16 * 3
    assert calls["read"] - reads <= 1 + (2 * 3 if executor is SerialExecutor else 1)


@pytest.mark.parametrize("model", ["lenet5", pytest.param("resnet18", marks=pytest.mark.slow)])
@pytest.mark.parametrize("executor", [SerialExecutor, CohortExecutor])
def test_the_model_goes_up_once_a_round_and_comes_down_once(executor: Callable[[], Executor], model: str) -> None:
    in_a_process_of_its_own(little_traffic, executor, model)


@pytest.mark.every
def test_a_step_launches_no_more_than_a_bare_loop_and_a_cohort_no_more_for_more_clients() -> None:
    in_a_process_of_its_own(few_operations)


class StaticCohort(CohortExecutor):
    """Takes the steps that a graph would hold, one after another."""

    def _check_graph(self, local: LocalTraining) -> None:
        pass

    def _record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return work


def recorded_with_adam() -> None:
    """A graph's Adam counts its steps on the device, so that no number of the host changes between them."""
    work = Workload("", 9, 0, 9, batch_size=2, uneven=(*range(1, 10),))
    runs = [Rounds(work, kind, device=simulated_device.NAME) for kind in (CohortExecutor(), StaticCohort(graph=True))]
    for run in runs:
        run.loop.local.optimizer = partial(torch.optim.Adam, lr=1e-3, eps=1e-3)
        run()
        run()
    one, other = (run.loop.state for run in runs)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.every
def test_adam_of_a_recorded_step_is_adam() -> None:
    in_a_process_of_its_own(recorded_with_adam)


def personalized_alike(tiny_root: Path, folder: Path, strategies: Sequence[str]) -> None:
    training.run(OmegaConf.create(config(tiny_root)), folder / "global")
    given = [f"checkpoint={folder / 'global'}", f"personalization=[{','.join(strategies)}]", "save_models=true"]
    for name, place in (("cpu", []), ("device", [f"trainer.accelerator={simulated_device.NAME}"])):
        personalization.run(compose_personalization(*given, *place), folder / name)
        assert bool(calls) == (name == "device")
    models = sorted((folder / "cpu" / "models").rglob("*.pt"))
    assert len(models) == 3 * len(strategies)
    for path in models:
        assert_same(torch.load(path), torch.load(folder / "device" / path.relative_to(folder / "cpu")))
    for path in [*(folder / "cpu" / "matrix").iterdir(), folder / "cpu" / "records.csv"]:
        assert path.read_text() == (folder / "device" / path.relative_to(folder / "cpu")).read_text()


# Of LoRA not known.
STRATEGIES = sorted({path.stem for path in (CONF / "personalization").glob("[!_]*.yaml") if "ora_" not in path.stem})


@pytest.mark.every
@pytest.mark.parametrize("strategies", [["local", "lp_ft", "none"], pytest.param(STRATEGIES, marks=pytest.mark.slow)])
def test_strategies_end_with_the_models_and_scores_of_the_cpu(
    strategies: Sequence[str], tiny_root: Path, tmp_path: Path
) -> None:
    in_a_process_of_its_own(personalized_alike, tiny_root, tmp_path, strategies)
