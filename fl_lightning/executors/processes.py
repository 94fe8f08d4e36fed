"""Runs client fits in worker processes on this machine."""

from __future__ import annotations

import logging
import math
import multiprocessing
import multiprocessing.util
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Literal

import torch
from typing_extensions import override

from fl_lightning.checks import above, at_least, one_of, within
from fl_lightning.client import Client, Fit, Scores
from fl_lightning.executors.executor import Message, Simulation
from fl_lightning.executors.worker import LANES, Worker
from fl_lightning.fit.local import LocalTraining

log = logging.getLogger(__name__)

StartMethod = Literal["auto", "fork", "spawn"]

#: How often a client's fit is begun before a client whose worker dies each time counts as failed.
ATTEMPTS = 3

#: Fits that take less than this many seconds are given out one ahead, so that a worker that has finished does not wait
#: for its next one: 4 percent of a round of fits of 12 ms each. Longer ones are not, for at the end of a round one
#: worker might then have two left and another none.
SHORT_FIT = 0.05

#: Finished fits that may wait for an earlier one, per worker: what a slow client may cost in memory.
FITS_AHEAD = 4


#: Seconds after which a fit that has not ended is said to be still running.
SILENCE = 60.0


@dataclass
class Job:
    """One client's task, from its beginning to its end.

    Attributes:
        client: The client.
        message: What is sent to it.
        begun: When it was the first in its worker's line, as far as that is known here.
        deaths: How many workers died of it.
        said: Whether it was said to be still running.
        answer: What came of it.
    """

    client: Client
    message: Message
    begun: float = 0.0
    deaths: int = 0
    said: bool = False
    answer: Fit | Scores | Exception | None = None


class ProcessExecutor(Simulation):
    """Runs several fits at a time, each in a worker process that lives as long as the federation.

    Results are those of :class:`~fl_lightning.executors.serial.SerialExecutor` to the bit, whatever the number of
    workers: a fit depends on the seed, the round and the client alone, outcomes come in the order of the tasks, and
    every worker uses as many threads as the serial executor. A worker that dies (killed, out of memory) is replaced and
    its client run again. Workers ignore Ctrl-C, and end with this process however it ends.

    Args:
        workers: Number of processes, at least 1. None: one for each core that this process may use; with GPUs, one for
            each of them.
        threads: Threads that torch uses in each, at least 1. More than there are free cores makes everything several
            times slower.
        start_method: ``fork`` starts at once and shares the data with this process. ``spawn`` starts Python afresh, as
            GPUs need, and as more than one thread needs. ``auto`` forks where that is safe.
        timeout: Seconds that a fit may take, above 0, before its worker is ended and the client counts as failed; None:
            any.
    """

    def __init__(
        self,
        workers: int | None = None,
        threads: int = 1,
        start_method: StartMethod = "auto",
        timeout: float | None = None,
    ) -> None:
        at_least("workers", workers, 1, or_null=True)
        within("threads", threads, "[1, 1024]")
        one_of("start_method", start_method, StartMethod)
        above("timeout", timeout, 0, or_null=True)
        self.workers = workers
        self.threads = threads
        self.start_method = start_method
        self.timeout = timeout
        self._workers: dict[int, Worker] = {}
        self._seconds = math.inf  # of the fit that ended last

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        super().setup(local, clients)
        self._data = {client.id: client.data for client in clients}
        method = self.start_method
        if method == "auto":
            # A forked process cannot use a GPU that its parent has touched, nor a pool of threads that it has started.
            safe = sys.platform == "linux" and torch.cuda.device_count() == 0 and self.threads == 1
            method = "fork" if safe else "spawn"
        self._context = multiprocessing.get_context(method)
        self._num_gpus = torch.cuda.device_count() if local.device.type == "cuda" else 0
        self._size = min(self.workers or self._num_gpus or usable_cores(), len(clients))
        if self._size > self._num_gpus > 0 and not shares_gpus():
            log.warning(
                "%d workers take turns on %d GPUs; to run them side by side start MPS: nvidia-cuda-mps-control -d",
                self._size,
                self._num_gpus,
            )
        # Runs before multiprocessing waits for its children at exit, in case nobody calls `close`.
        self._at_exit = multiprocessing.util.Finalize(self, end_all, args=(self._workers,), exitpriority=100)
        self._fill_places()

    @override
    def keeps_updates(self, device: torch.device) -> bool:
        return device.type == "cpu"

    @override
    def _answers(self, tasks: Iterable[tuple[Client, Message]]) -> Iterator[Fit | Scores | Exception]:
        self._fill_places()
        source = iter(tasks)
        jobs: deque[Job] = deque()  # begun and not yet handed out, in the order of the tasks
        lines: dict[int, deque[Job]] = {place: deque() for place in self._workers}  # what each worker has before it
        exhausted = False
        try:
            while True:
                while not exhausted and len(jobs) < FITS_AHEAD * self._size:
                    place = min(lines, key=lambda place: len(lines[place]))
                    if len(lines[place]) >= (LANES if self._seconds < SHORT_FIT else 1):
                        break
                    task = next(source, None)
                    if task is None:
                        exhausted = True
                    else:
                        jobs.append(Job(*task))
                        self._begin(place, jobs[-1], lines[place])
                if jobs and jobs[0].answer is not None:
                    yield jobs.popleft().answer  # type: ignore[misc]
                elif jobs:
                    self._collect(lines)
                else:
                    return
        finally:
            # Left early, by an error or Ctrl-C: what is still running is of no use to anybody.
            for place, line in lines.items():
                if line:
                    self._workers.pop(place).close(kill=True)

    @override
    def close(self) -> None:
        end_all(self._workers)

    def _fill_places(self) -> None:
        for place in range(self._size):
            if place not in self._workers:
                self._start_worker(place)

    def _start_worker(self, place: int) -> None:
        environment = {}
        if self._num_gpus > 1:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(index) for index in range(self._num_gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = names[place % self._num_gpus]
        siblings = list(self._workers.values())
        self._workers[place] = Worker(self._context, self.local, self._data, self.threads, environment, siblings)

    def _begin(self, place: int, job: Job, line: deque[Job]) -> None:
        job.begun = time.monotonic()
        line.append(job)
        self._workers[place].start(job.client, job.message)

    def _collect(self, lines: dict[int, deque[Job]]) -> None:
        """Wait until at least one worker has finished, died or run out of time, and take what it has."""
        places = {self._workers[place].connection: place for place, line in lines.items() if line}
        for connection in wait(list(places), self._patience(lines)):
            place = places[connection]  # type: ignore[index]
            try:
                result = self._workers[place].result()
            except EOFError:
                self._worker_died(place, lines[place])
                continue
            job = lines[place].popleft()
            now = time.monotonic()
            self._seconds = now - job.begun
            if lines[place]:
                lines[place][0].begun = now
            job.answer = result
        for place, line in lines.items():
            seconds = time.monotonic() - line[0].begun if line else 0.0
            if self.timeout is not None and seconds >= self.timeout:
                job, rest = self._replace(place, line)
                job.answer = TimeoutError(f"it took longer than executor.timeout={self.timeout} seconds")
                for one in rest:
                    self._begin(place, one, line)
            elif line and seconds >= SILENCE and not line[0].said:
                line[0].said = True
                log.warning("client %s has been at work for %.0f seconds", line[0].client.name, seconds)

    def _patience(self, lines: dict[int, deque[Job]]) -> float | None:
        """Return the seconds until a fit that runs will have to be ended or spoken of; None if there is none."""
        heads = [line[0] for line in lines.values() if line]
        moments = [job.begun + SILENCE for job in heads if not job.said]
        if self.timeout is not None:
            moments += [job.begun + self.timeout for job in heads]
        return max(0.0, min(moments) - time.monotonic()) if moments else None

    def _replace(self, place: int, line: deque[Job]) -> tuple[Job, list[Job]]:
        """End a worker and start another; return what it was at, and what it had not begun."""
        self._workers.pop(place).close(kill=True)
        self._start_worker(place)
        job, *rest = line
        line.clear()
        return job, rest

    def _worker_died(self, place: int, line: deque[Job]) -> None:
        reason = self._workers[place].exit_reason
        job, rest = self._replace(place, line)
        job.deaths += 1
        if job.deaths < ATTEMPTS:
            log.warning("the worker of client %s died (%s); its work is done again", job.client.name, reason)
            rest.insert(0, job)
        else:
            message = (
                f"its worker process died {job.deaths} times, at last: {reason}; "
                "SIGKILL mostly means that memory ran out: try fewer executor.workers"
            )
            job.answer = RuntimeError(message)
        for one in rest:
            self._begin(place, one, line)


def end_all(workers: dict[int, Worker]) -> None:
    """End all workers; none may be at work."""
    while workers:
        workers.popitem()[1].close(kill=False)


def shares_gpus() -> bool:
    """Tell whether NVIDIA's Multi-Process Service is there, by the pipe that its control daemon makes."""
    return os.path.exists(os.path.join(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control"))


def usable_cores() -> int:
    """Return the number of cores that this process may run on, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
