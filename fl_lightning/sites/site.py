"""The site's half: it answers a server's requests about one client's data, and keeps what is the client's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fl_lightning.client import Broadcast, Client, Exam, Fit, Scores
from fl_lightning.data.federated_data import FederatedData
from fl_lightning.evaluation.predict import Metrics
from fl_lightning.executors.executor import Message
from fl_lightning.executors.serial import torch_threads
from fl_lightning.fit.local import LocalTraining
from fl_lightning.fit.stock import silence_lightning
from fl_lightning.personalization.measurement import HOME, ModelMetrics
from fl_lightning.run.config import check, instantiate, instantiate_dict, plain
from fl_lightning.run.overrides import composed
from fl_lightning.run.own_module import arguments_of
from fl_lightning.run.training import build_local, check_metrics, metric_makers, new_module, task_of
from fl_lightning.run.trust import check_trusted
from fl_lightning.sharing import Sharing
from fl_lightning.sites import messages
from fl_lightning.sites.frame import MAX_BYTES, MessageError, decode_states, encode_states, integer
from fl_lightning.sites.held import LostError, Store
from fl_lightning.sites.predictions import Predictions
from fl_lightning.sites.settings import COMMON
from fl_lightning.sites.turn import Dialog, EndedError, RemoteBody
from fl_lightning.split.cost import ClientProfile
from fl_lightning.split.cut import Cut
from fl_lightning.split.exchange import Exchange
from fl_lightning.split.module import SplitModule
from fl_lightning.split.part import keep_part, without_weights
from fl_lightning.state import State, all_finite, difference, load, snapshot
from fl_lightning.task import guess

log = logging.getLogger(__name__)

OWN = ("data", "trainer")
"""Keys of the configuration that are the site's to say: where its data are, and on what it computes."""


class RefusedError(Exception):
    """The server will not have this site, or this site will not do what the server asks; the message says why."""


class Site:
    """One client where its data are. It runs no code that is sent: a configuration names classes of known packages.

    Args:
        name: Its name, which is that of the client.
        folder: Where it keeps what is the client's own.
        words: Configuration: ``data=...``, ``data.<key>=...``, ``trainer=...``, ``trainer.accelerator=...``.
        threads: Threads that torch uses, at least 1.
        trust: Packages beside the known ones whose classes the server may name.
        agreed: Begin of the fingerprint of the configuration that this site agrees to; empty: any.
        stays: Whether the model of a client never leaves in whole, to be scored elsewhere.
        predictions: The file that this site wants to have predicted; it then takes no part in training.
        device: What this machine can do: ``memory`` in bytes, ``flops_per_second``, above 0; either may be missing.

    Raises:
        ValueError: If the configuration says what is the server's to say, or a number is out of its range.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        words: Sequence[str] = (),
        threads: int = 1,
        trust: Sequence[str] = (),
        agreed: str = "",
        stays: bool = False,
        device: Mapping[str, float] | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        self.name, self.folder, self.threads = name, folder, threads
        self.trust, self.agreed, self.stays = list(trust), agreed, stays
        self.device = dict(device or {})
        ClientProfile.of(self.device)
        self.given = {word.partition("=")[0].lstrip("+"): word.partition("=")[2] for word in words}
        for key in self.given:
            if key.partition(".")[0].partition("/")[0] not in OWN:
                raise ValueError(
                    f"{key} is the server's to say; a site says where its data are (data=..., data.root=...)"
                )
        config = plain(composed("train", list(words)))
        self.own = {key: config[key] for key in OWN}
        self._stores: dict[str, Store] = {}
        self._described: tuple[dict[str, Any], FederatedData] | None = None
        self._batch_size = 0
        self._setup = ""
        self.ended = ""
        self.predictions, self.finished = predictions, False
        self._dialog: Dialog | None = None
        self._state: tuple[Any, State] = (None, {})  # the server's last model: it is sent once, under a number
        silence_lightning()

    def answer(self, request: bytes, max_bytes: int = MAX_BYTES) -> bytes:
        """Return the answer to a request; what goes wrong with the client's work is an answer, too.

        Where server and site cannot go together, :attr:`ended` then says why.
        """
        try:
            header, states = decode_states(request, max_bytes)
            with torch_threads(self.threads):
                content, found = self._answer(header, states)
        except RefusedError as error:
            self.ended = str(error)
            content, found = {"kind": "refused", "text": self.ended}, {}
        except (MessageError, LostError, OSError) as error:
            log.error("%s", error)
            content, found = {"kind": "lost" if isinstance(error, LostError) else "error", "text": str(error)}, {}
        answer = encode_states(content, found)
        if len(answer) > max_bytes:
            text = f"its answer of {len(answer)} bytes is longer than executor.max_bytes={max_bytes}; raise it"
            return encode_states({"kind": "error", "text": text}, {})
        return answer

    def _answer(self, header: dict[str, Any], states: dict[str, State]) -> messages.Content:
        kinds: dict[str, Callable[[dict[str, Any], dict[str, State]], messages.Content]] = {
            "describe": self._describe,
            "setup": self._set_up,
            "sync": self._sync,
            "fit": self._work,
            "score": self._work,
            "exchange": self._go_on,
            "refuse": self._refused,
        }
        kind = header.get("kind")
        if kind not in kinds:
            raise MessageError(f"there is no request {kind!r}")
        if kind != "exchange" and self._dialog is not None:
            self._dialog.end()
            self._dialog = None
        return kinds[str(kind)](header, states)

    def _refused(self, header: Mapping[str, Any], states: Mapping[str, State]) -> messages.Content:
        raise RefusedError(str(header.get("text")))

    def _describe(self, header: Mapping[str, Any], states: Mapping[str, State]) -> messages.Content:
        """Read the data as the server wants them, and say what it may know."""
        common = header.get("data")
        if not isinstance(common, dict):
            raise MessageError("`data` of a message must be settings by name")
        node = self.data_node(common)
        if self._described is None or self._described[0] != node:
            try:
                data = instantiate(node, "data", client=self.name)
            except Exception as error:  # a data module may be anybody's code
                log.debug("the data cannot be read", exc_info=True)
                raise RefusedError(f"its data cannot be read: {str(error) or type(error).__name__}") from error
            self._described, self._batch_size = (node, data), data.clients[0].batch_size
        data = self._described[1]
        own = data.clients[0]
        own.batch_size = self._batch_size
        content, found = messages.described(replace(Client(own.id, own).describe(), device=self.device))
        x, y = data.first_examples(1), data.first_targets(1)
        if not isinstance(x, torch.Tensor):
            raise RefusedError(f"examples at a site must be tensors, got a {type(x).__name__}")
        content |= {
            "num_classes": data.num_classes,
            "class_names": data.class_names,
            "in_channels": data.in_channels,
            "image_size": data.image_size,
            "shape": list(x.shape[1:]),
            "type": str(x.dtype).removeprefix("torch."),
            "target_shape": list(y.shape[1:]),
            "target_type": str(y.dtype).removeprefix("torch."),
            "task": type(guess(y)).__name__,
            "partition": data.partition.hash,
            "stays": self.stays,
        }
        return content, found

    def data_node(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Return the node of this site's data, with what the server says for all sites.

        Raises:
            RefusedError: If this site was told something else.
        """
        node = dict(self.own["data"])
        for key in COMMON:
            if key not in common or key not in node:
                continue
            if f"data.{key}" in self.given and node[key] != common[key]:
                raise RefusedError(
                    f"data.{key} is {common[key]!r} at the server, {node[key]!r} here; leave it out, or set it there"
                )
            check_trusted(common[key], f"data.{key}", self.trust, "the server's configuration")
            node[key] = common[key]
        return node

    def _set_up(self, header: Mapping[str, Any], states: Mapping[str, State]) -> messages.Content:
        """Get ready for a run's fits, from the configuration of the server and its initial weights."""
        config, size = header.get("config"), header.get("data")
        if not isinstance(config, dict) or not isinstance(size, dict):
            raise MessageError("a run must be set up with a configuration")
        if self._described is None:
            return {"kind": "need", "what": ["description"]}, {}
        if self.predictions is not None and header.get("serves") is not True:
            raise RefusedError(
                "it was started to predict (--infer), and the server trains; run fl_lightning.serve there"
            )
        fingerprint = str(header.get("setup"))
        if self.agreed and not fingerprint.startswith(self.agreed):
            raise RefusedError(f"the server's configuration {fingerprint} is not the one agreed to, {self.agreed}")
        try:
            cut = None if header.get("cut") is None else Cut(*header["cut"])
            initial, number = states.get("initial", {}), integer(header, "client")
            self.local, self.client = self._local(config, size, initial, number, cut)
        except Exception as error:  # a module or a callback may be anybody's code
            log.debug("the run cannot be set up", exc_info=True)
            reason = str(error) or type(error).__name__
            raise RefusedError(f"the run cannot be set up at site {self.name}: {reason}") from error
        self._setup, self._state = fingerprint, (None, {})
        if cut is not None:
            held = sum(tensor.nbytes for tensor in self.local.initial.values())
            log.info(
                "ready for method %s, fingerprint %s: it holds %s bytes of the model, before block %d and from %d on",
                config["method"], fingerprint.partition(".")[0], f"{held:,}", cut.at, cut.end,
            )  # fmt: skip
            return {"kind": "ready"}, {}
        shared = self.local.sharing.names(self.local.module)
        log.info(
            "ready for method %s, fingerprint %s: an update holds %d tensors of the model, %s", config["method"],
            fingerprint, len(shared), f"{sum(self.local.initial[name].nbytes for name in shared):,} bytes",
        )  # fmt: skip
        return {"kind": "ready"}, {}

    def _local(
        self, config: dict[str, Any], size: dict[str, Any], initial: State, number: int, cut: Cut | None
    ) -> tuple[LocalTraining, Client]:
        assert self._described is not None
        check_trusted(config, "", self.trust, "the server's configuration")
        mine = {key: value for key, value in self.own["trainer"].items() if key in ("accelerator", "devices")}
        config = {**config, "trainer": {**config["trainer"], **mine}}
        check({**config, "module": arguments_of(config["module"])})
        if "pretrained" in config["model"]:
            config["model"] = {**config["model"], "pretrained": False}  # its weights are among the initial ones
        data = self._described[1]
        task = task_of(config, data.first_targets(1))
        classes, channels, pixels = (integer(size, key) for key in ("num_classes", "in_channels", "image_size"))
        make = partial(new_module, config, classes, channels, pixels, task)
        try:
            with nullcontext() if cut is None else without_weights():
                module = make()
        except RuntimeError as error:
            if cut is None:
                raise
            log.warning("the model cannot be made without weights (%s): it is made whole, and then cut", error)
            module = make()
        if cut is not None:
            assert isinstance(module, SplitModule)
            keep_part(module, cut)
        if words := difference(initial, module.state_dict()):
            raise ValueError(f"the server's model is another one than this version makes: {words}")
        load(module, initial)
        callbacks = instantiate_dict(config["callbacks"], "callbacks")
        for name, callback in callbacks.items():
            callback.name = name
        local = build_local(config)
        local.folder = self.folder
        makers = metric_makers(config["metrics"])
        if (names := config.get("measures")) is None:
            local.metrics = Metrics(makers, task)
            local.metrics.use(task, config["metric"])
        else:
            measured = {str(name): (makers or {}).get(name) for name in names}
            local.metrics = ModelMetrics(measured, snapshot(module.backbone.state_dict()), task, config["metric"])
        sharing: Sharing = instantiate(config["sharing"], "sharing")
        local.setup(module, sharing, list(callbacks.values()), config["seed"])
        if cut is None:
            check_metrics(local.metrics, module, data)
        else:
            assert isinstance(module, SplitModule)
            module.line = Exchange(RemoteBody(self._ask), cut, callbacks["server"].alignment)
        data.to(local.device)
        own = data.clients[0]
        own.batch_size = config.get("batch_size") or self._batch_size
        return local, Client(number, own)

    def _sync(self, header: Mapping[str, Any], states: Mapping[str, State]) -> messages.Content:
        store = self._follow(header)
        return {"kind": "synced", "number": store.held.number}, {}

    def _follow(self, header: Mapping[str, Any]) -> Store:
        run, life, orders = (header.get(key) for key in ("run", "life", "orders"))
        if not (isinstance(run, str) and run.isalnum() and isinstance(life, str) and isinstance(orders, list)):
            raise MessageError("a request must name its run and hold the orders that came before it")
        if run not in self._stores:
            self._stores = {run: Store(self.folder / f"run_{run}")}
        store = self._stores[run]
        try:
            given = [(int(number), str(word), what) for number, word, what in orders]
            store.follow(life, given, integer(header, "last_order"))
        except (ValueError, TypeError) as error:
            raise MessageError(f"the orders of a request are damaged: {error}") from error
        return store

    def _work(self, header: dict[str, Any], states: dict[str, State]) -> messages.Content:
        """Fit or score."""
        needs = [] if header.get("setup") == self._setup else ["setup"]
        number, state = self._state
        if header.get("known") and header.get("state") != number:
            needs.append("state")
        if needs:
            return {"kind": "need", "what": needs}, {}
        if not header.get("known"):
            state = states.get("state", {})
        states["state"], self._state = state, (header.get("state"), state)
        message = messages.read_task(header, states)
        store = self._follow(header)
        client = store.fill(self.client)
        if isinstance(message, Broadcast):
            message.state = dict(message.state)  # a fit may put others into it
        elif message.fetch and self.stays:
            raise MessageError(f"the model of site {self.name} stays where it is (--keep-model)")
        ticket = str(header.get("ticket"))
        if getattr(self.local.module, "line", None) is None:
            return self._done(client, message, store, ticket)
        self._dialog = Dialog(ticket, partial(self._done, client, message, store, ticket))
        return self._dialog.begin()

    def _done(self, client: Client, message: Message, store: Store, ticket: str) -> messages.Content:
        """Fit or score, and say what came of it."""
        try:
            with torch_threads(self.threads):
                if self.predictions is not None and isinstance(message, Exam):
                    answer: Fit | Scores = self._predicted(self.predictions, client, message)
                else:
                    answer = self.local.answer(client, message)
            given = message.here if isinstance(message, Broadcast) else {}
            if isinstance(answer, Fit) and (back := answer.update.here.keys() & given.keys()):
                names = ", ".join(sorted(back)[:4])
                raise ValueError(
                    f"{names} would be handed back within one process; this method has no way over a network, take "
                    "executor=serial"
                )
        except EndedError:
            raise
        except Exception as error:  # the server decides what a failed client means
            log.exception("the client's work failed")
            if self.predictions is not None:
                self.ended = str(error) or type(error).__name__
            return {"kind": "error", "text": f"{type(error).__name__}: {error}", "number": store.held.number}, {}
        if isinstance(answer, Fit):
            if isinstance(message, Broadcast) and not message.request:
                if self.stays and not message.stage and isinstance(self.local.metrics, ModelMetrics):
                    # A model that was personalized, which else goes to all: it is kept and scored here.
                    answer = replace(answer, personal=dict(answer.update.state), stage=HOME)
                    answer.update.state, answer.update.extra = {}, {}
                store.take(answer, ticket)
            content, found = messages.fitted(answer, all_finite(answer.personal))
        else:
            content, found = messages.scored(answer)
        return {**content, "number": store.held.number}, found

    def _predicted(self, predictions: Predictions, client: Client, exam: Exam) -> Scores:
        """Write what the client's model predicts; the server learns for how many examples."""
        assert self._described is not None
        number, values = predictions.write(self.local, client, exam, self._described[1])
        told = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info(
            "%s holds the predictions of %d examples; by the targets in the data: %s", predictions.file, number, told
        )
        self.finished = True
        return Scores(client.id, number, {})

    def _go_on(self, header: dict[str, Any], states: dict[str, State]) -> messages.Content:
        """Go on with work that asked the server something."""
        if self._dialog is None or self._dialog.ticket != header.get("ticket"):
            return {"kind": "need", "what": ["turn"]}, {}
        return self._dialog.hear(states.get("sent", {}))

    def _ask(self, header: dict[str, Any], sent: State) -> State:
        assert self._dialog is not None
        return self._dialog.ask(header, sent)
