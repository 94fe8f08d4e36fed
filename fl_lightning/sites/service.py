"""The server's service: sites call it, ask for work, and hand in answers. It never calls them."""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

import grpc

import fl_lightning
from fl_lightning.sites.frame import MAX_BYTES, MessageError, decode, encode
from fl_lightning.sites.wire import Notes, listen

log = logging.getLogger(__name__)

SERVICE = "fl_lightning.Sites"
POLL = 10.0
"""Seconds that a site waits for work within one call; then it calls again."""

BEAT = 5.0
"""Seconds between two signs of life of a site, at most."""


class Host(Protocol):
    """What brings requests to sites and their answers back: the own service here, or another framework."""

    def gather(self) -> list[str]:
        """Return the names of the sites that are there; waits for one more than at the last call, or for all."""

    def release(self, site: str) -> None:
        """Give the place of a site, which has ended, to another."""

    def ask(self, site: str, request: bytes) -> Future[bytes]:
        """Send a request to a site, which answers one at a time."""

    def withdraw(self, site: str) -> None:
        """Forget the request that a site has not answered."""

    def silence(self, site: str) -> float:
        """Return the seconds for which a site has not been heard of."""

    def close(self) -> None:
        """Let all sites go."""


@dataclass
class Seat:
    """What the service knows of a site: who it is, and what it has before it.

    Attributes:
        token: SHA-256 of the token that it has shown.
        session: Of the process that speaks for it now.
        past: Sessions of processes whose place that one has taken.
        heard: When it was heard last.
        ticket: Number of the request before it.
        request: The request, until it is answered.
        answer: Takes the answer.
        waits: Whether it waits for work in a call now.
    """

    token: str
    session: str = ""
    past: set[str] = field(default_factory=set)
    heard: float = 0.0
    ticket: int = 0
    request: bytes | None = None
    answer: Future[bytes] = field(default_factory=Future)
    waits: bool = False


class SiteService:
    """Waits for sites, gives each the requests that are for it, and takes their answers.

    A site is who it says it is if it shows the token that is known of it: the one whose SHA-256 is given here, or else
    the first one seen. With client certificates its name must be the certificate's common name, too. A process that
    joins for a site takes the place of the one before it, which may say nothing any more.

    Args:
        address: ``host:port`` to listen at.
        sites: How many sites take part; or their names; or the SHA-256 of their tokens by name.
        credentials: For TLS; None listens in the clear.
        certified: Whether sites show certificates.
        max_bytes: The longest message.
        patience: Seconds of silence after which a site is missing; it gives signs of life four times as often.
    """

    def __init__(
        self,
        address: str,
        sites: int | Sequence[str] | Mapping[str, str],
        credentials: grpc.ServerCredentials | None = None,
        certified: bool = False,
        max_bytes: int = MAX_BYTES,
        patience: float = 60.0,
    ) -> None:
        self.beat = min(BEAT, patience / 4)
        self.names = None if isinstance(sites, int) else list(sites)
        self.number = sites if isinstance(sites, int) else len(sites)
        self.certified, self.max_bytes = certified, max_bytes
        self.seats = {name: Seat(token) for name, token in sites.items()} if isinstance(sites, Mapping) else {}
        self._there: list[str] = []
        self._gathered = 0
        self._change = threading.Condition()
        self._closed = False
        calls = {"Join": self._join, "Next": self._next, "Beat": self._beat}
        # Every site may wait for work in one call and give a sign of life in another.
        workers = 2 * self.number + 4
        self._server, self.port = listen(SERVICE, calls, address, credentials, workers, max_bytes)

    def gather(self) -> list[str]:
        """Return the names of the sites that are there; waits for one more than at the last call, or for all."""
        with self._change:
            wanted = min(self._gathered + 1, self.number)
            while len(self._there) < wanted:
                log.info(
                    "%d of %d sites are here%s; listening at port %d", len(self._there), self.number,
                    f" ({', '.join(self._there)})" if self._there else "", self.port,
                )  # fmt: skip
                self._change.wait(30.0)
            self._gathered = len(self._there)
            return list(self._there)

    def release(self, site: str) -> None:
        """Give the place of a site, which has ended, to another."""
        with self._change:
            self._there.remove(site)
            self._gathered -= 1  # who came meanwhile is still to be gathered

    def ask(self, site: str, request: bytes) -> Future[bytes]:
        """Send a request to a site, which answers one at a time."""
        with self._change:
            seat = self.seats[site]
            seat.ticket += 1
            seat.request, seat.answer = request, Future()
            self._change.notify_all()
            return seat.answer

    def withdraw(self, site: str) -> None:
        """Forget the request that a site has not answered."""
        with self._change:
            self.seats[site].request = None

    def silence(self, site: str) -> float:
        """Return the seconds for which a site has not been heard of."""
        return time.monotonic() - self.seats[site].heard

    def close(self) -> None:
        """Let all sites go; they wait for the next server."""
        with self._change:
            self._closed = True
            self._change.notify_all()
            self._change.wait_for(lambda: not any(seat.waits for seat in self.seats.values()), timeout=2.0)
        self._server.stop(grace=1.0).wait()

    def _join(self, request: bytes, notes: Notes, context: grpc.ServicerContext) -> tuple[bytes, Notes]:
        header, _ = decode(request, (), self.max_bytes)
        name, token, version = (header.get(key) for key in ("name", "token", "version"))
        if not (isinstance(name, str) and name and isinstance(token, str) and token):
            raise MessageError("a site must say its name and its token")
        if version != fl_lightning.__version__:
            raise PermissionError(
                f"the server runs fl_lightning {fl_lightning.__version__}, the site {version}; install one version"
            )
        if self.certified:
            shown = [one.decode() for one in context.auth_context().get("x509_common_name", [])]
            if shown != [name]:
                raise PermissionError(
                    f"the certificate is that of {', '.join(shown) or 'nobody'}, the site calls itself {name}; give it "
                    "the certificate's name with --name"
                )
        digest = token_digest(token)
        with self._change:
            if self.names is not None and name not in self.names:
                raise PermissionError(f"no site {name!r} is expected; these are: {', '.join(self.names)}")
            if name not in self._there and len(self._there) >= self.number:
                raise PermissionError(
                    f"all {self.number} places are taken, by {', '.join(self._there)}; raise executor.sites at the "
                    "server for one more"
                )
            seat = self.seats.setdefault(name, Seat(digest))
            if not secrets.compare_digest(seat.token, digest):
                raise PermissionError(
                    f"a site named {name!r} is known with another token; start it with the --folder it had, or give "
                    "this one another --name"
                )
            if seat.session:
                seat.past.add(seat.session)
            seat.session, seat.heard = secrets.token_hex(16), time.monotonic()
            if name not in self._there:
                self._there.append(name)
            log.info("site %s has joined", name)
            self._change.notify_all()
            return encode({"session": seat.session, "max_bytes": self.max_bytes, "beat": self.beat}), {}

    def _seat(self, notes: Notes) -> Seat:
        session = notes.get("session", "")
        for name, seat in self.seats.items():
            if session and secrets.compare_digest(session, seat.session):
                return seat
            if session in seat.past:
                raise PermissionError(f"another process has taken the place of this one as site {name}")
        raise LookupError("this session is not known; join again")

    def _next(self, answer: bytes, notes: Notes, context: grpc.ServicerContext) -> tuple[bytes, Notes]:
        with self._change:
            seat = self._seat(notes)
            seat.heard = time.monotonic()
            if answer and notes.get("ticket") == str(seat.ticket) and seat.request is not None:
                seat.request = None
                seat.answer.set_result(answer)
            # What came twice, late or for an older request is of no use to anybody any more.
            until = time.monotonic() + POLL
            seat.waits = True
            try:
                while not (seat.request or self._closed or "last" in notes) and (left := until - time.monotonic()) > 0:
                    self._change.wait(left)
                    self._seat(notes)  # raises where another process came meanwhile
            finally:
                seat.waits = False
                self._change.notify_all()
            seat.heard = time.monotonic()
            if self._closed:
                return b"", {"ticket": "0", "closed": "yes"}
            if seat.request is None:
                return b"", {"ticket": "0"}
            return seat.request, {"ticket": str(seat.ticket)}

    def _beat(self, request: bytes, notes: Notes, context: grpc.ServicerContext) -> tuple[bytes, Notes]:
        self._seat(notes).heard = time.monotonic()
        return b"", {}


def token_digest(token: str) -> str:
    """Return what a server may know of a site's token."""
    return hashlib.sha256(token.encode()).hexdigest()
