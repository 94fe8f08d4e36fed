"""Starts a server and three sites on this machine, trains and personalises, and compares with a simulation.

    python -m studies.sites_demo [any option of train.py]

Each site is a process of its own with a folder and data of its own, and calls the server at 127.0.0.1. These are the
commands that one types on four machines; only the data are made here: three domains of scikit-learn's digits, a file
each.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fl_lightning.data.sets.digits import Digits

NAMES = ("inverted", "noisy", "plain")
ROOT = Path(__file__).resolve().parents[1]


def write_data(folder: Path) -> None:
    """Write three domains of digits, a file for each site."""
    folder.mkdir(parents=True)
    for client in Digits(val_fraction=0.0).clients:
        if client.name in NAMES:
            (x_train, y_train), (x_test, y_test) = client.examples("train"), client.examples("test")
            images = {"x_train": x_train, "x_test": x_test}
            arrays = {name: x.permute(0, 2, 3, 1).numpy() for name, x in images.items()}
            np.savez(folder / f"{client.name}.npz", y_train=y_train.numpy(), y_test=y_test.numpy(), **arrays)  # type: ignore[arg-type]


@contextlib.contextmanager
def sites(folder: Path, connection: str) -> Iterator[Callable[[str], None]]:
    """Keep the three sites up; ``connection`` is the option that says who connects them.

    Yields:
        What kills a site, as a machine that fails would, and starts it again from its folder.
    """
    processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str) -> None:
        command = ["-m", "fl_lightning.site", connection, f"--name={name}"]
        data = [f"--folder={folder / 'sites' / name}", "data=folder", f"data.root={folder / 'data' / name}.npz"]
        print("at site", name, ": python", *command, *data, flush=True)
        with open(folder / f"site_{name}.log", "a") as log:
            processes[name] = subprocess.Popen([sys.executable, *command, *data], cwd=ROOT, stderr=log)

    def start_anew(name: str) -> None:
        processes[name].kill()
        processes[name].wait()
        start(name)

    try:
        for name in NAMES:
            start(name)
        yield start_anew
    finally:
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()


def script(name: str, *words: str) -> None:
    """Run a script; its failure ends this one."""
    print("at the server : python", name, *words, flush=True)
    done = subprocess.run([sys.executable, str(ROOT / name), *words], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def scores(run: Path) -> object:
    """Return the scores of a run."""
    return json.loads((run / "results.json").read_text())["metrics"]


def main() -> None:
    """Run everything."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no site is left behind
    folder = (Path("logs") / "sites" / time.strftime("%Y-%m-%d_%H-%M-%S")).absolute()
    write_data(folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at = ["executor=sites", f"executor.listen=127.0.0.1:{port}", f"executor.sites=[{','.join(NAMES)}]"]
    words = ["method=fedper", "loop.rounds=5", "dashboard=null", *sys.argv[1:]]
    with sites(folder, f"--server=127.0.0.1:{port}"):
        script("train.py", *at, "data.classes=10", *words, f"hydra.run.dir={folder / 'train'}")
        script(
            "train.py", *at, "data.classes=10", "loop.rounds=5", "dashboard=null", f"hydra.run.dir={folder / 'fedavg'}"
        )
        quick = ["personalization=[ft]", "personalization@baselines=[none]", "epochs=3", "figures=false"]
        script("personalize.py", f"checkpoint={folder / 'fedavg'}", *at, *quick, f"hydra.run.dir={folder / 'personal'}")
    data = ["data=folder", f"data.root={folder / 'data'}", "data.classes=10"]
    script("train.py", *data, *words, "executor=serial", f"hydra.run.dir={folder / 'simulation'}")
    equal = scores(folder / "train") == scores(folder / "simulation")
    print(f"scores at sites and of the simulation are {'the same to the bit' if equal else 'NOT the same'}: {folder}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
