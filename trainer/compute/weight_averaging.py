"""The average of a run's weights: when weights join it, its batch-norm statistics, and where it is kept."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

import optim
from trainer.compute.batch_norm import BatchNorms
from trainer.compute.forward_backward import ForwardBackward
from trainer.distributed.fixed_point import FixedPointSum
from trainer.distributed.group import WorkerGroup
from trainer.recipe.durations import Duration
from trainer.recipe.train import ExponentialAverage, StochasticAverage

REESTIMATED_EXAMPLES = 8192  # enough for means and variances to be known to a percent


class RunningAverage:
    """An average over the weights of `model`; its attribute `model` holds it.

    Args:
        section: what the recipe asks for.
        in_examples: gives a duration in served examples.
    """

    def __init__(
        self,
        model: nn.Module,
        section: ExponentialAverage | StochasticAverage,
        in_examples: Callable[[Duration], int],
    ):
        self.section, self.averaged = section, model
        if isinstance(section, StochasticAverage):
            self.average = optim.swa(model)
            self.start = in_examples(section.start)
            self.every = max(1, in_examples(section.every))
        else:
            self.average = optim.ema(model, section.decay, section.warmup)
            self.start, self.every = 0, 1

    @property
    def model(self) -> nn.Module:
        """The model with averaged weights."""
        return self.average.module

    def update(self, examples: int, batch: int) -> None:
        """Let the weights join, if the step of `batch` examples that ended at `examples` served ones crossed
        a multiple of the interval.
        """
        after = examples - self.start
        if after >= 0 and after // self.every > max(after - batch, -1) // self.every:
            self.average.update_parameters(self.averaged)

    def reestimate_batch_norm(
        self, forward_backward: ForwardBackward, group: WorkerGroup, position: int, micro: int
    ) -> None:
        """Give the mean of the weights running statistics of its own, over the examples that would come next:
        micro-batches of `micro` examples from `position` on.

        Which those are does not depend on the number of workers, nor do the sums.
        """
        norms = BatchNorms(self.model, group.device)
        if not isinstance(self.section, StochasticAverage) or not norms.norms:
            return
        micro_batches = math.ceil(REESTIMATED_EXAMPLES / micro)
        sums = FixedPointSum(len(norms.statistics), micro_batches, group.device)
        self.model.train()
        with group.raise_on_all("batch norm of the averaged weights"), torch.no_grad():
            for j in range(position, position + micro_batches):
                if forward_backward.loader.serves(j):
                    norms.clear()
                    forward_backward.forward(self.model, j)
                    sums.add(norms.statistics)
        norms.move(sums.over(group), pace=math.inf)
