"""Forward and backward over a worker's micro-batches, one by one or stacked: several in one forward pass,
where that gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import count

import torch
from torch import Tensor, nn

from data_echo import Draws, EchoLoader, generators
from trainer.compute.batch_norm import BatchNorms
from trainer.compute.execution import Execution
from trainer.compute.precision import LossScale, autocast
from trainer.task import Task

Batch = dict[str, Tensor]


class ForwardBackward:
    """Turns micro-batch numbers into gradients (in the parameters' `.grad`) and statistics.

    Args:
        task, model, norms: what is trained; `norms` are the model's.
        make_loader: gives a loader that begins at a position of the data stream.
        position: where to begin.
        seed: of the model's random draws.
        device: of model and micro-batches.
        precision: of the forward and backward pass.
        scale: what losses are multiplied by for the backward pass.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        norms: BatchNorms,
        make_loader: Callable[[int], EchoLoader],
        *,
        position: int,
        seed: int,
        device: torch.device,
        precision: str,
        scale: LossScale,
    ):
        self.task, self.model, self.norms = task, model, norms
        self.seed, self.device, self.precision, self.scale = seed, device, precision, scale
        self.statistics = torch.zeros(3 + len(norms.statistics), dtype=torch.float64, device=device)
        self.loader = make_loader(position)
        self._make_loader = make_loader
        self._loaded: dict[int, Batch] = {}  # what was read ahead
        self._spare: tuple[Sequence[int], Batch] | None = None

    def rewind(self, position: int) -> None:
        """Serve the micro-batches from `position` on once more."""
        self.loader.close()
        self.loader = self._make_loader(position)

    def load(self, micro_batches: Sequence[int]) -> Batch:
        """The augmented examples of these micro-batches, one after the other, on the device."""
        return _joined([self._load_one(j) for j in micro_batches])

    def spare(self, position: int) -> tuple[Sequence[int], Batch]:
        """A micro-batch for passes that only keep others company: always the first that this worker serves
        from the `position` on that this was first called with, out of a loader of its own.
        """
        if self._spare is None:
            j = next(j for j in count(position) if self.loader.serves(j))
            loader = self._make_loader(j)
            try:
                batch, draws = loader.micro_batch(j)
            finally:
                loader.close()
            self._spare = [j], self._augmented(j, batch, draws)
        return self._spare

    def backward(
        self, micro_batches: Sequence[int], batch: Batch, execution: Execution, weight: float = 1.0
    ) -> Tensor:
        """Add the gradient of the batch's summed loss, times the loss scale and `weight`; return
        `statistics`: [loss sum, count, batch norms' ...], float64, valid until the next call.
        """
        self.seed_forward(micro_batches[0])
        self.norms.stack(len(micro_batches))
        self.norms.clear()
        model = self._compiled_model if execution.compiled else self.model
        with autocast(self.precision, self.device):
            loss, count = self.task.loss(model, batch)
        # Not backward(scale): a gradient argument would import sympy.
        factor = self.scale.value * weight
        (loss if factor == 1 else loss * factor).backward()
        self.statistics[0] = loss.detach()
        self.statistics[1] = count
        self.statistics[2:-1] = self.norms.statistics
        return self.statistics

    def forward(self, model: nn.Module, micro_batch: int) -> None:
        """A forward pass of another model over one micro-batch, for what it leaves in batch norms."""
        batch = self.load([micro_batch])
        self.seed_forward(micro_batch)
        with autocast(self.precision, self.device):
            self.task.loss(model, batch)

    def seed_forward(self, micro_batch: int) -> None:
        """Seed what the forward pass of a micro-batch may draw from."""
        generators.seed(self.seed, "forward", micro_batch)

    def read_ahead(self, micro_batches: Sequence[int]) -> None:
        """Load these micro-batches now; `load` gives them out later."""
        for j in micro_batches:
            self._loaded[j] = self._load_one(j)

    def rehearse(self, micro_batches: Sequence[int], execution: Execution) -> Tensor:
        """Forward and backward over micro-batches that were read ahead, which stay loaded; returns the sum of
        their statistics.
        """
        sums = torch.zeros_like(self.statistics)
        for stack in stacks(micro_batches, execution):
            sums += self.backward(stack, _joined([self._loaded[j] for j in stack]), execution)
        return sums

    @cached_property
    def _compiled_model(self) -> nn.Module:
        # One compilation for each length of a stack; random draws are those of the model as it is.
        return torch.compile(self.model, dynamic=False, options={"fallback_random": True})  # type: ignore[return-value]

    def _load_one(self, j: int) -> Batch:
        if j in self._loaded:
            return self._loaded.pop(j)
        return self._augmented(j, *self.loader.micro_batch(j))

    def _augmented(self, j: int, batch: Batch, draws: Draws) -> Batch:
        generators.seed(self.seed, "augment", j)
        return self.task.augment(batch, draws)


def stacks(micro_batches: Sequence[int], execution: Execution) -> Iterator[Sequence[int]]:
    """Cut a worker's micro-batches of one step into what runs as one forward pass each. Compiled passes have
    one of two lengths, so that they are compiled twice at most: what is left over runs one by one.
    """
    stack = execution.stack
    whole = len(micro_batches) // stack * stack if execution.compiled else len(micro_batches)
    yield from (micro_batches[start : start + stack] for start in range(0, whole, stack))
    yield from ([j] for j in micro_batches[whole:])


def _joined(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
