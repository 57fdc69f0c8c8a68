"""Forward and backward passes over a worker's micro-batches, one by one or stacked where that is exactly the
same.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from data_echo import Feed
from trainer.batch_norm import BatchNorms
from trainer.task import Task

Batch = dict[str, Tensor]
MEASURED_TURNS = 3
SAME_GRADIENT = 1e-4  # relative; stacking reorders float32 sums, a batch-dependent model differs by far more


@dataclass(frozen=True)
class Stacking:
    """How passes run, chosen before the first step, recorded, and kept when the run is resumed."""

    micro_batches: int = 1  # per forward pass
    draws_random: bool = True  # each micro-batch runs under its own seed
    reason: str = "exact reduction: one micro-batch at a time"

    def to_dict(self) -> dict[str, int | bool | str]:
        return asdict(self)


class Passes:
    """What turns micro-batch numbers into gradients (in the parameters' `.grad`) and statistics."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        norms: BatchNorms,
        feed: Feed,
        *,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
    ):
        self.task, self.model, self.norms, self.feed = task, model, norms, feed
        self.seed, self.device, self.precision = seed, device, precision
        self.stacking = Stacking()
        self.statistics = torch.zeros(2 + len(norms.statistics), dtype=torch.float64, device=device)
        self._loaded: dict[int, Batch] = {}  # what the probe has read ahead of the first step

    def chunks(self, micro_batches: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut a worker's micro-batches of one step into what runs as one forward pass each."""
        for start in range(0, len(micro_batches), self.stacking.micro_batches):
            yield micro_batches[start : start + self.stacking.micro_batches]

    def load(self, micro_batches: Sequence[int]) -> Batch:
        """The augmented examples of these micro-batches, one after the other, on the device."""
        batches = [self._load_one(j) for j in micro_batches]
        if len(batches) == 1:
            return batches[0]
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def backward(self, micro_batches: Sequence[int], batch: Batch) -> Tensor:
        """Add the gradient of the batch's summed loss; return `statistics`: [loss sum, count, batch
        norms' ...], float64, valid until the next pass."""
        if self.stacking.draws_random:
            torch.manual_seed(_key(self.seed, "forward", micro_batches[0]))
        self.norms.stack(len(micro_batches))
        self.norms.clear()
        with self._autocast():
            loss, count = self.task.loss(self.model, batch)
        loss.backward()
        self.statistics[0] = loss.detach()
        self.statistics[1] = count
        self.statistics[2:] = self.norms.statistics
        return self.statistics

    def choose_stacking(
        self, micro_batches: Sequence[int], gradients: Sequence[Tensor], most: int
    ) -> Stacking:
        """Try up to `most` micro-batches stacked and unstacked, and choose: stacked only where the gradient
        is the same and it is not slower. Leaves parameters, gradients and the model's buffers as they
        were.
        """
        for j in micro_batches:
            self._loaded[j] = self._load_one(j)
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        try:
            return self._probe(micro_batches[:most], gradients)
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)

    def _probe(self, micro_batches: Sequence[int], gradients: Sequence[Tensor]) -> Stacking:
        random_state = _random_state(self.device)
        self._measure([[j] for j in micro_batches[:1]], gradients)
        if not torch.equal(random_state, _random_state(self.device)):
            return Stacking(
                reason="the forward pass draws random numbers: each micro-batch under its own seed"
            )
        if len(micro_batches) == 1:
            return Stacking(1, False, "one micro-batch fills a forward pass")
        one_by_one, one_by_one_s = self._measure([[j] for j in micro_batches], gradients)
        try:
            stacked, stacked_s = self._measure([micro_batches], gradients)
        except torch.OutOfMemoryError:
            return self._probe(micro_batches[: len(micro_batches) // 2], gradients)
        except RuntimeError as error:  # ragged batches, views that assume one batch size
            return Stacking(1, False, f"micro-batches do not stack: {str(error).splitlines()[0]}")
        off = _relative_distance(stacked, one_by_one)
        if not off < SAME_GRADIENT:
            return Stacking(1, False, f"stacking would change the gradient by {off:.1e}: examples interact")
        if stacked_s > one_by_one_s:
            return Stacking(1, False, "one by one is faster here")
        return Stacking(
            len(micro_batches),
            False,
            f"same gradient to {off:.0e}, {one_by_one_s / stacked_s:.1f} times as fast",
        )

    def _measure(
        self, chunks: Sequence[Sequence[int]], gradients: Sequence[Tensor]
    ) -> tuple[list[Tensor], float]:
        """The gradient of some passes and the seconds of their quickest turn: what else runs here only
        adds.
        """
        seconds = math.inf
        for _ in range(MEASURED_TURNS):
            for gradient in gradients:
                gradient.zero_()
            started = time.perf_counter()
            for chunk in chunks:
                ready = {
                    key: torch.cat([self._loaded[j][key] for j in chunk]) for key in self._loaded[chunk[0]]
                }
                self.norms.stack(len(chunk))
                with self._autocast():
                    self.task.loss(self.model, ready)[0].backward()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = min(seconds, time.perf_counter() - started)
        result = [gradient.clone() for gradient in gradients]
        for gradient in gradients:
            gradient.zero_()
        return result, seconds

    def _load_one(self, j: int) -> Batch:
        if j in self._loaded:
            return self._loaded.pop(j)
        batch, draws = self.feed.micro_batch(j)
        return self.task.augment(batch, draws)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def _key(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _random_state(device: torch.device) -> Tensor:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def _relative_distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """The largest distance over buffers, relative to the right one's norm."""
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(left, right, strict=True))
