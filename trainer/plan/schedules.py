"""Learning rate and batch over the run: pure functions of the examples served; no number of workers enters.

Formulas: Goyal et al. 2017 (arXiv:1706.02677) for the linear rule and its warm-up, Hoffer et al. 2017
(arXiv:1705.08741) for the square root, MLPerf's reference for the polynomial with its `plus_one` form, Smith
et al. 2018 (arXiv:1711.00489) for a batch that grows instead of a rate that falls.
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

from trainer.recipe.durations import Duration
from trainer.recipe.schedule import (
    CosineDecay,
    ExponentialDecay,
    MultiplyGrowth,
    PolynomialDecay,
    RampGrowth,
    Scale,
    StepDecay,
    StepsGrowth,
    WarmUp,
)
from trainer.recipe.schema import Recipe


def in_examples(length: Duration, *, examples_per_epoch: int, total_examples: int, batch_size: int) -> int:
    """A length in served examples, rounded to a whole one. A step counts as `batch_size` examples."""
    if length.examples is not None:
        return length.examples
    if length.epochs is not None:
        return round(length.epochs * examples_per_epoch)
    if length.steps is not None:
        return length.steps * batch_size
    return round((length.share or 0.0) * total_examples)


def scaled(scale: Scale, lr: float, batch_size: int) -> float:
    """The full rate of a batch: lr × (batch_size / base_batch) ** power."""
    power = {"none": 0.0, "linear": 1.0, "sqrt": 0.5, "power": scale.power or 0.0}[scale.rule]
    return lr * (batch_size / (scale.base_batch or batch_size)) ** power


class BatchStage(NamedTuple):
    """A stretch of the run with one batch. `rate` makes up for what the batch could not grow."""

    start: int  # examples served before it
    batch_size: int
    rate: float = 1.0


class BatchStages:
    """The batch over the run. A step begins with the batch of the stage that its first example lies in."""

    def __init__(self, recipe: Recipe, examples_per_epoch: int, total_examples: int) -> None:
        batch, growth = recipe.batch, recipe.batch.growth
        sizes, rates = batch.sizes, [1.0] * len(batch.sizes)
        starts = [0]

        def examples(length: Duration) -> int:
            return in_examples(
                length,
                examples_per_epoch=examples_per_epoch,
                total_examples=total_examples,
                batch_size=batch.size,
            )

        if isinstance(growth, MultiplyGrowth | StepsGrowth):
            starts += [examples(milestone) for milestone in growth.at]
        elif isinstance(growth, RampGrowth):
            starts = [examples(growth.over) * stage // (len(sizes) - 1) for stage in range(len(sizes))]
        if isinstance(growth, MultiplyGrowth):
            rates = [size / (batch.size * growth.factor**stage) for stage, size in enumerate(sizes)]
        self.stages = tuple(map(BatchStage, starts, sizes, rates))

    def at(self, served: int) -> BatchStage:
        """The stage of the step that follows `served` examples."""
        return self.stages[bisect_right(self.stages, served, key=lambda stage: stage.start) - 1]

    def steps(self, total_examples: int) -> tuple[int, int]:
        """The steps that serve at least `total_examples`, and the examples that they serve."""
        steps = served = 0
        ends = [*(stage.start for stage in self.stages[1:]), total_examples]
        for stage, end in zip(self.stages, ends, strict=True):
            more = max(0, math.ceil((min(end, total_examples) - served) / stage.batch_size))
            steps, served = steps + more, served + more * stage.batch_size
        return steps, served


class LearningRate:
    """The rate of each step. `peak` and `warmup_examples` are what the plan shows."""

    def __init__(self, recipe: Recipe, examples_per_epoch: int, total_examples: int) -> None:
        schedule = recipe.schedule
        self._schedule = schedule
        self._batch_size = recipe.batch.size
        self.examples_per_epoch = examples_per_epoch
        self._stages = BatchStages(recipe, examples_per_epoch, total_examples)
        self.total_examples = total_examples
        self.peak = scaled(schedule.scale, recipe.optimizer.hyper["lr"], recipe.batch.size)
        self.warmup_examples = self.in_examples(schedule.warmup) if schedule.warmup else 0
        self._decay = self._decay_function()
        self._cooling = self._cooling_function()

    def rate(self, served_before: int, batch_size: int) -> float:
        """The rate of the step of `batch_size` examples after `served_before` served ones.

        Warm-up is taken at the step's end, so that the first step moves; decay at its start, so that the last
        one does.
        """
        warmup = self._schedule.warmup
        factor = (
            self._stages.at(served_before).rate * self._decay(served_before) * self._cooling(served_before)
        )
        if warmup and served_before + batch_size < self.warmup_examples:
            factor *= warm(warmup, (served_before + batch_size) / self.warmup_examples)
        return self.peak * factor

    def in_examples(self, length: Duration) -> int:
        """A length of the recipe's in served examples."""
        return in_examples(
            length,
            examples_per_epoch=self.examples_per_epoch,
            total_examples=self.total_examples,
            batch_size=self._batch_size,
        )

    def _cooling_function(self) -> Callable[[int], float]:
        cooldown = self._schedule.cooldown
        if cooldown is None:
            return lambda served: 1.0
        length = self.in_examples(cooldown)
        progress = _progress(self.total_examples - length, length)
        if cooldown.shape == "sqrt":
            return lambda served: _between(1 - math.sqrt(progress(served)), cooldown.end)
        return lambda served: _between(1 - progress(served), cooldown.end)

    def _decay_function(self) -> Callable[[int], float]:
        """The way down as a function of the examples served."""
        decay = self._schedule.decay
        start, length = self.warmup_examples, self.total_examples - self.warmup_examples
        if isinstance(decay, StepDecay):
            milestones = [self.in_examples(milestone) for milestone in decay.at]
            return lambda served: decay.factor ** sum(served >= milestone for milestone in milestones)
        if isinstance(decay, CosineDecay):
            progress = _progress(start, length)
            return lambda served: _between((1 + math.cos(math.pi * progress(served))) / 2, decay.end)
        if isinstance(decay, PolynomialDecay):
            progress = _progress(start, length + (self._batch_size if decay.plus_one else 0))
            return lambda served: _between((1 - progress(served)) ** decay.power, decay.end)
        if isinstance(decay, ExponentialDecay):
            held, every = start + self.in_examples(decay.hold), max(1, self.in_examples(decay.every))
            return lambda served: max(decay.end, decay.factor ** (max(0, served - held) / every))
        return lambda served: 1.0


def warm(warmup: WarmUp, progress: float) -> float:
    """The share of the full rate at a progress from 0 to 1 of warm-up."""
    if warmup.shape == "constant":
        return warmup.start if progress < 1 else 1.0
    if warmup.shape == "exponential":
        return warmup.start ** (1 - progress)
    if warmup.shape == "cosine":
        return _between((1 - math.cos(math.pi * progress)) / 2, warmup.start)
    return _between(progress**warmup.power, warmup.start)


def _progress(start: int, length: int) -> Callable[[int], float]:
    """From 0 at `start` to 1 after `length` examples, and level on both sides."""
    return lambda served: min(1.0, max(0, served - start) / max(1, length))


def _between(height: float, floor: float) -> float:
    """`height` from 0 to 1, stretched to lie from `floor` to 1."""
    return floor + (1 - floor) * height
