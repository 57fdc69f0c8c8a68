"""How a worker computes its micro-batches: how many per forward pass, compiled or not, and with how many
threads.

It is found by trying before the first step, recorded with the run, and kept when the run is resumed.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.compute.precision import SAME_GRADIENT

if TYPE_CHECKING:
    from trainer.compute.forward_backward import ForwardBackward

MEASURED_TURNS = 3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CPU_STACK_EXAMPLES = 1024  # beyond this a CPU's caches lose more than the fewer calls save


@dataclass(frozen=True)
class Execution:
    """`stack` micro-batches per forward pass, on `threads` CPU threads, the model `compiled` or as it is.
    Where the forward pass draws random numbers (dropout), each micro-batch runs alone and under a seed of its
    own. `asked` is what the recipe's section `run` asked for when this was found.
    """

    stack: int = 1
    draws_random: bool = True
    threads: int = 1
    compiled: bool = False
    reason: str = "exact reduction: one micro-batch at a time, on one thread"
    asked: dict[str, Any] = field(default_factory=dict)

    def with_less_memory(self) -> Execution:
        """Half the stack, after memory ran out."""
        stack = self.stack // 2
        return replace(self, stack=stack, reason=f"memory ran out at {self.stack} at a time: {stack} now")


def choose(
    passes: ForwardBackward,
    micro_batches: Sequence[int],
    gradients: Sequence[Tensor],
    *,
    most: int,
    threads: int,
    compiled: bool = False,
) -> Execution:
    """Try a worker's first micro-batches stacked and one by one, with `threads` threads and with one; what is
    quickest is then compiled, if that is wanted.

    Micro-batches are stacked, and the model is compiled, only where the gradient stays the same; `most`
    bounds the stack. Parameters, gradients and the model's buffers are left as they were.
    """
    passes.read_ahead(micro_batches)
    trials = _Trials(passes, gradients)
    with _left_alone(passes, gradients):
        trials.look_for_random_draws(micro_batches[:1])
        together = micro_batches[: 1 if trials.found.draws_random else most]
        if not trials.found.draws_random:
            trials.stack(together)
        trials.choose_the_quickest(together, threads)
        if compiled:
            trials.attempt("compiled", together[: trials.found.stack], compiled=True)
    return trials.found


class _Trials:
    """Ways to compute micro-batches, tried one after another; `found` is what stands so far."""

    def __init__(self, passes: ForwardBackward, gradients: Sequence[Tensor]):
        self.passes, self.gradients = passes, gradients
        self.found = Execution(draws_random=False, reason="")

    def look_for_random_draws(self, micro_batches: Sequence[int]) -> None:
        before = _random_state(self.passes.device)
        self._computed(micro_batches, self.found)
        if not torch.equal(before, _random_state(self.passes.device)):
            self._settle(
                "the forward pass draws random numbers: each micro-batch under its own seed",
                draws_random=True,
            )

    def attempt(self, what: str, micro_batches: Sequence[int], **change: Any) -> None:
        """Make a change, if gradient and statistics stay what they are."""
        try:
            moved = self._moved(micro_batches, **change)
        except Exception as error:  # from a compiler, ragged batches, views that assume one batch size
            if is_out_of_memory(error):
                raise
            self._settle(f"not {what}: {_in_a_line(error)}")
            return
        if moved <= SAME_GRADIENT[self.passes.precision]:
            self._settle(f"{what}, the gradient is the same to {moved:.0e}", **change)
        else:
            self._settle(f"not {what}: the gradient would change by {moved:.0e} of itself")

    def stack(self, micro_batches: Sequence[int]) -> None:
        """The largest stack that memory and the model allow."""
        while len(micro_batches) > 1:
            try:
                return self.attempt("stacked", micro_batches, stack=len(micro_batches))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                micro_batches = micro_batches[: len(micro_batches) // 2]
        return self._settle("one micro-batch fills a forward pass")

    def choose_the_quickest(self, micro_batches: Sequence[int], threads: int) -> None:
        """Keep to what was found, or to less: one by one, on one thread. Each way counts by its best turn:
        whatever else the machine does only adds.
        """
        ways = [
            replace(self.found, stack=stack, threads=count)
            for stack in sorted({1, self.found.stack})
            for count in sorted({1, threads})
        ]
        best = [math.inf] * len(ways)
        for _ in range(MEASURED_TURNS if len(ways) > 1 else 0):
            for number, way in enumerate(ways):
                torch.set_num_threads(way.threads)
                best[number] = min(best[number], _seconds(self.passes, micro_batches, way))
        shown = [
            f"{way.stack} at a time on {way.threads} threads {1000 * seconds:.2g} ms"
            for way, seconds in zip(ways, best, strict=True)
        ]
        self.found = ways[best.index(min(best))]
        torch.set_num_threads(self.found.threads)
        if len(ways) > 1:
            self._settle(", ".join(shown))

    def _settle(self, reason: str, **change: Any) -> None:
        reasons = "; ".join(filter(None, (self.found.reason, reason)))
        self.found = replace(self.found, reason=reasons, **change)

    def _moved(self, micro_batches: Sequence[int], **change: Any) -> float:
        """How far a change moves gradient and statistics, relative to their sizes."""
        before = self._computed(micro_batches, self.found)
        after = self._computed(micro_batches, replace(self.found, **change))
        distances = [
            _norm(a - b for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)
        ]
        return max(
            distance and distance / max(_norm(b), torch.finfo().tiny)
            for distance, b in zip(distances, before, strict=True)
        )

    def _computed(self, micro_batches: Sequence[int], way: Execution) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient and the statistics of micro-batches, at a loss scale that leaves it finite."""
        scale = self.passes.scale
        while True:
            for gradient in self.gradients:
                gradient.zero_()
            statistics = self.passes.rehearse(micro_batches, way)
            gradients = [gradient / scale.value for gradient in self.gradients]
            if all(gradient.isfinite().all() for gradient in gradients) or not scale.fall():
                return gradients, [statistics]


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


def _seconds(passes: ForwardBackward, micro_batches: Sequence[int], way: Execution) -> float:
    started = time.perf_counter()
    passes.rehearse(micro_batches, way)
    if passes.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, for which torch has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)


def _in_a_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def _left_alone(passes: ForwardBackward, gradients: Sequence[Tensor]) -> Iterator[None]:
    """Whatever trials do to buffers, gradients and the loss scale is undone."""
    before = [(buffer, buffer.clone()) for buffer in passes.model.buffers()]
    scale, passes.scale = passes.scale, replace(passes.scale)
    try:
        yield
    finally:
        passes.scale = scale
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
