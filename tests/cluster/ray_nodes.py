"""Nodes of a Ray cluster, as an administrator starts them, all on this machine."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.ray_cluster import LOOPBACK_ONLY
from tests.cluster.commands import environment
from tests.cluster.processes import descendants, remaining


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def token() -> Iterator[Path]:
    """The file of a new cluster's token; nodes may keep their files beside it."""
    folder = Path(tempfile.mkdtemp(prefix="ls-head-", dir="/tmp"))  # not pytest's: sockets need a short path
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    try:
        yield file
    finally:
        shutil.rmtree(folder)


@contextmanager
def node(token: Path, *options: str, **more: str) -> Iterator[subprocess.Popen]:
    """A node that `ray start` starts with options, for as long as the body runs; nothing of it is left."""
    tools = Path(sys.executable).parent
    (agent,) = free_ports(1)  # Ray's own choices are the same for every node
    own = ["--dashboard-agent-listen-port", str(agent), "--temp-dir", tempfile.mkdtemp(dir=token.parent)]
    process = subprocess.Popen(
        [tools / "ray", "start", "--block", *own, *options],
        env=environment(
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            RAY_USAGE_STATS_ENABLED="0",
            PATH=f"{tools}:{os.environ['PATH']}",
            **(LOOPBACK_ONLY | more),
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        family = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert remaining(family) == []


def pull_the_plug(process: subprocess.Popen) -> None:
    """Take a node away, as a machine that loses power is taken away."""
    for each in descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
    process.kill()
    process.wait()
