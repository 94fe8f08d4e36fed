"""Client fits one after another in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from typing_extensions import override

from fl_lightning.client import Broadcast, Client
from fl_lightning.executors.executor import Executor, Outcome


class SerialExecutor(Executor):
    """Runs one fit at a time, here: the reference for all other executors."""

    @override
    def run(self, tasks: Iterable[tuple[Client, Broadcast]]) -> Iterator[Outcome]:
        for client, broadcast in tasks:
            try:
                fit = self.local.fit(client, broadcast)
            except Exception as error:  # noqa: BLE001 - the loop decides what a failed client means
                yield Outcome(client, error=error)
            else:
                yield Outcome(client, fit)
