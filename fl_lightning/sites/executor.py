"""The server's way to clients at sites of their own."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from functools import partial
from itertools import chain
from typing import Any

from typing_extensions import override

from fl_lightning.checks import above, one_of, whole, within
from fl_lightning.client import Broadcast, Client, ClientInfo, Exam, Scores
from fl_lightning.executors.executor import Executor, Message, Outcome, Task
from fl_lightning.fit.local import LocalTraining
from fl_lightning.sites import messages, wire
from fl_lightning.sites.frame import MAX_BYTES, MessageError, encode_states
from fl_lightning.sites.jobs import Job, Jobs, MissingError, OnMissing
from fl_lightning.sites.middle import Middle
from fl_lightning.sites.seats import Seat, SiteData, disagreement
from fl_lightning.sites.service import Host, SiteService
from fl_lightning.sites.settings import common
from fl_lightning.split.executor import SplitServer

log = logging.getLogger(__name__)


class SitesExecutor(Executor):
    """Lets sites fit and score, each on its own data, which never leave it, and keep what is their client's.

    Results have the bits of the serial executor where processors are alike: clients are numbered in the order of their
    sites' names, as files of one folder would be. A site that is killed goes on where it was; a server that is killed
    and resumed finds every site as it was at the checkpoint.

    Args:
        listen: ``host:port`` at which sites call.
        sites: How many take part, at least 1; or their names; or the SHA-256 of their tokens by name.
        on_missing: What a site does that is not heard of: ``wait`` waits for it; ``skip`` goes on without it, its score
            NaN, and takes it back when it comes again.
        patience: Seconds of silence after which a site is missing, above 0. A site at work is not silent.
        tls_cert: File of the server's certificate, PEM.
        tls_key: File of its key, PEM.
        tls_ca: File of the certificate of who signed those of the sites, PEM.
        insecure: Whether to speak in the clear beyond this machine.
        max_bytes: The longest message, at least 1000.
        give_up_after: Seconds of silence of a site that is waited for, above 0, after which the run ends; None: never.
        threads: Threads that torch uses for the middle of a split model, at least 1.
        host: Brings requests to sites and answers back, in the place of a service that listens.

    Raises:
        ValueError: If an argument is out of its range.
    """

    relays = True
    serves = False
    """Whether models are used, and not trained."""

    def __init__(
        self,
        listen: str = "127.0.0.1:50061",
        sites: int | list[str] | dict[str, str] = 2,
        on_missing: OnMissing = "wait",
        patience: float = 60.0,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        insecure: bool = False,
        max_bytes: int = MAX_BYTES,
        give_up_after: float | None = None,
        threads: int = 1,
        host: Host | None = None,
    ) -> None:
        if isinstance(sites, int):
            whole("sites", sites, 1)
        elif not sites or len(set(sites)) < len(sites):
            raise ValueError(f"executor.sites must name every site once, got {list(sites)}")
        one_of("on_missing", on_missing, OnMissing)
        above("patience", patience, 0)
        whole("max_bytes", max_bytes, 1000)
        above("give_up_after", give_up_after, 0, or_null=True)
        within("threads", threads, "[1, 1024]")
        if (tls_cert is None) != (tls_key is None):
            raise ValueError("executor.tls_cert and executor.tls_key belong together; give both")
        if tls_ca is not None and tls_cert is None:
            raise ValueError("executor.tls_ca must come with executor.tls_cert and executor.tls_key")
        wire.require_safety(
            listen,
            tls_cert is not None,
            insecure,
            "executor.tls_cert, executor.tls_key and executor.tls_ca for TLS, or executor.insecure=true",
        )
        self.listen, self.sites, self.on_missing, self.patience = listen, sites, on_missing, patience
        self.pems = tls_ca, tls_key, tls_cert
        self.max_bytes, self.give_up_after, self.threads = max_bytes, give_up_after, threads
        self.host = host
        self.life = secrets.token_hex(8)
        self.run_id = secrets.token_hex(8)
        self.mark = 0
        self._jobs: Jobs | None = None
        self._fingerprint = ""
        self._said = False
        self._tasks = 0
        self._middle: Middle | None = None
        self._tickets: dict[str, str] = {}
        self._held: dict[str, Any] = {}

    @override
    def find_data(self, config: Mapping[str, Any]) -> SiteData:
        """Wait for all sites, and return what they say of their data.

        Raises:
            ValueError: If they do not agree.
        """
        if self.on_missing == "skip" and (config.get("loop") or {}).get("on_client_error", "skip") != "skip":
            raise ValueError("executor.on_missing=skip must come with loop.on_client_error=skip")
        jobs = self.listen_for(config)
        assert self.host is not None
        found: dict[str, Seat] = {}
        number = self.sites if isinstance(self.sites, int) else len(self.sites)
        while len(found) < number:
            for job in jobs.serve([jobs.job(name, jobs.describe) for name in self.host.gather() if name not in found]):
                if job.error is not None:
                    log.error("site %s is refused: %s", job.site, job.error)
                    self.host.release(job.site)
                    continue
                header, states = job.content
                found[job.site] = Seat(messages.read_info(header, states, job.site), header)
                if words := disagreement(found, job.site):
                    list(jobs.serve([jobs.job(job.site, encode_states({"kind": "refuse", "text": words}, {}))]))
                    raise ValueError(words)
        unseen = set(config["data"].get("unseen_clients") or ())
        if strangers := unseen - found.keys():
            raise ValueError(f"data.unseen_clients must name sites, got {', '.join(sorted(strangers))}")
        ordered = sorted(found, key=lambda name: (name in unseen, name))
        jobs.seats = {name: found[name] for name in ordered}
        for index, (name, seat) in enumerate(self._sites.items()):
            stays = seat.description.get("stays") is True
            seat.info = replace(seat.info, id=index, unseen=name in unseen, stays=stays)
        if unseen >= found.keys():
            raise ValueError("data.unseen_clients must leave a site that trains")
        self.begin()
        self.recipe = recipe(config) if "loop" in config else {}
        return SiteData(list(self._sites.values()))

    def listen_for(self, config: Mapping[str, Any]) -> Jobs:
        """Listen for sites, unless somebody else brings requests to them."""
        if self.host is None:
            credentials = wire.server_credentials(*wire.read_pems(*self.pems))
            authority = self.pems[0] is not None
            self.host = SiteService(self.listen, self.sites, credentials, authority, self.max_bytes, self.patience)
            log.info("sites may call at %s:%d", self.listen.rpartition(":")[0], self.host.port)
        request = encode_states({"kind": "describe", "data": common(config)}, {})
        self._jobs = Jobs(self.host, request, self.on_missing, self.patience, self.give_up_after, self.max_bytes)
        return self._jobs

    @override
    def begin(self) -> None:
        self.run_id, self.life, self.mark = secrets.token_hex(8), secrets.token_hex(8), 0
        for seat in self._sites.values():
            seat.orders, seat.number, seat.marked = [], 0, None
            seat.order("load", None)

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        """Send all sites what they need to fit and score as ``local`` does.

        Raises:
            ValueError: If one cannot.
        """
        setups = self.prepare(local)
        if self._middle is not None:
            return  # sites ask for their parts when the cuts are chosen
        assert self._jobs is not None
        for job in self._jobs.serve([Job(name, make) for name, make in setups.items()]):
            if isinstance(job.error, MissingError):
                continue  # it asks for this when it comes
            if job.error is not None:
                raise ValueError(f"site {job.site}: {job.error}") from job.error

    def prepare(self, local: LocalTraining) -> dict[str, Callable[[bool], bytes]]:
        """Return by site what makes the request that gets it ready to fit and score as ``local`` does."""
        assert self._jobs is not None
        self.local = local
        config = {**self.recipe, "seed": local.seed}
        words = json.dumps(config, sort_keys=True, default=str)
        self._fingerprint = hashlib.sha256(words.encode()).hexdigest()[:16]
        first = next(iter(self._sites.values())).description
        size = {key: first[key] for key in ("num_classes", "in_channels", "image_size")}
        header = {"kind": "setup", "config": config, "data": size, "serves": self.serves}
        split = next((one for one in local.federated_callbacks if isinstance(one, SplitServer)), None)
        self._middle = None if split is None else Middle(split, local, self.threads)

        def encode(seat: Seat, full: bool) -> bytes:
            initial, cut = local.initial, None
            if self._middle is not None:
                initial, cut = self._middle.part(initial, seat.info), astuple(self._middle.cut(seat.info))
            given = {"setup": self._setup_of(seat.info), "client": seat.info.id, "cut": cut}
            return encode_states({**header, **given}, {"initial": initial})

        setups = self._jobs.setups = {name: partial(encode, seat) for name, seat in self._sites.items()}
        return setups

    def _setup_of(self, info: ClientInfo) -> str:
        """Return what names the setup of a site: the configuration, and of a split model the run and the cut."""
        if self._middle is None:
            return self._fingerprint
        return f"{self._fingerprint}.{self._middle.name}.{self._middle.cut(info).at}"

    @property
    def _sites(self) -> dict[str, Seat]:
        return {} if self._jobs is None else self._jobs.seats

    @override
    def describe(self) -> list[ClientInfo]:
        return [seat.info for seat in self._sites.values()]

    @override
    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        tasks = iter(tasks)
        if (first := next(tasks, None)) is not None:
            fits = isinstance(first[1], Broadcast) and not (first[1].stage or first[1].request)
            tasks = chain([first], tasks)
            if fits and self._middle is not None and self._middle.in_turn:
                yield from self._middle.one_by_one(tasks, self._run)
            else:
                yield from self._run(tasks)

    def _run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        infos: deque[ClientInfo] = deque()

        def jobs() -> Iterator[Job]:
            for info, message in tasks:
                infos.append(info)
                yield self._task(info, message)

        assert self._jobs is not None
        for job in self._jobs.serve(jobs()):
            info = infos.popleft()
            try:
                if job.error is not None:
                    raise job.error
                yield self._outcome(info, job)
            except MissingError as error:
                if isinstance(job.message, Exam):
                    names = self.local.metrics.names if job.message.metrics is None else job.message.metrics
                    yield Outcome(info, scores=Scores(info.id, 0, dict.fromkeys(names, math.nan)))
                else:
                    yield Outcome(info, error=error)
            except (MessageError, RuntimeError) as error:
                yield Outcome(info, error=error)

    def _task(self, info: ClientInfo, message: Message) -> Job:
        header, states = messages.task(message)
        turn = None if self._middle is None else self._middle.turn(info, message)
        if turn is not None and self._middle is not None:
            states = self._middle.sent(turn, states)
        if states.get("here") and not self._said:
            self._said = True
            log.warning("tensors that clients could have kept are sent to sites again: more travels than is counted")
        self._tasks += 1
        header |= {"setup": self._setup_of(info), "run": self.run_id, "life": self.life}
        header["ticket"] = f"{self.life}-{self._tasks}"
        if isinstance(message, Broadcast) and not (message.stage or message.request):
            self._tickets[info.name] = header["ticket"]
        seat = self._sites[info.name]

        def encode(full: bool) -> bytes:
            known = not seat.sent.replace(states["state"]) and not full
            seat.state += not known
            sent = {key: state for key, state in states.items() if not (known and key == "state")}
            return encode_states({**header, **seat.standing(), "state": seat.state, "known": known}, sent)

        return Job(info.name, encode, message, turn=turn)

    def _outcome(self, info: ClientInfo, job: Job) -> Outcome:
        (header, states), turn = job.content, job.turn
        if isinstance(job.message, Exam):
            scores = messages.read_scores(header, states, info.id)
            if turn is not None and self._middle is not None and scores.model is not None:
                scores.model |= self._middle.behind(turn)
            return Outcome(info, scores=scores)
        assert isinstance(job.message, Broadcast)
        sent = {**job.message.state, **job.message.here}
        update = messages.read_update(header, states, info.id, sent)
        if turn is not None and self._middle is not None:
            update.here |= self._middle.left(turn, info, job.message)
        return Outcome(info, update=update, own_is_finite=header.get("own_is_finite") is True)

    @override
    def commit(self, ids: Iterable[int]) -> None:
        chosen = set(ids)
        for name, seat in self._sites.items():
            if seat.info.id in chosen:
                seat.order("commit", self._tickets[name])

    @override
    def keep(self, label: str) -> None:
        for seat in self._sites.values():
            seat.order("keep", label)

    @override
    def restore(self, label: str) -> None:
        for seat in self._sites.values():
            seat.order("restore", label)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Let all sites put their states aside under one mark, and return how to find them again."""
        if self.host is None or self._jobs is None:
            return self._held
        self.mark += 1
        for seat in self._sites.values():
            seat.order("mark", self.mark)
        for job in self._jobs.serve([self._sync(name) for name in self._sites]):
            if job.error is not None and not isinstance(job.error, MissingError):
                raise RuntimeError(f"site {job.site}: {job.error}") from job.error
        sites = {
            name: {"mark": seat.marked, "orders": [[word, what] for _, word, what in seat.orders]}
            for name, seat in self._sites.items()
        }
        self._held = {"run": self.run_id, "mark": self.mark, "sites": sites}
        return self._held

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "sites" not in state_dict:
            raise ValueError("this run's clients were in one process, not at sites; resume it with the executor it had")
        assert self._jobs is not None
        self.run_id, self.mark = state_dict["run"], state_dict["mark"]
        self.life = secrets.token_hex(8)
        for name, seat in self._sites.items():
            self.stand(seat, state_dict["sites"][name])
        for job in self._jobs.serve([self._sync(name) for name in self._sites]):
            if job.error is not None and not isinstance(job.error, MissingError):
                raise ValueError(f"site {job.site} cannot go on: {job.error}") from job.error

    @staticmethod
    def stand(seat: Seat, held: Mapping[str, Any]) -> None:
        """Order a site to be where it was at a checkpoint."""
        seat.orders, seat.number, seat.marked = [], 0, held["mark"]
        seat.order("load", held["mark"])
        for word, what in held["orders"]:
            if word != "load":
                seat.order(word, what)

    @override
    def disconnect(self) -> None:
        if self.host is not None:
            self.host.close()
            self.host = None

    def _sync(self, name: str) -> Job:
        header = {"kind": "sync", "run": self.run_id, "life": self.life}
        return Job(name, lambda full: encode_states({**header, **self._sites[name].standing()}, {}))


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration sites need to train as it says."""
    keys = ("model", "module", "optimizer", "scheduler", "trainer", "sharing", "local", "callbacks")
    own = {key: config[key] for key in keys}
    evaluation = config["evaluation"] or {}
    scored = {key: evaluation.get(key) for key in ("metric", "metrics")}
    return {**own, "task": config.get("task"), "method": config["method"].get("name"), **scored}
