"""Trains at three sites of this machine through NVFlare or Flower, and compares with the simulation, to the bit.

    python -m studies.hosts_demo nvflare|flower [any option of train.py]

It starts the host at 127.0.0.1, three sites beside it, and stops them all at the end. Five methods are trained; in the
midst of one of them a site is killed and started again; a trained model is fine-tuned at the sites. Through NVFlare the
first method goes by ``SimEnv``, the second by ``PocEnv``, the others by ``ProdEnv``, as jobs of what that has started.
Each host needs an environment of its own (``make nvflare``, ``make flower``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fl_lightning
from fl_lightning.callbacks.checkpoint import read_checkpoint
from fl_lightning.evaluation.results import read_json
from fl_lightning.sites.held import Held
from studies.sites_demo import NAMES, sites, write_data

METHODS = ("fedavg", "fedper", "scaffold", "fedftha", "ditto")
KILLED = "scaffold"
"""In the midst of which a site is killed; it has tensors of its own at the server and at the sites."""

FINE_TUNING = (
    *("personalization=[ft]", "personalization@baselines=[none]", "epochs=1", "figures=false"),
    *("logger=none", "progress=null"),
)
LOGIN = 120.0
"""Seconds that a login at NVFlare's server may take."""

APP = """
[project]
name = "fl-lightning-sites"
version = "1.0.0"
description = "Personalised federated learning at sites"
license = "Apache-2.0"
dependencies = ["fl_lightning[flower]"]

[tool.flwr.app]
publisher = "me"

[tool.flwr.app.components]
serverapp = "fl_lightning.sites.flower_app:server"
clientapp = "fl_lightning.sites.flower_app:client"

[tool.flwr.app.config]
command = ""
"""

Run = Callable[[str], None]
"""Runs a command line in the host's server; returns when it has ended."""


def main() -> None:
    """Run everything."""
    host, *own = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    folder = (Path("logs") / host / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    write_data(folder / "data")
    words = ["data.classes=10", "model=lenet5", "loop.rounds=2", "dashboard=null", "logger=none", "progress=null", *own]
    os.environ["FL_LIGHTNING_SITES"] = str(folder / "sites")
    at = ["executor=hosted", f"executor.sites=[{','.join(NAMES)}]"]
    with sites(folder, "--hosted") as start_anew, {"nvflare": nvflare, "flower": flower}[host](folder) as run:

        def timed(what: str, *command: str) -> None:
            began = time.monotonic()
            run(" ".join([*command, *at, f"hydra.run.dir={folder / what}"]))
            print(f"{what} at the sites: {time.monotonic() - began:.0f} s", flush=True)

        for method in METHODS:
            if method == KILLED:
                threading.Thread(target=kill, args=(folder, method, start_anew), daemon=True).start()
            timed(method, "train.py", f"method={method}", *words)
        timed("personalized", "personalize.py", f"checkpoint={folder / METHODS[0]}", *FINE_TUNING)
    equal = True
    for method in METHODS:
        data, simulated = ["data=folder", f"data.root={folder / 'data'}"], folder / f"{method}_simulated"
        fl_lightning.train(f"method={method}", "executor=serial", *data, *words, folder=simulated)
        same = equals(left_behind(folder / method, folder / "sites"), left_behind(simulated))
        print(f"{method}: sites and simulation {'are the same to the bit' if same else 'DIFFER'}", flush=True)
        equal = equal and same
    simulated = folder / "personalized_simulated"
    first = folder / f"{METHODS[0]}_simulated"
    fl_lightning.personalize(first, None, "executor=serial", *FINE_TUNING, folder=simulated)
    same = equals(fine_tuned(folder / "personalized"), fine_tuned(simulated))
    print(f"personalize.py: sites and simulation {'are the same to the bit' if same else 'DIFFER'}", flush=True)
    equal = equal and same
    print(f"run folders: {folder}")
    sys.exit(not equal)


def kill(folder: Path, method: str, start_anew: Callable[[str], None]) -> None:
    """Kill the last site once it has begun with a method, and start it again."""
    log = folder / f"site_{NAMES[-1]}.log"
    while f"ready for method {method}" not in log.read_text():
        time.sleep(0.1)
    print(f"site {NAMES[-1]} is killed in the midst of {method}", flush=True)
    start_anew(NAMES[-1])


@contextlib.contextmanager
def nvflare(folder: Path) -> Iterator[Run]:
    """Have the first job simulated; the second brings a provisioned server and three clients up, which stay."""
    from nvflare.recipe import PocEnv, ProdEnv, SimEnv

    from fl_lightning.sites.nvflare_job import job

    os.environ["NVFLARE_POC_WORKSPACE"] = str(folder / "poc")
    # A machine with other work needs longer than the 10 s that a login may take by default.
    poc = PocEnv(num_clients=len(NAMES), clients=list(NAMES), extra={"login_timeout": LOGIN})
    envs: list[Any] = [poc, SimEnv(clients=list(NAMES), workspace_root=str(folder / "simulator"))]

    def run(command: str) -> None:
        env = envs.pop()
        recipe = job(command, len(NAMES))
        if isinstance(env, SimEnv):
            recipe.execute(env).get_result()
            return
        id = env.deploy(recipe.finalize())
        env.get_job_result(id)
        if (status := env.get_job_status(id)) != "FINISHED:COMPLETED":
            raise RuntimeError(f"the job ended as {status}; see {folder / 'poc'}")
        # PocEnv would start all anew for every job.
        envs.append(ProdEnv(startup_kit_location=poc._get_admin_startup_kit_path(), login_timeout=LOGIN))

    try:
        yield run
    finally:
        poc.stop(clean_up=False)
        end_rest(folder / "poc")


def end_rest(folder: Path) -> None:
    """End what NVFlare has left: a client whose server is gone calls it for ever, and a shell begins it again."""
    for kind in ("daemon_pid.fl", "pid.fl"):
        for file in folder.rglob(kind):
            id = file.read_text().strip()
            command = subprocess.run(
                ["ps", "-o", "args=", "-p", id], capture_output=True, text=True, check=False
            ).stdout
            if str(folder) in command:
                os.kill(int(id), signal.SIGKILL)


@contextlib.contextmanager
def flower(folder: Path) -> Iterator[Run]:
    """Keep a Flower SuperLink and three SuperNodes up."""
    bin = Path(sys.executable).parent
    home, app = folder / "flower", folder / "app"
    home.mkdir()
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    ports = free_ports(1 + len(NAMES))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{ports[0]}"\ninsecure = true\n'
    )
    path = f"{bin}{os.pathsep}{os.environ['PATH']}"
    own = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path}
    link = ["flower-superlink", "--insecure", f"--port={ports[0]}", "--disable-runtime-dependency-installation"]
    commands = [link]
    for name, port in zip(NAMES, ports[1:], strict=True):
        config = f'name="{name}" folder="{folder / "sites" / name}"'
        node = ["flower-supernode", "--insecure", f"--superlink=127.0.0.1:{ports[0]}", f"--port={port}"]
        commands.append([*node, f"--node-config={config}"])
    processes = []

    def run(command: str) -> None:
        order = ["flwr", "run", str(app), "here", "--stream", "--run-config", f"command='{command}'"]
        done = subprocess.run([str(bin / order[0]), *order[1:]], env=own, cwd=folder, check=False)
        if done.returncode:
            raise RuntimeError(f"flwr run ended with {done.returncode}")

    try:
        for number, command in enumerate(commands):
            print(" ".join(command), flush=True)
            with open(folder / f"{command[0]}_{number}.log", "w") as log:
                processes.append(
                    subprocess.Popen([str(bin / command[0]), *command[1:]], env=own, stdout=log, stderr=log)
                )
            if number == 0:
                wait_for(ports[0])
        yield run
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(port: int) -> None:
    """Wait until somebody listens at a port."""
    until = time.monotonic() + 600.0  # a busy machine needs minutes to start it
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nobody listens at 127.0.0.1:{port}")


def free_ports(number: int) -> list[int]:
    """Return ports that nobody listens at."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]


def left_behind(run: Path, folder: Path | None = None) -> dict[str, Any]:
    """Return the shared tensors, every client's own, and the scores of a run; ``folder`` holds those of its sites."""
    content = read_checkpoint(run / "checkpoints" / "last.pt")
    if folder is None:
        clients = content["executor"]["clients"]
        own = {name: (clients[id]["personal"], clients[id]["memory"]) for id, name in enumerate(NAMES)}
    else:
        put = content["executor"]
        own = {}
        for name in NAMES:
            mark = folder / name / f"run_{put['run']}" / f"mark_{put['mark']:08d}.state"
            held = Held.decode(mark.read_bytes())
            own[name] = held.personal, held.memory
    return {"state": content["state"], "own": own, "scores": read_json(run / "results.json")["metrics"]}


def fine_tuned(run: Path) -> Any:
    """Return all that ``personalize.py`` found, but for times."""

    def without_times(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_times(inner) for key, inner in value.items() if "second" not in key}
        return [without_times(inner) for inner in value] if isinstance(value, list) else value

    return without_times(read_json(run / "results.json")["methods"])


def equals(one: Any, other: Any) -> bool:
    """Say whether nested values are the same to the bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equals(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(equals(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return bool(one == other or (one != one and other != other))


if __name__ == "__main__":
    main()
