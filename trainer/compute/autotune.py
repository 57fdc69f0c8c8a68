"""How micro-batches are best computed, found by trying before the first step.

Micro-batches are stacked, and the model is compiled, only where the gradient stays the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_echo import generators
from trainer.compute.execution import Execution, is_out_of_memory
from trainer.compute.forward_backward import ForwardBackward
from trainer.compute.precision import SAME_GRADIENT
from trainer.errors import UserError

ROUNDS = 3  # in which each way is timed
HOPELESS = 3.0  # times the quickest so far: such a way is not timed again


def choose(
    forward_backward: ForwardBackward,
    micro_batches: Sequence[int],
    gradients: Sequence[Tensor],
    *,
    most: int,
    threads: int,
    compiled: bool = False,
) -> Execution:
    """Try a worker's first micro-batches stacked and one by one, with `threads` threads and with one; what is
    quickest is then compiled, if that is wanted.

    `most` bounds the stack. Parameters, gradients and the model's buffers are left as they were.
    """
    forward_backward.read_ahead(micro_batches)
    trials = _Trials(forward_backward, gradients)
    with _undone(forward_backward, gradients):
        if problem := trials.examine(micro_batches[:1]):
            trials.note(f"{problem}, so results depend on which worker computes which micro-batch")
        together = micro_batches[: 1 if trials.best.draws_random else most]
        if not trials.best.draws_random:
            trials.stack(together)
        trials.choose_the_quickest(together, threads)
        if compiled:
            trials.attempt("compiled", together[: trials.best.stack], compiled=True)
    return trials.best


def refuse_dependence_on_workers(
    forward_backward: ForwardBackward, micro_batches: Sequence[int], gradients: Sequence[Tensor]
) -> None:
    """Refuse a model whose exact sums would still depend on who computes which micro-batch.

    Parameters, gradients and the model's buffers are left as they were.

    Raises:
        UserError: its forward pass changes a buffer, or draws from what cannot be seeded.
    """
    forward_backward.read_ahead(micro_batches[:1])
    with _undone(forward_backward, gradients):
        problem = _Trials(forward_backward, gradients).examine(micro_batches[:1])
    if problem:
        right = "make it depend on its inputs alone, or let run.reduction be fast"
        raise UserError(f"run.reduction: is exact, and {problem}; {right}")


class _Trials:
    """Ways to compute micro-batches, tried one after another; `best` is the choice so far."""

    def __init__(self, forward_backward: ForwardBackward, gradients: Sequence[Tensor]):
        self.forward_backward, self.gradients = forward_backward, gradients
        self.best = Execution(draws_random=False, reason="")

    def examine(self, micro_batches: Sequence[int]) -> str:
        """Note whether the forward pass draws random numbers. Returns what else it depends on besides its
        inputs, weights and seed, in words; nothing where there is nothing.
        """
        compute = self.forward_backward
        if not micro_batches:  # of this worker, at this place
            return ""
        before = {name: buffer.clone() for name, buffer in compute.model.named_buffers()}
        first = self._computed(micro_batches, self.best)
        drawn = generators.state()
        compute.seed_forward(micro_batches[0])
        if drawn != generators.state():
            self.note(
                "the forward pass draws random numbers: each micro-batch under its own seed",
                draws_random=True,
            )
        buffers = compute.model.named_buffers()
        moved = [name for name, buffer in buffers if not _same(before.get(name), buffer)]
        if moved:
            return f"the forward pass changes the model's buffer {', '.join(moved)}"
        if _distance(first, self._computed(micro_batches, self.best)) > SAME_GRADIENT[compute.precision]:
            return "the forward pass gives another gradient each time, under the same seed"
        return ""

    def attempt(self, what: str, micro_batches: Sequence[int], **change: Any) -> None:
        """Make a change, if gradient and statistics stay what they are."""
        try:
            moved = self._moved(micro_batches, **change)
        except Exception as error:  # from a compiler, ragged batches, views that assume one batch size
            if is_out_of_memory(error):
                raise
            self.note(f"not {what}: {_in_a_line(error)}")
            return
        if moved <= SAME_GRADIENT[self.forward_backward.precision]:
            self.note(f"{what}, the gradient is the same to {moved:.0e}", **change)
        else:
            self.note(f"not {what}: the gradient would change by {moved:.0e} of itself")

    def stack(self, micro_batches: Sequence[int]) -> None:
        """The largest stack that memory and the model allow."""
        while len(micro_batches) > 1:
            try:
                return self.attempt("stacked", micro_batches, stack=len(micro_batches))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                micro_batches = micro_batches[: len(micro_batches) // 2]
        return self.note("one micro-batch fills a forward pass")

    def choose_the_quickest(self, micro_batches: Sequence[int], threads: int) -> None:
        """The best so far, or less of it: one by one, on one thread. Each way counts by its best round: other
        work on the machine only adds.
        """
        ways = [
            replace(self.best, stack=stack, threads=count)
            for stack in sorted({1, self.best.stack})
            for count in sorted({1, threads})
        ]
        quickest = [math.inf] * len(ways)
        for _ in range(ROUNDS if len(ways) > 1 else 0):
            for number, way in enumerate(ways):
                if math.inf > quickest[number] > HOPELESS * min(quickest):
                    continue  # on a busy machine a try can take a hundred times what another does
                torch.set_num_threads(way.threads)
                quickest[number] = min(quickest[number], _seconds(self.forward_backward, micro_batches, way))
        shown = [
            f"{way.stack} at a time on {way.threads} threads {1000 * seconds:.2g} ms"
            for way, seconds in zip(ways, quickest, strict=True)
        ]
        self.best = ways[quickest.index(min(quickest))]
        torch.set_num_threads(self.best.threads)
        if len(ways) > 1:
            self.note(", ".join(shown), trial_s=min(quickest) / len(micro_batches))

    def note(self, reason: str, **change: Any) -> None:
        """Add to the reasons of the choice, with what they change in it."""
        reasons = "; ".join(filter(None, (self.best.reason, reason)))
        self.best = replace(self.best, reason=reasons, **change)

    def _moved(self, micro_batches: Sequence[int], **change: Any) -> float:
        """How far a change moves gradient and statistics, relative to their sizes."""
        before = self._computed(micro_batches, self.best)
        return _distance(before, self._computed(micro_batches, replace(self.best, **change)))

    def _computed(self, micro_batches: Sequence[int], way: Execution) -> Computed:
        """The gradient and the statistics of micro-batches, at a loss scale that leaves it finite."""
        scale = self.forward_backward.scale
        while True:
            for gradient in self.gradients:
                gradient.zero_()
            statistics = self.forward_backward.rehearse(micro_batches, way)
            gradients = [gradient / scale.value for gradient in self.gradients]
            if all(gradient.isfinite().all() for gradient in gradients) or not scale.fall():
                return gradients, [statistics]


def _seconds(forward_backward: ForwardBackward, micro_batches: Sequence[int], way: Execution) -> float:
    started = time.perf_counter()
    forward_backward.rehearse(micro_batches, way)
    if forward_backward.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


Computed = tuple[list[Tensor], list[Tensor]]  # gradients, statistics


def _distance(before: Computed, after: Computed) -> float:
    """How far gradients or statistics lie from others, relative to their sizes: the larger of the two."""
    distances = [_norm(a - b for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
    return max(
        distance and distance / max(_norm(b), torch.finfo().tiny)
        for distance, b in zip(distances, before, strict=True)
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.norm()) ** 2 for tensor in tensors))


def _in_a_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def _undone(forward_backward: ForwardBackward, gradients: Sequence[Tensor]) -> Iterator[None]:
    """What trials do to buffers, gradients and the loss scale is undone."""
    before = [(buffer, buffer.clone()) for buffer in forward_backward.model.buffers()]
    scale, forward_backward.scale = forward_backward.scale, replace(forward_backward.scale)
    try:
        yield
    finally:
        forward_backward.scale = scale
        for buffer, value in before:
            buffer.copy_(value)
        for gradient in gradients:
            gradient.zero_()


def _same(before: Tensor | None, after: Tensor) -> bool:
    return before is not None and torch.equal(before.nan_to_num(), after.nan_to_num())
