"""The MLflow UI: a server on the loopback interface, for as long as the command runs."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import tracking
from cluster.console import Console
from cluster.signals import interruptible
from trainer.errors import RunFailed, UserError
from trainer.tracking import address
from trainer.tracking.progress import TrackingProgress
from trainer.tracking.writer import QUIET_MLFLOW

USUAL_PORT = 5000
STARTING_S = 120.0
SERVER = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # nobody asked for a process that runs code on request
}


def show(folder: Path, port: int | None, console: Console) -> None:
    """Serve the place where a run or a sweep is until Ctrl-C, and say at which address it is shown.

    Raises:
        UserError: MLflow has nothing of it.
    """
    progress = TrackingProgress.load(folder)
    if progress is None or progress.run_id is None:
        raise UserError(tracking.how_to_look(folder))
    if progress.uri.startswith("http"):
        console.say(tracking.how_to_look(folder))
        return
    # Of another database the password is in the environment alone.
    uri = progress.uri if progress.uri.startswith(address.SQLITE) else None
    serve(uri, port, console, tracking.page(folder))


def serve(uri: str | None, port: int | None, console: Console, page: str = "") -> None:
    """Serve the runs at `uri` (default: as for training) until Ctrl-C; `page` is the path that is shown."""
    uri = address.resolved(uri)
    if uri.startswith("http"):
        console.say(f"the runs are on a server that has its UI at {address.shown(uri)}")
        return
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.exists():
        raise UserError(
            f"{file}: there is no such database; go to the folder that the runs were started from"
        )
    port = port or _free_port()
    with interruptible(), _server(uri, port, console) as server:
        console.say(f"MLflow: http://127.0.0.1:{port}{page and f'/{page}'}   (Ctrl-C ends it)")
        server.wait()


@contextmanager
def _server(uri: str, port: int, console: Console) -> Iterator[subprocess.Popen]:
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ
            | QUIET_MLFLOW
            | SERVER
            | {"MLFLOW_BACKEND_STORE_URI": uri},  # which `ps` does not show
            start_new_session=True,  # so that its own children can be ended with it
        )
        guard = _ends_with_us(server.pid)
        try:
            with console.waiting("starting the MLflow server"):
                if not _answers(server, port):
                    log.seek(0)
                    raise RunFailed(f"the MLflow server did not start:\n{log.read().strip()}")
            yield server
        finally:
            guard.kill()
            guard.wait()
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def _ends_with_us(group: int) -> subprocess.Popen:
    """A process that waits for this one to end, however it does, and ends a group of processes then."""
    program = (
        "import os, signal, sys, time\n"
        "sys.stdin.read()\n"  # ends with the process at the other end of the pipe
        "for number, pause_s in (signal.SIGTERM, 5), (signal.SIGKILL, 0):\n"
        f"    os.killpg({group}, number)\n"
        "    time.sleep(pause_s)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _answers(server: subprocess.Popen, port: int) -> bool:
    """Wait until the server answers; False when it ends or takes too long."""
    began_at = time.monotonic()
    while server.poll() is None and time.monotonic() - began_at < STARTING_S:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return True
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    return False


def _free_port() -> int:
    """The usual port when it is free, else any that is."""
    for wanted in (USUAL_PORT, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise RunFailed("no port of this machine is free")
