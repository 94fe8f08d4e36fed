"""Has sites do what the server asks, each one thing after another, whoever is late, lost or started anew."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Literal

from fl_lightning.executors.executor import Message
from fl_lightning.sites import messages
from fl_lightning.sites.frame import MessageError, decode_states, encode_states
from fl_lightning.sites.seats import Seat
from fl_lightning.sites.service import Host
from fl_lightning.sites.turn import Turn

log = logging.getLogger(__name__)

AHEAD = 4
"""Tasks per site that are taken up before the first of them has ended."""

NEEDS = 100
"""How often a site may say that it was started anew before it has done a request."""

OnMissing = Literal["wait", "skip"]


class MissingError(RuntimeError):
    """A site was not heard of for the time that it is given."""


@dataclass
class Job:
    """One request to a site, and what came of it.

    Attributes:
        site: Its name.
        encode: Makes the request, given whether the site has lost what it was sent before.
        info: Of the client.
        content: The answer.
        error: What went wrong.
        full: Whether all is sent.
        needs: How often the site said that it lacks something.
        before: The job that this one makes ready for, and which fails with it.
        ended: Whether there is an answer or an error.
        turn: The server's half of work on a model whose middle the server holds.
        reply: What the site asked for in the midst of its work.
    """

    site: str
    encode: Callable[[bool], bytes]
    message: Message | None = None
    content: messages.Content = ({}, {})
    error: Exception | None = None
    full: bool = False
    needs: int = 0
    before: Job | None = None
    ended: bool = False
    turn: Turn | None = None
    reply: bytes = b""


class Jobs:
    """Brings jobs to sites, and takes their answers.

    Args:
        host: Brings requests to sites and answers back.
        describe: The request for a description of the data, which a site that was started anew is sent again.
        on_missing: As in :class:`~fl_lightning.sites.executor.SitesExecutor`.
        patience: As there.
        give_up_after: As there.
        max_bytes: As there.

    Attributes:
        seats: The sites that have been taken, by name.
        setups: Makes the request with which a site gets ready for the run, by its name.
    """

    def __init__(
        self,
        host: Host,
        describe: bytes,
        on_missing: OnMissing,
        patience: float,
        give_up_after: float | None,
        max_bytes: int,
    ) -> None:
        self.host, self.describe = host, describe
        self.on_missing, self.patience, self.give_up_after, self.max_bytes = (
            on_missing, patience, give_up_after, max_bytes,
        )  # fmt: skip
        self.seats: dict[str, Seat] = {}
        self.setups: dict[str, Callable[[bool], bytes]] = {}

    @staticmethod
    def job(name: str, request: bytes) -> Job:
        """Return the job of a request that is the same whenever it is sent."""
        return Job(name, lambda full: request)

    def serve(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Have jobs done, each site one after another, and yield them as they end, in their order."""
        source, exhausted = iter(jobs), False
        waiting: deque[Job] = deque()
        lines: dict[str, deque[Job]] = {}
        running: dict[str, Future[bytes]] = {}
        try:
            while True:
                while not exhausted and len(waiting) < AHEAD * max(1, len(self.seats)):
                    job = next(source, None)
                    if job is None:
                        exhausted = True
                        break
                    waiting.append(job)
                    lines.setdefault(job.site, deque()).append(job)
                    if job.site not in running:
                        self._begin(lines[job.site], running)
                if waiting and waiting[0].ended:
                    yield waiting.popleft()
                    continue
                if not waiting:
                    return
                done, _ = wait(running.values(), 0.5, FIRST_COMPLETED)
                for site in [site for site, future in running.items() if future in done]:
                    self._take(lines[site], running.pop(site).result())
                    self._begin(lines[site], running)
                self._look_for_missing(lines, running)
        finally:
            for site in running:  # left early, by an error or Ctrl-C
                self.host.withdraw(site)

    def _begin(self, line: deque[Job], running: dict[str, Future[bytes]]) -> None:
        while line:
            job = line[0]
            request = job.reply or job.encode(job.full)
            if len(request) <= self.max_bytes:
                running[job.site] = self.host.ask(job.site, request)
                return
            job.error = ValueError(
                f"a message of {len(request)} bytes for site {job.site} is longer than executor.max_bytes="
                f"{self.max_bytes}; raise it"
            )
            self._end(line)

    def _take(self, line: deque[Job], answer: bytes) -> None:
        """Take the answer to the first job of a line."""
        job = line[0]
        seat = self.seats.get(job.site)
        try:
            header, states = decode_states(answer, self.max_bytes)
            kind = header.get("kind")
            if kind == "exchange" and job.turn is not None:
                reply = job.turn.answer(header, states.get("sent", {}))
                job.reply = encode_states({"kind": "exchange", "ticket": header.get("ticket")}, {"sent": reply})
                return
            if kind == "need" and seat is not None and self.setups and job.needs < NEEDS:
                job.needs += 1
                # It was started anew, and is told again what went before.
                job.full, job.reply = True, b""
                what = header.get("what", ())
                if "description" in what:
                    line.appendleft(Job(job.site, lambda full: self.describe, before=job))
                elif "setup" in what:
                    line.appendleft(Job(job.site, self.setups[job.site], before=job))
                return
            if kind in ("error", "lost", "need", "refused"):
                raise RuntimeError(str(header.get("text", f"it asks for {header.get('what')}, over and over")))
            if seat is not None:
                if kind == "description" and header.get("partition") != seat.description["partition"]:
                    raise RuntimeError("it came back with other data; start it with those it had, or begin a new run")
                if seat.missing:
                    log.warning("site %s is here again", job.site)
                    seat.missing = False
                if isinstance(header.get("number"), int):
                    seat.done(header["number"])
            job.content = header, states
        except (MessageError, RuntimeError) as error:
            job.error = error
        self._end(line)

    @staticmethod
    def _end(line: deque[Job]) -> None:
        """Take the first job off a line; if it failed, with the one that it made ready for."""
        job = line.popleft()
        job.ended = True
        if job.error is not None and job.before is not None:
            job.before.error, job.before.ended = job.error, True
            line.remove(job.before)

    def _look_for_missing(self, lines: dict[str, deque[Job]], running: dict[str, Future[bytes]]) -> None:
        """Give up, or speak of, sites that have been silent for too long."""
        silent = {site for site in running if self.host.silence(site) > self.patience}
        for site in silent:
            seat = self.seats.get(site)
            if seat is None:
                continue
            if not seat.missing:
                seat.missing = True
                rest = "it is waited for" if self.on_missing == "wait" else "the run goes on without it"
                log.warning("site %s has not been heard of for %.0f s; %s", site, self.host.silence(site), rest)
            if self.give_up_after is not None and self.host.silence(site) > self.give_up_after:
                raise RuntimeError(
                    f"site {site} has not been heard of for {self.give_up_after:g} s (executor.give_up_after); start "
                    "it, then the server with resume=RUN"
                )
        # As long as another is at work, one that comes late still joins in.
        if self.on_missing == "skip" and silent and silent >= running.keys():
            for site in silent:
                running.pop(site)
                self.host.withdraw(site)
                for job in lines[site]:
                    job.error, job.ended = MissingError(f"it was not heard of for {self.patience:g} s"), True
                lines[site].clear()
