"""What does Lightning cost? One worker, one thread, beside a bare loop that does the same.

python -m benchmarks.overhead [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks.bare import BareRounds
from benchmarks.timing import Contender, circumstances, interleaved, ratio, spread
from benchmarks.workloads import METHODS, W1, W2, Rounds, Workload
from fl_lightning.executors import SerialExecutor


def measure(workload: Workload, method: str, repeats: int, cpu: bool) -> dict[str, list[float]]:
    """Seconds per round of the bare loop, the lean fit, and Lightning's own loop."""
    contenders: dict[str, Contender] = {
        "bare": BareRounds(workload, method),
        "lean": Rounds(workload, SerialExecutor(), method, "lean"),
        "stock": Rounds(workload, SerialExecutor(), method, "stock"),
    }
    return interleaved(contenders, repeats, clock=time.process_time if cpu else time.perf_counter)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2"], choices=["W1", "W2"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--cpu", action="store_true", help="processor time instead of wall time: for a busy machine")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(circumstances())
    print("processor time" if arguments.cpu else "wall time", end="; ")
    print("one worker, one thread; median of the ratios to the bare loop just before (middle half of them)")
    for workload in (W1, W2):
        if workload.name not in arguments.workloads:
            continue
        for method in arguments.methods:
            seconds = measure(workload, method, arguments.repeats, arguments.cpu)
            bare = statistics.median(seconds["bare"])
            parts = [f"{name} {ratio(seconds, name):.3f} ({spread(seconds, name)})" for name in ("lean", "stock")]
            print(f"{workload.name} {method:8s} bare {bare:.3f} s a round   {'   '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
