"""Sites that another framework connects: requests travel in its messages, and through a door to a site's process.

The framework's process beside a site imports no torch and knows no data: it hands bytes on to the site's process, which
stays warm. A request is handed over once and then asked after by its hash, so no call lasts long, and one that is lost
is made again without the work being done twice.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import secrets
import shlex
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

POLL = 5.0
"""Seconds that a door keeps a caller waiting for an answer; then it is asked again."""

PAUSE = 1.0
"""Seconds until a call that failed is made again."""

WORKING, UNKNOWN = b"", b"?"
"""What a door says in place of an answer: it is not there yet; of such a request nothing is known here."""

Digest = bytes
"""SHA-256 of a request, which stands for it once it has been handed over; a request itself is longer."""

PAST = 100
"""Requests that a door remembers; one that comes again after the next is late, and nobody waits for its answer."""

MARK = 16
"""Bytes before a request by which it differs from an equal one: that is done, too."""


class Carrier(Protocol):
    """What another framework does for us."""

    def names(self) -> Sequence[str]:
        """Return the names of the sites that are connected."""

    def carry(self, site: str, message: bytes) -> bytes:
        """Bring a message to a site's door and return what it says; raises whatever went wrong."""


class Door:
    """Where the framework's process beside a site hands in requests: at the loopback, for who can read the token.

    The address is left in the folder. There is no pickle: bytes alone are read. Each call is heard by a thread of its
    own: a caller who says nothing keeps nobody waiting.

    Args:
        name: Of the site.
        folder: Of the site.
        token: Of the site; a caller shows that it knows it.
    """

    def __init__(self, name: str, folder: Path, token: str) -> None:
        self._listener = Listener(("127.0.0.1", 0), backlog=8)
        self._key = token.encode()
        self._file = folder / "door"
        self._file.write_text(f"{name}\n{self._listener.address[1]}\n")
        self._change = threading.Condition()
        self._digest: Digest = b""
        self._past: deque[Digest] = deque(maxlen=PAST)
        self._request: bytes | None = None
        self._answer: bytes | None = None
        self._fetched = False
        self._closed = False
        threading.Thread(target=self._listen, daemon=True).start()

    def next(self) -> bytes:
        """Wait for a request; it must be answered before the next.

        Raises:
            EOFError: If the door is closed.
        """
        with self._change:
            while self._request is None or self._answer is not None:
                if self._closed:
                    raise EOFError("the door is closed")
                # Not for good at once: a signal is only looked at between two waits.
                self._change.wait(1.0)
            return self._request

    def answer(self, answer: bytes, last: bool = False) -> None:
        """Lay the answer ready; ``last`` waits until it is fetched, for a short while."""
        with self._change:
            self._answer, self._fetched = answer, False
            self._change.notify_all()
            if last:
                self._change.wait_for(lambda: self._fetched, 4 * POLL)

    def close(self) -> None:
        """Answer no more."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._file.unlink(missing_ok=True)
        self._listener.close()

    def _listen(self) -> None:
        while not self._closed:
            try:
                call = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    log.warning("a call at the door failed: %s", error)
                continue
            threading.Thread(target=self._hear, args=(call,), daemon=True).start()

    def _hear(self, call: Connection) -> None:
        try:
            with call:
                deliver_challenge(call, self._key)
                answer_challenge(call, self._key)
                call.send_bytes(self._take(call.recv_bytes()))
        except (OSError, EOFError, AuthenticationError) as error:
            if not self._closed:
                log.warning("a call at the door failed: %s", error or type(error).__name__)

    def _take(self, message: bytes) -> bytes:
        short = len(message) == hashlib.sha256().digest_size
        digest = message if short else hashlib.sha256(message).digest()
        with self._change:
            if digest != self._digest:
                if short:
                    return UNKNOWN
                if digest in self._past:
                    return WORKING
                if not self._change.wait_for(lambda: self._request is None or self._answer is not None, POLL):
                    return WORKING  # still at the request before, which nobody waits for any more
                self._past.append(self._digest)
                self._digest, self._request, self._answer = digest, message[MARK:], None
                self._change.notify_all()
            if not self._change.wait_for(lambda: self._answer is not None, POLL) or self._answer is None:
                return WORKING
            self._fetched = True
            self._change.notify_all()
            return self._answer


def knock(name: str, folder: Path, message: bytes) -> bytes:
    """Hand a message in at a site's door; called by the framework's process beside the site.

    Args:
        name: As which the framework knows the site.
        folder: Of the site.
        message: A request or the hash of one.

    Returns:
        The answer, or what stands for none yet.

    Raises:
        ConnectionError: If the site's process is not there.
        PermissionError: If the site has another name.
    """
    try:
        known, port = (folder / "door").read_text().split()
        token = (folder / "token").read_text().strip()
        with Client(("127.0.0.1", int(port)), authkey=token.encode()) as door:
            if known != name:
                raise PermissionError(f"the site in {folder} is {known}, not {name}; give both one name")
            door.send_bytes(message)
            return door.recv_bytes()
    except (FileNotFoundError, ConnectionError, AuthenticationError, EOFError) as error:
        raise ConnectionError(
            f"site {name} is not up ({error or type(error).__name__}); start it: python -m fl_lightning.site --hosted "
            f"--name {name} --folder {folder} data=..."
        ) from error


class Relay:
    """The server's way to sites through another framework, within whose server it runs.

    Args:
        sites: How many sites take part, or their names.
        patience: Seconds of silence after which a site is missing, at least 15.

    Raises:
        ValueError: If no framework has started this process.
    """

    carrier: Carrier | None = None
    """What the framework does; set by :func:`run_command`."""

    def __init__(self, sites: int | list[str], patience: float) -> None:
        if Relay.carrier is None:
            raise ValueError(
                "executor=hosted must be started by NVFlare or Flower (docs/sites.md); take executor=sites without them"
            )
        if patience < 3 * POLL:
            raise ValueError(f"executor.patience must be at least {3 * POLL:g} with executor=hosted, got {patience:g}")
        self._names = None if isinstance(sites, int) else list(sites)
        self._number = sites if isinstance(sites, int) else len(sites)
        self._carrier = Relay.carrier
        self._there: list[str] = []
        self._gathered = 0
        self._heard: dict[str, float] = {}
        self._tickets: dict[str, int] = {}

    def gather(self) -> list[str]:
        """Return the names of the sites that are there; waits for one more than at the last call, or for all."""
        told = 0.0
        while len(self._there) < min(self._gathered + 1, self._number):
            if time.monotonic() - told > 30.0:
                told = time.monotonic()
                log.info("%d of %d sites are here%s", len(self._there), self._number, _listed(self._there))
            for name in self._carrier.names():
                if name in self._there or (self._names is not None and name not in self._names):
                    continue
                if len(self._there) < self._number:
                    self._there.append(name)
                    self._heard[name] = time.monotonic()
            time.sleep(0.0 if self._there else 0.2)
        self._gathered = len(self._there)
        return list(self._there)

    def release(self, site: str) -> None:
        """Give the place of a site, which has ended, to another, or to itself when it comes again."""
        self._there.remove(site)
        self._gathered = len(self._there)
        time.sleep(PAUSE)

    def ask(self, site: str, request: bytes) -> Future[bytes]:
        """Send a request to a site, which answers one at a time."""
        self._tickets[site] = ticket = self._tickets.get(site, 0) + 1
        answer: Future[bytes] = Future()
        threading.Thread(target=self._fetch, args=(site, request, ticket, answer), daemon=True).start()
        return answer

    def withdraw(self, site: str) -> None:
        """Forget the request that a site has not answered."""
        self._tickets[site] = self._tickets.get(site, 0) + 1

    def silence(self, site: str) -> float:
        """Return the seconds for which a site has not been heard of."""
        return time.monotonic() - self._heard[site]

    def close(self) -> None:
        """Let all sites go; they wait for the next server."""
        for site in self._tickets:
            self.withdraw(site)

    def _fetch(self, site: str, request: bytes, ticket: int, answer: Future[bytes]) -> None:
        request = secrets.token_bytes(MARK) + request
        message, told = request, False
        while self._tickets[site] == ticket:
            try:
                said = self._carrier.carry(site, message)
            except Exception as error:  # of whatever kind the framework's are; the executor's patience decides
                if not told:
                    told = True
                    log.warning("site %s is not reached, and asked again: %s", site, error or type(error).__name__)
                message = request
                time.sleep(PAUSE)
                continue
            self._heard[site] = time.monotonic()
            if said == UNKNOWN:
                message = request
            elif said == WORKING:
                message = hashlib.sha256(request).digest()
            else:
                if self._tickets[site] == ticket:
                    answer.set_result(said)
                return


def _listed(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


@contextmanager
def carried_by(carrier: Carrier) -> Iterator[None]:
    """Let runs within the block reach their sites through a framework."""
    before, Relay.carrier = Relay.carrier, carrier
    try:
        yield
    finally:
        Relay.carrier = before


def run_command(command: str, carrier: Carrier) -> None:
    """Run a command line within a framework's server.

    Args:
        command: ``train.py executor=hosted …`` or ``personalize.py checkpoint=RUN executor=hosted …``.
        carrier: What the framework does.

    Raises:
        ValueError: If it is no such command, or does not go by ``executor=hosted``.
        KeyboardInterrupt: If the run was stopped.
    """
    # Imported here: torch takes seconds to load, and who asks for sites has none. By name: NVFlare sends along with a
    # job whatever its files import.
    run_script = importlib.import_module("fl_lightning.notebook").run_script

    script, *words = shlex.split(command)
    hosted = "executor=hosted" in words or any(word.startswith("resume=") for word in words)
    if script not in ("train.py", "personalize.py") or not hosted:
        raise ValueError(f"the command must be train.py or personalize.py with executor=hosted, got {command!r}")
    ended: Future[object] = Future()

    def run() -> None:
        try:
            ended.set_result(run_script(script.removesuffix(".py"), words))
        except BaseException as error:
            ended.set_exception(error)

    # A run in the main thread would take the signal with which a host ends it for the wish to finish the round.
    with carried_by(carrier):
        threading.Thread(target=run, daemon=True).start()
        ended.result()
