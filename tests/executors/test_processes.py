"""The process executor against the serial one, and against all that can go wrong with processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_lightning.callback import FederatedCallback
from fl_lightning.client import Broadcast
from fl_lightning.executors import ProcessExecutor, processes
from fl_lightning.executors.processes import ATTEMPTS, shares_gpus, usable_cores
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.training import stop_after_round
from tests.federations import Federation, add_recorder, assert_same, federation, outcome


class Saboteur(FederatedCallback):
    """Does something at one client's start from a round on: once (a file remembers that it is done) or always."""

    def __init__(self, what: str, client: int, done: Path | None = None, first_round: int = 0) -> None:
        self.what = what
        self.client = client
        self.done = done
        self.first_round = first_round

    def on_client_start(self, client: Any, module: Any, broadcast: Broadcast) -> None:
        if client.id != self.client or (self.done is not None and self.done.exists()):
            return
        if broadcast.round < self.first_round:
            return
        if self.done is not None:
            self.done.touch()
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "hang":
            time.sleep(60)
        if self.what == "foreign":
            raise type("Unpicklable", (Exception,), {})("cannot travel")
        raise ValueError(f"client {client.id} has had enough")


class Diary(FederatedCallback):
    """A method with memory at the client and something to say in both directions."""

    def on_broadcast(self, loop: Any, client: Any, broadcast: Broadcast) -> None:
        broadcast.extra["greeting"] = torch.tensor([float(loop.round), float(client.id)])

    def on_client_start(self, client: Any, module: Any, broadcast: Broadcast) -> None:
        assert broadcast.extra["greeting"].tolist() == [broadcast.round, client.id]
        client.memory["rounds"] = client.memory.get("rounds", torch.zeros(())) + 1
        client.memory["process"] = torch.tensor(os.getpid())

    def on_client_end(self, client: Any, module: Any, update: Any) -> None:
        update.extra["rounds"] = client.memory["rounds"].clone()


def with_callback(run: Federation, callback: FederatedCallback) -> Federation:
    callback.name = "planted"
    run.loop.callbacks["planted"] = callback
    return run


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() <= before


def children() -> set[int]:
    """The child processes of this one, but for the standard library's own helper."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else 0
            if parent == os.getpid() and "resource_tracker" not in (entry / "cmdline").read_text():
                found.add(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def test_any_number_of_workers_gives_the_serial_result_to_the_bit(tiny_root: Path, tmp_path: Path) -> None:
    common = ("sharing.personal=[head]", "cohort.fraction=0.7", "seed=5")
    results = []
    executors = [["executor=serial"], *(["executor=processes", f"executor.workers={number}"] for number in (1, 2, 3))]
    for number, overrides in enumerate(executors):
        run = federation(tiny_root, tmp_path / str(number), *common, *overrides)
        recorder = add_recorder(run)
        run.fit()
        results.append((outcome(run), [dict(vars(update)) for update in recorder.updates]))
    for other in results[1:]:
        assert_same(results[0], other)


@pytest.mark.slow
def test_spawned_workers_give_the_serial_result(tiny_root: Path, tmp_path: Path) -> None:
    serial = federation(tiny_root, tmp_path / "serial", "sharing.personal=[head]")
    spawned = federation(
        tiny_root, tmp_path / "spawned", "sharing.personal=[head]", "executor=processes", "executor.start_method=spawn"
    )
    for run in (serial, spawned):
        run.fit()
    assert_same(outcome(serial), outcome(spawned))


def test_memory_and_extra_travel_with_the_client(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "executor=processes", "executor.workers=2", "loop.rounds=3")
    recorder = add_recorder(with_callback(run, Diary()))
    run.fit()
    assert [float(update.extra["rounds"]) for update in recorder.updates] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert os.getpid() not in {int(client.memory["process"]) for client in run.clients}


@pytest.mark.parametrize(("workers", "first_round"), [(2, 0), (1, 1)], ids=["at once", "with a fit behind it"])
def test_killed_worker_is_replaced_and_its_client_run_again(
    workers: int, first_round: int, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(processes, "SHORT_FIT", 60.0)  # from the second fit on each worker is given two at a time
    whole = federation(tiny_root, tmp_path / "whole")
    whole.fit()
    run = federation(tiny_root, tmp_path / "killed", "executor=processes", f"executor.workers={workers}")
    with_callback(run, Saboteur("kill", 1, done=tmp_path / "done", first_round=first_round)).fit()
    assert "died (killed by SIGKILL); its work is done again" in caplog.text
    left = outcome(run)
    left["callbacks"].pop("planted")
    assert_same(outcome(whole), left)


def test_client_that_kills_every_worker_is_an_error_of_that_client(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(
        tiny_root, tmp_path, "executor=processes", "executor.workers=2", "loop.rounds=1", "loop.on_client_error=skip"
    )
    with_callback(run, Saboteur("kill", 0)).fit()
    assert run.loop.history[0]["round/failed"] == 1
    assert run.loop.history[0]["round/trained"] == 2
    run = federation(tiny_root, tmp_path / "raise", "executor=processes", "executor.workers=2")
    with pytest.raises(RuntimeError, match=f"died {ATTEMPTS} times, at last: killed by SIGKILL"):
        with_callback(run, Saboteur("kill", 0)).fit()


@pytest.mark.every
def test_a_fit_that_hangs_is_ended_in_time(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SILENCE", 0.5)
    words = ["executor=processes", "executor.workers=2", "executor.timeout=3", "loop.on_client_error=skip"]
    run = federation(tiny_root, tmp_path, *words, "loop.rounds=2")
    with_callback(run, Saboteur("hang", 1, done=tmp_path / "done")).fit()
    assert [row["round/failed"] for row in run.loop.history] == [1, 0]
    assert [row["round/trained"] for row in run.loop.history] == [2, 3]
    assert "client bob has been at work for" in caplog.text
    assert "longer than executor.timeout=3 seconds" in caplog.text


def test_exception_comes_back_with_the_traceback_of_the_worker(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "own", "executor=processes", "executor.workers=2")
    with pytest.raises(RuntimeError, match="client bob: client 1 has had enough") as caught:
        with_callback(run, Saboteur("raise", 1)).fit()
    error = caught.value.__cause__
    assert isinstance(error, ValueError)
    assert "in on_client_start" in str(error.__cause__)
    run = federation(tiny_root, tmp_path / "foreign", "executor=processes", "executor.workers=2")
    with pytest.raises(RuntimeError, match="client bob: Unpicklable: cannot travel"):
        with_callback(run, Saboteur("foreign", 1)).fit()


def test_round_that_is_given_up_leaves_workers_that_can_be_used_again(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "loop.rounds=0")
    run.fit()
    loop = run.loop
    executor = ProcessExecutor(workers=2)
    executor.setup(loop.local, run.clients)
    tasks = [(client, loop.broadcast(client)) for client in loop.clients]
    given_up = executor.run(tasks)
    next(given_up)
    given_up.close()
    again = list(executor.run(tasks))
    executor.close()
    assert [outcome.client.id for outcome in again] == [0, 1, 2]
    for task, result in zip(tasks, again, strict=True):
        assert result.update is not None
        info, broadcast = task
        assert_same(vars(loop.local.fit(run.clients[info.id], broadcast).update), vars(result.update))


@pytest.mark.parametrize("how", ["twice Ctrl-C", "SIGKILL"])
def test_no_process_outlives_the_run(how: str, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "run", "executor=processes", "executor.workers=2")
    with_callback(run, Saboteur("hang", 0))
    executor = run.loop.executor
    setup = executor.setup
    reader, writer = os.pipe()
    main = os.fork()
    if main == 0:

        def announce(*args: Any) -> None:
            setup(*args)
            os.write(writer, " ".join(str(worker.process.pid) for worker in executor._workers.values()).encode())

        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        executor.setup = announce
        try:
            with stop_after_round(run.loop, RunFolder(tmp_path / "run")):
                run.fit()
        except KeyboardInterrupt:
            os._exit(7)
        os._exit(0)
    workers = [int(pid) for pid in os.read(reader, 100).split()]
    assert len(workers) == 2
    time.sleep(0.3)
    if how == "SIGKILL":
        os.kill(main, signal.SIGKILL)
        os.kill(workers[0], signal.SIGKILL)  # it hangs in a fit; the other one waits for work and must see the end
    else:
        os.killpg(main, signal.SIGINT)  # as a terminal does: to every process
        time.sleep(0.3)
        assert all(_alive(pid) for pid in [main, *workers])
        os.killpg(main, signal.SIGINT)
    status = os.waitpid(main, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if how == "SIGKILL" else 7)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in workers)
    os.close(reader)
    os.close(writer)


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="workers must be at least 1"):
        ProcessExecutor(workers=0)
    with pytest.raises(ValueError, match="threads must .*, got 0"):
        ProcessExecutor(threads=0)
    with pytest.raises(ValueError, match="auto, fork, spawn"):
        ProcessExecutor(start_method="thread")  # type: ignore[arg-type]


def test_default_is_one_worker_per_core_but_no_more_than_clients(tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path, "executor=processes", "loop.rounds=0")
    run.fit()
    assert run.loop.executor._size == min(usable_cores(), 3)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_mps_is_seen_by_the_pipe_of_its_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not shares_gpus()
    (tmp_path / "control").touch()
    assert shares_gpus()
