"""A Ray cluster to train on: one of our own that ends with the run, or one that is already there.

A cluster of our own listens on the loopback interface only, in all its processes, and knows no other token
than the one made for it.
"""

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from cluster.package import CLUSTER_BYTES, in_job, packed
from trainer.errors import RunFailed

NEEDED = ("gcs_server", "raylet")  # the processes without which a cluster is lost
FILES = "lockstep-"  # how the folders of our own clusters begin, followed by the driver's process number
NODE_S = 30.0  # until Ray's own way of waiting for its node takes over
ENDING_S = 10.0  # what the last processes of a cluster may take to end
OURS = ("cluster", "data_echo", "optim", "trainer")
NOT_UPLOADED = ["__pycache__/"]  # of our packages
LOOPBACK_ONLY = {
    # What Ray sets on systems that cannot form clusters: node address 127.0.0.1, and every port bound to it.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",  # none of ours could use the processes that it starts
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


Phase = Callable[[str], AbstractContextManager[None]]


def connected(
    address: str | None, cpus: int, phase: Phase, say: Callable[[str], None]
) -> AbstractContextManager[None]:
    """The cluster at `address`, or for None one of our own, for as long as the body runs.

    Args:
        cpus: that a cluster of our own has, whatever the machine's cores: all of ours find a place.
        phase: what the start is done in, by name.
        say: tells the user what is sent.
    """
    return _own_cluster(cpus, phase) if address is None else _existing_cluster(address, phase, say)


@contextmanager
def _own_cluster(cpus: int, phase: Phase) -> Iterator[None]:
    """A cluster on this machine that lives as long as the body and keeps its files in one folder."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{FILES}{os.getpid()}-", dir="/tmp"))  # for sockets: a short path
    is_up = False
    try:
        files = folder / "r"  # Ray opens its folder to everybody: ours around it stays closed
        files.mkdir()
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ.update(LOOPBACK_ONLY, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        _make_importable(Path.cwd())
        with phase("Ray"), _lean(), _told_why():
            _start(address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=str(files))
        is_up = True
        yield
    finally:
        groups = [process.pid for _, process in _processes()]
        if lost_process() is None:
            _stop()
        else:
            _kill()
        for group in groups:  # workers that the raylet has just told to end, too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        _remove(folder, is_quiet=is_up)


@contextmanager
def _existing_cluster(address: str, phase: Phase, say: Callable[[str], None]) -> Iterator[None]:
    """A cluster that somebody else started; our packages and the working folder are sent to its nodes."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # an open cluster has to be asked for, with "disabled"
    try:
        with phase(f"Ray at {address}"):
            if in_job():
                _start(address=address)
            else:
                with packed(Path.cwd(), CLUSTER_BYTES, say) as archive:
                    _start(address=address, runtime_env=code_for_workers(archive))
        yield
    finally:
        _stop()


def _start(**options: Any) -> None:
    """Start or join a cluster; its processes form a group of their own, so that a signal to the command's
    group leaves them to save and to end in order.
    """
    import ray
    from ray._private import utils

    die_with_parent = utils.set_kill_on_parent_death_linux

    def in_a_group_of_its_own() -> None:  # runs in the child, before its program
        die_with_parent()
        os.setpgid(0, 0)

    with _replaced(
        (utils, "set_kill_on_parent_death_linux", in_a_group_of_its_own),
        (utils, "set_sigterm_handler", lambda handler: None),  # Ray's knows nothing of the run
    ):
        ray.init(**options)


@contextmanager
def _told_why() -> Iterator[None]:
    """On slow machines Ray's processes give up waiting for each other, in many words of their own."""
    try:
        yield
    except Exception as error:
        why = str(error).strip().partition("\n")[0]
        raise RunFailed(f"Ray did not start ({why}); try again, or train with --local") from error


def _lean() -> AbstractContextManager[None]:
    """While a cluster of our own starts, Ray leaves out what a run has no use for, the autoscaler's monitor
    and the dashboard with its agent, and asks every 20 ms, not every second, whether its node is there.
    """
    from ray._private import services, utils
    from ray._private.node import Node

    return _replaced(
        (Node, "start_monitor", lambda node: None),
        (Node, "start_api_server", lambda node, **_: setattr(node, "_webui_url", "")),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not wanted")),
        (services, "get_node", partial(_node_once_there, services.get_node)),
    )


@contextmanager
def _replaced(*replacements: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of Ray's, as (owner, name, replacement), are others while the body runs."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _node_once_there(get_node: Callable[[str, str], Any], gcs_address: str, node_id: str) -> Any:
    """As Ray's `get_node`, which sleeps for whole seconds while the node is not there."""
    from ray._private.services import _get_gcs_client_options
    from ray._private.state import GlobalState

    state, deadline = GlobalState(), time.monotonic() + NODE_S
    state._initialize_global_state(_get_gcs_client_options(gcs_address))
    while time.monotonic() < deadline:
        if any(node["NodeID"] == node_id and node["Alive"] for node in state.node_table()):
            break
        time.sleep(0.02)
    return get_node(gcs_address, node_id)


def _processes() -> Iterator[tuple[str, Popen]]:
    """The processes that keep a cluster of our own running, by name; none where it has not started."""
    node = getattr(sys.modules.get("ray._private.worker"), "_global_node", None)
    for name, started in node.all_processes.items() if node else ():
        yield from ((name, each.process) for each in started)


def lost_process() -> str | None:
    """The process of a cluster of our own that has died, and how; None while all live."""
    for name, process in _processes():
        if name in NEEDED and (code := process.poll()) is not None:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"Ray's {name.replace('_', ' ')} (process {process.pid}) {how}"
    return None


def _stop() -> None:
    shutdown = getattr(sys.modules.get("ray"), "shutdown", None)
    if shutdown is not None:  # an interrupt may come while Ray is imported
        shutdown()


def _kill() -> None:
    """End what is left of a cluster that has lost a process: it cannot be shut down in order."""
    atexit.register(_leave)
    for _, process in _processes():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own, workers included
        process.wait()


def _end_users_of(folder: Path) -> None:
    """End the processes of a cluster that was interrupted while it started: Ray knows nothing of them yet."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if f"{folder}/".encode() in command.read_bytes():
                group = os.getpgid(int(command.parent.name))  # with those that hide their command
                if group != os.getpgrp():
                    os.killpg(group, signal.SIGKILL)


def _leave() -> None:
    """End this process before Ray's threads in it do, which miss their cluster: with a crash, or never."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _remove(folder: Path, is_quiet: bool) -> None:
    """Remove a folder that processes which are about to end may still write to; where it is not quiet, some
    may only be starting, and make it anew.
    """
    deadline, looks = time.monotonic() + ENDING_S, 0 if is_quiet else 3
    while (folder.exists() or looks > 0) and time.monotonic() < deadline:
        if not is_quiet:
            _end_users_of(folder)
        shutil.rmtree(folder, ignore_errors=True)
        looks = looks - 1 if not folder.exists() else 3 if not is_quiet else 0
        time.sleep(0.1)


def _sweep() -> None:
    """Remove what clusters of drivers that were killed have left."""
    for folder in Path("/tmp").glob(f"{FILES}*-*"):
        owner = folder.name.removeprefix(FILES).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _make_importable(folder: Path) -> None:
    """What is started from here finds the user's modules."""
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


def code_for_workers(archive: Path) -> dict[str, Any]:
    """The runtime environment that brings the user's files and our packages to other machines."""
    root = Path(__file__).resolve().parents[1]
    return {
        "working_dir": str(archive),
        "py_modules": [str(root / name) for name in OURS],
        "excludes": NOT_UPLOADED,
    }
