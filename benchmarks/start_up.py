"""How long from the end of the imports to the first round, and how long is that round?

python -m benchmarks.start_up
"""

from __future__ import annotations

import argparse
import time

import torch

from benchmarks.timing import circumstances
from benchmarks.workloads import W2, Rounds
from fl_lightning.executors import Executor, ProcessExecutor, SerialExecutor


def main() -> None:
    """Print the times; the workload's random images are made before, for a data set would be read."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    print(circumstances())
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
