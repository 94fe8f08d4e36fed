"""What do two worker processes bring on two cores? Beside a bare loop on one thread.

The bare loop, bare workers and workers do the same arithmetic; ``local.channels_last=true`` differs in the last bits.

python -m benchmarks.workers [--repeats 15] [--workers 2]
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.bare import BareRounds, BareWorkers
from benchmarks.timing import circumstances, interleaved, ratio, spread
from benchmarks.workloads import W1, W2, Rounds, Workload
from fl_lightning.executors import ProcessExecutor

#: Ratios to the bare loop on one thread, measured earlier on another machine of two cores.
PEERS = {
    "PFLlib": (1.35, 1.37),
    "FL-bench, Ray, 2 workers": (0.76, 1.46),
    "Flower, 2 Ray actors": (0.75, 1.40),
    "pfl-research, 2 processes": (0.53, 0.55),
}


def measure(workload: Workload, workers: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per round of the bare loop, of the bare loop in as many processes, and of lean fits in workers."""
    several = {
        "bare workers": BareWorkers(workload, workers),
        "workers": Rounds(workload, ProcessExecutor(workers), engine="lean"),
        "workers, channels last": Rounds(workload, ProcessExecutor(workers), engine="lean", channels_last=True),
    }
    try:
        return interleaved({"bare": BareRounds(workload), **several}, repeats)
    finally:
        for contender in several.values():
            contender.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(circumstances())
    print(f"{arguments.workers} workers of one thread; median of the ratios to the bare loop (middle half of them)")
    for workload in (W1, W2):
        seconds = measure(workload, arguments.workers, arguments.repeats)
        bare = statistics.median(seconds["bare"])
        parts = [f"{name} {ratio(seconds, name):.3f} ({spread(seconds, name)})" for name in list(seconds)[1:]]
        print(f"{workload.name} fedavg   bare {bare:.3f} s a round   {'   '.join(parts)}", flush=True)
        beside = f"{ratio(seconds, 'workers', 'bare workers'):.3f} ({spread(seconds, 'workers', 'bare workers')})"
        print(f"{workload.name} fedavg   workers beside bare workers {beside}, target 1.03", flush=True)
    others = ", ".join(f"{name} {one}, {two}" for name, (one, two) in PEERS.items())
    print(f"others, measured earlier (W1, W2): {others}")


if __name__ == "__main__":
    main()
