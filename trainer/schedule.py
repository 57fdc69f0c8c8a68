"""Learning rate over the run: pure functions of the examples served; no number of workers enters.

Formulas: Goyal et al. 2017 (arXiv:1706.02677) for the linear rule and its warm-up, Hoffer et al. 2017
(arXiv:1705.08741) for the square root, MLPerf's reference for the polynomial with its `plus_one` form.
"""

import math
from collections.abc import Callable

from trainer.recipe import (
    CosineDecay,
    ExponentialDecay,
    Length,
    PolynomialDecay,
    Recipe,
    Scale,
    StepDecay,
    WarmUp,
)


def in_examples(length: Length, *, examples_per_epoch: int, total_examples: int, batch_size: int) -> int:
    """A length in served examples, rounded to a whole one."""
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


class LearningRate:
    """The rate of each step. `warmup_examples` and `peak` are what the plan shows."""

    def __init__(self, recipe: Recipe, examples_per_epoch: int, total_examples: int) -> None:
        self._recipe = recipe
        self._size = {
            "examples_per_epoch": examples_per_epoch,
            "total_examples": total_examples,
            "batch_size": recipe.batch.size,
        }
        schedule = recipe.schedule
        self.peak = scaled(schedule.scale, recipe.optimizer.hyper["lr"], recipe.batch.size)
        self.total_examples = total_examples
        self.warmup_examples = self._examples(schedule.warmup) if schedule.warmup else 0
        self._decay = self._decay_function()

    def rate(self, served_before: int, batch_size: int) -> float:
        """The rate of the step of `batch_size` examples after `served_before` served ones.

        Warm-up is taken at the step's end, so that the first step moves; decay at its start, so that the
        last one does.
        """
        warmth = 1.0
        warmup = self._recipe.schedule.warmup
        if warmup and served_before + batch_size < self.warmup_examples:
            warmth = warm(warmup, (served_before + batch_size) / self.warmup_examples)
        return self.peak * warmth * self._decay(served_before) * self._cooling(served_before)

    def _examples(self, length: Length) -> int:
        return in_examples(length, **self._size)

    def _progress(self, served: int, start: int, length: int) -> float:
        return min(1.0, max(0, served - start) / max(1, length))

    def _cooling(self, served: int) -> float:
        cooldown = self._recipe.schedule.cooldown
        if cooldown is None:
            return 1.0
        length = self._examples(cooldown)
        progress = self._progress(served, self.total_examples - length, length)
        return _between(1 - (progress if cooldown.shape == "linear" else math.sqrt(progress)), cooldown.end)

    def _decay_function(self) -> Callable[[int], float]:
        """The way down as a function of the examples served."""
        decay = self._recipe.schedule.decay
        start, length = self.warmup_examples, self.total_examples - self.warmup_examples
        if isinstance(decay, StepDecay):
            milestones = [self._examples(milestone) for milestone in decay.at]
            return lambda served: decay.factor ** sum(served >= milestone for milestone in milestones)
        if isinstance(decay, CosineDecay):
            return lambda served: _between(
                (1 + math.cos(math.pi * self._progress(served, start, length))) / 2, decay.end
            )
        if isinstance(decay, PolynomialDecay):
            span = length + (self._recipe.batch.size if decay.plus_one else 0)
            return lambda served: _between(
                (1 - self._progress(served, start, span)) ** decay.power, decay.end
            )
        if isinstance(decay, ExponentialDecay):
            held, every = start + self._examples(decay.hold), self._examples(decay.every)
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


def _between(height: float, floor: float) -> float:
    """`height` from 0 to 1, stretched to lie from `floor` to 1."""
    return floor + (1 - floor) * height
