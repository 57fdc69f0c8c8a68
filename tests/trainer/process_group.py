"""Processes that stand in for workers, kept warm so that a case costs its training and not torch's import."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


class ProcessGroup:
    """Up to `size` processes; `run` lets the first few of them form a gloo group and call the same function
    in it.
    """

    def __init__(self, size: int):
        spawn = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, workers: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(*args)` returns on each of `workers` workers, by rank."""
        with TemporaryDirectory() as folder:
            for rank, pipe in enumerate(self.pipes[:workers]):
                pipe.send((rank, workers, str(Path(folder) / "store"), function, args))
            answers = [pipe.recv() for pipe in self.pipes[:workers]]
        for failed, answer in answers:
            if failed:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=20)
            process.kill()


def _serve(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            rank, workers, store, function, args = pipe.recv()
        except EOFError:
            return
        if workers > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
        try:
            answer = (False, function(*args))
        except BaseException:
            answer = (True, traceback.format_exc())
        if workers > 1:
            dist.destroy_process_group()
        pipe.send(answer)
