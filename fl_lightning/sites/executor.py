"""The server's way to clients at sites of their own."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fl_lightning.checks import above, one_of, whole, within
from fl_lightning.client import Broadcast, Client, ClientInfo, Exam, Scores
from fl_lightning.data.partition import Partition
from fl_lightning.data.splits import ClientIndices
from fl_lightning.executors.executor import Executor, Message, Outcome, Task
from fl_lightning.executors.worker import SentState
from fl_lightning.fit.local import FitPlan, LocalTraining
from fl_lightning.sites import messages, wire
from fl_lightning.sites.frame import MAX_BYTES, MessageError, decode_states, encode_states
from fl_lightning.sites.held import Order
from fl_lightning.sites.service import Host, SiteService
from fl_lightning.sites.settings import common
from fl_lightning.sites.turn import Turn
from fl_lightning.split.body import ServerBody
from fl_lightning.split.cut import Cut
from fl_lightning.split.executor import Relay, SplitServer
from fl_lightning.split.fit import SplitFit
from fl_lightning.split.module import SplitModule
from fl_lightning.state import State

log = logging.getLogger(__name__)

AHEAD = 4
"""Tasks per site that are taken up before the first of them has ended."""

NEEDS = 100
"""How often a site may say that it was started anew before it has done a request."""

OnMissing = Literal["wait", "skip"]


class MissingError(RuntimeError):
    """A site was not heard of for the time that it is given."""


@dataclass
class Seat:
    """What the server knows of a site.

    Attributes:
        info: The client that lives there.
        description: What it said of its data.
        orders: What it was told to do with its state and has not yet said to have done.
        number: Of the last order.
        marked: The mark that it is known to hold.
        sent: Knows which model it was sent last.
        state: How many models it was sent.
        missing: Whether it was said to be missing.
    """

    info: ClientInfo
    description: dict[str, Any]
    orders: list[Order] = field(default_factory=list)
    number: int = 0
    marked: int | None = None
    sent: SentState = field(default_factory=SentState)
    state: int = 0
    missing: bool = False

    def order(self, word: str, what: Any) -> None:
        """Tell the site to do something with its state, before the next request."""
        self.number += 1
        self.orders.append((self.number, word, what))

    def standing(self) -> dict[str, Any]:
        """Return where the site's state must be when it does the next request, and how it gets there."""
        return {"orders": self.orders, "last_order": self.number}

    def done(self, number: int) -> None:
        """Strike off what it has done."""
        for _, word, what in [order for order in self.orders if order[0] <= number]:
            if word in ("mark", "load"):
                self.marked = what
        self.orders = [order for order in self.orders if order[0] > number]


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


class SiteData:
    """What is known at a server of data that are at sites: :class:`FederatedData` without an example.

    Args:
        seats: The sites, in the order of their clients.
    """

    def __init__(self, seats: Sequence[Seat] = (), **settings: Any) -> None:
        if not seats:
            raise ValueError("data=sites is for executor=sites, which says whose data they are; choose data=...")
        first = seats[0].description
        self.clients: list[Any] = []
        self.unseen: list[Any] = []
        self.num_classes: int = first["num_classes"]
        self.class_names: list[str] = first["class_names"]
        self.in_channels: int = first["in_channels"]
        self.image_size: int = first["image_size"]
        self.name = "sites"
        self._example = first["shape"], first["type"]
        self._target = first["target_shape"], first["target_type"], first["task"]
        nothing = torch.zeros(0, dtype=torch.int64)
        own = [one.description["partition"] for one in seats]
        self.partition = Partition(
            source="sites",
            fingerprint=hashlib.sha256(json.dumps(own).encode()).hexdigest(),
            num_examples=sum(one.info.num_train + one.info.num_val + one.info.num_test for one in seats),
            num_classes=self.num_classes,
            clients=tuple(ClientIndices(one.info.name, nothing, nothing, nothing, one.info.unseen) for one in seats),
            description={"clients": "one per site"},
        )

    def first_examples(self, number: int) -> Tensor:
        """Return zeros in the form of examples: the server has none."""
        shape, kind = self._example
        return torch.zeros(number, *shape, dtype=messages.torch_type(kind))

    def first_targets(self, number: int) -> Tensor:
        """Return what has the form of targets, and is of the task that the sites' own are of."""
        shape, kind, task = self._target
        return torch.full((number, *shape), 0.5 if task == "Regression" else 0, dtype=messages.torch_type(kind))


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
        self._seats: dict[str, Seat] = {}
        self._setup: tuple[str, dict[str, Callable[[bool], bytes]]] | None = None
        self._describe = b""
        self._said = False
        self._tasks = 0
        self._split: SplitServer | None = None
        self._bodies: dict[tuple[str, int], State] = {}  # that a stage's models go with, by stage and client
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
        if self.host is None:
            credentials = wire.server_credentials(*wire.read_pems(*self.pems))
            authority = self.pems[0] is not None
            self.host = SiteService(self.listen, self.sites, credentials, authority, self.max_bytes, self.patience)
            log.info("sites may call at %s:%d", self.listen.rpartition(":")[0], self.host.port)
        request = self._describe = encode_states({"kind": "describe", "data": common(config)}, {})
        found: dict[str, Seat] = {}
        number = self.sites if isinstance(self.sites, int) else len(self.sites)
        while len(found) < number:
            for job in self._serve([self._job(name, request) for name in self.host.gather() if name not in found]):
                if job.error is not None:
                    log.error("site %s is refused: %s", job.site, job.error)
                    self.host.release(job.site)
                    continue
                header, states = job.content
                found[job.site] = Seat(messages.read_info(header, states, job.site), header)
                if words := self._disagreement(found, job.site):
                    list(self._serve([self._job(job.site, encode_states({"kind": "refuse", "text": words}, {}))]))
                    raise ValueError(words)
        unseen = set(config["data"].get("unseen_clients") or ())
        if strangers := unseen - found.keys():
            raise ValueError(f"data.unseen_clients must name sites, got {', '.join(sorted(strangers))}")
        ordered = sorted(found, key=lambda name: (name in unseen, name))
        self._seats = {name: found[name] for name in ordered}
        for index, (name, seat) in enumerate(self._seats.items()):
            stays = seat.description.get("stays") is True
            seat.info = replace(seat.info, id=index, unseen=name in unseen, stays=stays)
            seat.order("load", None)
        if unseen >= found.keys():
            raise ValueError("data.unseen_clients must leave a site that trains")
        self.recipe = recipe(config) if "loop" in config else {}
        return SiteData(list(self._seats.values()))

    def _disagreement(self, found: Mapping[str, Seat], name: str) -> str:
        """Say how a site's data do not go with those of the first; empty if they do."""
        first = next(iter(found))
        mine, other = found[name].description, found[first].description
        for key, word in {
            "shape": "examples of shape",
            "type": "examples of type",
            "class_names": "the classes",
        }.items():
            if mine.get(key) != other.get(key):
                return (
                    f"site {name} has {word} {mine.get(key)}, site {first} {other.get(key)}; bring them to one with "
                    "data.resize, data.channels and data.classes at the server"
                )
        return ""

    @override
    def setup(self, local: LocalTraining, clients: Sequence[Client]) -> None:
        """Send all sites what they need to fit and score as ``local`` does.

        Raises:
            ValueError: If one cannot.
        """
        self.local = local
        config = {**self.recipe, "seed": local.seed}
        words = json.dumps(config, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(words.encode()).hexdigest()[:16]
        first = next(iter(self._seats.values())).description
        size = {key: first[key] for key in ("num_classes", "in_channels", "image_size")}
        header = {"kind": "setup", "config": config, "data": size}
        self._split = next((one for one in local.federated_callbacks if isinstance(one, SplitServer)), None)

        def encode(seat: Seat, full: bool) -> bytes:
            initial, cut = local.initial, self._cut(seat.info)
            if cut is not None:
                assert isinstance(local.module, SplitModule)
                initial = {name: initial[name] for name in local.module.parts(cut).client}
            given = {"setup": self._setup_of(seat.info), "client": seat.info.id, "cut": cut and astuple(cut)}
            return encode_states({**header, **given}, {"initial": initial})

        self._setup = fingerprint, {name: partial(encode, seat) for name, seat in self._seats.items()}
        if self._split is not None:
            if type(local.plan) is not FitPlan:
                raise ValueError("local.plan must be null where sites hold parts of a split model")
            self._life_of_setup = secrets.token_hex(4)
            return  # sites ask for their parts when the cuts are chosen
        for job in self._serve([Job(name, make) for name, make in self._setup[1].items()]):
            if isinstance(job.error, MissingError):
                continue  # it asks for this when it comes
            if job.error is not None:
                raise ValueError(f"site {job.site}: {job.error}") from job.error

    def _cut(self, info: ClientInfo) -> Cut | None:
        """Return where a client's model is cut; at the first block that the server holds before that is chosen."""
        if self._split is None:
            return None
        assert isinstance(self.local.module, SplitModule)
        return self._split.cuts.get(info.id) or self.local.module.cut_at(self.local.module.start)

    def _setup_of(self, info: ClientInfo) -> str:
        """Return what names the setup of a site: the configuration, and of a split model the run and the cut."""
        assert self._setup is not None
        cut = self._cut(info)
        return self._setup[0] if cut is None else f"{self._setup[0]}.{self._life_of_setup}.{cut.at}"

    @override
    def describe(self) -> list[ClientInfo]:
        return [seat.info for seat in self._seats.values()]

    @override
    def run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        tasks = iter(tasks)
        if (first := next(tasks, None)) is not None:
            fits = isinstance(first[1], Broadcast) and not (first[1].stage or first[1].request)
            in_turn = fits and self._split is not None and self._split.in_turn
            yield from (self._in_turn if in_turn else self._run)(chain([first], tasks))

    def _in_turn(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """Have fits done one after another, through one body; whoever is missing is called once more at the end."""
        relay, order, late = Relay(), deque(tasks), set()
        while order:
            info, message = order.popleft()
            assert isinstance(message, Broadcast)
            relay.hand(message)
            for outcome in self._run([(info, message)]):
                if isinstance(outcome.error, MissingError) and info.id not in late:
                    late.add(info.id)
                    order.append((info, message))
                    continue
                if outcome.update is not None:
                    relay.take(outcome.update, outcome.own_is_finite)
                yield outcome

    def _run(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        infos: deque[ClientInfo] = deque()

        def jobs() -> Iterator[Job]:
            for info, message in tasks:
                infos.append(info)
                yield self._task(info, message)

        for job in self._serve(jobs()):
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
        turn = self._turn(info, message)
        if turn is not None:
            assert isinstance(self.local.module, SplitModule)
            body = set(self.local.module.parts(turn.cut).body)
            states["state"] = {name: tensor for name, tensor in message.state.items() if name not in body}
            states.pop("here", None)
        if states.get("here") and not self._said:
            self._said = True
            log.warning("tensors that clients could have kept are sent to sites again: more travels than is counted")
        self._tasks += 1
        header |= {"setup": self._setup_of(info), "run": self.run_id, "life": self.life}
        header["ticket"] = f"{self.life}-{self._tasks}"
        if isinstance(message, Broadcast) and not (message.stage or message.request):
            self._tickets[info.name] = header["ticket"]
        seat = self._seats[info.name]

        def encode(full: bool) -> bytes:
            known = not seat.sent.replace(states["state"]) and not full
            seat.state += not known
            sent = {key: state for key, state in states.items() if not (known and key == "state")}
            return encode_states({**header, **seat.standing(), "state": seat.state, "known": known}, sent)

        return Job(info.name, encode, message, turn=turn)

    def _turn(self, info: ClientInfo, message: Message) -> Turn | None:
        """Return the server's half of work on a model whose middle it holds."""
        cut, split, local = self._cut(info), self._split, self.local
        if cut is None or split is None or (isinstance(message, Broadcast) and message.request):
            return None
        module = local.module
        assert isinstance(module, SplitModule)
        acting = self._acting(message)

        def new_body() -> ServerBody:
            given = {**message.state, **message.here} if isinstance(message, Broadcast) else message.state
            if isinstance(message, Exam) and message.stage:
                given = self._bodies[message.stage, info.id]
            initial = {name: local.initial[name] for name in module.parts(cut).body}
            return acting.new_body(module, local.optimizer, {**initial, **given}, local.device, guarded=True)

        precision = local.precision if isinstance(message, Broadcast) else "32-true"
        return Turn(new_body, cut, split.shapes, precision, self.threads)

    def _acting(self, message: Message) -> SplitFit:
        """Return the callback that cuts the model in this work."""
        assert self._split is not None
        if not (isinstance(message, Broadcast) and message.stage):
            return self._split
        callbacks = self.local.stages[message.stage].federated_callbacks
        if (found := next((one for one in callbacks if isinstance(one, SplitFit)), None)) is None:
            raise ValueError(
                f"callbacks.{message.stage} trains the whole model, of which a site holds a part; take "
                "fl_lightning.split.personal_stage.PersonalStage"
            )
        return found

    def _outcome(self, info: ClientInfo, job: Job) -> Outcome:
        (header, states), turn = job.content, job.turn
        if isinstance(job.message, Exam):
            scores = messages.read_scores(header, states, info.id)
            if turn is not None and scores.model is not None:
                scores.model |= self._body_behind(turn)
            return Outcome(info, scores=scores)
        assert isinstance(job.message, Broadcast)
        sent = {**job.message.state, **job.message.here}
        update = messages.read_update(header, states, info.id, sent)
        if turn is not None:
            stage = job.message.stage
            if stage:
                self._bodies[stage, info.id] = self._body_behind(turn)
            update.here |= self._acting(job.message).left_of(turn.body, () if stage else job.message.here)
        return Outcome(info, update=update, own_is_finite=header.get("own_is_finite") is True)

    def _body_behind(self, turn: Turn) -> State:
        """Return the tensors of the body behind a client's cut, as they are now."""
        assert isinstance(self.local.module, SplitModule)
        names = set(self.local.module.parts(turn.cut).body)
        return {name: tensor for name, tensor in turn.body.state().items() if name in names}

    @override
    def commit(self, ids: Iterable[int]) -> None:
        chosen = set(ids)
        for name, seat in self._seats.items():
            if seat.info.id in chosen:
                seat.order("commit", self._tickets[name])

    @override
    def keep(self, label: str) -> None:
        for seat in self._seats.values():
            seat.order("keep", label)

    @override
    def restore(self, label: str) -> None:
        for seat in self._seats.values():
            seat.order("restore", label)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Let all sites put their states aside under one mark, and return how to find them again."""
        if self.host is None:
            return self._held
        self.mark += 1
        for seat in self._seats.values():
            seat.order("mark", self.mark)
        for job in self._serve([self._sync(name) for name in self._seats]):
            if job.error is not None and not isinstance(job.error, MissingError):
                raise RuntimeError(f"site {job.site}: {job.error}") from job.error
        sites = {
            name: {"mark": seat.marked, "orders": [[word, what] for _, word, what in seat.orders]}
            for name, seat in self._seats.items()
        }
        self._held = {"run": self.run_id, "mark": self.mark, "sites": sites}
        return self._held

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "sites" not in state_dict:
            raise ValueError("this run's clients were in one process, not at sites; resume it with the executor it had")
        self.run_id, self.mark = state_dict["run"], state_dict["mark"]
        self.life = secrets.token_hex(8)
        for name, seat in self._seats.items():
            held = state_dict["sites"][name]
            seat.orders, seat.number, seat.marked = [], 0, held["mark"]
            seat.order("load", held["mark"])
            for word, what in held["orders"]:
                if word != "load":
                    seat.order(word, what)
        for job in self._serve([self._sync(name) for name in self._seats]):
            if job.error is not None and not isinstance(job.error, MissingError):
                raise ValueError(f"site {job.site} cannot go on: {job.error}") from job.error

    @override
    def disconnect(self) -> None:
        if self.host is not None:
            self.host.close()
            self.host = None

    def _sync(self, name: str) -> Job:
        header = {"kind": "sync", "run": self.run_id, "life": self.life}
        return Job(name, lambda full: encode_states({**header, **self._seats[name].standing()}, {}))

    @staticmethod
    def _job(name: str, request: bytes) -> Job:
        return Job(name, lambda full: request)

    def _serve(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """Have jobs done, each site one after another, and yield them as they end, in their order."""
        assert self.host is not None
        source, exhausted = iter(jobs), False
        waiting: deque[Job] = deque()
        lines: dict[str, deque[Job]] = {}
        running: dict[str, Future[bytes]] = {}
        began = time.monotonic()
        try:
            while True:
                while not exhausted and len(waiting) < AHEAD * max(1, len(self._seats)):
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
                self._look_for_missing(lines, running, began)
        finally:
            for site in running:  # left early, by an error or Ctrl-C
                self.host.withdraw(site)

    def _begin(self, line: deque[Job], running: dict[str, Future[bytes]]) -> None:
        assert self.host is not None
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
        seat = self._seats.get(job.site)
        try:
            header, states = decode_states(answer, self.max_bytes)
            kind = header.get("kind")
            if kind == "exchange" and job.turn is not None:
                reply = job.turn.answer(header, states.get("sent", {}))
                job.reply = encode_states({"kind": "exchange", "ticket": header.get("ticket")}, {"sent": reply})
                return
            if kind == "need" and seat is not None and self._setup is not None and job.needs < NEEDS:
                job.needs += 1
                # It was started anew, and is told again what went before.
                job.full, job.reply = True, b""
                what = header.get("what", ())
                if "description" in what:
                    line.appendleft(Job(job.site, lambda full: self._describe, before=job))
                elif "setup" in what:
                    line.appendleft(Job(job.site, self._setup[1][job.site], before=job))
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

    def _look_for_missing(self, lines: dict[str, deque[Job]], running: dict[str, Future[bytes]], began: float) -> None:
        """Give up, or speak of, sites that have been silent for too long."""
        assert self.host is not None
        silent = {site for site in running if self.host.silence(site) > self.patience}
        for site in silent:
            seat = self._seats.get(site)
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


def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a configuration sites need to train as it says."""
    keys = ("model", "module", "optimizer", "scheduler", "trainer", "sharing", "local", "callbacks")
    own = {key: config[key] for key in keys}
    evaluation = config["evaluation"] or {}
    scored = {key: evaluation.get(key) for key in ("metric", "metrics")}
    return {**own, "task": config.get("task"), "method": config["method"].get("name"), **scored}
