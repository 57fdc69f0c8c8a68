"""Forward and backward passes over a worker's micro-batches, one by one or stacked where that is exactly the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from data_echo import EchoLoader
from trainer.compute.autotune import Execution
from trainer.compute.batch_norm import BatchNorms
from trainer.compute.precision import LossScale, autocast
from trainer.task import Task

Batch = dict[str, Tensor]


class ForwardBackward:
    """What turns micro-batch numbers into gradients (in the parameters' `.grad`) and statistics."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        norms: BatchNorms,
        loader: EchoLoader,
        *,
        seed: int,
        device: torch.device,
        precision: str = "fp32",
    ):
        self.task, self.model, self.norms, self.loader = task, model, norms, loader
        self.seed, self.device, self.precision = seed, device, precision
        self.scale = LossScale()
        self.execution = Execution()
        self.statistics = torch.zeros(2 + len(norms.statistics), dtype=torch.float64, device=device)
        self._loaded: dict[int, Batch] = {}  # what the probe has read ahead of the first step

    def chunks(self, micro_batches: Sequence[int]) -> Iterator[Sequence[int]]:
        """Cut a worker's micro-batches of one step into what runs as one forward pass each. Compiled passes
        have one of two lengths, so that they are compiled twice at most: what is left over runs one by one.
        """
        stack = self.execution.stack
        whole = len(micro_batches) // stack * stack if self.execution.compiled else len(micro_batches)
        yield from (micro_batches[start : start + stack] for start in range(0, whole, stack))
        yield from ([j] for j in micro_batches[whole:])

    def load(self, micro_batches: Sequence[int]) -> Batch:
        """The augmented examples of these micro-batches, one after the other, on the device."""
        return _joined([self._load_one(j) for j in micro_batches])

    def backward(self, micro_batches: Sequence[int], batch: Batch) -> Tensor:
        """Add the gradient of the batch's summed loss, times the loss scale; return `statistics`: [loss sum,
        count, batch norms' ...], float64, valid until the next pass."""
        if self.execution.draws_random:
            torch.manual_seed(_key(self.seed, "forward", micro_batches[0]))
        self.norms.stack(len(micro_batches))
        self.norms.clear()
        model = self._compiled_model if self.execution.compiled else self.model
        with autocast(self.precision, self.device):
            loss, count = self.task.loss(model, batch)
        loss.backward(torch.full_like(loss, self.scale.value))
        self.statistics[0] = loss.detach()
        self.statistics[1] = count
        self.statistics[2:] = self.norms.statistics
        return self.statistics

    def forward(self, model: nn.Module, micro_batch: int) -> None:
        """A forward pass of another model over one micro-batch, for what it leaves in batch norms."""
        batch = self.load([micro_batch])
        torch.manual_seed(_key(self.seed, "forward", micro_batch))
        with autocast(self.precision, self.device):
            self.task.loss(model, batch)

    def read_ahead(self, micro_batches: Sequence[int]) -> None:
        """Load these micro-batches now; `load` gives them out later."""
        for j in micro_batches:
            self._loaded[j] = self._load_one(j)

    def rehearse(self, micro_batches: Sequence[int], execution: Execution) -> Tensor:
        """Forward and backward over micro-batches that were read ahead, which stay loaded; returns the sum of
        their statistics.
        """
        self.execution = execution
        sums = torch.zeros_like(self.statistics)
        for chunk in self.chunks(micro_batches):
            sums += self.backward(chunk, _joined([self._loaded[j] for j in chunk]))
        return sums

    @cached_property
    def _compiled_model(self) -> nn.Module:
        # One compilation for each length of a chunk; random draws are those of the model as it is.
        return torch.compile(self.model, dynamic=False, options={"fallback_random": True})  # type: ignore[return-value]

    def _load_one(self, j: int) -> Batch:
        if j in self._loaded:
            return self._loaded.pop(j)
        batch, draws = self.loader.micro_batch(j)
        return self.task.augment(batch, draws)


def _key(*parts: object) -> int:
    """A 63-bit seed from anything with a stable text."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
