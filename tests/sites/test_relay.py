"""Sites behind another framework have the bits of the simulation, whatever the framework loses on the way."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import pytest

from fl_lightning.sites import relay
from fl_lightning.sites.held import Store
from fl_lightning.sites.process import read_token, serve_hosted
from fl_lightning.sites.relay import UNKNOWN, WORKING, Door, carried_by, knock, run_command
from tests.federations import add_recorder, assert_same, by_name, federation, outcome
from tests.scripts import call
from tests.sites.federation import NAMES, LockedSite
from tests.sites.test_personalization import QUICK, table, without_seconds


class Lossy:
    """Carries messages within this process; loses every third one, and every fourth answer."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.sent = folder, 0, 0

    def names(self) -> list[str]:
        return list(NAMES)

    def carry(self, site: str, message: bytes) -> bytes:
        self.calls += 1
        if self.calls % 3 == 0:
            raise OSError("lost")
        self.sent += len(message)
        answer = knock(site, self.folder / site, message)
        if self.calls % 4 == 0:
            raise OSError("its answer is lost")
        return answer


class Life:
    """A site's process, as a thread: its state is what is in its folder, so it can be ended and begun again."""

    def __init__(self, root: Path, folder: Path, name: str) -> None:
        data = ["data=folder", f"data.root={root / name}.npz"]
        self.site = LockedSite(name, folder / name, data, trust=["tests"])
        self.door = Door(name, folder / name, read_token(folder / name))
        self.thread = threading.Thread(target=quietly, args=(self.site, self.door), daemon=True)
        self.thread.start()

    def end(self) -> None:
        self.door.close()
        self.thread.join(10.0)
        assert not self.thread.is_alive()


@contextmanager
def doors(root: Path, folder: Path) -> Iterator[dict[str, Life]]:
    lives = {name: Life(root, folder, name) for name in NAMES}
    try:
        yield lives
    finally:
        for life in lives.values():
            life.end()


def quietly(site: LockedSite, door: Door) -> None:
    with pytest.raises((EOFError, ValueError)):
        serve_hosted(site, door)


@pytest.mark.parametrize(
    "method",
    ["scaffold", *(pytest.param(method, marks=pytest.mark.slow) for method in ("fedper", "splitfed", "flexp_sfl"))],
)
def test_what_is_lost_on_the_way_changes_no_bit(
    method: str, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages and answers are lost, and a site is started anew in the midst of it; the middle of a model may cross."""
    monkeypatch.setattr(relay, "PAUSE", 0.0)
    words = [*by_name(method), "loop.rounds=2"]
    serial = federation(tiny_root, tmp_path / "serial", *words)
    serial.fit()
    expected = outcome(serial)
    with doors(tiny_root, tmp_path / "sites") as lives, carried_by(carrier := Lossy(tmp_path / "sites")):
        own = ["executor=hosted", "executor.sites=3", "data.classes=3"]
        run = federation(tiny_root / "nothing", tmp_path / "server", *own, *words)

        def start_anew(loop: Any) -> None:
            if loop.round == 1:
                lives["bob"].end()
                lives["bob"] = Life(tiny_root, tmp_path / "sites", "bob")

        add_recorder(run).on_round_end = start_anew  # type: ignore[method-assign]
        with run.open():
            run.loop.run_rounds()
            found = outcome(run)
        run.loop.executor.disconnect()
    assert carrier.calls > 20
    assert_same(
        {key: value for key, value in found.items() if key != "executor"},
        {key: value for key, value in expected.items() if key != "executor"},
    )
    for name, client in zip(NAMES, serial.clients, strict=True):
        held = Store(tmp_path / "sites" / name / f"run_{run.loop.executor.run_id}").held  # type: ignore[attr-defined]
        assert_same((held.personal, held.memory), (client.personal, client.memory))


@pytest.mark.slow
def test_a_model_is_fine_tuned_through_a_host(tiny_root: Path, tmp_path: Path) -> None:
    """Fine-tuned models travel, and the matrix of all clients' scores is that of one process."""
    quiet = ["logger=none", "trust=[tests]", *QUICK]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model", "data.classes=3"]
    training = [*model, "data.batch_size=8", "loop.rounds=1", "dashboard=null", "logger=none"]
    ways = {
        "one": (["executor=serial"], ["data=folder", f"data.root={tiny_root}"]),
        "host": (["executor=hosted", "executor.sites=3"], []),
    }
    with doors(tiny_root, tmp_path / "sites"), carried_by(Lossy(tmp_path / "sites")):
        for name, (at, data) in ways.items():
            run = tmp_path / name
            assert call("train", *at, *data, *training, f"hydra.run.dir={run}") == 0
            assert call("personalize", f"checkpoint={run}", *at, *quiet, f"hydra.run.dir={run}_personal") == 0
    found, expected = (without_seconds(table(tmp_path / f"{name}_personal")) for name in ("host", "one"))
    assert_same(found, expected)


def test_a_request_is_done_once_and_asked_after_by_its_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "POLL", 0.05)
    door = Door("ann", tmp_path, read_token(tmp_path))
    request, digest = b"r" * 40, relay.hashlib.sha256(b"r" * 40).digest()
    try:
        assert knock("ann", tmp_path, digest) == UNKNOWN
        assert knock("ann", tmp_path, request) == WORKING
        assert door.next() == request[relay.MARK :]
        assert knock("ann", tmp_path, b"another" * 9) == WORKING, "one at a time"
        door.answer(b"done")
        assert [knock("ann", tmp_path, one) for one in (digest, request)] == [b"done"] * 2
        assert knock("ann", tmp_path, b"another" * 9) == WORKING
        assert door.next() == (b"another" * 9)[relay.MARK :]
        assert knock("ann", tmp_path, request) == WORKING, "it is late"
        door.answer(b"done, too")
        assert knock("ann", tmp_path, request) == WORKING
        assert knock("ann", tmp_path, b"another" * 9) == b"done, too"
    finally:
        door.close()


def test_a_door_opens_to_who_knows_the_token_and_the_name(tmp_path: Path) -> None:
    door = Door("ann", tmp_path, read_token(tmp_path))
    try:
        port = int((tmp_path / "door").read_text().split()[1])
        with pytest.raises(AuthenticationError):
            Client(("127.0.0.1", port), authkey=b"guessed")
        silent = socket.create_connection(("127.0.0.1", port))
        with pytest.raises(PermissionError, match="is ann, not bob; give both one name"):
            knock("bob", tmp_path, b"?")
        assert knock("ann", tmp_path, b"0" * 32) == UNKNOWN, "who failed and who says nothing did no harm"
        silent.close()
    finally:
        door.close()
    with pytest.raises(ConnectionError, match="site ann is not up .*; start it: python -m fl_lightning.site --hosted"):
        knock("ann", tmp_path, b"?")


def test_a_host_that_is_not_there_is_named(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="executor=hosted must be started by NVFlare or Flower"):
        federation(tiny_root, tmp_path, "executor=hosted")
    carrier = Lossy(tmp_path)
    with carried_by(carrier), pytest.raises(ValueError, match="executor.patience must be at least 15"):
        federation(tiny_root, tmp_path, "executor=hosted", "executor.patience=1")
    for command in ("rm -r /", "train.py method=fedper", "study.py executor=hosted"):
        with pytest.raises(ValueError, match="the command must be train.py or personalize.py with executor=hosted"):
            run_command(command, carrier)
    assert relay.Relay.carrier is None


def test_a_site_that_does_not_answer_is_missing_after_a_while(tmp_path: Path) -> None:
    with carried_by(Lossy(tmp_path)):
        host = relay.Relay(["ann"], 60.0)
    assert host.gather() == ["ann"]
    answer = host.ask("ann", b"r" * 40)
    time.sleep(0.05)
    assert 0.05 <= host.silence("ann") < 10
    assert not answer.done()
    host.close()
