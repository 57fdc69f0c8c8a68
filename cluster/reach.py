"""Who answers at an address, within seconds: asked before anything waits there for longer."""

import http.client
import os
import socket
import ssl
from collections.abc import Callable
from threading import Thread
from urllib.parse import urlsplit

from trainer.errors import UserError

ANSWER_S = 5.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SETTINGS = bytes([4])
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + SETTINGS + bytes(5)


def reach_loopback_directly() -> None:
    """No proxy of the environment stands between two processes of this machine."""
    for name in ("no_proxy", "NO_PROXY"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))


def refuse_silent_head(url: str) -> None:
    """Ask a head's dashboard for its version. UserError where no HTTP server answers in time."""
    parts = urlsplit(url)
    if parts.hostname not in LOOPBACK and any(
        os.environ.get(name) for name in (f"{parts.scheme}_proxy", f"{parts.scheme}_proxy".upper())
    ):
        return  # it is the proxy that answers
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection

    def ask() -> None:
        connection = kind(parts.hostname or "", parts.port, timeout=ANSWER_S)
        connection.request("HEAD", "/api/version")
        connection.getresponse()
        connection.close()

    if (wrong := _within(ask)) is not None:
        raise UserError(
            f"{url}: no Ray head answers there ({wrong}); give --address http://HOST:PORT of its dashboard"
        )


def refuse_silent_cluster(address: str, named_by: str) -> None:
    """Greet the GCS at HOST:PORT. UserError where nobody answers in time, or somebody else."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local") or "://" in address.removeprefix("ray://"):
        return
    if not host or not port.isdecimal() or int(port) > 65535:
        raise UserError(
            f"{named_by}: is {address}; give HOST:PORT of a running head, as `ray start` printed it"
        )

    def greet() -> None:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.sendall(HTTP2_GREETING)
            if connection.recv(64)[3:4] != SETTINGS:  # the first frame of every HTTP/2 server
                raise ConnectionError("something else than Ray listens there")

    if (wrong := _within(greet)) is not None:
        cure = "start one, name another, or unset it to train on a cluster of your own"
        raise UserError(f"{named_by}: no Ray head answers at {address} ({wrong}); {cure}")


def _within(ask: Callable[[], None]) -> str | None:
    """What went wrong with a question, or that no answer came in time; None where one came."""
    failures: list[str] = []

    def body() -> None:
        try:
            ask()
        except (OSError, http.client.HTTPException, ssl.SSLError, ValueError) as error:
            failures.append(getattr(error, "strerror", None) or str(error) or type(error).__name__)

    thread = Thread(target=body, name="question", daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    if thread.is_alive():
        return f"silent for {ANSWER_S:g} s"
    return failures[0] if failures else None
