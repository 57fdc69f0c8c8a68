"""What the processes of this machine are and where they listen, from Linux's /proc."""

import contextlib
import ipaddress
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
LISTENING = "0A"


@dataclass(frozen=True)
class Process:
    """A process; the time that it started tells it from a later one with its number."""

    pid: int
    parent: int
    started: int  # clock ticks since boot
    command: str

    @property
    def is_alive(self) -> bool:
        """Whether it still runs, be it as an orphan; a zombie has ended."""
        now = _process(self.pid)
        return now is not None and now.started == self.started


@dataclass(frozen=True)
class Port:
    """An address that a process listens on."""

    command: str
    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether other machines cannot reach it."""
        address = ipaddress.ip_address(self.host)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback


def descendants(pid: int) -> list[Process]:
    """All processes that descend from `pid` and have not lost their parents."""
    everyone = [process for entry in PROC.glob("[0-9]*") if (process := _process(int(entry.name)))]
    found: list[Process] = []
    parents = {pid}
    while parents:
        children = [process for process in everyone if process.parent in parents]
        found += children
        parents = {process.pid for process in children}
    return found


def remaining(processes: list[Process], patience_s: float = 20.0) -> list[Process]:
    """Those of the processes that have not ended when the patience has."""
    deadline = time.monotonic() + patience_s
    while alive := [process for process in processes if process.is_alive]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return alive


def until(condition: Callable[[], object], patience_s: float) -> None:
    """Wait until the condition holds; one that is asked too early may fail to find its files."""
    deadline = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(FileNotFoundError):
            if condition():
                return
        assert time.monotonic() < deadline, f"not within {patience_s} s"
        time.sleep(0.2)


def ports(processes: list[Process]) -> list[Port]:
    """Every TCP address that one of the processes listens on."""
    hosts = _listening_sockets()
    found = []
    for process in processes:
        for inode in _socket_inodes(process.pid):
            if inode in hosts:
                found.append(Port(process.command, *hosts[inode]))
    return found


def _process(pid: int) -> Process | None:
    try:
        stat = (PROC / str(pid) / "stat").read_text()
        command = (
            (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else Process(pid, int(fields[1]), int(fields[19]), command)


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    for entry in (PROC / str(pid) / "fd").glob("*"):
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    return inodes


def _listening_sockets() -> dict[str, tuple[str, int]]:
    sockets = {}
    for table in ("tcp", "tcp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING:
                host, port = fields[1].split(":")
                sockets[fields[9]] = (_host(host), int(port, 16))
    return sockets


def _host(text: str) -> str:
    """The kernel writes addresses as words in the machine's own byte order."""
    words = [bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8)]
    return str(ipaddress.ip_address(b"".join(words)))
