"""A site's process: it calls a server, does what it is asked, and waits for the next server when one has ended."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import fl_lightning
from fl_lightning import files
from fl_lightning.checks import above
from fl_lightning.run.folder import RunFolder
from fl_lightning.sites.dry_run import print_what_leaves
from fl_lightning.sites.frame import MAX_BYTES, decode, encode
from fl_lightning.sites.predictions import Predictions
from fl_lightning.sites.relay import Door
from fl_lightning.sites.service import SERVICE, token_digest
from fl_lightning.sites.site import Site
from fl_lightning.sites.wire import Line, channel_credentials, read_pems, require_safety

log = logging.getLogger(__name__)

TIMEOUT = 300.0
"""Seconds that one call may take, which may bring a whole model."""


def read_token(folder: Path) -> str:
    """Return the token of the site that has this folder; makes one at the first call."""
    file = folder / "token"
    if not file.is_file():
        files.write_text(file, secrets.token_hex(32) + "\n")
        os.chmod(file, 0o600)
    return file.read_text().strip()


def serve(site: Site, line: Line, token: str, once: bool = False) -> None:
    """Do what servers ask, one after another.

    Args:
        site: Does the work.
        line: Calls the server.
        token: Says who the site is.
        once: Whether to end with the first server's run.

    Raises:
        ConnectionError: If no server is there for the line's patience.
        PermissionError: If the server does not take this site.
        ValueError: If server and site cannot go together.
    """
    who = {"name": site.name, "token": token, "version": fl_lightning.__version__}
    while True:
        answer, _ = line.call("Join", encode(who), advice="start the server, or see that --server is its address")
        header, _ = decode(answer, ())
        session, max_bytes = str(header["session"]), min(int(header["max_bytes"]), line.max_bytes)
        log.info("site %s has joined the server at %s", site.name, line.address)
        notes, answer = {"session": session, "ticket": "0"}, b""
        with (
            suppress(LookupError),
            _signs_of_life(line, session, float(header["beat"])),
        ):  # it was started anew: join again
            while True:
                request, found = line.call("Next", answer, notes)
                if "closed" in found:
                    log.info("the server has ended its run%s", "" if once else "; waiting for the next one")
                    if once:
                        return
                    break
                notes, answer = {"session": session, "ticket": found["ticket"]}, b""
                if request:
                    answer = site.answer(request, max_bytes)
                if site.ended or site.finished:
                    line.call("Next", answer, {**notes, "last": "yes"})
                    if site.ended:
                        raise ValueError(site.ended)
                    return


def serve_hosted(site: Site, door: Door, max_bytes: int = MAX_BYTES) -> NoReturn:
    """Do what another framework hands in, one request after another.

    Args:
        site: Does the work.
        door: Where requests are handed in; closed at the end.
        max_bytes: The longest message.

    Raises:
        ValueError: If server and site cannot go together.
    """
    log.info("site %s waits for its host", site.name)
    try:
        while True:
            answer = site.answer(door.next(), max_bytes)
            door.answer(answer, last=bool(site.ended))
            if site.ended:
                raise ValueError(site.ended)
    finally:
        door.close()


@contextmanager
def _signs_of_life(line: Line, session: str, seconds: float) -> Iterator[None]:
    """Let the server know that this process is there, while it is at work."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(seconds):
            line.beat({"session": session})

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def parser() -> argparse.ArgumentParser:
    """Return the options of ``python -m fl_lightning.site``."""
    options = argparse.ArgumentParser(
        prog="python -m fl_lightning.site",
        description="One client of a federation, where its data are. Nothing leaves but what --dry-run prints.",
        epilog="A configuration says where the data are, as for train.py: data=folder data.root=MINE.npz",
    )
    options.add_argument("--server", help="host:port of the server; default: 127.0.0.1:50061")
    options.add_argument("--hosted", action="store_true", help="be called through NVFlare or Flower on this machine")
    options.add_argument("--name", required=True, help="name of this site")
    options.add_argument("--folder", type=Path, help="where it keeps what is its own; default: sites/NAME")
    options.add_argument("--threads", type=int, default=1, help="threads of a fit")
    options.add_argument("--dry-run", action="store_true", help="print what would leave, and connect to nobody")
    options.add_argument("--show-token", action="store_true", help="print the SHA-256 of its token, for executor.sites")
    options.add_argument("--fingerprint", default="", help="the configuration that this site agrees to; begin suffices")
    options.add_argument("--keep-model", action="store_true", help="never hand the client's model over in whole")
    options.add_argument("--trust", action="append", default=[], help="a package of your own that the server may name")
    options.add_argument("--memory", type=float, help="bytes that a fit may take here, by which a split model is cut")
    options.add_argument("--speed", type=float, help="floating-point operations a second of a fit here, likewise")
    options.add_argument("--infer", type=Path, help="a .csv or .npz to write predictions to; needs fl_lightning.serve")
    options.add_argument("--split", default="test", help="of which examples: test, val, train or all")
    options.add_argument("--once", action="store_true", help="end with the first run")
    options.add_argument("--patience", type=float, default=86400.0, help="seconds for which a server is called again")
    options.add_argument("--max-bytes", type=int, default=MAX_BYTES, help="longest message")
    options.add_argument("--tls-cert", type=Path, help="own certificate, PEM; its common name is the site's name")
    options.add_argument("--tls-key", type=Path, help="its key, PEM")
    options.add_argument("--tls-ca", type=Path, help="certificate of who signed the server's, PEM")
    options.add_argument("--insecure", action="store_true", help="speak in the clear beyond this machine")
    options.add_argument("overrides", nargs="*", help="configuration: data=..., data.root=..., trainer=...")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve one client's data to the servers of a federation, until told to stop."""
    chosen = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("lightning").setLevel(logging.ERROR)
    folder = chosen.folder or Path("sites") / chosen.name
    try:
        if chosen.dry_run:
            print_what_leaves(chosen.name, chosen.overrides, device_of(chosen))
            return
        if chosen.show_token:
            print(f"{chosen.name}: {token_digest(read_token(folder))}")
            return
        work(chosen, folder)
    except (ValueError, TypeError, OSError, LookupError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on where it was")


def device_of(chosen: argparse.Namespace) -> dict[str, float]:
    """Return what the options say of this machine.

    Raises:
        ValueError: If a number is out of its range.
    """
    told = {"memory": chosen.memory, "flops_per_second": chosen.speed}
    for name, option in (("memory", "--memory"), ("flops_per_second", "--speed")):
        if told[name] is not None:
            above(option, told[name], 0)
    return {name: value for name, value in told.items() if value is not None}


def work(chosen: argparse.Namespace, folder: Path) -> None:
    """Do what servers ask, as the options say.

    Raises:
        ValueError: If the options do not go together, or server and site do not.
    """
    if chosen.infer is None and chosen.split != "test":
        raise ValueError("--split must come with --infer")
    if chosen.hosted:
        for name in ("infer", "server", "once", "insecure", "tls_cert", "tls_key", "tls_ca"):
            if getattr(chosen, name):
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must be left out with --hosted, whose host connects the site; leave it out")
    elif (chosen.tls_cert is None) != (chosen.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together")
    address = chosen.server or "127.0.0.1:50061"
    encryption = channel_credentials(read_pems(chosen.tls_ca, chosen.tls_key, chosen.tls_cert))
    needed = "--tls-ca, --tls-cert and --tls-key for TLS, or --insecure to speak in the clear"
    require_safety(address, encryption is not None, chosen.insecure, needed)
    site = Site(
        chosen.name,
        folder,
        chosen.overrides,
        threads=chosen.threads,
        trust=chosen.trust,
        agreed=chosen.fingerprint,
        stays=chosen.keep_model,
        device=device_of(chosen),
        predictions=None if chosen.infer is None else Predictions(chosen.infer, chosen.split),
    )
    held = RunFolder(folder)  # its lock goes with it
    try:
        held.hold()
    except ValueError:
        raise ValueError(f"another process runs in {folder}; end it, or choose another --folder") from None

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if chosen.hosted:
        serve_hosted(site, Door(chosen.name, folder, read_token(folder)), chosen.max_bytes)
    line = Line(address, SERVICE, TIMEOUT, chosen.patience, encryption, chosen.max_bytes)
    try:
        serve(site, line, read_token(folder), chosen.once)
    finally:
        line.close()
