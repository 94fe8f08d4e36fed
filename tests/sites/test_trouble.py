"""What goes wrong between a server and its sites ends in one sentence at the side that can act, and nothing hangs."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fl_lightning
from fl_lightning import files
from fl_lightning.client import Broadcast, Exam
from fl_lightning.evaluation.results import read_json
from fl_lightning.sites import process, service
from fl_lightning.sites.executor import SitesExecutor
from fl_lightning.sites.frame import MessageError, decode, decode_states, encode, encode_states
from fl_lightning.sites.held import LostError, Store
from fl_lightning.sites.service import SERVICE, SiteService, token_digest
from fl_lightning.sites.site import Site
from fl_lightning.sites.wire import Line, channel_credentials, read_pems, server_credentials
from fl_lightning.state import same
from tests.federations import add_recorder, assert_same, federation, outcome
from tests.scripts import call
from tests.sites.federation import NAMES, SiteThread, at_sites, free_port, run_at_sites, sites

VERSION = fl_lightning.__version__


def join(line: Line, name: str, token: str = "t", version: str = VERSION) -> str:
    answer, _ = line.call("Join", encode({"name": name, "token": token, "version": version}))
    return str(decode(answer)[0]["session"])


def words_of(line: Line, message: bytes) -> str:
    """What a server says to somebody who joins with some bytes; empty if they are right."""
    try:
        line.call("Join", message)
    except (ValueError, PermissionError) as error:
        return str(error)
    return ""


@pytest.fixture
def hosted() -> Iterator[Callable[..., tuple[SiteService, Line]]]:
    """Start services that listen on the loopback; each comes with a line to it."""
    made: list[Any] = []

    def make(sites: Any, credentials: Any = None, **options: Any) -> tuple[SiteService, Line]:
        host = SiteService("127.0.0.1:0", sites, credentials, **options)
        line = Line(f"127.0.0.1:{host.port}", SERVICE, timeout=20.0, patience=0.0)
        made.extend((line, host))
        return host, line

    yield make
    for one in made:
        one.close()


def test_who_may_speak_for_a_site(hosted: Callable[..., tuple[SiteService, Line]]) -> None:
    _, line = hosted(["ann", "bob"])
    first = join(line, "ann")
    for name, token, version, words in (
        ("eve", "t", VERSION, "no site 'eve' is expected; these are: ann, bob"),
        ("ann", "u", VERSION, "a site named 'ann' is known with another token; start it with the --folder it had"),
        ("bob", "t", "0.1", f"the server runs fl_lightning {VERSION}, the site 0.1; install one version"),
    ):
        with pytest.raises(PermissionError, match=words):
            join(line, name, token, version)
    second = join(line, "ann")
    assert first != second
    with pytest.raises(PermissionError, match="another process has taken the place of this one as site ann"):
        line.call("Next", b"", {"session": first, "ticket": "0"})
    with pytest.raises(LookupError, match="this session is not known; join again"):
        line.call("Next", b"", {"session": "of another server", "ticket": "0"})
    _, counted = hosted(1)
    join(counted, "zoe")
    with pytest.raises(PermissionError, match="all 1 places are taken, by zoe; raise executor.sites at the server"):
        join(counted, "ann")
    _, listed = hosted({"ann": token_digest("right")})
    join(listed, "ann", "right")
    with pytest.raises(PermissionError, match="known with another token"):
        join(listed, "ann", "wrong")


def test_answers_that_come_twice_late_or_for_an_older_request_are_of_no_use(hosted: Any) -> None:
    host, line = hosted(1)
    session = join(line, "ann")

    def next_(answer: bytes = b"", ticket: int = 0) -> tuple[bytes, int]:
        request, notes = line.call("Next", answer, {"session": session, "ticket": str(ticket), "last": "yes"})
        return request, int(notes["ticket"])

    first = host.ask("ann", b"one")
    assert next_() == next_() == (b"one", 1)  # asked twice, as after an answer that was lost
    assert next_(b"1", 1) == (b"", 0)
    assert next_(b"again", 1) == (b"", 0)
    assert first.result() == b"1"
    second = host.ask("ann", b"two")
    assert next_(b"old", 1) == (b"two", 2)
    assert not second.done()
    host.withdraw("ann")
    assert next_(b"late", 2) == (b"", 0)
    assert not second.done()
    third = host.ask("ann", b"three")
    next_(b"2", 2)
    assert next_(b"3", 3) == (b"", 0)
    assert third.result() == b"3"


def test_a_message_is_what_was_sent_or_refused() -> None:
    shared = torch.arange(6.0)
    states = {
        "state": {"b": shared[2:4], "a": torch.zeros((), dtype=torch.int64), "n": torch.full((2,), torch.inf)},
        "extra": {"a": shared.reshape(2, 3).t(), "empty": torch.zeros(0, 4, dtype=torch.bfloat16)},
        "none": {},
    }
    data = encode_states({"kind": "x", "value": float("nan")}, states)
    header, found = decode_states(data)
    assert header["kind"] == "x"
    assert [list(state) for state in found.values()] == [list(state) for state in states.values()]  # in their order
    assert_same(found, {key: {name: t.contiguous() for name, t in one.items()} for key, one in states.items()})
    twice = encode_states({}, {"one": {"x": shared}, "two": {"y": shared}})
    assert len(twice) < len(encode_states({}, {"one": {"x": shared}, "two": {"y": shared.clone()}}))
    with pytest.raises(MessageError, match="is longer than the 10 that are accepted"):
        decode_states(data, max_bytes=10)
    with pytest.raises(MessageError, match="2 tensors that belong to no state"):
        decode_states(encode({"states": {}}, {"a": torch.zeros(1), "b": torch.zeros(1)}))


def test_garbage_is_refused_in_a_sentence(hosted: Any, tiny_root: Path, tmp_path: Path) -> None:
    """A fuzz test: messages cut off, with bytes changed, and of nothing but noise; at the server and at a site."""
    host, line = hosted(1, max_bytes=20_000)
    site = Site("ann", tmp_path, ["data=folder", f"data.root={tiny_root / 'ann.npz'}"])
    good = encode({"name": "ann", "token": "t", "version": VERSION})
    request = encode_states(
        {"kind": "fit", "round": 0, "setup": "", "run": "r", "life": "l", "orders": [[1, "load", None]]},
        {"state": {"x": torch.zeros(3)}, "extra": {}},
    )
    chance = random.Random(0)
    for number in range(150):
        for message in (good, request):
            noise = bytearray(message)
            if number % 3 == 0:
                noise = noise[: chance.randrange(len(noise))]
            elif number % 3 == 1:
                for _ in range(chance.randrange(1, 9)):
                    noise[chance.randrange(len(noise))] = chance.randrange(256)
            else:
                noise = bytearray(chance.randbytes(chance.randrange(200)))
            header, _ = decode_states(site.answer(bytes(noise)))
            assert header["kind"] in ("error", "need")
            said = words_of(line, bytes(noise))
            assert "Traceback" not in said
            assert "Exception calling application" not in said
    with pytest.raises(ValueError, match="refuses Join: .*larger than max"):
        line.call("Join", bytes(30_000))
    assert not list(tmp_path.rglob("*.state"))
    assert host.seats.keys() <= {"ann"} or len(host.seats) == 1


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"kind": "format the disk"}, "there is no request 'format the disk'"),
        ({"kind": "describe", "data": 3}, "`data` of a message must be settings by name"),
        ({"kind": "sync", "run": "../x", "life": "l", "orders": []}, "must name its run"),
        ({"kind": "sync", "run": "x", "life": "l", "orders": [[1, "load", None], [2, "run", "rm"]], "last_order": 2},
         "there is no order 'run'"),
        ({"kind": "sync", "run": "x", "life": "l", "orders": [["a"]], "last_order": 2}, "are damaged"),
        ({"kind": "sync", "run": "x", "life": "l", "orders": [], "last_order": 4}, "does not go with the run"),
        ({"kind": "sync", "run": "x", "life": "l", "orders": [[1, "load", 7]], "last_order": 1}, "is not there"),
    ],
)  # fmt: skip
def test_a_site_does_nothing_but_what_it_knows(
    header: dict[str, Any], words: str, tiny_root: Path, tmp_path: Path
) -> None:
    site = Site("ann", tmp_path, ["data=folder", f"data.root={tiny_root / 'ann.npz'}"])
    answer, _ = decode_states(site.answer(encode_states(header, {})))
    assert words in answer["text"]


def test_code_that_is_sent_is_not_run(tiny_root: Path, tmp_path: Path) -> None:
    """A configuration may name classes of known packages alone."""
    port = free_port()
    node = {"_target_": "os.system", "command": "touch /tmp/x"}
    words = r"site ann: .*optimizer\._target_ must name code of a known package"
    with sites(port, tiny_root, tmp_path / "sites", ["ann"]) as [ann], pytest.raises(ValueError, match=words):
        run_at_sites(tiny_root, tmp_path / "server", port, number=1, optimizer=node)
    assert "known package" in str(ann.error)


@pytest.mark.parametrize(
    ("options", "changed", "words_at_server", "words_at_site"),
    [
        ({"agreed": "0123"}, {}, "site cid: the server's configuration", "is not the one agreed to, 0123"),
        ({}, {"classes": 4}, "has the classes ['0', '1', '2'", "with data.resize, data.channels and data.classes at"),
        ({}, {"size": 16}, "has examples of shape [3, ", "bring them to one with data.resize"),
    ],
)
def test_sites_that_do_not_go_together(
    options: dict[str, Any],
    changed: dict[str, int],
    words_at_server: str,
    words_at_site: str,
    tiny_root: Path,
    tmp_path: Path,
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    with np.load(root / "cid.npz") as found:
        content = dict(found)
    if "size" in changed:
        content = {k: v.repeat(2, 1).repeat(2, 2) if k.startswith("x") else v for k, v in content.items()}
    if "classes" in changed:
        content["y_train"][0] = 3
    np.savez(root / "cid.npz", **content)
    port = free_port()
    threads = [SiteThread(port, root, tmp_path, "ann"), SiteThread(port, root, tmp_path, "cid", **options)]
    words = ["data.classes=null"] if "classes" in changed else []
    with pytest.raises(ValueError) as error:  # noqa: PT011 - its words are compared below
        run_at_sites(root, tmp_path / "server", port, *words, number=2)
    for thread in threads:
        thread.join()
    assert words_at_server in str(error.value)
    # Whoever came second is the one that differs.
    assert [words_at_site in str(thread.error) for thread in threads].count(True) == 1


@pytest.mark.every
def test_a_model_that_is_too_long_a_message_ends_the_run_in_a_sentence(tiny_root: Path, tmp_path: Path) -> None:
    port, words = free_port(), r"message of \d+ bytes for site ann is longer than executor.max_bytes=2000; raise it"
    with sites(port, tiny_root, tmp_path / "sites", ["ann"]), pytest.raises(ValueError, match=words):
        run_at_sites(tiny_root, tmp_path / "server", port, "executor.max_bytes=2000", number=1)


def test_what_a_site_may_not_say(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method is the server's to say; a site says where its data are"):
        Site("ann", tmp_path, ["method=fedper"])
    data = ["data=folder", f"data.root={tiny_root / 'ann.npz'}"]
    site = Site("ann", tmp_path, [*data, "data.batch_size=4"])
    site.answer(encode_states({"kind": "describe", "data": {"batch_size": 8}}, {}))
    assert site.ended == "data.batch_size is 8 at the server, 4 here; leave it out, or set it there"
    gone = Site("ann", tmp_path, ["data=folder", "data.root=nowhere"])
    gone.answer(encode_states({"kind": "describe", "data": {}}, {}))
    assert gone.ended.startswith("its data cannot be read: data.root must name a folder")


def test_a_site_whose_data_cannot_be_read_gives_its_place_to_another(tiny_root: Path, tmp_path: Path) -> None:
    port = free_port()
    broken = SiteThread(port, tiny_root, tmp_path, "eve", file="nothing")
    came: list[SiteThread] = []

    def come_later() -> None:
        broken.thread.join()
        came.append(SiteThread(port, tiny_root, tmp_path, "ann"))

    later = threading.Thread(target=come_later, daemon=True)
    later.start()
    run = run_at_sites(tiny_root, tmp_path / "server", port, "loop.rounds=1", number=1)
    later.join()
    for thread in (broken, *came):
        thread.join()
    assert "its data cannot be read" in str(broken.error)
    assert [info.name for info in run.loop.clients] == ["ann"]


@pytest.mark.slow
def test_a_full_disk_at_a_site_loses_nothing(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with the site's sentence, and goes on with the same bits when there is room."""
    whole = federation(tiny_root, tmp_path / "serial", "method=fedper", "loop.rounds=4")
    whole.fit()
    write, full = files.write_bytes, threading.Event()

    def fails(path: Path, data: bytes) -> None:
        if full.is_set() and path.parent.parent.name == "bob":
            raise OSError(errno.ENOSPC, f"Could not write '{path}' (No space left on device)")
        write(path, data)

    monkeypatch.setattr(files, "write_bytes", fails)
    port = free_port()
    words = ("method=fedper", "loop.rounds=4")
    with sites(port, tiny_root, tmp_path / "sites"):
        run = at_sites(tiny_root, tmp_path / "server", port, *words)
        recorder = add_recorder(run)
        recorder.on_round_end = lambda loop: full.set() if loop.round == 1 else None  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=r"site bob: .*Could not write .*bob"):
            run.fit()
        run.loop.executor.disconnect()
    full.clear()
    with sites(port, tiny_root, tmp_path / "sites"):
        rest = at_sites(tiny_root, tmp_path / "server", port, *words, f"resume='{tmp_path / 'server'}'")
        rest.fit()
        found = outcome(rest)
        rest.loop.executor.disconnect()
    expected = outcome(whole)
    for one in (expected, found):
        one.pop("executor")
    assert_same(found, expected)


@pytest.mark.slow
def test_a_dead_site_costs_its_time_once_and_a_late_one_joins_in(tiny_root: Path, tmp_path: Path) -> None:
    port = free_port()
    patience = 1.5
    words = ("executor.on_missing=skip", f"executor.patience={patience}", "loop.on_client_error=skip", "loop.rounds=7")
    threads = [SiteThread(port, tiny_root, tmp_path / "sites", name) for name in NAMES]
    run = at_sites(tiny_root, tmp_path / "server", port, *words, "method=fedper")
    began: dict[int, float] = {}
    dead = threads[2]

    class Die(BaseException):
        pass

    def die(*_: Any) -> bytes:
        raise Die

    def on_round_end(loop: Any) -> None:
        began[loop.round] = time.monotonic()
        if loop.round == 1:
            dead.site.answer = die  # type: ignore[method-assign]
        if loop.round == 4:
            threads.append(SiteThread(port, tiny_root, tmp_path / "sites", "cid"))
            while loop.executor.host.silence("cid") > 0.5:
                time.sleep(0.05)

    recorder = add_recorder(run)
    recorder.on_round_end = on_round_end  # type: ignore[method-assign]
    dead._run = lambda: None  # type: ignore[method-assign]
    try:
        run.fit()
    finally:
        run.loop.executor.disconnect()
    for thread in threads:
        thread.join()
    trained = [row["round/trained"] for row in run.loop.history]
    assert trained == [3, 3, 2, 2, 2, 3, 3]
    # Round 2 waits; rounds 3 and 4 do not, neither for the fit nor for scores.
    assert began[4] - began[2] < patience


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and what it signed for a server and for ann; a stranger's, and what that signed for ann."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("pki")
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    for authority in ("ca", "stranger"):
        openssl("req", "-x509", *key, "-keyout", f"{authority}.key", "-out", f"{authority}.pem", "-days", "2", "-subj", f"/CN={authority}")  # fmt: skip  # noqa: E501
    signed = ("server", "ca", "server"), ("server", "ca", "old"), ("ann", "ca", "ann"), ("ann", "stranger", "forged")
    for name, authority, file in signed:
        days = "-1" if file == "old" else "2"
        openssl("req", *key, "-keyout", f"{file}.key", "-out", f"{file}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{file}.csr", "-CA", f"{authority}.pem", "-CAkey", f"{authority}.key",
                "-CAcreateserial", "-days", days, "-extfile", "names", "-out", f"{file}.pem")  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_site_is_who_its_certificate_says(hosted: Any, certificates: Path) -> None:
    def pems(*names: str | None) -> list[bytes | None]:
        return read_pems(*(certificates / name if name else None for name in names))

    host, clear = hosted(2, server_credentials(*pems("ca.pem", "server.key", "server.pem")), certified=True)

    def line(*names: str | None) -> Line:
        return Line(clear.address, SERVICE, 20.0, 20.0, channel_credentials(pems(*names)))

    assert join(line("ca.pem", "ann.key", "ann.pem"), "ann")
    with pytest.raises(PermissionError, match="the certificate is that of ann, the site calls itself bob"):
        join(line("ca.pem", "ann.key", "ann.pem"), "bob")
    with pytest.raises(ConnectionError, match="its certificate is not signed by the authority that is given here"):
        join(line("stranger.pem", "ann.key", "ann.pem"), "ann")
    for names in (("ca.pem", "forged.key", "forged.pem"), ("ca.pem", None, None)):
        with pytest.raises(ConnectionError, match="hangs up each time: it speaks TLS .* certificate shown"):
            join(line(*names), "ann")
    clear.patience = 20.0
    with pytest.raises(ConnectionError, match="hangs up each time"):
        join(clear, "ann")
    assert list(host.seats) == ["ann"]
    _, late = hosted(1, server_credentials(*pems("ca.pem", "old.key", "old.pem")), certified=True)
    with pytest.raises(
        ConnectionError, match="its certificate has expired by the clock here, 2.*; set the clock, or have"
    ):
        join(Line(late.address, SERVICE, 20.0, 20.0, channel_credentials(pems("ca.pem", "ann.key", "ann.pem"))), "ann")
    _, open_ = hosted(1)
    with pytest.raises(ConnectionError, match="it speaks in the clear, and this side TLS"):
        join(Line(open_.address, SERVICE, 20.0, 20.0, channel_credentials(pems("ca.pem"))), "ann")


@pytest.mark.slow
def test_a_whole_run_over_tls_has_the_bits_of_the_simulation(
    certificates: Path, tiny_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_root / "ann.npz", tmp_path / "data")
    port = free_port()
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", "executor.sites=[ann]", "data.classes=3"]
    at += [f"executor.tls_ca={certificates / 'ca.pem'}", f"executor.tls_cert={certificates / 'server.pem'}"]
    at += [f"executor.tls_key={certificates / 'server.key'}"]
    model = ["model=lenet5", "~model", "+model._target_=tests.federations.tiny_model"]
    words = [*model, "method=fedper", "data.batch_size=8", "loop.rounds=2", "dashboard=null", "logger=none"]
    own = channel_credentials(read_pems(*(certificates / name for name in ("ca.pem", "ann.key", "ann.pem"))))
    with sites(port, tiny_root, tmp_path / "sites", ["ann"], credentials=own) as [site]:
        assert call("train", *at, *words, f"hydra.run.dir={tmp_path / 'over'}") == 0
    assert site.error is None
    assert site.line.encrypted
    data = ["data=folder", f"data.root={tmp_path / 'data'}", "data.classes=3", "executor=serial"]
    assert call("train", *data, *words, f"hydra.run.dir={tmp_path / 'serial'}") == 0
    found, expected = (read_json(tmp_path / name / "results.json")["metrics"] for name in ("over", "serial"))
    assert found == expected


def test_nothing_is_said_in_the_clear_beyond_this_machine() -> None:
    with pytest.raises(ValueError, match=r"0\.0\.0\.0:1 is not this machine.*give executor.tls_cert"):
        SitesExecutor("0.0.0.0:1")
    SitesExecutor("0.0.0.0:1", insecure=True)
    with pytest.raises(ValueError, match="belong together"):
        SitesExecutor(tls_cert="x")
    with pytest.raises(SystemExit, match=r"error: 10\.0\.0\.1:1 is not this machine.*--insecure"):
        process.main(["--server=10.0.0.1:1", "--name=ann"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl")
def test_a_second_process_in_a_folder_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locks = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB); "
    other = [sys.executable, "-S", "-c", locks + "print('held', flush=True); sys.stdin.read()", f"{tmp_path / '.lock'}"]
    arguments = [f"--folder={tmp_path}", "--name=ann", "data=digits"]
    tried: list[bytes] = []

    def serve(*_: Any) -> None:
        second = subprocess.run(other, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        tried.append((second.stderr.splitlines() or [b"it got the lock"])[-1])

    monkeypatch.setattr(process, "serve", serve)
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit, match="another process runs in .*; end it, or choose another --folder"):
            process.main(arguments)
        assert first.stdin is not None
        first.stdin.close()
    monkeypatch.setattr(process.signal, "signal", lambda *_: None)
    process.main(arguments)
    assert tried[0].startswith((b"BlockingIOError", b"PermissionError"))


def test_a_site_that_is_killed_at_any_write_goes_on(tmp_path: Path) -> None:
    """The state after orders is the same, wherever between two of them, or before an answer, a site was killed."""
    fit = type("Fit", (), {"stage": "", "personal": {"w": torch.ones(2)}, "memory": {"m": torch.zeros(1)}})

    def all_of_it(folder: Path, again: int | None) -> Store:
        store = Store(folder)
        steps: list[Callable[[Store], None]] = [
            lambda s: s.follow("a", [(1, "load", None)], 1),
            lambda s: s.take(fit, "a-1"),  # type: ignore[arg-type]
            lambda s: s.follow("a", [(1, "load", None), (2, "commit", "a-1"), (3, "keep", "best")], 3),
            lambda s: s.follow("a", [(4, "mark", 1)], 4),
            lambda s: s.take(fit, "a-2"),  # type: ignore[arg-type]
            lambda s: s.follow("a", [(5, "restore", "best"), (6, "mark", 2)], 6),
        ]
        for number, step in enumerate(steps):
            step(store)
            if number == again:
                store = Store(folder)
                step(store)
        return store

    whole = all_of_it(tmp_path / "whole", None)
    for number in range(6):
        other = all_of_it(tmp_path / str(number), number)
        assert other.held.number == whole.held.number == 6
        assert same(other.held.personal, whole.held.personal)
        assert sorted(other.held.kept) == ["best"]
    # A server that was killed asks for the state at its checkpoint, by another life.
    resumed = Store(tmp_path / "whole")
    resumed.follow("b", [(1, "load", 1)], 1)
    assert same(resumed.held.personal, fit.personal)
    assert same(resumed.held.memory, fit.memory)
    with pytest.raises(LostError, match="mark_00000009.state"):
        resumed.follow("c", [(1, "load", 9)], 1)
    with pytest.raises(LostError, match="does not go with the run"):
        Store(tmp_path / "emptied").follow("b", [], 1)


def test_a_task_says_what_it_is() -> None:
    from fl_lightning.sites import messages

    exam = Exam("val", {"x": torch.ones(2)}, personal=True, stage="s", confusion=True, metrics=("a",), fetch=True)
    assert messages.read_task(*messages.task(exam)) == exam
    sent = Broadcast(3, {"x": torch.ones(2)}, {"c": torch.zeros(1)}, False, "stage", "ask", {"h": torch.ones(1)})
    header, states = messages.task(sent)
    assert vars(messages.read_task(header, states)) == vars(sent)
    assert service.BEAT < service.POLL
