"""How a worker computes its micro-batches: how many per forward pass, and with how many threads.

It is found by trying before the first step, recorded with the run, and kept when the run is resumed.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from trainer.passes import Passes

MEASURED_TURNS = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
SAME_GRADIENT = 1e-4  # relative; stacking reorders float32 sums, examples that interact differ by far more
CPU_STACK_EXAMPLES = 1024  # beyond this a CPU's caches lose more than the fewer calls save


@dataclass(frozen=True)
class Execution:
    """`stack` micro-batches per forward pass, on `threads` CPU threads. Where the forward pass draws random
    numbers (dropout), each micro-batch runs alone and under a seed of its own.
    """

    stack: int = 1
    draws_random: bool = True
    threads: int = 1
    reason: str = "exact reduction: one micro-batch at a time, on one thread"


def choose(
    passes: Passes,
    micro_batches: Sequence[int],
    gradients: Sequence[Tensor],
    *,
    most: int,
    threads: int,
) -> Execution:
    """Try a worker's first micro-batches stacked and one by one, with `threads` threads and with one.

    Stacked wins only where the gradient is the same and it is quicker; `most` bounds the stack. Parameters,
    gradients and the model's buffers are left as they were.
    """
    passes.read_ahead(micro_batches)
    with _left_alone(passes.model, gradients):
        if _draws_random(passes, micro_batches[0]):
            ways, reason = [1], "the forward pass draws random numbers: each micro-batch under its own seed"
            return _quickest(passes, micro_batches[:1], ways, threads, draws_random=True, reason=reason)
        stack, reason = _stackable(passes, micro_batches[:most], gradients)
        return _quickest(passes, micro_batches[:most], [1, stack], threads, draws_random=False, reason=reason)


def _draws_random(passes: Passes, micro_batch: int) -> bool:
    before = _random_state(passes.device)
    passes.rehearse([[micro_batch]])
    return not torch.equal(before, _random_state(passes.device))


def _stackable(passes: Passes, micro_batches: Sequence[int], gradients: Sequence[Tensor]) -> tuple[int, str]:
    """The largest stack that leaves the gradient what it is, and what was found."""
    if len(micro_batches) == 1:
        return 1, "one micro-batch fills a forward pass"
    one_by_one = _gradient(passes, [[j] for j in micro_batches], gradients)
    try:
        stacked = _gradient(passes, [micro_batches], gradients)
    except torch.OutOfMemoryError:
        return _stackable(passes, micro_batches[: len(micro_batches) // 2], gradients)
    except RuntimeError as error:  # ragged batches, views that assume one batch size
        return 1, f"micro-batches do not stack: {str(error).splitlines()[0]}"
    distance, size = _norm(a - b for a, b in zip(stacked, one_by_one, strict=True)), _norm(one_by_one)
    if distance < SAME_GRADIENT * size:
        return len(
            micro_batches
        ), f"stacked and one by one, the gradient is the same to {distance / size:.0e}"
    return (
        1,
        f"stacking would change the gradient by {distance:.1e} of {size:.1e}: examples of a batch interact",
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


def _gradient(passes: Passes, chunks: Sequence[Sequence[int]], gradients: Sequence[Tensor]) -> list[Tensor]:
    for gradient in gradients:
        gradient.zero_()
    passes.rehearse(chunks)
    return [gradient.clone() for gradient in gradients]


def _quickest(
    passes: Passes,
    micro_batches: Sequence[int],
    stacks: Sequence[int],
    threads: int,
    *,
    draws_random: bool,
    reason: str,
) -> Execution:
    """The quickest of the ways that are left, each by its best turn: whatever else the machine does only
    adds.
    """
    ways = [(stack, count) for stack in sorted(set(stacks)) for count in sorted({1, threads})]
    best = dict.fromkeys(ways, math.inf)
    for _ in range(MEASURED_TURNS if len(ways) > 1 else 0):
        for stack, count in ways:
            torch.set_num_threads(count)
            chunks = [micro_batches[i : i + stack] for i in range(0, len(micro_batches), stack)]
            best[stack, count] = min(best[stack, count], _seconds(passes, chunks))
    stack, count = min(ways, key=best.__getitem__)
    shown = ", ".join(
        f"{s} at a time on {c} threads {1000 * best[s, c]:.2g} ms" for s, c in ways if len(ways) > 1
    )
    return Execution(stack, draws_random, count, "; ".join(filter(None, (reason, shown))))


def _seconds(passes: Passes, chunks: Sequence[Sequence[int]]) -> float:
    started = time.perf_counter()
    passes.rehearse(chunks)
    if passes.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def _left_alone(model: nn.Module, gradients: Sequence[Tensor]) -> Iterator[None]:
    """Whatever passes do to buffers and gradients is undone."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
        for gradient in gradients:
            gradient.zero_()


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def stack_limit(device: torch.device, micro: int) -> int:
    """The most micro-batches of `micro` examples that are worth trying in one forward pass."""
    return max(1, CPU_STACK_EXAMPLES // micro) if device.type == "cpu" else 1 << 20


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, where it is glibc. A step's activations are freed and wanted
    again in the next; to give them back to the system in between costs a page fault for every 4 KiB of them.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def cores_per_worker(workers: int) -> int:
    """CPU threads for each of some workers on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // workers)
