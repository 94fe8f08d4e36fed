"""The loop against a federation written by hand in plain PyTorch, and what it does when something goes wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from fl_lightning.aggregators import Aggregator
from fl_lightning.callback import FederatedCallback
from fl_lightning.executors import CohortExecutor, ProcessExecutor, SerialExecutor
from fl_lightning.methods.soup import Soup
from fl_lightning.seeding import derive_seed
from fl_lightning.state import num_bytes
from tests.federations import Federation, add_recorder, assert_same, federation, outcome


def by_hand(run: Federation, rounds: int, lr: float, momentum: float, mu: float = 0.0) -> dict[str, torch.Tensor]:
    """FedAvg or FedProx over all clients, as the papers write it; batches are the clients' own."""
    state = {name: tensor.clone() for name, tensor in run.loop.local.initial.items()}
    module = copy.deepcopy(run.module)
    for round in range(rounds):
        total: dict[str, torch.Tensor] = {}
        for client in run.clients:
            module.load_state_dict(state)
            module.train()
            start = {name: p.detach().clone() for name, p in module.named_parameters()}
            optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=momentum)
            client.data.seed(derive_seed(run.loop.seed, "batches", round, client.id))
            for x, y in client.data.train_dataloader():
                optimizer.zero_grad()
                loss = functional.cross_entropy(module(x), y)
                penalty = sum(((p - start[name]) ** 2).sum() for name, p in module.named_parameters())
                (loss + mu / 2 * penalty).backward()
                optimizer.step()
            for name, tensor in module.state_dict().items():
                part = tensor.double() * client.num_examples
                total[name] = total[name] + part if name in total else part
        examples = sum(client.num_examples for client in run.clients)
        counts = {name: t for name, t in module.state_dict().items() if not t.is_floating_point()}
        state = {name: (t / examples).float() if name not in counts else state[name] for name, t in total.items()}
    return {name: tensor for name, tensor in state.items() if name not in counts}


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_fedavg_and_fedprox_are_the_hand_written_ones(mu: float, tiny_root: Path, tmp_path: Path) -> None:
    method = ["method=fedprox", f"callbacks.proximal.mu={mu}"] if mu else ["method=fedavg"]
    run = federation(
        tiny_root, tmp_path / "run", *method, "optimizer.lr=0.1", "optimizer.momentum=0.5", "loop.rounds=3"
    )
    run.fit()
    for name, tensor in by_hand(run, 3, 0.1, 0.5, mu).items():
        torch.testing.assert_close(
            run.loop.state[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


class Setup(Aggregator):
    """Keeps what it was set up with."""

    def setup(self, module: Any, clients: Any = (), device: Any = None) -> None:
        super().setup(module, clients, device)
        self.given = module, list(clients), device


def test_the_aggregator_is_set_up_with_module_clients_and_device(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "loop.rounds=1", "data.unseen_clients=[cid]")
    run.loop.aggregator = aggregator = Setup()
    run.fit()
    module, clients, device = aggregator.given
    assert (module, device) == (run.module, run.loop.device)
    assert [(one.id, one.name, one.num_train) for one in clients] == [(0, "ann", 21), (1, "bob", 27)]
    assert [one.label_counts.sum() for one in clients] == [21, 27]


def test_proximal_penalty_of_weight_zero_is_fedavg_to_the_bit(tiny_root: Path, tmp_path: Path) -> None:
    runs = []
    for method in (["method=fedavg"], ["method=fedprox", "callbacks.proximal.mu=0"]):
        run = federation(tiny_root, tmp_path / method[0], *method)
        run.fit()
        runs.append(run.loop.state)
    assert_same(*runs)


def test_bytes_are_those_of_the_shared_tensors(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "method=fedbn", "cohort.number=2", "loop.rounds=3")
    run.fit()
    each = num_bytes(run.loop.state)
    assert each < num_bytes(run.loop.local.initial)
    assert run.loop.bytes_up == run.loop.bytes_down == 3 * 2 * each


class Breaks(FederatedCallback):
    """Makes one client fail, or its update bad."""

    def __init__(self, how: str, client: int = 1) -> None:
        self.how = how
        self.client = client

    def on_client_end(self, client: Any, module: Any, update: Any) -> None:
        if client.id == self.client and self.how == "error":
            raise OSError("the client fell over")
        if client.id == self.client and self.how == "nan":
            update.state["head.bias"] = update.state["head.bias"] * float("nan")


@pytest.mark.parametrize(
    ("how", "option", "sentence"),
    [
        ("error", "loop.on_client_error", "client bob: the client fell over"),
        ("nan", "loop.on_bad_update", "client bob: its update holds NaN"),
    ],
)
def test_a_bad_client_stops_the_run_or_is_left_out_and_counted(
    how: str, option: str, sentence: str, tiny_root: Path, tmp_path: Path
) -> None:
    run = federation(tiny_root, tmp_path / "raise", f"{option}=raise")
    run.loop.add_callback("breaks", Breaks(how))
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        run.fit()
    choice = "skip" if how == "error" else "drop"
    run = federation(tiny_root, tmp_path / choice, f"{option}={choice}", "sharing.personal=[head]")
    run.loop.add_callback("breaks", Breaks(how)) if how == "error" else None
    if how == "nan":
        run.loop.add_callback("breaks", BreaksBackbone())
    run.fit()
    assert run.loop.history[0]["round/trained"] == 2
    assert run.loop.history[0]["round/failed" if how == "error" else "round/dropped"] == 1
    assert run.clients[0].personal
    assert not run.clients[1].personal, "a client that is left out keeps what it had"


class BreaksBackbone(Breaks):
    def __init__(self) -> None:
        super().__init__("nan")

    def on_client_end(self, client: Any, module: Any, update: Any) -> None:
        if client.id == self.client:
            update.state["backbone.conv1.bias"] = update.state["backbone.conv1.bias"] + float("inf")


def test_all_clients_left_out_changes_nothing(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "loop.on_client_error=skip", "cohort.number=1", "loop.rounds=1")
    for client in range(3):
        run.loop.add_callback(f"breaks{client}", Breaks("error", client))
    run.fit()
    assert_same(run.loop.state, {name: run.loop.local.initial[name] for name in run.loop.state})


@pytest.mark.parametrize("buffers", ["average", "local", "reset"])
def test_buffer_policies(buffers: str, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", f"sharing.buffers={buffers}")
    recorder = add_recorder(run)
    run.fit()
    name = "backbone.norm1.running_mean"
    steps = {client.id: len(client.data.train_dataloader()) for client in run.clients}
    if buffers == "local":
        assert all(name not in update.state for update in recorder.updates)
        assert not torch.equal(run.clients[0].personal[name], run.clients[1].personal[name])
        assert run.loop.global_state() is None
    else:
        last = recorder.updates[-3:]
        mean = sum(u.num_examples * u.state[name].double() for u in last) / sum(u.num_examples for u in last)
        torch.testing.assert_close(run.loop.state[name], mean.float())
        counts = [u.state["backbone.norm1.num_batches_tracked"].item() for u in last]
        first = [u.state["backbone.norm1.num_batches_tracked"].item() for u in recorder.updates[:3]]
        assert first == [steps[u.client_id] for u in recorder.updates[:3]]
        if buffers == "reset":
            assert counts == first
        else:
            assert counts == [max(first) + n for n in first], "the largest count goes on"


def test_evaluation_changes_no_training(tiny_root: Path, tmp_path: Path) -> None:
    states = []
    for every in (1, 5):
        run = federation(tiny_root, tmp_path / str(every), f"evaluation.every={every}", "loop.rounds=3")
        run.fit()
        states.append(run.loop.state)
    assert_same(*states)


def test_the_order_of_clients_changes_nothing(tiny_root: Path, tmp_path: Path) -> None:
    forward = federation(tiny_root, tmp_path / "forward", "loop.rounds=1")
    backward = federation(tiny_root, tmp_path / "backward", "loop.rounds=1")
    backward.clients.reverse()
    records = [add_recorder(run) for run in (forward, backward)]
    forward.fit()
    backward.fit()
    updates = [{update.client_id: update.state for update in record.updates} for record in records]
    assert_same(updates[0], dict(sorted(updates[1].items())))


def test_history_is_whole(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "loop.rounds=3")
    run.fit()
    assert [row["round"] for row in outcome(run)["history"]] == [0, 1, 2]
    assert {
        "fit/train_loss",
        "test/global/accuracy/mean",
        "val/global/loss/mean",
        "traffic/bytes_up",
    } <= run.loop.history[0].keys()


@pytest.mark.parametrize(
    ("method", "stay"),
    [
        ("fedavg", True),
        ("fedadam", True),
        ("krum", False),
        ("scaffold", False),  # reads updates in on_client_end
    ],
)
def test_updates_stay_where_they_were_trained_if_a_mean_alone_reads_them(
    method: str, stay: bool, tiny_root: Path, tmp_path: Path
) -> None:
    run = federation(tiny_root, tmp_path, "loop.rounds=0", f"method={method}")
    run.fit()
    assert run.loop.local.keeps_updates is stay
    run.loop.local.plan = Soup()  # fits more than once, and may do anything with what comes out
    assert not run.loop._updates_may_stay()


def test_who_reads_updates_merges_otherwise_or_is_elsewhere_gets_them_on_the_cpu() -> None:
    class Reads(FederatedCallback):
        def on_upload(self, client: Any, module: Any, update: Any) -> None: ...

    class Watches(Reads):
        reads_updates = False

    class Other(Aggregator):
        def aggregate(self, state: Any, updates: Any) -> Any: ...

    class Weighs(Aggregator):
        def weight(self, update: Any) -> float:
            return 1.0

    assert [kind().needs_updates for kind in (FederatedCallback, Reads, Watches)] == [False, True, False]
    assert [kind.only_averages for kind in (Aggregator, Other, Weighs)] == [True, False, True]
    kinds, places = (
        (SerialExecutor(), CohortExecutor(), ProcessExecutor(1)),
        (torch.device("cpu"), torch.device("cuda")),
    )
    assert [kind.keeps_updates(place) for place in places for kind in kinds] == [True] * 5 + [False]
