"""The average of a run's weights: when weights join it, its batch-norm statistics, and where it is kept."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

import optim
from trainer.compute.batch_norm import BatchNorms
from trainer.distributed.reduction import FixedPointSum
from trainer.recipe.train import StochasticAverage

if TYPE_CHECKING:
    from trainer.training import Training

REESTIMATED_EXAMPLES = 8192  # enough for means and variances to be known to a percent


class RunningAverage:
    """An average over `training`'s weights, as its recipe asks for it; `model` holds it."""

    def __init__(self, training: Training):
        self.section = section = training.recipe.train.average
        assert section is not None
        if isinstance(section, StochasticAverage):
            self.average = optim.swa(training.model)
            self.start = training.in_examples(section.start)
            self.every = max(1, training.in_examples(section.every))
        else:
            self.average = optim.ema(training.model, section.decay, section.warmup)
            self.start, self.every = 0, 1

    @property
    def model(self) -> torch.nn.Module:
        """The model with averaged weights."""
        return self.average.module

    def update(self, training: Training, batch: int) -> None:
        """Let the weights join, if this step of `batch` examples crossed a multiple of the interval."""
        after = training.progress.examples - self.start
        if after >= 0 and after // self.every > max(after - batch, -1) // self.every:
            self.average.update_parameters(training.model)

    def reestimate_batch_norm(self, training: Training) -> None:
        """Give the mean of the weights running statistics of its own, over the examples that would come next.

        Which those are does not depend on the number of workers, nor do the sums.
        """
        norms = BatchNorms(self.model, training.group.device)
        if not isinstance(self.section, StochasticAverage) or not norms.norms:
            return
        micro_batches = math.ceil(REESTIMATED_EXAMPLES / training.recipe.batch.micro)
        sums = FixedPointSum(len(norms.statistics), micro_batches, training.group.device)
        self.model.train()
        with training.group.raise_on_all("batch norm of the averaged weights"), torch.no_grad():
            for j in training.own_micro_batches(micro_batches):
                norms.clear()
                training.passes.forward(self.model, j)
                sums.add(norms.statistics)
        norms.move(sums.over(training.group), pace=math.inf)
