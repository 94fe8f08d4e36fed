"""Runs client fits one after another in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from typing_extensions import override

from fl_lightning.checks import within
from fl_lightning.client import Client, Fit, Scores
from fl_lightning.executors.executor import Message, Simulation


class SerialExecutor(Simulation):
    """Runs one fit at a time, here: the reference for all other executors.

    Args:
        threads: Threads that torch uses within a fit, at least 1. Beside a busy neighbour two were measured to be 8
            times slower than one, and the last bits of results depend on the number; to use all cores, take
            ``executor=processes``. None: as many as torch chooses.
    """

    def __init__(self, threads: int | None = 1) -> None:
        within("threads", threads, "[1, 1024]", or_null=True)
        self.threads = threads

    @override
    def keeps_updates(self, device: torch.device) -> bool:
        return True

    @override
    def _answers(self, tasks: Iterable[tuple[Client, Message]]) -> Iterator[Fit | Scores | Exception]:
        for client, message in tasks:
            try:
                with torch_threads(self.threads):
                    answer = self.local.answer(client, message)
            except Exception as error:  # the loop decides what a failed client means
                yield error
            else:
                yield answer


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Let torch use this many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
