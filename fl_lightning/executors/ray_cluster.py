"""Runs client fits on the machines of a Ray cluster."""

from __future__ import annotations

import logging
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from fl_lightning.checks import above, at_least, within
from fl_lightning.client import Client, Fit, Scores
from fl_lightning.executors.executor import Message, Simulation, own_part
from fl_lightning.executors.processes import ATTEMPTS, FITS_AHEAD, Job
from fl_lightning.executors.tensor_pickle import dumps, loads
from fl_lightning.executors.worker import SentState, answer, answer_or_error, move_images
from fl_lightning.fit.local import LocalTraining
from fl_lightning.fit.stock import silence_lightning

log = logging.getLogger(__name__)

#: A value in the object store: bytes, and its tensors as arrays of bytes that readers on one machine share.
Packed = tuple[bytes, list[tuple[torch.dtype, tuple[int, ...], NDArray[np.uint8]]]]


class RayExecutor(Simulation):
    """Runs fits in actors on a Ray cluster: several machines, or several fits on one GPU.

    Results are those of the serial executor to the bit where the machines' processors are alike. The model of a round
    travels once to each machine, by Ray's object store. A client whose actor or machine is lost runs again elsewhere,
    and a new actor is asked for; until a machine has room for it, the others do its work.

    Args:
        address: Of a running cluster, such as ``auto`` or ``10.0.0.1:6379``. None: a cluster on this machine, for the
            time of the run.
        workers: Number of actors, at least 1. None: as many as find room in the cluster as it is at the start.
        cpus: Cores of each actor, above 0.
        gpus: Accelerators of each actor, at least 0; 0.25 puts four actors on one.
        threads: Threads that torch uses in each actor, at least 1.
        timeout: Seconds that a fit may take, above 0, before its actor is ended and the client counts as failed; None:
            any.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        cpus: float = 1.0,
        gpus: float = 0.0,
        threads: int = 1,
        timeout: float | None = None,
    ) -> None:
        at_least("workers", workers, 1, or_null=True)
        above("cpus", cpus, 0)
        at_least("gpus", gpus, 0)
        within("threads", threads, "[1, 1024]")
        above("timeout", timeout, 0, or_null=True)
        try:
            import ray
        except ImportError as error:
            raise ImportError("executor=ray needs Ray; install it with: pip install 'fl_lightning[ray]'") from error
        self.ray = ray
        self.address = address
        self.workers = workers
        self.cpus = cpus
        self.gpus = gpus
        self.threads = threads
        self.timeout = timeout
        self._free: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: dict[Any, tuple[Any, Job]] = {}

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        super().setup(local, clients)
        self._owns_ray = not self.ray.is_initialized()
        if self._owns_ray:
            self.ray.init(
                address=self.address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR
            )
        resources = self.ray.cluster_resources()
        room = int(resources.get("CPU", 0) / self.cpus)
        if self.gpus:
            room = min(room, int(resources.get("GPU", 0) / self.gpus))
        number = min(self.workers or room, len(clients))
        if number < 1:
            raise ValueError(
                f"one worker takes {self.cpus} cores and {self.gpus} GPUs, but the cluster has "
                f"{resources.get('CPU', 0):g} and {resources.get('GPU', 0):g}; lower executor.cpus or executor.gpus"
            )
        self._given = self.ray.put(pack(local)), self.ray.put(pack({client.id: client.data for client in clients}))
        self._actor = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)(RayWorker)
        self._sent = SentState()
        for _ in range(number):
            self._start_actor()

    @override
    def _answers(self, tasks: Iterable[tuple[Client, Message]]) -> Iterator[Fit | Scores | Exception]:
        source = iter(tasks)
        jobs: deque[Job] = deque()  # begun and not yet handed out, in the order of the tasks
        again: deque[Job] = deque()  # lost with their actors
        exhausted = False
        number = len(self._free) + len(self._starting)
        try:
            while True:
                while self._free and (again or not (exhausted or len(jobs) >= FITS_AHEAD * number)):
                    if again:
                        self._begin(again.popleft())
                        continue
                    task = next(source, None)
                    if task is None:
                        exhausted = True
                    else:
                        jobs.append(Job(*task))
                        self._begin(jobs[-1])
                if jobs and jobs[0].answer is not None:
                    yield jobs.popleft().answer  # type: ignore[misc]
                elif jobs or not exhausted:
                    self._collect(again)
                else:
                    return
        finally:
            for actor, _ in self._busy.values():  # left early: what still runs is of no use to anybody
                self.ray.kill(actor)
                self._start_actor()
            self._busy.clear()

    @override
    def close(self) -> None:
        if not self.ray.is_initialized():
            return
        for actor in [*self._free, *self._starting.values(), *(actor for actor, _ in self._busy.values())]:
            self.ray.kill(actor)
        self._free, self._starting, self._busy = [], {}, {}
        if self._owns_ray:
            self.ray.shutdown()

    def _start_actor(self) -> None:
        actor: Any = self._actor.remote(*self._given, self.threads)
        self._starting[actor.ready.remote()] = actor

    def _begin(self, job: Job) -> None:
        if self._sent.replace(job.message.state):
            self._state = self.ray.put(pack(job.message.state))
        actor = self._free.pop()
        job.begun = time.monotonic()
        task = pack((job.client.id, own_part(job.client, job.message), replace(job.message, state={})))
        self._busy[actor.answer.remote(self._state, task)] = actor, job

    def _collect(self, again: deque[Job]) -> None:
        """Wait until something has happened: a fit is done or overdue, an actor is ready, or one of them is lost."""
        done, _ = self.ray.wait([*self._busy, *self._starting], num_returns=1, timeout=self._patience())
        if not done:
            self._end_overdue()
            return
        reference = done[0]
        lost = (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError)
        if reference in self._starting:
            actor = self._starting.pop(reference)
            try:
                self.ray.get(reference)
            except lost:
                self._start_actor()
            else:
                self._free.append(actor)
            return
        actor, job = self._busy.pop(reference)
        try:
            result = answer_or_error(*unpack(self.ray.get(reference)))
        except lost as error:
            self._start_actor()
            job.deaths += 1
            if job.deaths < ATTEMPTS:
                log.warning("the actor of client %s is lost; its work is done again", job.client.name)
                again.append(job)
            else:
                message = f"its actor was lost {job.deaths} times, at last: {error}"
                job.answer = RuntimeError(message)
            return
        self._free.append(actor)
        job.answer = result

    def _patience(self) -> float | None:
        """Return the seconds until the first fit that runs is overdue; None if none will be."""
        if self.timeout is None or not self._busy:
            return None
        first = min(job.begun for _, job in self._busy.values())
        return max(0.0, first + self.timeout - time.monotonic())

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for reference, (actor, job) in list(self._busy.items()):
            if self.timeout is not None and now - job.begun >= self.timeout:
                del self._busy[reference]
                self.ray.kill(actor)
                self._start_actor()
                job.answer = TimeoutError(f"it took longer than executor.timeout={self.timeout} seconds")


class RayWorker:
    """Runs fits in an actor.

    Args:
        local: What runs a fit, packed.
        data: The data of every client by id, packed.
        threads: Threads that torch uses.
    """

    def __init__(self, local: Packed, data: Packed, threads: int) -> None:
        torch.set_num_threads(threads)
        silence_lightning()
        self.local: LocalTraining = unpack(local)
        # Images are only read, so that all actors of a machine may share them.
        self.data: Mapping[int, Any] = unpack(data, copy=False)
        move_images(self.data, self.local.device)

    def ready(self) -> bool:
        """Say that the actor is there."""
        return True

    def answer(self, state: Packed, task: Packed) -> Packed:
        """Run one fit or exam."""
        client_id, own, message = unpack(task)
        client = Client(client_id, self.data[client_id], *own)
        return pack(answer(self.local, client, replace(message, state=unpack(state))))


def pack(value: Any) -> Packed:
    """Take a value apart into bytes and arrays: Ray lets processes of one machine share arrays, but not tensors."""
    data, tensors = dumps(value)
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8).numpy() for tensor in tensors]
    return data, [(tensor.dtype, tuple(tensor.shape), array) for tensor, array in zip(tensors, flat, strict=True)]


def unpack(packed: Packed, copy: bool = True) -> Any:
    """Put a value together again.

    Args:
        packed: What :func:`pack` gave.
        copy: Whether its tensors are copies. Else they may be shared with other processes, and must not be written to.
    """
    data, arrays = packed
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        flat = [torch.from_numpy(array.copy() if copy else array) for _, _, array in arrays]
    tensors = [
        one.view(dtype).view(shape) if len(one) else torch.empty(shape, dtype=dtype)
        for (dtype, shape, _), one in zip(arrays, flat, strict=True)
    ]
    return loads(data, tensors)
