"""Split training at sites: the bits of one process, who holds what, and what goes wrong on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from fl_lightning.callback import FederatedCallback
from fl_lightning.client import ClientInfo
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import Federation, assemble
from fl_lightning.sites import messages
from fl_lightning.sites.dry_run import print_what_leaves
from fl_lightning.sites.executor import SitesExecutor
from fl_lightning.sites.frame import MessageError, decode_states, encode_states
from fl_lightning.sites.held import Store
from fl_lightning.sites.site import Site
from fl_lightning.sites.turn import Turn
from fl_lightning.split.body import ServerBody
from fl_lightning.split.executor import SplitServer
from fl_lightning.split.module import SplitModule
from tests import simulated_device
from tests.federations import assert_same, federation, outcome
from tests.simulated_device import calls, in_a_process_of_its_own
from tests.sites.federation import NAMES, at_sites
from tests.sites.test_bits import finished
from tests.split.halves import make_body, make_module

#: What happens to a message to a site: return None to lose it, and with it the site's process.
Fate = Callable[["Near", str, dict[str, Any]], Any]


class Near:
    """Brings requests to sites within this process, one after another, without a network; each may die at any of them.

    It takes the place of a service that listens; see :class:`fl_lightning.sites.service.Host`.
    """

    def __init__(self, root: Path, folder: Path, fate: Fate | None = None, *words: str) -> None:
        self.root, self.folder, self.fate = root, folder, fate
        self.words = words
        self.sites = {name: self.new(name) for name in NAMES}
        self.gone: set[str] = set()
        self.asked: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def data_of(self, name: str) -> Sequence[str]:
        return self.words or ["data=folder", f"data.root={self.root / name}.npz"]

    def new(self, name: str) -> Site:
        return Site(name, self.folder / name, self.data_of(name), trust=["tests"])

    @contextmanager
    def called(self) -> Iterator[None]:
        """Let the server find these sites."""
        find_data = SitesExecutor.find_data

        def found(executor: SitesExecutor, config: Any) -> Any:
            executor.host = self
            return find_data(executor, config)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SitesExecutor, "find_data", found)
            yield

    def gather(self) -> list[str]:
        return list(NAMES)

    def ask(self, site: str, request: bytes) -> Future[bytes]:
        future: Future[bytes] = Future()
        header, _ = decode_states(request)
        if self.fate is not None:
            self.fate(self, site, header)
        if site not in self.gone:
            answer = self.sites[site].answer(request)
            self.asked.append((site, header, decode_states(answer)[0]))
            future.set_result(answer)
        return future

    def silence(self, site: str) -> float:
        return 100.0 if site in self.gone else 0.0

    def release(self, site: str) -> None:
        raise AssertionError(self.sites[site].ended)

    def withdraw(self, site: str) -> None: ...
    def close(self) -> None: ...


def run_near(root: Path, folder: Path, *words: str, fate: Fate | None = None) -> tuple[Federation, Near]:
    """Run a tiny federation whose sites are in this process."""
    near = Near(root, folder / "sites", fate)
    with near.called():
        run = at_sites(root, folder / "server", 1, "seed=3", *words)
    run.fit()
    return run, near


def assert_bits(run: Federation, near: Near, serial: Federation) -> None:
    """Compare shared and personal tensors, history, account and what the callbacks remember."""
    found, expected = outcome(run), outcome(serial)
    found.pop("executor")
    clients = expected.pop("executor")["clients"]
    assert_same(found, expected)
    for number, name in enumerate(NAMES):
        held = Store(near.folder / name / f"run_{run.loop.executor.run_id}").held  # type: ignore[attr-defined]
        assert_same({"personal": held.personal, "memory": held.memory, "kept": held.kept}, clients[number])


def kill(name: str, at: int) -> Fate:
    """Let a site die when it is asked something for the n-th time in the midst of its work."""
    asked = 0

    def fate(near: Near, site: str, header: dict[str, Any]) -> None:
        nonlocal asked
        if site == name and header["kind"] == "exchange":
            asked += 1
            if asked == at:
                near.sites[name] = near.new(name)

    return fate


def tensors_of(site: Site) -> int:
    """Bytes of all tensors of a model that a site's process holds: its module's, and their initial values."""
    held = [*site.local.module.parameters(), *site.local.module.buffers(), *site.local.initial.values()]
    assert not any(tensor.is_meta for tensor in held)
    return sum(tensor.nbytes for tensor in held)


def test_a_site_holds_its_part_and_may_die_in_mid_turn(tiny_root: Path, tmp_path: Path) -> None:
    """Two cuts and alignment; bob dies after his body has moved, and his turn is repeated from where it began."""
    words = ("method=flexp_sfl", "split_policy=fixed", "module.end=0", "loop.rounds=1")
    serial = federation(tiny_root, tmp_path / "serial", "seed=3", *words)
    serial.fit()
    run, near = run_near(tiny_root, tmp_path, *words, fate=kill("bob", 5))
    assert_bits(run, near, serial)
    module, server = run.module, run.loop.callbacks["server"]
    assert isinstance(module, SplitModule)
    for client in run.loop.clients:
        held = set(module.parts(server.cuts[client.id]).client)
        own = sum(tensor.nbytes for name, tensor in module.state_dict().items() if name in held)
        assert tensors_of(near.sites[client.name]) == 2 * own
        assert set(near.sites[client.name].local.module.state_dict()) == held
    assert len({cut.at for cut in server.cuts.values()}) == 2
    assert [answer["kind"] for site, _, answer in near.asked if site == "bob"].count("need") == 4  # setup, anew, turn


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sl", "splitfed", "pfsl"])
def test_sites_start_from_a_trained_model(method: str, tiny_root: Path, tmp_path: Path) -> None:
    finished(federation(tiny_root, tmp_path / "first"), tiny_root, tmp_path / "first")
    words = (f"method={method}", "loop.rounds=1", f"init_from='{tmp_path / 'first'}'")
    serial = federation(tiny_root, tmp_path / "serial", "seed=3", *words)
    serial.fit()
    run, near = run_near(tiny_root, tmp_path, *words)
    assert_bits(run, near, serial)
    fresh = federation(tiny_root, tmp_path / "fresh", "seed=3", *words[:2])
    fresh.fit()
    assert fresh.loop.history[0]["fit/train_loss"] != run.loop.history[0]["fit/train_loss"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("method=pfsl", "data.unseen_clients=[cid]"),
        ("method=flexp_sfl", "data.unseen_clients=[cid]"),
        ("method=sl", "cohort.fraction=0.5", "local.validate=true"),
        ("method=splitfed", "trainer.precision=bf16-mixed"),
        ("method=flexp_sfl", "split_policy=fixed", "module.end=0", "callbacks.server.alignment.at=client",
         "trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_other_settings_have_the_bits_of_one_process(words: tuple[str, ...], tiny_root: Path, tmp_path: Path) -> None:
    words = (*words, "seed=3", "loop.rounds=1")
    expected = finished(federation(tiny_root, tmp_path / "serial", *words), tiny_root, tmp_path / "serial", *words)
    with Near(tiny_root, tmp_path / "sites").called():
        run = at_sites(tiny_root, tmp_path / "server", 1, *words)
    assert_same(finished(run, tiny_root, tmp_path / "server", *words), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_language_models_with_adapters_are_cut_at_sites(name: str, tmp_path: Path) -> None:
    """Frozen weights go to their holder once; what all layers use, such as rotary embeddings, stays with the client."""
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    from tests.split.test_transformers import CONFIGS, texts

    root = texts(tmp_path / "texts")
    data = ["data=texts", "data.prompt=prompt", "data.length=10", f"data.root={root}"]
    form = json.dumps({**CONFIGS[name], "model_type": name}).replace('"', "")
    words = [
        "method=flexp_sfl", "model=hf", "~model.config", f"+model.config={form}",
        "model.adapters={rank: 2, targets: attention}",
        "module.end=-2", "split_policy=fixed", "task=language", "data.batch_size=4", "loop.rounds=1", "logger=none",
        "dashboard=null", "callbacks.everyone.every=1",
    ]  # fmt: skip
    serial = assemble(plain(composed("train", [*words, *data])), RunFolder(tmp_path / "serial"))
    serial.fit()
    near = Near(root, tmp_path / "sites", None, *data)
    with near.called():
        own = ["executor=sites", "executor.sites=3", *words]
        run = assemble(plain(composed("train", own)), RunFolder(tmp_path / "server"))
    run.fit()
    assert_bits(run, near, serial)
    assert isinstance(run.module, SplitModule)
    for client in run.loop.clients:
        held = run.module.parts(run.loop.callbacks["server"].cuts[client.id]).client  # type: ignore[attr-defined]
        assert set(near.sites[client.name].local.module.state_dict()) == set(held)


class ReadsMetrics(FederatedCallback):
    """Reads what only Lightning's own loop has, at the end of an epoch: the fit is run again there."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen = dict(trainer.callback_metrics)


@pytest.mark.slow
def test_a_fit_that_is_run_again_begins_with_the_same_body(tiny_root: Path, tmp_path: Path) -> None:
    reads = "+callbacks.reads._target_=tests.sites.test_split.ReadsMetrics"
    words = ("method=sl", "loop.rounds=1", reads)
    serial = federation(tiny_root, tmp_path / "serial", "seed=3", *words, "local.engine=stock")
    serial.fit()
    run, near = run_near(tiny_root, tmp_path, *words)
    assert_bits(run, near, serial)
    begun = [answer for site, _, answer in near.asked if answer.get("batch") == 0]
    assert len(begun) == len(NAMES) + 3  # each site learns once that the lean loop does not do


@pytest.mark.slow
def test_who_was_lost_in_mid_turn_is_missed_and_leaves_no_trace(tiny_root: Path, tmp_path: Path) -> None:
    def fate(near: Near, site: str, header: dict[str, Any]) -> None:
        forward = sum(name == "cid" and asked["kind"] == "exchange" for name, asked, _ in near.asked)
        if site == "cid" and forward >= 3:
            near.gone.add("cid")

    skip = ("loop.on_client_error=skip", "method=sl", "callbacks.everyone=null", "evaluation.every=100")
    run, _ = run_near(tiny_root, tmp_path, *skip, "executor.on_missing=skip", fate=fate)
    alone = federation(tiny_root, tmp_path / "alone", "seed=3", *skip, "data.unseen_clients=[cid]")
    alone.fit()
    assert_same(run.loop.state, alone.loop.state)
    assert run.loop.callbacks["server"].results(run.loop)["split"]["missed_rounds"] == {"cid": [0, 1]}  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"cid has not been heard of for 50 s \(executor.give_up_after\); start"):
        run_near(tiny_root, tmp_path / "waits", "method=sl", "executor.give_up_after=50", fate=fate)


@pytest.mark.slow
def test_who_comes_late_joins_the_running_round(tiny_root: Path, tmp_path: Path) -> None:
    came: list[str] = []

    def fate(near: Near, site: str, header: dict[str, Any]) -> None:
        if header["kind"] == "fit":
            if not came and site == "ann":
                near.gone.add("ann")
            if site == "cid":
                near.gone.discard("ann")
            came.append(site)

    skip = ("loop.on_client_error=skip", "method=sl", "loop.rounds=1", "executor.on_missing=skip")
    run, near = run_near(tiny_root, tmp_path, *skip, "callbacks.everyone=null", fate=fate)
    assert [site for site, _, answer in near.asked if answer.get("batch") == 0] == ["bob", "cid", "ann"]
    assert run.loop.callbacks["server"].missed == {}  # type: ignore[attr-defined]


def new_turn(device: str = "cpu") -> Turn:
    """The server's half of a small vision transformer, cut in its middle."""
    module = make_module("vit")

    def new_body() -> ServerBody:
        return make_body(module, weight=0.25, guarded=True, device=device)

    return Turn(new_body, module.cut_at(2), [torch.Size([5, 16])] * len(module.blocks))


FINE = torch.zeros(2, 5, 16)
FORWARD = {"what": "forward", "batch": 0, "reach": "front"}


@pytest.mark.parametrize(
    ("header", "sent", "words"),
    [
        ({"what": "format the disk"}, {}, "may ask for forward, backward, evaluate in the midst"),
        (FORWARD, {"labels": FINE}, "may hold activation, base, got labels"),
        ({"what": "forward", "batch": 0, "reach": "all"}, {"activation": FINE}, "`reach` of a message must be one of"),
        ({"what": "forward", "batch": 1, "reach": "front"}, {"activation": FINE}, "batch 0 of its turn must be next"),
        ({"what": "forward", "batch": -1, "reach": "front"}, {"activation": FINE}, "must be a whole number"),
        (FORWARD, {}, "`activation` must be of shape .N, 5, 16., got none"),
        (FORWARD, {"activation": torch.zeros(())}, "got ..$"),
        (FORWARD, {"activation": FINE[:0]}, "got .0, 5, 16."),
        (FORWARD, {"activation": FINE[..., 1:]}, "got .2, 5, 15."),
        (FORWARD, {"activation": FINE.long()}, "got torch.int64"),
        (FORWARD, {"activation": FINE + torch.nan}, "holds NaN"),
        (FORWARD, {"activation": FINE, "base": FINE[:1]}, "have 2 examples"),
        ({"what": "backward"}, {"gradient": FINE}, "must follow an activation"),
        ({"what": "evaluate"}, {}, "`activation` must be of shape"),
    ],
)  # fmt: skip
def test_what_does_not_belong_to_a_turn_is_refused(header: Any, sent: dict[str, Tensor], words: str) -> None:
    turn = new_turn()
    with pytest.raises(MessageError, match=words):
        turn.answer(header, sent)


def test_a_gradient_that_would_spoil_the_body_is_refused() -> None:
    turn = new_turn()
    before = turn.body.state()
    for scale, gradient, words in (
        (1.0, FINE[:1], r"must be torch.float32 \(2, 5, 16\), got torch.float32 \(1, 5, 16\)"),
        (1.0, FINE.double(), "got torch.float64"),
        (1.0, FINE + torch.inf, "its gradient holds NaN or an infinity"),
        (1.0, FINE + 3e38, "would move the body to NaN or an infinity"),
        (0.0, FINE, "`scale` of a message must be a number above 0"),
    ):
        output = turn.answer(FORWARD, {"activation": torch.randn(2, 5, 16)})["output"]
        assert output.shape == FINE.shape
        with pytest.raises(MessageError, match=words):
            turn.answer({"what": "backward", "scale": scale}, {"gradient": gradient})
        assert_same(turn.body.state(), before)
    turn.answer(FORWARD, {"activation": torch.randn(2, 5, 16)})
    down = turn.answer({"what": "backward", "scale": 1.0}, {"gradient": torch.ones(2, 5, 16)})["gradient"]
    assert down.shape == FINE.shape
    assert not torch.equal(turn.body.state()["backbone.blocks.1.attn.qkv.weight"], before["backbone.blocks.1.attn.qkv.weight"])  # fmt: skip  # noqa: E501


def test_the_server_computes_where_its_body_is() -> None:
    assert new_turn("meta").answer(FORWARD, {"activation": FINE})["output"].is_meta


def test_a_site_without_work_wants_the_turn_from_its_beginning(tiny_root: Path, tmp_path: Path) -> None:
    site = Site("ann", tmp_path, ["data=folder", f"data.root={tiny_root / 'ann.npz'}"])
    answer, _ = decode_states(site.answer(encode_states({"kind": "exchange", "ticket": "x"}, {})))
    assert answer == {"kind": "need", "what": ["turn"]}


@pytest.mark.every
def test_a_site_is_cut_by_what_it_declares(tiny_root: Path, tmp_path: Path) -> None:
    """Ann is too slow for all but the earliest cut, bob holds and computes anything, cid has a profile."""
    near = Near(tiny_root, tmp_path / "sites")
    for name, device in {"ann": {"flops_per_second": 1.0}, "bob": {"flops_per_second": 1e15, "memory": 1e12}}.items():
        near.sites[name] = Site(name, tmp_path / name, near.data_of(name), trust=["tests"], device=device)
    slow = (
        "callbacks.server.profiles=[{flops_per_second: 1.0e+15},{flops_per_second: 1.0, memory: 1.0},{memory: 1.0e+12}]"
    )
    words = ("method=flexp_sfl", "module.end=0", "loop.rounds=0", "callbacks.everyone=null", slow)
    with near.called():
        run = at_sites(tiny_root, tmp_path / "server", 1, *words)
    run.fit()
    server = run.loop.callbacks["server"]
    assert isinstance(server, SplitServer)
    found = server.results(run.loop)["split"]
    assert [server._profile_of[number].memory for number in range(3)] == [float("inf"), 1e12, 1e12]
    last = run.module.end - 1  # type: ignore[operator]
    assert found["cuts"] == {"ann": 1, "bob": last, "cid": last}
    assert last > 1
    assert found["declared"] == {"ann": {"flops_per_second": 1.0}, "bob": {"flops_per_second": 1e15, "memory": 1e12}}


@pytest.mark.parametrize("device", [{"memory": -1.0}, {"memory": "much"}, {"disk": 1.0}, [1.0]])
def test_a_device_that_is_none_is_refused(device: Any) -> None:
    own = ClientInfo(0, "ann", 1, 1, 1)
    header, states = messages.described(own)
    assert "device" not in header
    with pytest.raises(MessageError, match="number above 0|may hold"):
        messages.read_info({**header, "device": device}, states, "ann")


@pytest.mark.slow
def test_a_dry_run_says_what_leaves_with_a_batch(tiny_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cuts = ["split_policy=fixed", "callbacks.server.policy.cuts=[2]", "module.end=0"]
    words = [f"data.root={tiny_root / 'ann.npz'}", "method=flexp_sfl", "model=lenet5", "data=folder", *cuts]
    print_what_leaves("ann", [*words, "model._target_=tests.federations.tiny_model"], {"memory": 2e9})
    said = capsys.readouterr().out
    assert "  0 bytes of tensors" in said
    assert "'device': {'memory': 2000000000.0}" in said
    assert "activation  float32 (N, 4, 4, 4)\n  gradient  float32 (N, 16)\n  base  float32 (N, 4, 4, 4)" in said


def on_the_device(root: Path, folder: Path) -> None:
    words = ("method=flexp_sfl", "split_policy=fixed", "module.end=0", "loop.rounds=1")
    serial = federation(root, folder / "serial", "seed=3", *words)
    serial.fit()
    assert not calls
    run, near = run_near(root, folder, *words, f"trainer.accelerator={simulated_device.NAME}")
    assert run.loop.local.device.type == simulated_device.NAME
    assert calls["aten::convolution"] > 10
    assert near.sites["ann"].local.device.type == "cpu"
    assert_bits(run, near, serial)


@pytest.mark.slow
@pytest.mark.skipif(not simulated_device.is_possible(), reason=f"torch {torch.__version__} has no backends in Python")
def test_the_server_computes_on_the_trainers_device(tiny_root: Path, tmp_path: Path) -> None:
    in_a_process_of_its_own(on_the_device, tiny_root, tmp_path)
