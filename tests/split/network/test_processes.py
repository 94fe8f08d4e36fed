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

from fl_lightning.files import read_tensors
from tests.federations import federation

SETTINGS = ["method=flexp_sfl", "model=lenet5", "data.batch_size=8", "loop.rounds=3", "seed=3"]
LONG = ["method=flexp_sfl", "model=lenet5", "data.batch_size=8", "loop.rounds=10000", "seed=3"]
TINY = ["~model", "+model._target_=tests.federations.tiny_model"]
SECONDS = 300


class Processes:
    """Starts processes and makes sure that none outlives the test."""

    def __init__(self, root: Path, folder: Path, settings: list[str] = SETTINGS) -> None:
        self.root, self.folder, self.settings, self.running = root, folder, settings, []

    def start(self, module: str, name: str, *options: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", f"fl_lightning.split.network.{module}", f"--folder={self.folder / name}", *options,
             *self.settings, "data=folder", f"data.root={self.root}", *TINY],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[3],
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
        return self.start(
            "client", f"client{number}", f"--client={number}", f"--server=127.0.0.1:{port}", f"--patience={SECONDS}"
        )

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
        assert processes.serving.wait(timeout=deadline - time.monotonic()) == 0
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
        assert processes.serving.wait(timeout=deadline - time.monotonic()) == 0
    finally:
        processes.close()
    assert read_tensors(tmp_path / "client0" / "client.pt")["round"] == 3


@pytest.mark.slow
def test_ctrl_c_ends_every_process_in_one_line_and_a_restarted_federation_goes_on(
    tiny_root: Path, tmp_path: Path
) -> None:
    processes, deadline = Processes(tiny_root, tmp_path, LONG), time.monotonic() + SECONDS
    checkpoint = tmp_path / "client0" / "client.pt"
    try:
        for begun in (0, 1):
            port = processes.server(0)
            clients = [processes.client(number, port) for number in range(3)]
            wait_for(checkpoint, deadline)
            before = read_tensors(checkpoint)["round"]
            while read_tensors(checkpoint)["round"] == before:
                assert time.monotonic() < deadline, "the clients do not go on"
                time.sleep(0.1)
            assert before >= begun
            for process in clients:
                process.send_signal(signal.SIGINT)
                output, _ = process.communicate(timeout=deadline - time.monotonic())
                assert process.returncode == 1, output
                assert output.endswith("stopped; the same command goes on from the last finished round\n")
                assert "Traceback" not in output
            processes.serving.send_signal(signal.SIGINT)
            output, _ = processes.serving.communicate(timeout=deadline - time.monotonic())
            assert processes.serving.returncode == 0, output
            assert "Traceback" not in output
            assert re.search(r"served \d+ steps, \d+ bytes up and \d+ down\n$", output)
    finally:
        processes.close()


@pytest.mark.slow
def test_clients_with_other_settings_are_told_which(tiny_root: Path, tmp_path: Path) -> None:
    processes = Processes(tiny_root, tmp_path)
    try:
        port = processes.server(0)
        for settings, words in (
            ([*SETTINGS[:-1], "seed=4"], "another seed than"),
            ([*SETTINGS, "module.start=1", "module.end=0"], "another module (where the model is cut, lr_factors) than"),
            (
                [*SETTINGS, "split_policy=fixed", "callbacks.server.policy.cuts=[1]"],
                "another callbacks.server (cuts, alignment) than",
            ),
        ):
            processes.settings = settings
            process = processes.client(0, port)
            output, _ = process.communicate(timeout=SECONDS)
            assert process.returncode == 1
            assert f"error: the server at 127.0.0.1:{port} refuses Join: this client was started with {words}" in output
            assert "Traceback" not in output
    finally:
        processes.close()
