"""What belongs to a client is reached through the executor alone: describe, fit, score, keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fl_lightning.callback import FederatedCallback
from fl_lightning.client import Broadcast, ClientInfo, Exam
from fl_lightning.evaluation.results import read_json
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.results import finish
from fl_lightning.run.training import Federation
from fl_lightning.state import load, num_bytes
from tests.federations import add_recorder, assert_same, config, every, federation, outcome

EXECUTORS = (["executor=serial"], ["executor=processes", "executor.workers=2"])


class Gossip(FederatedCallback):
    """Stores in one hook and reads in the other: what a client is sent is what came in the round before."""

    def __init__(self) -> None:
        self.heard = torch.zeros(3)
        self.order: list[str] = []

    def on_broadcast(self, loop: Any, client: ClientInfo, broadcast: Broadcast) -> None:
        self.order.append("broadcast")
        broadcast.extra["heard"] = self.heard.clone()

    def on_update(self, loop: Any, client: ClientInfo, update: Any) -> None:
        self.order.append("update")
        self.heard[client.id] += update.state["head.bias"].sum()


class Asks(FederatedCallback):
    """Asks every client of the cohort for its mean loss before the round."""

    def on_round_start(self, loop: Any, cohort: Any) -> None:
        self.answers = loop.ask(self.name, cohort)

    def on_request(self, client: Any, module: Any, broadcast: Broadcast) -> Any:
        x, y = next(iter(client.data.eval_dataloader("train")))
        with torch.no_grad():
            return {"loss": functional.cross_entropy(module(x), y)}


class HalfPrecision(FederatedCallback):
    """Sends the update in half the bytes."""

    def on_upload(self, client: Any, module: Any, update: Any) -> None:
        update.state = {name: t.half() if t.is_floating_point() else t for name, t in update.state.items()}

    def on_receive(self, loop: Any, client: ClientInfo, update: Any) -> None:
        update.state = {name: t.float() if t.is_floating_point() else t for name, t in update.state.items()}


def with_callback(run: Federation, callback: FederatedCallback, name: str = "mine") -> Federation:
    run.loop.add_callback(name, callback)
    return run


def test_the_order_of_hooks_does_not_depend_on_the_executor(tiny_root: Path, tmp_path: Path) -> None:
    runs = []
    for number, words in enumerate(EXECUTORS):
        gossip = Gossip()
        run = with_callback(federation(tiny_root, tmp_path / str(number), *words), gossip)
        run.fit()
        runs.append(run)
        assert gossip.order == [*["broadcast"] * 3, *["update"] * 3] * 2
    assert_same(*(outcome(run) for run in runs))


def test_describe_tells_what_the_data_say(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "loop.rounds=0")
    with run.open():
        for info, client in zip(run.loop.clients, run.clients, strict=True):
            data = client.data
            assert (info.id, info.name, info.num_examples) == (client.id, data.name, data.num_train)
            assert [info.count(split) for split in ("train", "val", "test")] == [
                data.num_train,
                data.num_val,
                data.num_test,
            ]
            assert torch.equal(info.label_counts, torch.bincount(data.examples("train")[1], minlength=3))


@pytest.mark.parametrize(
    "method", [every(one, one in ("fedavg", "fedftha")) for one in ("fedavg", "fedper", "ditto", "fedftha")]
)
def test_scores_have_the_same_bits_wherever_they_are_formed(method: str, tiny_root: Path, tmp_path: Path) -> None:
    found = []
    for number, words in enumerate(EXECUTORS):
        run = federation(tiny_root, tmp_path / str(number), f"method={method}", *words)
        with run.open():
            run.loop.run_rounds()
            exams = [
                (client, run.loop.personal_exam(client, split, confusion=True))
                for client in run.loop.clients
                for split in ("val", "test")
            ]
            found.append([vars(scores) for scores in run.loop.score(exams)])
    assert_same(*found)
    # By other means: the client's tensors, loaded by hand.
    for client, scores in zip(run.clients, found[0][1::2], strict=True):
        module = run.module
        load(module, {**run.loop.initial, **client.personal, **run.loop.state})
        module.eval()
        x, y = (torch.cat(part) for part in zip(*client.data.test_dataloader(), strict=True))
        logits = module.personal_forward(x)
        assert scores["values"]["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
        assert scores["values"]["loss"] == pytest.approx(functional.cross_entropy(logits, y).item(), rel=1e-5)
        assert scores["confusion"].sum() == len(y)


def test_a_model_is_fetched_and_scored_elsewhere(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "method=fedper")
    with run.open():
        run.loop.run_rounds()
        ann, bob = run.loop.clients[:2]
        model = run.loop.personal_state(ann)
        [at_home, away] = run.loop.score([(ann, run.loop.personal_exam(ann, "test")), (bob, Exam("test", model))])
        [again] = run.loop.score([(ann, Exam("test", model, personal=True))])
    assert again.values == at_home.values
    assert away.client_id == bob.id
    assert away.values != at_home.values


def test_asking_is_counted_and_leaves_nothing(tiny_root: Path, tmp_path: Path) -> None:
    plain = federation(tiny_root, tmp_path / "plain", "loop.rounds=1")
    plain.fit()
    for number, words in enumerate(EXECUTORS):
        asks = Asks()
        run = with_callback(federation(tiny_root, tmp_path / str(number), "loop.rounds=1", *words), asks)
        run.fit()
        assert set(asks.answers) == {0, 1, 2}
        assert_same(run.loop.state, plain.loop.state)
        assert run.loop.bytes_down == plain.loop.bytes_down + 3 * num_bytes(run.loop.initial)
        assert run.loop.bytes_up == plain.loop.bytes_up + 3 * 4
        load(run.module, run.loop.initial)
        x, y = next(iter(run.clients[0].data.eval_dataloader("train")))
        expected = functional.cross_entropy(run.module(x), y)
        torch.testing.assert_close(asks.answers[0]["loss"], expected.detach(), rtol=1e-4, atol=1e-5)


def test_uploads_are_transformed_in_one_place(tiny_root: Path, tmp_path: Path) -> None:
    plain = federation(tiny_root, tmp_path / "plain", "loop.rounds=1")
    plain.fit()
    run = with_callback(federation(tiny_root, tmp_path / "half", "loop.rounds=1"), HalfPrecision())
    run.fit()
    floats = num_bytes({name: t for name, t in run.loop.initial.items() if t.is_floating_point()})
    assert run.loop.bytes_up == plain.loop.bytes_up - 3 * floats // 2
    for name, tensor in run.loop.state.items():
        torch.testing.assert_close(tensor, plain.loop.state[name], rtol=2e-3, atol=1e-3)


def test_a_round_that_fails_leaves_the_clients_as_they_were(tiny_root: Path, tmp_path: Path) -> None:
    class FailsLate(FederatedCallback):
        def on_aggregate_end(self, loop: Any) -> None:
            pass

        def on_update(self, loop: Any, client: ClientInfo, update: Any) -> None:
            if loop.round == 1 and client.id == 2:
                raise KeyError("late")

    run = with_callback(federation(tiny_root, tmp_path, "method=fedper"), FailsLate())
    once = federation(tiny_root, tmp_path / "once", "method=fedper", "loop.rounds=1")
    once.fit()
    with pytest.raises(KeyError, match="late"):
        run.fit()
    for client, other in zip(run.clients, once.clients, strict=True):
        assert_same(client.personal, other.personal)


def test_each_view_is_kept_at_its_own_best_round(tiny_root: Path, tmp_path: Path) -> None:
    words = ("method=ditto", "loop.rounds=6", "optimizer.lr=0.3", "seed=3")
    run = federation(tiny_root, tmp_path, *words)
    with run.open():
        run.loop.run_rounds()
        results = finish(run.loop, RunFolder(tmp_path), config(tiny_root, *words), run.partition_hash)
    for view in ("global", "personal"):
        curve = [row[f"val/{view}/accuracy/mean"] for row in run.loop.history]
        best = int(np.argmax(curve))
        assert results["kept_rounds"][view] == best
        assert results["validation"][view]["value"] == curve[best]
        # Test scores of the kept models are those of that round.
        assert results[view]["mean"] == run.loop.history[best][f"test/{view}/accuracy/mean"]
        assert results["metrics"][view]["loss"]["mean"] == run.loop.history[best][f"test/{view}/loss/mean"]
    assert read_json(RunFolder(tmp_path).results)["kept_rounds"] == results["kept_rounds"]


def test_one_view_may_choose_for_both(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(
        tiny_root,
        tmp_path,
        "method=ditto",
        "loop.rounds=6",
        "optimizer.lr=0.3",
        "seed=3",
        "evaluation.chooses=personal",
    )
    run.fit()
    best = run.loop.callbacks["evaluation"].best  # type: ignore[attr-defined]
    assert best["global"]["round"] == best["personal"]["round"]
    assert best["global"]["by"] == "personal"


def test_a_tuned_model_that_validation_chose_is_made_again(tiny_root: Path, tmp_path: Path) -> None:
    """Per-FedAvg scores the model after a step: the kept round's score is the score that was validated with it."""
    words = ("method=per_fedavg", "loop.rounds=4", "optimizer.lr=0.1")
    run = federation(tiny_root, tmp_path, *words)
    with run.open():
        run.loop.run_rounds()
        results = finish(run.loop, RunFolder(tmp_path), config(tiny_root, *words), run.partition_hash)
    row = run.loop.history[results["kept_rounds"]["personal"]]
    assert results["personal"]["mean"] == row["test/personal/accuracy/mean"]
    assert results["metrics"]["personal"]["loss"]["mean"] == row["test/personal/loss/mean"]


def test_the_loop_needs_no_clients_of_its_own(tiny_root: Path, tmp_path: Path) -> None:
    """As at real sites: the executor brings the clients, the server has none."""
    run = federation(tiny_root, tmp_path / "plain", "loop.rounds=1")
    run.fit()
    other = federation(tiny_root, tmp_path / "sites", "loop.rounds=1")
    executor, setup = other.loop.executor, other.loop.executor.setup
    clients = other.clients
    executor.setup = lambda local, given: setup(local, clients)  # type: ignore[method-assign]
    other.loop.fit(other.module, ())
    assert_same(outcome(other), outcome(run))
    add_recorder(other)
