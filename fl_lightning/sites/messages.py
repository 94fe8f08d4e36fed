"""What is said between server and site: fits, exams and their answers, as header and named states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fl_lightning.client import Broadcast, ClientInfo, Exam, Fit, Scores, Update
from fl_lightning.executors.executor import Message
from fl_lightning.sites.frame import MessageError, integer, number
from fl_lightning.split.cost import MEASURED
from fl_lightning.state import State

Content = tuple[dict[str, Any], dict[str, State]]
"""Header and states of a message."""

TOTALS = "totals:"


def task(message: Message) -> Content:
    """Say a fit or an exam.

    What a client could have kept or made anew (``Broadcast.here``) is sent: more travels than is counted.
    """
    if isinstance(message, Exam):
        fields = ("split", "personal", "stage", "confusion", "metrics", "fetch")
        return {"kind": "score", **{name: getattr(message, name) for name in fields}}, {"state": message.state}
    header = {name: getattr(message, name) for name in ("round", "train", "stage", "request")}
    return {"kind": "fit", **header}, {"state": message.state, "extra": message.extra, "here": message.here}


def read_task(header: Mapping[str, Any], states: Mapping[str, State]) -> Message:
    """Understand a fit or an exam.

    Raises:
        MessageError: If it is not one.
    """
    for name, kind in {"train": bool, "stage": str, "request": str, "split": str, "personal": bool}.items():
        if name in header and not isinstance(header[name], kind):
            raise MessageError(f"`{name}` of a message must be of type {kind.__name__}, got {header[name]!r}")
    state = states.get("state", {})
    if header["kind"] == "fit":
        extra, words = states.get("extra", {}), (header.get("stage", ""), header.get("request", ""))
        train, here = bool(header.get("train", True)), states.get("here", {})
        return Broadcast(integer(header, "round"), state, extra, train, *words, here=here)
    if header.get("split") not in ("train", "val", "test"):
        raise MessageError(f"`split` of a message must be train, val or test, got {header.get('split')!r}")
    metrics = header.get("metrics")
    return Exam(
        header["split"],
        state,
        bool(header.get("personal")),
        header.get("stage", ""),
        bool(header.get("confusion")),
        None if metrics is None else tuple(map(str, metrics)),
        bool(header.get("fetch")),
    )


def fitted(fit: Fit, own_is_finite: bool) -> Content:
    """Say what a fit sends back; what it leaves with the client is not in it."""
    update = fit.update
    header = {"kind": "update", "num_examples": update.num_examples, "own_is_finite": own_is_finite}
    metrics = {name: float(value) for name, value in update.metrics.items()}
    return {**header, "metrics": metrics}, {"state": update.state, "extra": update.extra}


def read_update(header: Mapping[str, Any], states: Mapping[str, State], client_id: int, sent: State) -> Update:
    """Understand what a fit sends back.

    Raises:
        MessageError: If it is no update, or holds tensors of the model that were not sent.
    """
    state, metrics = states.get("state", {}), header.get("metrics")
    if header["kind"] != "update" or not isinstance(metrics, dict):
        raise MessageError(f"the answer to a fit must be an update, got {header['kind']!r}")
    if strange := state.keys() - sent.keys():
        raise MessageError(f"an update may hold the tensors that were sent alone, got {', '.join(sorted(strange)[:4])}")
    numbers = {str(name): float(value) for name, value in metrics.items()}
    return Update(client_id, integer(header, "num_examples"), state, states.get("extra", {}), numbers)


def scored(scores: Scores) -> Content:
    """Say what an exam found."""
    states = {TOTALS + name: total for name, total in scores.totals.items()}
    if scores.confusion is not None:
        states["confusion"] = {"confusion": scores.confusion}
    if scores.model is not None:
        states["model"] = scores.model
    values = {name: float(value) for name, value in scores.values.items()}
    return {"kind": "scores", "num_examples": scores.num_examples, "values": values}, states


def read_scores(header: Mapping[str, Any], states: Mapping[str, State], client_id: int) -> Scores:
    """Understand what an exam found.

    Raises:
        MessageError: If it is no scores.
    """
    values = header.get("values")
    if header["kind"] != "scores" or not isinstance(values, dict):
        raise MessageError(f"the answer to an exam must be scores, got {header['kind']!r}")
    return Scores(
        client_id,
        integer(header, "num_examples"),
        {str(name): float(value) for name, value in values.items()},
        {key.removeprefix(TOTALS): total for key, total in states.items() if key.startswith(TOTALS)},
        states.get("confusion", {}).get("confusion"),
        states.get("model"),
    )


def described(info: ClientInfo) -> Content:
    """Say what the server may know of a client."""
    fields = ("num_train", "num_val", "num_test", "batch_size")
    header = {"kind": "description", **{name: getattr(info, name) for name in fields}}
    if info.device:
        header["device"] = info.device
    return header, {"labels": {"counts": info.label_counts}}


def read_info(header: Mapping[str, Any], states: Mapping[str, State], name: str) -> ClientInfo:
    """Understand what the server may know of a client, whose number is still to be given.

    Raises:
        MessageError: If something is missing.
    """
    train, val, test = (integer(header, key) for key in ("num_train", "num_val", "num_test"))
    try:
        counts = states["labels"]["counts"]
    except KeyError as error:
        raise MessageError("a description must hold the counts of labels") from error
    device = header.get("device", {})
    if not isinstance(device, dict) or device.keys() - set(MEASURED):
        raise MessageError(f"`device` of a description may hold {' and '.join(MEASURED)}, got {device!r}")
    device = {key: number(device, str(key), 0.0) for key in device}
    return ClientInfo(0, name, train, val, test, counts, integer(header, "batch_size"), device=device)


def torch_type(name: Any) -> torch.dtype:
    """Return the number type of examples by its name.

    Raises:
        MessageError: If there is none.
    """
    found = {"float32": torch.float32, "int64": torch.int64, "uint8": torch.uint8, "bool": torch.bool}.get(name)
    if found is None:
        raise MessageError(f"the type of examples and targets must be float32, int64, uint8 or bool, got {name!r}")
    return found
