"""How many clients a second does one GPU train? Eager, as a CUDA graph, and a hundred clients at once.

    python -m benchmarks.gpu [--models lenet5 resnet18] [--repeats 9]

Clients per second and ratios to a bare loop on the same GPU in the same run, beside the floor: bytes, operations and
kernel launches of a step. Needs a CUDA GPU; torch 2.11 and Python 3.12 will do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bare import BareRounds
from benchmarks.timing import circumstances, interleaved, ratio
from benchmarks.workloads import LR, MOMENTUM, Rounds, Workload
from fl_lightning.executors import CohortExecutor, SerialExecutor


class GraphRounds(BareRounds):
    """The bare loop with its step recorded once as a CUDA graph: one launch a step, for every client."""

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload, device="cuda")
        x, y = self.data[0]
        self.x, self.y = x[: workload.batch_size].clone(), y[: workload.batch_size].clone()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, foreach=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # as CUDA graphs want it: a few steps outside of the default stream first
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)
        functional.cross_entropy(self.model(self.x), self.y).backward()
        self.optimizer.step()

    def train(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Replay the graph for every batch; a last batch that is not full is left out, for shapes are fixed."""
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()
        for _ in range(self.workload.epochs):
            order = torch.randperm(len(y), generator=self.generator).to(y.device)
            for index in order.split(self.workload.batch_size):
                if len(index) == self.workload.batch_size:
                    self.x.copy_(x[index])
                    self.y.copy_(y[index])
                    self.graph.replay()


def synchronized(contender: Callable[[], None]) -> Callable[[], None]:
    """A contender whose time ends when the GPU has finished."""

    def run() -> None:
        contender()
        torch.cuda.synchronize()

    return run


def floor(workload: Workload) -> str:
    """Operations, bytes of weights and kernel launches of one step, as text."""
    bare = BareRounds(workload, device="cuda")
    x, y = (tensor[: workload.batch_size] for tensor in bare.data[0])
    optimizer = torch.optim.SGD(bare.model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(bare.model(x), y).backward()
        optimizer.step()

    step()
    with FlopCounterMode(display=False) as counter:
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    launches = sum(1 for event in record.events() if "LaunchKernel" in event.name)
    weights = sum(p.numel() * p.element_size() for p in bare.model.parameters())
    return f"{counter.get_total_flops() / 1e6:.1f} MFLOP, {weights / 1e6:.2f} MB of weights, {launches} launches a step"


def measure(workload: Workload, repeats: int) -> None:
    """Print the table of one workload."""
    contenders: dict[str, Callable[[], None]] = {
        "bare": BareRounds(workload, device="cuda"),
        "graph": GraphRounds(workload),
        "lean": Rounds(workload, SerialExecutor(), engine="lean", device="cuda"),
        "stock": Rounds(workload, SerialExecutor(), engine="stock", device="cuda"),
        "cohort": Rounds(workload, CohortExecutor(workload.per_round), device="cuda"),
        "cohort, graph": Rounds(workload, CohortExecutor(workload.per_round, graph=True), device="cuda"),
    }
    if workload.model == "resnet18":
        contenders["lean bf16"] = Rounds(workload, SerialExecutor(), device="cuda", precision="bf16-mixed")
    seconds = interleaved({name: synchronized(one) for name, one in contenders.items()}, repeats)
    print(f"{workload.name} {workload.model}: {floor(workload)}")
    for name in contenders:
        per_second = workload.per_round / statistics.median(seconds[name])
        print(f"  {name:13s} {per_second:9.0f} clients/s   {1 / ratio(seconds, name):6.2f} x bare", flush=True)
    print(f"  memory on the device: at most {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["lenet5", "resnet18"])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a CUDA GPU, and there is none here")
    print(circumstances())
    for model in arguments.models:
        measure(Workload("W1", clients=20, examples=500, per_round=4, model=model), arguments.repeats)
        measure(Workload("W2", clients=100, examples=50, per_round=100, model=model), arguments.repeats)


if __name__ == "__main__":
    main()
