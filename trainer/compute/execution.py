"""How a worker computes its micro-batches: how many at a time, on how many threads, compiled or not."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CPU_STACK_EXAMPLES = 1024  # beyond this a CPU's caches lose more than the fewer calls save


@dataclass(frozen=True)
class Execution:
    """`stack` micro-batches per forward pass, on `threads` CPU threads, the model `compiled` or as it is.

    Where the forward pass draws random numbers (dropout), each micro-batch runs alone and under a seed of its
    own. `asked` is what the recipe's section `run` asked for when this was found. It is chosen before the
    first step (`trainer.compute.autotune`), kept in checkpoints, and taken from them on resume.
    """

    stack: int = 1
    draws_random: bool = True
    threads: int = 1
    compiled: bool = False
    reason: str = "exact reduction: one micro-batch at a time, on one thread"
    asked: dict[str, Any] = field(default_factory=dict)
    trial_s: float | None = None  # seconds per micro-batch that the trial took

    def with_less_memory(self) -> Execution:
        """Half the stack, after memory ran out."""
        stack = self.stack // 2
        return replace(self, stack=stack, reason=f"memory ran out at {self.stack} at a time: {stack} now")


def stack_limit(device: torch.device, micro: int) -> int:
    """The most micro-batches of `micro` examples that are worth trying in one forward pass."""
    return max(1, CPU_STACK_EXAMPLES // micro) if device.type == "cpu" else 1 << 20


def cores_per_worker(workers: int) -> int:
    """CPU threads for each of some workers on this machine, OMP_NUM_THREADS at most where that is set."""
    cores = len(os.sched_getaffinity(0)) // workers
    most = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return max(1, min(cores, int(most)) if most.isdecimal() else cores)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, for which torch has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is glibc. A step's activations are freed and wanted
    again in the next; to give them back to the system in between costs a page fault for every 4 KiB of them.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
