"""The plan: every number that a recipe derives, computed once before the run and sent to its workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.errors import RecipeError, refuse
from trainer.plan import checks
from trainer.plan.inputs import Inputs
from trainer.plan.schedules import BatchStages, LearningRate, in_examples
from trainer.recipe.schema import Recipe

if TYPE_CHECKING:
    from data_echo import Schedule


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against its data and its model. Durations are in examples served to the model."""

    recipe: Recipe
    examples: dict[str, int]  # by split
    rows_together: int  # training rows that are read at one go
    left_out: tuple[str, ...]  # lines on what the sources found and do not read
    stages: BatchStages
    steps: int
    total_examples: int  # the length that the schedules are stretched over
    served_examples: int  # at the end of the last step, which may go past the total
    fresh_examples: int
    peak_lr: float
    warmup_examples: int
    parameters: int  # numbers that are trained
    state_bytes: int  # of the optimizer
    part_numbers: int  # of the parameters, the most that one worker holds where the model is spread
    part_state_bytes: int
    checkpointed_blocks: tuple[str, ...]  # modules that compute their activations again

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step at `batch.size`, K."""
        return self.recipe.batch.size // self.recipe.batch.micro

    def micro_batches_at(self, served: int) -> int:
        """Micro-batches of the step that follows `served` examples."""
        return self.stages.at(served).batch_size // self.recipe.batch.micro

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches of the largest step."""
        return max(self.recipe.batch.sizes) // self.recipe.batch.micro

    @property
    def largest_workers(self) -> int:
        """The most workers that each have something to do in every step."""
        return self.recipe.batch.largest_workers

    def busiest_worker(self, batch_size: int | None = None) -> float:
        """The part of a step of `batch_size` examples (default: `batch.size`) that its busiest worker
        computes, in the mean over steps; with the most workers that the run may have.
        """
        batch = self.recipe.batch
        micro_batches = (batch_size or batch.size) // batch.micro
        return busiest_worker(micro_batches, batch.lanes, self.recipe.run.most_workers)


def resolve(recipe: Recipe, inputs: Inputs | None = None) -> Plan:
    """Resolve a recipe; RecipeError names what its task, its data or its model contradict."""
    import optim
    from trainer.compute import activation_checkpointing

    inputs = inputs or Inputs.of(recipe)
    examples = inputs.examples
    n, size = examples["train"], recipe.batch.size
    total = in_examples(recipe.train, examples_per_epoch=n, total_examples=0, batch_size=size)
    refuse([recipe.problem(*contradiction) for contradiction in checks.length(recipe, total)])
    rate, stages = LearningRate(recipe, n, total), BatchStages(recipe, n, total)
    _find_weights(recipe)
    model = inputs.model(recipe)
    contradictions = [*checks.data(recipe, n), *checks.schedule(recipe, stages, rate)]
    contradictions += [*checks.model(recipe, model), *checks.groups(recipe, model)]
    refuse([recipe.problem(*contradiction) for contradiction in contradictions])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps, served = stages.steps(total)
    workers = recipe.run.fewest_workers
    return Plan(
        recipe=recipe,
        examples=examples,
        rows_together=inputs.rows_together,
        left_out=inputs.left_out,
        stages=stages,
        steps=steps,
        total_examples=total,
        served_examples=served,
        fresh_examples=echo_schedule(recipe, n).fresh_served(served // recipe.batch.micro),
        peak_lr=rate.peak,
        warmup_examples=rate.warmup_examples,
        parameters=sum(parameter.numel() for parameter in parameters),
        state_bytes=optim.state_bytes(recipe.optimizer.name, parameters, **recipe.optimizer.hyper),
        part_numbers=sum(-(-len(p) // workers) * p[0].numel() if p.dim() else 1 for p in parameters),
        part_state_bytes=optim.state_bytes(
            recipe.optimizer.name, parameters, workers=workers, **recipe.optimizer.hyper
        ),
        checkpointed_blocks=tuple(activation_checkpointing.blocks(model, recipe.run.recompute)),
    )


def _find_weights(recipe: Recipe) -> None:
    """Refuse to start from weights that are not there."""
    from trainer.compute import initial_weights

    if recipe.init.from_ is not None:
        try:
            initial_weights.find(recipe.init.from_, recipe.checkpoint.dir)
        except RecipeError as error:
            raise recipe.placed(error) from error


def echo_schedule(recipe: Recipe, train_examples: int) -> Schedule:
    """The recipe's order and echo."""
    from data_echo import DataError, Schedule

    batch, echo = recipe.batch, recipe.echo
    try:
        return Schedule(
            train_examples,
            batch.lanes,
            batch.micro,
            1 if echo.factor == "auto" else echo.factor,
            echo.capacity or 0,
            recipe.seed,
            whole_batches=echo.at == "batch",
            max_age=echo.max_age,
            block=batch.shuffle.block,
            window=batch.shuffle.window,
        )
    except DataError as error:
        raise RecipeError([recipe.problem("echo", error.wrong, error.right)]) from error


def busiest_worker(micro_batches: int, lanes: int, workers: int) -> float:
    """Mean over steps of the largest part that one worker has of a step's micro-batches.

    Micro-batch j is of lane j mod lanes, and lane l belongs to worker l mod workers.
    """
    steps = lanes // math.gcd(micro_batches, lanes)  # after these the pattern repeats

    def done(ends: np.ndarray, worker: int) -> np.ndarray:
        """A worker's micro-batches among the run's first ones."""
        turns, lane = np.divmod(ends, lanes)
        of_a_turn = len(range(worker, lanes, workers))
        return turns * of_a_turn + (lane - worker + workers - 1) // workers

    first = np.arange(steps) * micro_batches
    largest = np.zeros(steps, np.int64)
    for worker in range(workers):
        largest = np.maximum(largest, done(first + micro_batches, worker) - done(first, worker))
    return float(largest.sum()) / (steps * micro_batches)
