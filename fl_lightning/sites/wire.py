"""Messages over gRPC: a line that calls again while nobody answers, a server that says no in words, and TLS."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc

from fl_lightning.checks import above, at_least
from fl_lightning.sites.frame import MAX_BYTES, MessageError

log = logging.getLogger(__name__)

FIRST_WAIT = 0.05  # seconds until a call is repeated; it doubles up to a second
HANG_UPS = 5
"""How often in a row a server may hang up before that is taken for an answer."""

RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

Notes = Mapping[str, str]
"""What stands beside a message: ASCII text by key."""

Call = Callable[[bytes, Notes, grpc.ServicerContext], tuple[bytes, Notes]]
"""What a server does with a message and its notes."""


class Line:
    """Calls a server, and calls again while it cannot be reached.

    Args:
        address: ``host:port``.
        service: Name of the service.
        timeout: Seconds that one call may take, above 0.
        patience: Seconds for which an unreachable server is called again, at least 0.
        credentials: For TLS; ``None`` speaks in the clear.
        max_bytes: The longest message that is sent or accepted.
    """

    def __init__(
        self,
        address: str,
        service: str,
        timeout: float = 30.0,
        patience: float = 60.0,
        credentials: grpc.ChannelCredentials | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        above("timeout", timeout, 0)
        at_least("patience", patience, 0)
        self.address, self.service, self.encrypted = address, service, credentials is not None
        self.timeout, self.patience, self.max_bytes = timeout, patience, max_bytes
        options = [
            *_limits(max_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )

    def call(
        self, name: str, message: bytes = b"", notes: Notes | None = None, advice: str = ""
    ) -> tuple[bytes, Notes]:
        """Send a message and return the answer. A message may arrive twice.

        Args:
            name: The call.
            message: What is sent.
            notes: What stands beside it.
            advice: What a user can do where the server stays away; the end of the sentence.

        Raises:
            ConnectionError: If the server cannot be reached within the patience.
            LookupError: If the server does not know what the message speaks of.
            PermissionError: If the server does not let this side speak.
            ValueError: If the message is too long, or the server refuses it, with its reason.
        """
        if len(message) > self.max_bytes:
            raise ValueError(f"a message of {len(message)} bytes is longer than the {self.max_bytes} that are allowed")
        deadline, wait, hung_up = time.monotonic() + self.patience, FIRST_WAIT, 0
        method = self._channel.unary_unary(f"/{self.service}/{name}")
        while True:
            try:
                answer, call = method.with_call(message, timeout=self.timeout, metadata=tuple((notes or {}).items()))
                return answer, {key: str(value) for key, value in call.trailing_metadata() or ()}
            except grpc.RpcError as error:
                code, details = error.code(), str(error.details())
                if code == grpc.StatusCode.FAILED_PRECONDITION:
                    raise LookupError(details) from error
                if code == grpc.StatusCode.PERMISSION_DENIED:
                    raise PermissionError(f"the server at {self.address} says: {details}") from error
                if code not in RETRIED:
                    raise ValueError(f"the server at {self.address} refuses {name}: {details}") from error
                hung_up = hung_up + 1 if "Socket closed" in details else 0
                if reason := _no_use(details, hung_up):
                    raise ConnectionError(f"the server at {self.address} does not answer {name}: {reason}") from error
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"the server at {self.address} does not answer {name} ({code.name}: {_short(details)}) for "
                        f"{self.patience:.0f} s{advice and f'; {advice}'}"
                    ) from error
                if wait == FIRST_WAIT:
                    log.warning(
                        "the server at %s is not reached (%s: %s); it is called again for %.0f s",
                        self.address, code.name, _short(details), self.patience,
                    )  # fmt: skip
            time.sleep(wait)
            wait = min(2 * wait, 1.0)

    def beat(self, notes: Notes) -> None:
        """Give a sign of life, once; whether it arrives is for others to find out."""
        with suppress(grpc.RpcError, ValueError):  # ValueError: the line is closed
            self._channel.unary_unary(f"/{self.service}/Beat")(b"", timeout=10.0, metadata=tuple(notes.items()))

    def close(self) -> None:
        """Hang up."""
        self._channel.close()


def listen(
    service: str,
    calls: Mapping[str, Call],
    address: str,
    credentials: grpc.ServerCredentials | None = None,
    workers: int = 8,
    max_bytes: int = MAX_BYTES,
) -> tuple[grpc.Server, int]:
    """Start to listen.

    What a call raises is the caller's answer: a :class:`MessageError`, a ``LookupError`` or a ``PermissionError`` says
    that the message is not right, an ``OSError`` that this side cannot do it.

    Args:
        service: Name of the service.
        calls: What it answers, by name.
        address: ``host:port``; port 0 takes a free one.
        credentials: For TLS; ``None`` listens in the clear.
        workers: Calls that are taken at once.
        max_bytes: The longest message that is sent or accepted.

    Returns:
        The server, to be stopped by the caller, and the port.

    Raises:
        OSError: If the address cannot be had.
    """
    server = grpc.server(ThreadPoolExecutor(workers), options=[*_limits(max_bytes), ("grpc.so_reuseport", 0)])
    handlers = {name: grpc.unary_unary_rpc_method_handler(_handler(name, call)) for name, call in calls.items()}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    try:
        port = (
            server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        )
    except RuntimeError as error:
        raise OSError(f"cannot listen at {address}: {error}; choose another port") from error
    server.start()
    return server, port


def _handler(name: str, call: Call) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            answer, notes = call(request, dict(context.invocation_metadata()), context)
            context.set_trailing_metadata(tuple(notes.items()))
            return answer
        except MessageError as error:
            log.warning("%s refused: %s", name, error)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except LookupError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except PermissionError as error:
            log.warning("%s refused: %s", name, error)
            context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except OSError as error:
            log.exception("%s failed", name)
            context.abort(grpc.StatusCode.INTERNAL, str(error))
        raise AssertionError("abort raises")

    return handle


def read_pems(*paths: str | Path | None) -> list[bytes | None]:
    """Return the contents of files, None for what is not given."""
    return [Path(path).read_bytes() if path else None for path in paths]


def server_credentials(
    authority: bytes | None, key: bytes | None, certificate: bytes | None
) -> grpc.ServerCredentials | None:
    """Return what TLS needs at the server; with an authority, clients must show a certificate that it signed."""
    if key is None or certificate is None:
        return None
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)


def channel_credentials(pems: Sequence[bytes | None]) -> grpc.ChannelCredentials | None:
    """Return what TLS needs at a client, of authority, key and certificate, if one of them is given."""
    return grpc.ssl_channel_credentials(*pems) if any(pems) else None


def require_safety(address: str, encrypted: bool, insecure: bool, needed: str) -> None:
    """Refuse to speak in the clear to another machine, unless that is asked for.

    Args:
        address: ``host:port``.
        encrypted: Whether there is TLS.
        insecure: Whether speaking in the clear was asked for.
        needed: The settings that give TLS, and the one that does without.

    Raises:
        ValueError: If the address is no loopback, and neither holds.
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    if not (local or encrypted or insecure):
        raise ValueError(f"{address} is not this machine, and what is sent tells about the data: give {needed}")


def _limits(max_bytes: int) -> list[tuple[str, int]]:
    return [("grpc.max_receive_message_length", max_bytes), ("grpc.max_send_message_length", max_bytes)]


def _no_use(details: str, hung_up: int) -> str:
    """Say why calling again is of no use; empty if it may be."""
    for state in ("has expired", "is not yet valid"):
        if f"certificate {state}" in details:
            return (
                f"its certificate {state} by the clock here, {time.strftime('%Y-%m-%d %H:%M')}; set the clock, or have "
                "the certificate renewed"
            )
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return "its certificate is not signed by the authority that is given here, or is not of this address"
    if "WRONG_VERSION_NUMBER" in details:
        return "it speaks in the clear, and this side TLS; give both certificates, or neither"
    if hung_up >= HANG_UPS:
        return (
            "it hangs up each time: it speaks TLS and this side does not, or it refuses the certificate shown, as of "
            "another authority or as out of date by its own clock"
        )
    return ""


def _short(details: str) -> str:
    """Return why a call failed, without where: gRPC names every address that it has tried."""
    return re.split(r"ip[^ ]*:\d+: ", (details.splitlines() or [""])[0])[-1][:200]
