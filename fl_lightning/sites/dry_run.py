"""What would leave a site, found by doing a round here, on the site's own data, without a server."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import override

from fl_lightning.callback import FederatedCallback, Server
from fl_lightning.client import Client, ClientInfo, Update
from fl_lightning.executors.serial import SerialExecutor
from fl_lightning.run.config import plain
from fl_lightning.run.folder import RunFolder
from fl_lightning.run.overrides import composed
from fl_lightning.run.training import assemble
from fl_lightning.sites import messages
from fl_lightning.split.cut import Cut
from fl_lightning.split.executor import SplitExecutor, SplitServer
from fl_lightning.state import State

QUIET = ("logger=none", "dashboard=null", "progress=null", "checkpoint=null", "loop.rounds=1")


class Watch(FederatedCallback):
    """Keeps the update that a client sends."""

    update: Update | None = None

    @override
    def on_update(self, loop: Server, client: ClientInfo, update: Update) -> None:
        self.update = update


def print_what_leaves(name: str, words: Sequence[str], device: Mapping[str, float] | None = None) -> None:
    """Train one round here as the server's command says, and print what an update would hold.

    Args:
        name: Of the site.
        words: Configuration of the site and of the server together.
        device: What the site says of its machine, by which a split model is cut.
    """
    config = plain(composed("train", [*words, *QUIET]))
    config["data"]["client"] = name
    server = (config["callbacks"] or {}).get("server") or {}
    in_turn = server.get("in_turn")
    if "profiles" in server:
        server["profiles"] = [{**profile, **(device or {})} for profile in server["profiles"]]
    executor = SplitExecutor if in_turn else SerialExecutor
    config["executor"] = {"_target_": f"{executor.__module__}.{executor.__qualname__}"}
    logging.getLogger("fl_lightning").setLevel(logging.WARNING)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        run = assemble(config, RunFolder(Path(folder) / "run"))
        run.loop.add_callback("watch", watch)
        run.fit()
    assert watch.update is not None
    info = replace(Client(0, run.clients[0].data).describe(), device=dict(device or {}))
    print(f"Once: the description of the data\n  {_plain(info)}")
    print("Every round: an update")
    total = 0
    for part, state in (("model", watch.update.state), ("method", watch.update.extra)):
        for line in _lines(part, state):
            print(f"  {line}")
        total += sum(tensor.nbytes for tensor in state.values())
    print(f"  {total:,} bytes of tensors, and the numbers {', '.join(watch.update.metrics)}, num_examples")
    for server in run.loop.callbacks.values():
        if isinstance(server, SplitServer):
            print("\n".join(_batch(server, server.cuts[0])))
    print("Every evaluation: scores\n  " + ", ".join(run.loop.metrics.names) + ", with the sums they are formed of")
    own = [tensor for tensor in run.clients[0].personal if tensor not in watch.update.state]
    print(f"Never: examples, labels one by one, {', '.join(own) or 'no tensor of the model'}")


def _batch(server: SplitServer, cut: Cut) -> Iterator[str]:
    """Say what leaves with every batch where the server holds the model's middle."""
    up = {"activation": cut.at, "gradient": cut.end}
    if server.alignment.place and cut.at > cut.start:
        up["base"] = cut.start
    yield f"Every batch of N examples, with the model cut before its blocks {cut.at} and {cut.end}"
    for name, block in up.items():
        yield f"  {name}  float32 (N, {', '.join(map(str, server.shapes[block - 1]))})"


def _lines(part: str, state: State) -> Iterator[str]:
    for name, tensor in state.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        yield f"{part:6}  {name}  {kind} {tuple(tensor.shape)}  {tensor.nbytes:,} bytes"


def _plain(info: ClientInfo) -> dict[str, Any]:
    header, states = messages.described(info)
    return {key: value for key, value in header.items() if key != "kind"} | {
        "label_counts": states["labels"]["counts"].tolist(),
        "and": "number and names of classes, shape of an example, hash of the partition",
    }
