"""Split training through the federated loop: degenerate cases, accounts, and what is refused."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from fl_lightning import files
from fl_lightning.callback import FederatedCallback
from fl_lightning.client import Broadcast, Client, ClientInfo, Update
from fl_lightning.fit.local import Fit
from fl_lightning.run import training
from fl_lightning.run.config import CONF, plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import assemble
from fl_lightning.seeding import derive_seed
from fl_lightning.split.aggregators import EdgeAggregator
from fl_lightning.split.cost import batch_bytes
from fl_lightning.split.executor import SplitExecutor, SplitServer
from fl_lightning.split.module import SplitModule
from fl_lightning.state import num_bytes
from tests.federations import Federation, assert_same, federation, tiny, tiny_model
from tests.split.halves import make_module


def train(tiny_root: Path, folder: Path, method: str, *overrides: str) -> Federation:
    run = federation(tiny_root, folder, f"method={method}", "seed=3", *overrides)
    run.fit()
    return run


def personal_models(run: Federation) -> list[dict[str, torch.Tensor]]:
    """All tensors of every client's personal model."""
    loop = run.loop
    return [one.model for one in loop.score([(c, loop.personal_exam(c, "test", fetch=True)) for c in loop.clients])]


def test_splitfed_is_fedavg_to_the_bit(tiny_root: Path, tmp_path: Path) -> None:
    split = train(tiny_root, tmp_path / "split", "splitfed")
    plain = train(tiny_root, tmp_path / "plain", "fedavg", "optimizer=adam")
    assert_same(split.loop.state, plain.loop.state)


def test_flexp_sfl_with_equal_cuts_and_no_alignment_is_split_learning(tiny_root: Path, tmp_path: Path) -> None:
    plain = train(tiny_root, tmp_path / "sl", "sl")
    flexible = train(
        tiny_root,
        tmp_path / "flexp",
        "flexp_sfl",
        "split_policy=fixed",
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


def test_clients_report_their_own_memory_and_speed(tiny_root: Path, tmp_path: Path) -> None:
    given = ["loop.rounds=0", "callbacks.server.measure=true", "callbacks.everyone=null"]
    run = train(tiny_root, tmp_path / "run", "flexp_sfl", *given)
    with run.open():
        server = run.loop.callbacks["server"]
        found = server.results(run.loop)["split"]["measured"]
    assert found.keys() == {client.name for client in run.clients}
    assert all(device["memory"] > 1e6 and device["flops_per_second"] > 1e6 for device in found.values())
    assert server._profile_of[run.clients[0].id].up == server.profiles[0].up  # links are not measured
    assert run.loop.bytes_down == 0


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
    assert kept.loop.callbacks["server"].optimizers["body"]
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
        (["executor=processes", "executor.workers=1"], "executor=split or sites, got ProcessExecutor"),
        (["callbacks.server.in_turn=false"], "callbacks.server.in_turn=true, or executor=serial"),
        (["~module", "+module._target_=fl_lightning.module.FederatedModule"], "needs a SplitModule"),
        (["module.start=0"], "1 <= start"),
        (["split_policy=fixed", "callbacks.server.policy.cuts=[5]"], "got start 1, cut 5, end 2"),
        (["module.lr_factors={middle: 1}"], "lr_factors must be one of base, top, tail, head"),
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


def test_pfsl_keeps_the_front_and_personalises_only_heads(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "pfsl")
    module, initial = run.module, run.loop.local.initial
    held = module.parts(module.cut_at(1))
    assert not set(held.base) & run.loop.state.keys()
    complete = run.loop.global_state()
    assert all(torch.equal(complete[name], initial[name]) for name in held.base)
    models = personal_models(run)
    for name in initial:
        same = all(torch.equal(model[name], models[0][name]) for model in models)
        assert same == (name not in held.head), name


@pytest.mark.parametrize("method", ["pfsl", pytest.param("phsfl", marks=pytest.mark.every)])
def test_last_personal_stage_is_in_the_account(method: str, tiny_root: Path, tmp_path: Path) -> None:
    """It sends activations up and down for every batch of every epoch, no gradient, and is counted once."""
    run = train(tiny_root, tmp_path / "run", method, "callbacks.final.epochs=3")
    loop, server = run.loop, run.loop.callbacks["server"]
    for _ in range(2):  # the last and the kept models; the models of a state are trained once
        personal_models(run)
        loop.state = dict(loop.state)
    sizes = {client.id: [len(y) for _, y in client.data.train_dataloader()] for client in run.clients}
    profile = server.latency.model.blocks
    examples = sum(sum(some) for some in sizes.values())  # the client keeps what came down in the first epoch
    up, down = (sum(row[f"traffic/bytes_{way}"] for row in loop.history) for way in ("up", "down"))
    assert loop.bytes_up - up == examples * profile[0].out_bytes
    assert loop.bytes_down - down == examples * profile[-1].out_bytes
    result = loop.callbacks["final"].results(loop)["personal_stage"]
    assert result["bytes"]["gradient_up"] == result["bytes"]["gradient_down"] == 0
    model = server.latency.model
    flops = model.flops(server.cuts[0].end, len(model.blocks)) + model.head.flops
    slowest = max(
        sum(server.latency.batch(server.cuts[i], server.profiles[i], size, "tail").total for size in some)
        + 2 * 3 * sum(some) * flops / server.profiles[i].flops_per_second
        for i, some in sizes.items()
    )
    assert slowest <= result["simulated_seconds"] < 1.05 * slowest


def test_frozen_front_is_sent_no_gradient_and_waits_for_none(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "pfsl", "callbacks.server.schedule=sequential")
    server = run.loop.callbacks["server"]
    up = down = seconds = 0
    for client in run.clients:
        for size in [len(y) for _, y in client.data.train_dataloader()]:
            cut, device = server.cuts[client.id], server.profiles[client.id]
            formula = batch_bytes(cut, server.latency.model, size, None, "body")
            up, down = up + 2 * formula.up, down + 2 * formula.down
            seconds += 2 * server.latency.batch(cut, device, size, "body").total
            head = 2 * sum(run.module.state_dict()[name].nbytes for name in ("head.weight", "head.bias"))
        seconds += head / device.up + head / device.down
    assert (server.traffic.up, server.traffic.down) == (up, down)
    assert server.simulated_seconds == pytest.approx(seconds)


def test_pfsl_with_one_client_averages_nothing(tiny_root: Path, tmp_path: Path) -> None:
    alone = "data.unseen_clients=[bob, cid]"
    averaged = train(tiny_root, tmp_path / "averaged", "pfsl", alone)
    copy = train(tiny_root, tmp_path / "copy", "pfsl", alone, "executor=split", "callbacks.server.in_turn=true")
    assert_same(averaged.loop.state, copy.loop.state)


def test_phsfl_never_moves_the_head_before_the_end(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "phsfl")
    initial, head = run.loop.local.initial, ("head.weight", "head.bias")
    assert not set(head) & run.loop.state.keys()
    models = personal_models(run)
    for name in head:
        assert not any(torch.equal(model[name], initial[name]) for model in models)
        assert not torch.equal(models[0][name], models[1][name])
    assert all(torch.equal(models[0][name], models[2][name]) for name in initial if name not in head)


def test_personal_models_of_client_and_body_are_exported(tiny_root: Path, tmp_path: Path) -> None:
    """A plain model loads each file strictly, and scores what the results say of it."""
    words = [*tiny(tiny_root), "method=flexp_sfl", "evaluation.save_personal=true", "logger=none", "dashboard=null"]
    results = training.run(composed("train", words), tmp_path / "run")
    model = tiny_model(3)
    whole = model.backbone.eval()
    whole.add_module("head", model.head)
    clients = {client.name: client for client in federation(tiny_root, tmp_path / "again").clients}
    for entry in results["clients"]:
        whole.load_state_dict(files.read_tensors(tmp_path / "run" / "personal_models" / f"{entry['name']}.pt"))
        x, y = next(iter(clients[entry["name"]].data.test_dataloader()))
        with torch.no_grad():
            assert (whole(x).argmax(1) == y).float().mean().item() == pytest.approx(entry["personal"])


def test_relayed_ends_are_one_model_that_goes_round(tiny_root: Path, tmp_path: Path) -> None:
    """As plain SGD over the clients' batches, one client after another; the ends' bytes are counted both ways."""
    given = [
        "callbacks.server.relay=true", "sharing.shared=['*']", "callbacks.client_optimizer=null", "optimizer=sgd",
        "optimizer.momentum=0", "+model.batch_norm=false", "module.end=0",
    ]  # fmt: skip
    run = train(tiny_root, tmp_path / "run", "sl", *given)
    loop, server = run.loop, run.loop.callbacks["server"]
    whole = make_tiny_module(run.module, loop.local.initial)
    optimizer = torch.optim.SGD(whole.parameters(), lr=loop.local.optimizer.keywords["lr"])
    for number in range(loop.round):
        for client in run.clients:
            client.data.seed(derive_seed(3, "batches", number, client.id))
            for x, y in client.data.train_dataloader():
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(whole(x), y).backward()
                optimizer.step()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(loop.state[name], tensor, rtol=1e-4, atol=1e-6)
    ends = sum(num_bytes({n: loop.state[n]}) for n in run.module.parts(server.cuts[0]).client)
    assert loop.bytes_up == server.traffic.up + len(run.clients) * loop.round * ends
    with pytest.raises(ValueError, match="relay=true hands the clients' part on, which takes one cut"):
        train(tiny_root, tmp_path / "other", "sl", "callbacks.server.relay=true")


def make_tiny_module(module: SplitModule, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    whole = copy.deepcopy(torch.nn.Sequential(OrderedDict(backbone=module.backbone, head=module.head)))
    whole.requires_grad_(True)
    whole.load_state_dict(state)
    return whole.train()


def test_bytes_between_edges_and_cloud_are_counted(tiny_root: Path, tmp_path: Path) -> None:
    run = train(tiny_root, tmp_path / "run", "phsfl", "loop.rounds=3")
    found = run.loop.callbacks["server"].results(run.loop)["split"]["bytes"]
    once = 2 * num_bytes(run.loop.state)  # two edge servers, of three rounds one ends at the cloud
    assert found["edges_to_cloud"] == found["cloud_to_edges"] == once
    assert run.loop.history[-1]["split/edges_to_cloud"] == once


def update(client: int, value: float, examples: int) -> Update:
    return Update(client, examples, {"w": torch.full((2,), value)})


def test_two_levels_by_hand() -> None:
    aggregator = EdgeAggregator(edges=2, cloud_every=2)
    start = {"w": torch.zeros(2)}
    clients = [SimpleNamespace(id=number) for number in range(4)]
    first = aggregator.aggregate(start, [update(0, 1.0, 1), update(1, 4.0, 2), update(2, 3.0, 3)])
    # edge 0 has clients 0 and 2: (1 + 9) / 4 = 2.5; edge 1 has client 1: 4; the cloud would be (4 * 2.5 + 2 * 4) / 6
    assert first["w"][0].item() == pytest.approx(3.0)
    assert [aggregator.broadcast(first, client)["w"][0].item() for client in clients] == [2.5, 4.0, 2.5, 4.0]
    resumed = EdgeAggregator(edges=2, cloud_every=2)
    resumed.load_state_dict(aggregator.state_dict())
    second = resumed.aggregate(first, [update(0, 10.0, 4)])
    assert second["w"][0].item() == pytest.approx((4 * 10 + 2 * 4) / 6)
    assert [resumed.broadcast(second, client)["w"][0].item() for client in clients] == [second["w"][0].item()] * 4


@pytest.mark.parametrize("settings", [{"edges": 1, "cloud_every": 5}, {"edges": 3, "cloud_every": 1}])
def test_two_levels_degenerate_to_fedavg(settings: dict[str, int], tiny_root: Path, tmp_path: Path) -> None:
    overrides = [f"aggregator.{key}={value}" for key, value in settings.items()]
    levels = train(
        tiny_root, tmp_path / "levels", "splitfed", "aggregator._target_=fl_lightning.split.aggregators.EdgeAggregator",
        *(f"+{override}" for override in overrides),
    )  # fmt: skip
    plain = train(tiny_root, tmp_path / "plain", "fedavg", "optimizer=adam")
    for name, tensor in plain.loop.state.items():
        torch.testing.assert_close(levels.loop.state[name], tensor, rtol=1e-4, atol=1e-5)


def test_device_clock_by_hand(tiny_root: Path, tmp_path: Path) -> None:
    clock = (
        "+callbacks.clock={_target_: fl_lightning.split.device_clock.DeviceClock, "
        "profiles: [{flops_per_second: 1e6, up: 1e3, down: 2e3}, {flops_per_second: 5e5, up: 1e4, down: 1e4}]}"
    )
    run = train(tiny_root, tmp_path / "run", "fedavg", clock, "trainer.max_epochs=2")
    size = sum(tensor.numel() * tensor.element_size() for tensor in run.loop.state.values())
    flops = 2 * (4 * 4 * 4 * 3 * 9) + 2 * (2 * 2 * 4 * 4 * 9) + 2 * 16 * 3  # two convolutions and the head
    devices = [(1e6, 1e3, 2e3), (5e5, 1e4, 1e4)]
    rounds = [
        size / down + size / up + 3 * flops * 2 * client.num_examples / speed
        for client, (speed, up, down) in zip(run.clients, [devices[0], devices[1], devices[0]], strict=True)
    ]
    assert run.loop.callbacks["clock"].results(run.loop)["simulated_seconds"] == pytest.approx(2 * max(rounds))


@pytest.mark.parametrize("model", ["gpt_tiny", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_language_model_on_texts(model: str, tmp_path: Path) -> None:
    """Clients whose texts follow different rules; GPT-2 is tied, so both ends stay at the client."""
    if model == "gpt2":
        pytest.importorskip("transformers", reason="the extra `text` is not installed")
    root = tmp_path / "texts"
    root.mkdir()
    for name, letters in {"ann": "abcdefgh", "bob": "hgfedcba", "cid": "acegbdfh"}.items():
        (root / f"{name}.txt").write_text(letters * 40)
    sizes = ["model.width=16", "model.depth=3"]
    if model == "gpt2":
        sizes = ["model.config.n_embd=16", "model.config.n_layer=3", "loop.rounds=8"]
    overrides = [
        "data=tokens", f"data.root={root}", "data.length=6", f"model={model}",
        "method=flexp_sfl", "loop.rounds=3", "trainer.max_epochs=2", "optimizer.lr=0.01", "logger=none",
        "dashboard=null", "data.batch_size=4", "split_policy=fixed", *sizes,
    ]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = plain(compose("train", overrides))
    run = assemble(config, RunFolder(tmp_path / "run"))
    run.fit()
    server = run.loop.callbacks["server"]
    assert [server.cuts[client.id].at for client in run.clients] == [1, 2, 3]
    first, last = run.loop.history[0], run.loop.history[-1]
    assert last["fit/train_loss"] < first["fit/train_loss"] / 2
    assert last["personal_on/own"] > last["personal_on/everyone"]  # each text has a rule of its own


@pytest.mark.every
@pytest.mark.parametrize("method", ["splitfed", "pfsl"])
def test_bodies_of_their_own_train_in_any_process(method: str, tiny_root: Path, tmp_path: Path) -> None:
    """The body comes with the message, so processes end with the bits and the account of one."""
    one = train(tiny_root, tmp_path / "one", method)
    many = train(tiny_root, tmp_path / "many", method, "executor=processes", "executor.workers=2")
    assert_same(one.loop.state, many.loop.state)
    models = [personal_models(run) for run in (one, many)]
    for first, second in zip(*models, strict=True):
        assert_same(first, second)
    assert (one.loop.bytes_up, one.loop.bytes_down) == (many.loop.bytes_up, many.loop.bytes_down)
    results = [{key: c.results(run.loop) for key, c in run.loop.callbacks.items()} for run in (one, many)]
    assert results[0] == results[1]


def test_body_goes_from_client_to_client_but_for_what_is_not_finite() -> None:
    class AddsOne:
        def answer(self, client: Client, message: Broadcast) -> Fit:
            own = torch.tensor(math.nan) if client.id == 1 else torch.zeros(())
            here = {
                "w": message.here.get("w", message.here.get("copy/w")) + 1,
                "optimizer/w|step": torch.tensor(client.id),
            }
            return Fit(Update(client.id, 1, {}, here=here), {"head": own}, {})

    executor = SplitExecutor()
    infos = [ClientInfo(number, str(number), 1, 1, 1) for number in range(4)]
    executor.setup(AddsOne(), [Client(number, SimpleNamespace()) for number in range(4)])
    names = ["w", "w", "copy/w", "w"]  # the third client has a private `w`, and is given the server's beside it
    for _ in range(2):  # a round begins with what the server sends, not with what the last one left
        messages = [Broadcast(0, {}, here={name: torch.zeros(())}) for name in names]
        list(executor.run(zip(infos, messages, strict=True)))
        found = [message.here[name].item() for message, name in zip(messages, names, strict=True)]
        assert found == [0, 1, 1, 2]
        assert [message.here.get("optimizer/w|step") for message in messages] == [None, 0, 0, 2]


class ReadsMetrics(FederatedCallback):
    """Reads what only Lightning's own loop has, at the end of an epoch: the fit is run again there."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen = dict(trainer.callback_metrics)


def test_fit_that_is_run_again_trains_the_body_once(tiny_root: Path, tmp_path: Path) -> None:
    runs = []
    for engine in ("stock", "auto"):
        run = federation(tiny_root, tmp_path / engine, "method=sl", "seed=3", f"local.engine={engine}", "loop.rounds=1")
        run.loop.add_callback("reads", ReadsMetrics())
        run.fit()
        runs.append(run)
    assert_same(runs[0].loop.state, runs[1].loop.state)
    assert runs[0].loop.bytes_up == runs[1].loop.bytes_up


class FailingClient(FederatedCallback):
    """Lets one client fail in the middle of its fit."""

    def __init__(self, client_id: int) -> None:
        self.client_id = client_id

    def on_client_start(self, client: Any, module: Any, broadcast: Any) -> None:
        self.failing = client.id == self.client_id

    def on_train_batch_end(self, *_: Any) -> None:
        if self.failing:
            raise OSError("the battery is empty")


def test_client_that_fails_in_mid_fit_leaves_the_body_as_it_found_it(tiny_root: Path, tmp_path: Path) -> None:
    states = []
    for number, overrides in enumerate(([], ["data.unseen_clients=[cid]"])):
        run = federation(
            tiny_root, tmp_path / str(number), "method=sl", "seed=3", "loop.on_client_error=skip", *overrides
        )
        callback = FailingClient(2)
        callback.name = "failing"
        run.loop.callbacks["failing"] = callback
        run.fit()
        assert run.module.exchange is None
        states.append(run.loop.state)
    assert_same(states[0], states[1])
