"""Server and clients as real processes on this machine, killed at bad moments, against the federated loop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fl_lightning.checkpoint import read_tensors
from tests.federations import federation

SETTINGS = ["method=flexp_sfl", "model=lenet5", "data.batch_size=8", "loop.rounds=3", "seed=3"]
TINY = ["~model", "+model._target_=tests.federations.tiny_model"]
SECONDS = 300


class Processes:
    """Starts processes and makes sure that none outlives the test."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder, self.running = root, folder, []

    def start(self, module: str, name: str, *options: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", f"fl_lightning.split.{module}", f"--folder={self.folder / name}", *options,
             *SETTINGS, "data=folder", f"data.root={self.root}", *TINY],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
        self.running.append(process)
        return process

    def server(self, port: int, patience: float = SECONDS) -> int:
        """Start the server and return its port once it listens. Impatient, it passes over clients that start slowly."""
        process = self.start(
            "server", "server", f"--address=127.0.0.1:{port}", "--clients=3", "--classes=3", "--size=8",
            f"--patience={patience}",
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r"serving 3 clients at 127\.0\.0\.1:(\d+)", line):
                self.serving = process
                return int(found[1])
        raise AssertionError("the server did not start")

    def client(self, number: int, port: int) -> subprocess.Popen:
        return self.start("client", f"client{number}", f"--client={number}", f"--server=127.0.0.1:{port}")

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def wait_for(path: Path, deadline: float) -> None:
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["undisturbed", "killed"])
def test_processes_end_with_the_bits_of_the_federated_loop(kill: bool, tiny_root: Path, tmp_path: Path) -> None:
    run = federation(tiny_root, tmp_path / "loop", *SETTINGS)
    run.fit()
    processes, deadline = Processes(tiny_root, tmp_path), time.monotonic() + SECONDS
    try:
        port = processes.server(0)
        clients = {number: processes.client(number, port) for number in range(3)}
        if kill:
            wait_for(tmp_path / "client0" / "client.pt", deadline)
            processes.serving.send_signal(signal.SIGKILL)
            processes.serving.wait()
            assert processes.server(port) == port
        for number, process in clients.items():
            output, _ = process.communicate(timeout=deadline - time.monotonic())
            assert process.returncode == 0, output
            assert f"client {number} (" in output
        assert processes.serving.wait(timeout=10) == 0
    finally:
        processes.close()
    body = read_tensors(tmp_path / "server" / "server.pt")["body"]
    assert body.keys() == run.loop.state.keys()
    for name, tensor in body.items():
        assert torch.equal(tensor, run.loop.state[name]), name
    for client in run.clients:
        personal = read_tensors(tmp_path / f"client{client.id}" / "client.pt")["personal"]
        assert personal.keys() == client.personal.keys()
        assert all(torch.equal(personal[name], client.personal[name]) for name in personal)
    assert not list(tmp_path.glob("server/*.tmp"))


@pytest.mark.slow
def test_killed_client_is_passed_over_and_comes_back(tiny_root: Path, tmp_path: Path) -> None:
    processes, deadline = Processes(tiny_root, tmp_path), time.monotonic() + SECONDS
    try:
        port = processes.server(0, patience=5.0)
        first = processes.client(0, port)
        wait_for(tmp_path / "client0" / "client.pt", deadline)
        first.send_signal(signal.SIGKILL)
        first.wait()
        clients = [processes.client(number, port) for number in range(3)]
        for process in clients:
            output, _ = process.communicate(timeout=deadline - time.monotonic())
            assert process.returncode == 0, output
        assert processes.serving.wait(timeout=10) == 0
    finally:
        processes.close()
    assert read_tensors(tmp_path / "client0" / "client.pt")["round"] == 3
