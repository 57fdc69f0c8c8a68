"""Everything that one worker trains with, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from data_echo import EchoLoader, Schedule
from optim.flat import FlatOptimizer
from trainer.compute.batch_norm import BatchNorms
from trainer.compute.execution import Execution
from trainer.compute.forward_backward import ForwardBackward, stacks
from trainer.compute.precision import LossScale
from trainer.compute.weight_averaging import RunningAverage
from trainer.distributed.fully_sharded import scattered
from trainer.distributed.group import WorkerGroup
from trainer.distributed.reduction import Reduction
from trainer.distributed.sharded_state import ShardedOptimizer
from trainer.errors import UserError
from trainer.plan.plan import Plan
from trainer.plan.schedules import LearningRate
from trainer.recipe.durations import Duration
from trainer.recipe.schema import Recipe
from trainer.run_folder.checkpoints import State
from trainer.run_folder.decisions import Decisions


@dataclass
class Progress:
    """How far a run has come. `position` counts micro-batches and is the data stream's whole state."""

    step: int = 0
    position: int = 0
    examples: int = 0
    skipped: int = 0  # updates that the guard left out


@dataclass
class Training:
    """One worker's model and optimizer, its part of the data, and how gradients are computed and added up."""

    plan: Plan
    group: WorkerGroup
    model: nn.Module
    optimizer: FlatOptimizer | ShardedOptimizer
    names: list[str]  # of the parameters, in the optimizer's order
    norms: BatchNorms
    forward_backward: ForwardBackward
    reduction: Reduction
    rate: LearningRate
    schedule: Schedule
    progress: Progress
    decisions: Decisions
    average: RunningAverage | None = None
    execution: Execution = field(default_factory=Execution)
    stop_asked: Callable[[], bool] = lambda: False  # whether this worker wants the run to end with this step

    @property
    def recipe(self) -> Recipe:
        """What is trained."""
        return self.plan.recipe

    @property
    def loader(self) -> EchoLoader:
        """Where the micro-batches come from."""
        return self.forward_backward.loader

    @property
    def loss_scale(self) -> LossScale:
        """What losses are multiplied by for the backward pass."""
        return self.forward_backward.scale

    @property
    def finished(self) -> bool:
        """Whether the plan is done."""
        return self.progress.examples >= self.plan.total_examples

    def is_finite(self) -> bool:
        """Whether every parameter is."""
        return self.reduction.is_finite()

    def execute(self, execution: Execution) -> None:
        """Compute the steps from here on as `execution` says."""
        if execution is not self.execution:
            self.execution = execution
            torch.set_num_threads(execution.threads)

    def with_less_memory(self) -> None:
        """Serve the current step's micro-batches once more, half as many per forward pass."""
        self.execute(self.execution.with_less_memory())
        self.forward_backward.rewind(self.progress.position)

    def in_examples(self, duration: Duration) -> int:
        """A duration of the recipe in served examples."""
        return self.rate.in_examples(duration)

    def rate_factor(self) -> float:
        """What roll-backs so far multiply the learning rate by."""
        taken = self.decisions.rate_factors
        return math.prod(factor for start, factor in taken if start <= self.progress.position)

    def own_micro_batches(self, micro_batches: int) -> list[int]:
        """Of the next `micro_batches` of the run those that this worker serves."""
        start = self.progress.position
        return [j for j in range(start, start + micro_batches) if self.loader.serves(j)]

    def passes(self, micro_batches: int) -> int:
        """The most forward passes that any worker does for the next `micro_batches` of the run."""
        start, lanes, size = self.progress.position, self.recipe.batch.lanes, self.group.size
        owners = [j % lanes % size for j in range(start, start + micro_batches)]
        busiest = max(owners.count(rank) for rank in range(size))
        return sum(1 for _ in stacks(range(busiest), self.execution))

    def state(self) -> State:
        """All that the rest of the run depends on: tensors and plain values, keyed by parameter name. Where
        the model is spread, all workers take part, and rank 0 has the tensors.
        """
        return self.reduction.gathered(
            {
                "progress": asdict(self.progress),
                "model": self.model.state_dict(),
                "optimizer": _by_name(self.optimizer, self.names),
                "scale": asdict(self.loss_scale),
                "execution": asdict(self.execution),
                "average": None if self.average is None else self.average.average.state_dict(),
            }
        )

    def load_optimizer(self, state: State) -> None:
        """Take over a checkpoint's state of the optimizer."""
        _load_by_name(self.optimizer, self.names, state["optimizer"])


def _by_name(optimizer: FlatOptimizer | ShardedOptimizer, names: Sequence[str]) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {
        "state": {names[index]: value for index, value in state["state"].items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
    }


def _load_by_name(
    optimizer: FlatOptimizer | ShardedOptimizer, names: Sequence[str], saved: dict[str, Any]
) -> None:
    current = optimizer.state_dict()["param_groups"]
    if set(saved["state"]) - set(names) or len(saved["groups"]) != len(current):
        raise UserError(
            "the checkpoint's optimizer state is of other parameters; resume with the recipe it came from"
        )
    number = {name: index for index, name in enumerate(names)}
    groups = [{**group, "params": now["params"]} for group, now in zip(saved["groups"], current, strict=True)]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number[name]: {key: scattered(value, held[number[name]]) for key, value in values.items()}
        for name, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})
