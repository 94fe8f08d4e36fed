"""How long is the start of ``train.py`` beside the imports alone, and the first round beside the second?

    python -m benchmarks.start_up [--repeats 5]

The start is imports, composition, data and model: a run of no rounds, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch

from benchmarks.timing import circumstances, interleaved, ratio, spread
from benchmarks.workloads import W2, Rounds
from fl_lightning.executors import Executor, ProcessExecutor, SerialExecutor

IMPORTS = "import lightning, torchvision"
COMMAND = "from fl_lightning.run.command_line import train; train()"


def starts(repeats: int) -> dict[str, list[float]]:
    """Seconds of the imports, and of the default run without rounds, each time in a new process."""

    def process(code: str, *words: str) -> Callable[[], None]:
        def run() -> None:
            with TemporaryDirectory() as folder:  # no run is written over another
                place = [f"hydra.run.dir={folder}/run"] if words else []
                subprocess.run([sys.executable, "-c", code, *words, *place], check=True, stdout=subprocess.DEVNULL)

        return run

    return interleaved(
        {"imports": process(IMPORTS), "train.py": process(COMMAND, "loop.rounds=0", "dashboard=null")}, repeats
    )


def main() -> None:
    """Print the times; the workload's random images are made before, for a data set would be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(circumstances())
    seconds = starts(arguments.repeats)
    print(
        f"{IMPORTS} {statistics.median(seconds['imports']):.2f} s, train.py loop.rounds=0 "
        f"{ratio(seconds, 'train.py', 'imports'):.3f} ({spread(seconds, 'train.py', 'imports')}), target 1.3"
    )
    executors: dict[str, Executor] = {"serial": SerialExecutor(), "2 processes": ProcessExecutor(2)}
    for name, executor in executors.items():
        start = time.perf_counter()
        W2.pool()
        data = time.perf_counter() - start
        start = time.perf_counter()
        rounds = Rounds(W2, executor)
        ready = time.perf_counter() - start - data
        start = time.perf_counter()
        rounds()
        first = time.perf_counter() - start
        start = time.perf_counter()
        rounds()
        second = time.perf_counter() - start
        print(f"{name:12s} set-up {ready:.2f} s   first round {first:.2f} s   second round {second:.2f} s")
        rounds.close()


if __name__ == "__main__":
    main()
