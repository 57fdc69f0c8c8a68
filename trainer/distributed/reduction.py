"""Adding up gradients and statistics over micro-batches and workers.

Two ways, one interface. *Fast* adds in floating point and starts sending while the last backward pass is
still running.
*Exact* adds integers of fixed point, for which order cannot matter: any number of workers gets the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.engine.fixed_point import numbers, square_sum
from optim.flat import FlatBuffers, FlatOptimizer
from trainer.distributed.fixed_point import FixedPointSum
from trainer.distributed.fully_sharded import gathered
from trainer.distributed.group import WorkerGroup
from trainer.distributed.sharded_state import ShardedOptimizer

FIRST_BUCKET_BYTES = 1 << 20  # small, so that sending starts early in the backward pass
BUCKET_BYTES = 25 << 20  # DDP's default: large enough to use the link, small enough to overlap


class Reduction(Protocol):
    """How a model lies on the workers, and how its gradients (in place) and one vector of statistics are
    summed over a step's micro-batches.
    """

    is_spread: bool
    """Whether each worker holds a part of the model. Then every pass, checkpoint and evaluation is one of all
    workers together.
    """

    saves_together: bool
    """Whether each worker holds a part of what a checkpoint does."""

    def gradients(self) -> list[Tensor]:
        """The gradients that lie here, to be changed in place."""

    def begin(self) -> None:
        """A step starts: nothing is summed yet."""

    def begin_pass(self, is_last: bool) -> None:
        """A backward pass follows: this worker's last of the step, or not."""

    def add(self, statistics: Tensor) -> None:
        """A backward pass is done; its statistics (1-D, float64) join the sum."""

    def finish(self) -> tuple[Tensor, Tensor]:
        """Sum over the workers; the gradients hold the total. Returns the summed statistics, and squares [n]
        whose sum is that of all gradients.
        """

    def is_finite(self) -> bool:
        """Whether every parameter is."""

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        """Where each worker can run `model`, or an average of it, by itself."""

    def gathered(self, value: Any) -> Any:
        """A state with its tensors whole, on rank 0."""


class Replicated:
    """What all ways have in common in which each worker holds the whole model, its gradients in flat
    buffers.
    """

    is_spread = False

    def __init__(self, group: WorkerGroup, optimizer: FlatOptimizer | ShardedOptimizer):
        self.group, self.optimizer = group, optimizer
        self.saves_together = isinstance(optimizer, ShardedOptimizer)

    def gradients(self) -> list[Tensor]:
        return self.optimizer.flat.gradients

    def squares(self) -> Tensor:
        """Of each gradient buffer [buffers]."""
        return torch.stack([gradient.dot(gradient) for gradient in self.gradients()])

    def is_finite(self) -> bool:
        return all(bool(buffer.isfinite().all()) for buffer in self.optimizer.flat.parameters)

    def whole(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def gathered(self, value: Any) -> Any:
        return gathered(value, self.group) if self.saves_together else value


class FastReduction(Replicated):
    """Floating-point sums; buckets of the gradient buffers travel as soon as the last backward pass has
    filled them.
    """

    def __init__(self, group: WorkerGroup, optimizer: FlatOptimizer | ShardedOptimizer, statistics: int):
        super().__init__(group, optimizer)
        self.parameters = optimizer.flat.held
        self.statistics = torch.zeros(statistics, dtype=torch.float64, device=group.device)
        self.flat: FlatBuffers | None = None  # those that the buckets are slices of
        self.buckets: list[Tensor] = []
        self.bucket_of: dict[Tensor, int] = {}
        self.missing: list[int] = []
        self.sent: list[dist.Work | None] = []
        self.last = False
        if group.size > 1:
            for parameter in self.parameters:
                parameter.register_post_accumulate_grad_hook(self._filled)

    def begin(self) -> None:
        self.statistics.zero_()
        if self.optimizer.flat is not self.flat:
            self.flat = self.optimizer.flat
            self.buckets, self.bucket_of = _buckets(self.flat, self.parameters)
        self.missing = [0] * len(self.buckets)
        for bucket in self.bucket_of.values():
            self.missing[bucket] += 1
        self.sent, self.last = [], False

    def begin_pass(self, is_last: bool) -> None:
        self.last = is_last

    def add(self, statistics: Tensor) -> None:
        self.statistics += statistics

    def finish(self) -> tuple[Tensor, Tensor]:
        self._send_until(
            len(self.buckets)
        )  # parameters without a gradient this time, or no micro-batch at all
        self.group.all_reduce(self.statistics)
        for work in self.sent:
            if work is not None:
                work.wait()
        return self.statistics, self.squares()

    def _filled(self, parameter: Tensor) -> None:
        if not self.last:
            return
        self.missing[self.bucket_of[parameter]] -= 1
        ready = len(self.sent)
        while ready < len(self.buckets) and self.missing[ready] == 0:
            ready += 1
        self._send_until(ready)

    def _send_until(self, end: int) -> None:
        # Always in bucket order: every worker must issue the same collectives in the same order.
        for bucket in self.buckets[len(self.sent) : end]:
            self.sent.append(self.group.all_reduce_async(bucket))


class ExactReduction(Replicated):
    """Fixed-point sums: each micro-batch's gradient is rounded once to a multiple of 2^-60 and added in
    integers.

    Integer addition does not depend on order, so neither do the sums. A value that does not fit (see
    `FixedPointSum`), or is not finite, makes the whole sum NaN, which the loop refuses to train on.
    """

    def __init__(
        self,
        group: WorkerGroup,
        optimizer: FlatOptimizer | ShardedOptimizer,
        statistics: int,
        micro_batches: int,
    ):
        super().__init__(group, optimizer)
        buffers = optimizer.flat.gradients
        self.sums = [FixedPointSum(buffer.numel(), micro_batches, group.device) for buffer in buffers]
        self.statistics = FixedPointSum(statistics, micro_batches, group.device)

    def begin(self) -> None:
        for total in (*self.sums, self.statistics):
            total.clear()

    def begin_pass(self, is_last: bool) -> None:
        pass  # nothing travels before every micro-batch has been rounded

    def add(self, statistics: Tensor) -> None:
        self.statistics.add(statistics)
        for buffer, total in zip(self.optimizer.flat.gradients, self.sums, strict=True):
            total.add(buffer)
            buffer.zero_()

    def finish(self) -> tuple[Tensor, Tensor]:
        for buffer, total in zip(self.optimizer.flat.gradients, self.sums, strict=True):
            buffer.copy_(total.over(self.group))
        return self.statistics.over(self.group), numbers(square_sum(self.gradients())).view(1)


def _buckets(flat: FlatBuffers, parameters: Sequence[Tensor]) -> tuple[list[Tensor], dict[Tensor, int]]:
    """Slices of the gradient buffers in the order in which a backward pass fills them, and each parameter's
    bucket.
    """
    places = sorted(((flat.place(p), p) for p in parameters), key=lambda placed: placed[0], reverse=True)
    buckets: list[Tensor] = []
    bucket_of: dict[Tensor, int] = {}
    end: dict[int, int] = {number: buffer.numel() for number, buffer in enumerate(flat.gradients)}
    for position, ((number, start, _), parameter) in enumerate(places):
        buffer = flat.gradients[number]
        bucket_of[parameter] = len(buckets)
        is_last = position + 1 == len(places) or places[position + 1][0][0] != number
        bytes_so_far = (end[number] - start) * buffer.element_size()
        if is_last or bytes_so_far >= (BUCKET_BYTES if buckets else FIRST_BUCKET_BYTES):
            buckets.append(buffer[0 if is_last else start : end[number]])
            end[number] = start
    return buckets, bucket_of
