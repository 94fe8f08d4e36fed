"""Runs the server: ``python -m fl_lightning.split.network.server``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence

from fl_lightning.checks import whole
from fl_lightning.module import FitContext
from fl_lightning.run.config import instantiate
from fl_lightning.run.training import new_module
from fl_lightning.sites.wire import server_credentials
from fl_lightning.split.module import SplitModule
from fl_lightning.split.network.options import (
    certificates,
    fingerprint,
    make_server,
    parser,
    prepare,
    read_config,
    require_safety,
)
from fl_lightning.split.network.service import SplitService, start


def build(options: argparse.Namespace) -> SplitService:
    """Make the service from the command line's options."""
    for name in ("clients", "classes", "channels", "size"):
        whole(f"--{name}", getattr(options, name), 1)
    config = read_config(options.overrides)
    server = make_server(config)
    module = new_module(config, options.classes, options.channels, options.size)
    assert isinstance(module, SplitModule)
    optimizer = instantiate(config["optimizer"], "optimizer")
    module.context = FitContext(optimizer)  # for a body that has none of its own
    x = module.example_input(options.channels, options.size)
    latency = server.latency_model(module, x, config["data"]["batch_size"], optimizer)
    profiles = [server.profiles[index % len(server.profiles)] for index in range(options.clients)]
    return SplitService(
        server.new_body(module),
        dict(enumerate(server.choose_cuts(module, latency, profiles))),
        fingerprint(config, module),
        options.folder / "server.pt",
        options.save_every,
        sequential=options.schedule == "sequential",
        patience=options.patience,
        keep_optimizer=server.keep_optimizer,
        precision=config["trainer"].get("precision", "32-true"),
        max_bytes=options.max_bytes,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until all clients have finished, or until told to stop; the checkpoint stays."""
    options = parser("The server of split training.")
    options.add_argument("--address", default="127.0.0.1:50051", help="host:port to listen at; port 0 takes a free one")
    options.add_argument("--clients", type=int, required=True, help="number of clients")
    options.add_argument("--classes", type=int, required=True, help="classes of the data, or size of the vocabulary")
    options.add_argument("--channels", type=int, default=3, help="channels of an image; 1 for tokens")
    options.add_argument("--size", type=int, default=32, help="height of an image, or tokens of a sequence")
    options.add_argument("--save-every", type=int, default=1, help="steps of the body between two checkpoints")
    options.add_argument("--patience", type=float, default=60.0, help="seconds until a silent client is passed over")
    options.add_argument("--schedule", choices=["sequential", "asynchronous"], default="sequential")
    chosen = options.parse_args(arguments)
    prepare()
    try:
        encryption = server_credentials(*certificates(chosen))
        require_safety(chosen.address, encryption is not None, chosen.insecure)
        service = build(chosen)
        server, port = start(service, chosen.address, encryption)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    told = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: told.set())
    print(f"serving {chosen.clients} clients at {chosen.address.rpartition(':')[0]}:{port}", flush=True)
    while not told.wait(0.2):
        if len(service.finished) == chosen.clients:
            break
    server.stop(grace=1.0).wait()
    service.save()  # steps since the last save, where --save-every is above 1
    print(f"served {service.steps} steps, {service.traffic.up} bytes up and {service.traffic.down} down", flush=True)


if __name__ == "__main__":
    main()
