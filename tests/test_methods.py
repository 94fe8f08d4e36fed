"""What must hold for every method: one table over all of ``conf/method``.

Each method runs once as a user types it, with the dashboard, TensorBoard and evaluation that are shipped. The other
tests compare runs of their own with that one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fl_lightning.evaluation.results import MetricsTable, read_json
from fl_lightning.run.config import CONF
from fl_lightning.state import all_finite
from tests.federations import (
    Federation,
    add_recorder,
    assert_same,
    by_name,
    every,
    federation,
    outcome,
    stopped_and_resumed,
    tiny,
)
from tests.scripts import call

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))

BODY, HEAD = {"backbone.conv1", "backbone.norm1", "backbone.conv2"}, {"head"}
#: The layers that travel, where not all do. Split methods cut the model for each client (tests/split).
TRAVELS = {
    **dict.fromkeys(("fedbabu", "fedft", "fedftha", "fedper", "fedrep", "virtual"), BODY),
    "fedbn": BODY - {"backbone.norm1"} | HEAD,
    "lg_fedavg": HEAD,
    "fedproto": {"prototypes"},
    "pfedpg": {"prompt"},
    "fedmosaic": {f"adapters.model.blocks_{n}_attn_{part}.received" for n in (0, 1) for part in ("qkv", "proj")},
    "fedbasis": {"bases", "backbone.norm1"},  # of the latter, BatchNorm's statistics
    **dict.fromkeys(("fedfomo", "l2gd", "local", "mocha"), set[str]()),
}
#: Methods that train adapters: BatchNorm's statistics are no part of the frozen base.
LORA = {part: {f"backbone.{conv}.lora_{part}.default" for conv in ("conv1", "conv2")} for part in "AB"}
REST = {"backbone.norm1"} | HEAD
TRAVELS |= dict.fromkeys(
    ("feddpa", "fedit", "fedex_lora", "flexlora", "flora", "hetlora"), LORA["A"] | LORA["B"] | REST
)
TRAVELS |= {"ffa_lora": LORA["B"] | REST, "fedsa_lora": LORA["A"] | REST}
ALTERNATES = {"rolora": (LORA["B"] | REST, LORA["A"] | REST)}
#: What travels differs by client, or is no part of the model; said in the methods' own tests.
OWN_TESTS = ("fedjets", "pac_pfl", "zoopfl")
SPLIT = ("flexp_sfl", "pfsl", "phsfl", "sl", "splitfed")

#: One of each kind of client half: plain, memory, two models, phases, gradients of gradients, the server's body, draws.
KINDS = ("fedavg", "scaffold", "ditto", "fedftha", "per_fedavg", "flexp_sfl", "virtual")
FAST = ("fedavg", "scaffold", "fedftha", "flexp_sfl")


@pytest.fixture(scope="module", params=[every(one, one in FAST) for one in METHODS])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shipped(method: str, tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``train.py method=...``, tiny; whatever else is as it is shipped."""
    folder = tmp_path_factory.mktemp(method) / "run"
    assert call("train", *tiny(tiny_root), *by_name(method), "seed=3", f"hydra.run.dir={folder}") == 0
    return folder


def test_what_a_user_types_leaves_results_models_pictures_and_curves(method: str, shipped: Path) -> None:
    results = read_json(shipped / "results.json")
    assert (results["method"], results["rounds"], len(results["clients"])) == (method, 2, 3)
    views = [view for view in ("global", "personal") if results[view]]
    assert views
    for view in views:
        assert 0 <= results[view]["mean"] <= 1
        assert all(0 <= client[view] <= 1 for client in results["clients"])
    assert (shipped / "global_model.pt").exists() == ("global" in views)
    rows = MetricsTable(shipped / "metrics.csv").rows
    assert [row["round"] for row in rows] == [0, 1]
    figures = {path.name for path in (shipped / "figures").iterdir()}
    scored = {key.split("/")[1] for key in rows[-1] if key.startswith("test/")} & {"global", "personal"}
    confusion = "global" if "global" in views else "personal"
    assert figures >= {
        "partition.png",
        f"confusion_{confusion}.png",
        *(f"clients_over_rounds_{view}.png" for view in scored),
    }
    events = EventAccumulator(str(next(shipped.rglob("events.out.tfevents*")).parent)).Reload()
    tags = events.Tags()
    assert len(tags["images"]) == len(figures)
    assert {key for row in rows for key, value in row.items() if value is not None} - {"round"} <= set(tags["scalars"])


def test_trains_and_keeps_personal_tensors_at_home(method: str, shipped: Path, tiny_root: Path, tmp_path: Path) -> None:
    """The same seed gives the same bits, and neither pictures nor curves change one."""
    run = federation(tiny_root, tmp_path / "run", *by_name(method), "seed=3")
    recorder = add_recorder(run)
    run.fit()
    assert_same(outcome(shipped), outcome(run))
    initial = run.loop.local.initial
    assert recorder.updates
    for update in recorder.updates:
        assert all_finite(update.state)
        assert not update.state.keys() & run.clients[update.client_id].personal.keys()
        assert update.state.keys() <= initial.keys()
        layers = {name.rpartition(".")[0] for name in update.state if not name.startswith("log_std.")}
        assert method in (*SPLIT, *OWN_TESTS) or layers in ALTERNATES.get(method, (TRAVELS.get(method, BODY | HEAD),))
    for client in run.clients:
        elsewhere = {*run.loop.sharing.names(run.module, client), *run.loop.sharing.fixed_names(run.module)}
        assert client.personal.keys() | elsewhere >= initial.keys()
    moved = [name for name, tensor in run.loop.state.items() if not torch.equal(tensor, initial[name])]
    own = [
        name
        for name in set(run.clients[0].personal) & set(run.clients[1].personal)
        if not torch.equal(run.clients[0].personal[name], run.clients[1].personal[name])
    ]
    assert moved or own, "nothing was learned"
    if any(tensor.is_floating_point() for tensor in run.clients[0].personal.values()):
        assert own, "personal tensors are the same at two clients"


@pytest.mark.slow
def test_another_seed_gives_other_bits(method: str, shipped: Path, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, *by_name(method), "seed=4")
    run.fit()
    with pytest.raises(AssertionError):
        assert_same(outcome(shipped), outcome(run))


def test_stopped_and_resumed_equals_uninterrupted(method: str, shipped: Path, tiny_root: Path, tmp_path: Path) -> None:
    rest = stopped_and_resumed(tiny_root, tmp_path / "run", 1, *by_name(method), "seed=3")
    assert_same(outcome(shipped), outcome(rest))


@pytest.mark.slow
def test_two_workers_equal_one(method: str, shipped: Path, tiny_root: Path, tmp_path: Path) -> None:
    try:
        run = with_two_workers(tiny_root, tmp_path, method)
    except ValueError as error:
        if "which takes executor=split" in str(error):
            pytest.skip(f"{method} says so itself: {error}")
        raise
    assert_same(outcome(shipped), outcome(run))


def with_two_workers(tiny_root: Path, folder: Path, method: str) -> Federation:
    run = federation(tiny_root, folder, *by_name(method), "seed=3", "executor=processes", "executor.workers=2")
    run.fit()
    return run


@pytest.mark.parametrize("kind", [every(one, one in FAST) for one in KINDS if one not in SPLIT])
def test_two_workers_equal_one_of_each_kind(kind: str, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "serial", *by_name(kind), "seed=3")
    run.fit()
    assert_same(outcome(run), outcome(with_two_workers(tiny_root, tmp_path / "workers", kind)))


@pytest.mark.parametrize(
    "method", [pytest.param(one, marks=[] if one in KINDS else pytest.mark.slow) for one in METHODS]
)
def test_mixed_precision(method: str, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", *by_name(method), "trainer.precision=bf16-mixed")
    run.fit()
    assert all_finite(run.loop.state)
    assert all(all_finite(client.personal) for client in run.clients)
