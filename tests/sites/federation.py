"""A server and its sites in one process: threads that call a service on the loopback, as processes would."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from fl_lightning.run.training import Federation
from fl_lightning.sites.process import read_token, serve
from fl_lightning.sites.service import SERVICE
from fl_lightning.sites.site import Site
from fl_lightning.sites.wire import Line
from tests.federations import federation

NAMES = ("ann", "bob", "cid")

#: Threads share torch's random generator, so sites in threads of one process work one at a time.
ONE_AT_A_TIME = threading.Lock()


class LockedSite(Site):
    def answer(self, *args: Any) -> bytes:
        with ONE_AT_A_TIME:
            return super().answer(*args)


class SiteThread:
    """One site that serves one run, until it ends by itself; ``error`` says why."""

    def __init__(
        self,
        port: int,
        root: Path,
        folder: Path,
        name: str,
        *words: str,
        file: str = "",
        once: bool = True,
        patience: float = 25.0,
        data: Sequence[str] = (),
        credentials: grpc.ChannelCredentials | None = None,
        **options: Any,
    ) -> None:
        self.line = Line(f"127.0.0.1:{port}", SERVICE, timeout=30.0, patience=patience, credentials=credentials)
        data = data or ["data=folder", f"data.root={root / (file or name)}.npz"]
        self.folder, self.once = folder / name, once
        self.site = LockedSite(name, self.folder, [*data, *words], trust=["tests"], **options)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            serve(self.site, self.line, read_token(self.folder), self.once)
        except BaseException as error:
            self.error = error

    def join(self, seconds: float = 30.0) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"site {self.site.name} hangs"
        self.line.close()


@contextmanager
def sites(port: int, root: Path, folder: Path, names: Sequence[str] = NAMES, **options) -> Iterator[list[SiteThread]]:
    threads = [SiteThread(port, root, folder, name, **options) for name in names]
    try:
        yield threads
    finally:
        for thread in threads:
            thread.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def at_sites(root: Path, folder: Path, port: int, *words: str, number: int = 3) -> Federation:
    """Assemble a tiny run whose clients are at sites; waits until they are there. The server reads no data."""
    own = ["executor=sites", f"executor.listen=127.0.0.1:{port}", f"executor.sites={number}"]
    return federation(root / "nothing", folder, *own, "data.classes=3", *words)


def run_at_sites(root: Path, folder: Path, port: int, *words: str, number: int = 3, **training: Any) -> Federation:
    """Run a tiny federation to its end, whatever that is; ``training`` takes the place of what sites are sent."""
    run = at_sites(root, folder, port, *words, number=number)
    try:
        run.loop.executor.recipe = {**run.loop.executor.recipe, **training}
        run.fit()
    finally:
        run.loop.executor.disconnect()
    return run
