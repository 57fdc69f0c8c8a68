"""Everything that one worker needs to train a recipe, built once and in one order on every worker."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import optim
from data_echo import EchoLoader, Preparer, Schedule
from trainer.compute import autotune as execution
from trainer.compute import initial_weights as weights
from trainer.compute.activation_checkpointing import recompute
from trainer.compute.autotune import Execution
from trainer.compute.batch_norm import BatchNorms
from trainer.compute.forward_backward import ForwardBackward
from trainer.compute.precision import LossScale
from trainer.compute.weight_averaging import RunningAverage
from trainer.distributed.group import WorkerGroup
from trainer.distributed.reduction import ExactReduction, FastReduction, Reduction
from trainer.errors import UserError
from trainer.plan import plan as planning
from trainer.plan.plan import Plan
from trainer.plan.schedules import LearningRate
from trainer.recipe.durations import Duration
from trainer.recipe.schema import Recipe
from trainer.run_folder.decisions import Decisions
from trainer.task import Task

State = dict[str, Any]
NONE_TAKEN = Decisions()


@dataclass
class Progress:
    """How far a run has come. `position` counts micro-batches and is the data stream's whole state."""

    step: int = 0
    position: int = 0
    examples: int = 0
    skipped: int = 0  # updates that the guard left out


@dataclass
class Training:
    """One worker's model, optimizer, share of the data and way of adding up, and how far they have come."""

    recipe: Recipe
    plan: Plan
    group: WorkerGroup
    model: nn.Module
    optimizer: torch.optim.Optimizer
    names: list[str]  # of the parameters, in the optimizer's order
    norms: BatchNorms
    preparer: Preparer
    loader: EchoLoader
    passes: ForwardBackward
    reduction: Reduction
    rate: LearningRate
    schedule: Schedule
    progress: Progress
    decisions: Decisions
    average: RunningAverage | None = None

    @property
    def finished(self) -> bool:
        """Whether the plan is done."""
        return self.progress.examples >= self.plan.total_examples

    def is_finite(self) -> bool:
        """Whether every parameter is."""
        buffers = self.optimizer.flat.parameters  # type: ignore[attr-defined]
        return all(bool(buffer.isfinite().all()) for buffer in buffers)

    @property
    def scale(self) -> LossScale:
        """What losses are multiplied by for the backward pass."""
        return self.passes.scale

    def in_examples(self, length: Duration) -> int:
        """A length of the recipe's in served examples."""
        return self.rate.in_examples(length)

    def rate_factor(self) -> float:
        """What roll-backs so far multiply the learning rate by."""
        taken = self.decisions.rate_factors
        return math.prod(factor for start, factor in taken if start <= self.progress.position)

    def own_micro_batches(self, micro_batches: int) -> list[int]:
        """The next step's micro-batches that this worker serves."""
        start = self.progress.position
        return [j for j in range(start, start + micro_batches) if self.loader.serves(j)]

    def rewind_loader(self) -> None:
        """Go back to where the step began, so that its micro-batches are served once more."""
        self.loader.close()
        self.loader = self.passes.loader = _echo_loader(
            self.recipe, self.group, self.schedule, self.preparer, self.progress.position
        )

    def state(self) -> State:
        """All that the rest of the run depends on: tensors and plain values, keyed by parameter name."""
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": _named_state(self.optimizer, self.names),
            "scale": asdict(self.scale),
            "execution": asdict(self.passes.execution),
            "average": None if self.average is None else self.average.average.state_dict(),
        }


def build(
    recipe: Recipe,
    plan: Plan,
    task: Task,
    group: WorkerGroup,
    preparer: Preparer,
    state: State | None = None,
    decisions: Decisions = NONE_TAKEN,
) -> Training:
    """A worker ready for its first step, or for the one after `state` was saved (by any number of workers).
    `decisions` are those that the run took before.
    """
    if group.device.type == "cpu":
        execution.keep_freed_memory()
    progress = Progress(**state["progress"]) if state else Progress()
    model = _model(recipe, task, group)
    norms = BatchNorms(
        model, group.device, recipe.batch.micro // (recipe.batch.bn_group or recipe.batch.micro)
    )
    recompute(model, plan.recomputed)
    optimizer, names = _optimizer(recipe, plan, model)
    if state is not None:
        model.load_state_dict(state["model"])
        _load_named_state(optimizer, names, state["optimizer"])
    schedule = planning.echo_schedule(recipe, plan.examples["train"])
    for position, factor in decisions.echo_factors:
        schedule.change(position, factor)
    loader = _echo_loader(recipe, group, schedule, preparer, progress.position)
    precision = recipe.train.precision
    passes = ForwardBackward(
        task, model, norms, loader, seed=recipe.seed, device=group.device, precision=precision
    )
    passes.scale = LossScale(**state["scale"]) if state else LossScale.of(precision, recipe.batch.micro)
    training = Training(
        recipe=recipe,
        plan=plan,
        group=group,
        model=model,
        optimizer=optimizer,
        names=names,
        norms=norms,
        preparer=preparer,
        loader=loader,
        passes=passes,
        reduction=_reduction(recipe, plan, group, optimizer, len(passes.statistics)),
        rate=LearningRate(recipe, plan.examples["train"], plan.total_examples),
        schedule=schedule,
        progress=progress,
        decisions=decisions,
    )
    _settle(training, state)
    return training


def _settle(training: Training, state: State | None) -> None:
    """What needs a built training: its average, and how its passes run, chosen or as it was."""
    recipe, passes = training.recipe, training.passes
    if recipe.train.average is not None:
        training.average = RunningAverage(training)
        if state is not None:
            training.average.average.load_state_dict(state["average"])
    asked = recipe.run.model_dump(include={"stack", "compile", "reduction"})
    asked["device"] = training.group.device.type
    if state is not None and state["execution"]["asked"] == asked:
        passes.execution = Execution(**state["execution"])
    else:
        if recipe.run.reduction == "fast":
            _choose_execution(training)
        passes.execution = replace(passes.execution, asked=asked)
    torch.set_num_threads(passes.execution.threads)


def _model(recipe: Recipe, task: Task, group: WorkerGroup) -> nn.Module:
    random.seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)
    torch.manual_seed(recipe.seed)
    model = task.model().to(group.device)
    if recipe.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.register_forward_pre_hook(_channels_last)
    for pattern in recipe.init.freeze:
        weights.freeze(model, pattern)
    for pattern in recipe.init.zero:
        weights.zero(model, pattern)
    if recipe.init.from_ is not None:
        weights.put(weights.find(recipe.init.from_, recipe.checkpoint.dir), model)
    if group.size > 1:  # a model may draw its first weights from anywhere
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    return model.train()


def _channels_last(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images [examples, channels, height, width] among a model's inputs, with channels innermost in memory;
    the layers that follow keep to it.
    """
    return tuple(
        value.contiguous(memory_format=torch.channels_last)
        if isinstance(value, torch.Tensor) and value.dim() == 4
        else value
        for value in inputs
    )


def _optimizer(recipe: Recipe, plan: Plan, model: nn.Module) -> tuple[torch.optim.Optimizer, list[str]]:
    section = recipe.optimizer
    grouping = optim.group_parameters(
        model,
        no_decay=section.no_decay,
        no_adapt=section.no_adapt,
        lr_multipliers=section.lr_multipliers,
    )
    optimizer = optim.build(
        section.name, grouping.groups, flatten=True, **{**section.hyper, "lr": plan.peak_lr}
    )
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    return optimizer, [name_of[parameter] for parameter in _parameters(optimizer)]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _reduction(recipe: Recipe, plan: Plan, group: WorkerGroup, optimizer: Any, statistics: int) -> Reduction:
    if recipe.run.reduction == "exact":
        return ExactReduction(group, optimizer, statistics, plan.most_micro_batches)
    return FastReduction(group, optimizer, _parameters(optimizer), statistics)


def _echo_loader(
    recipe: Recipe, group: WorkerGroup, schedule: Schedule, preparer: Preparer, position: int
) -> EchoLoader:
    return EchoLoader(
        schedule,
        preparer,
        lanes=[lane for lane in range(recipe.batch.lanes) if group.owns(lane)],
        position=position,
        device=group.device,
        seed=recipe.seed,
        fresh_augment=recipe.echo.at == "before_augment",
    )


def _choose_execution(training: Training) -> None:
    """Rank 0 tries, everyone follows: the same choice everywhere."""
    run, batch, group = training.recipe.run, training.recipe.batch, training.group
    training.optimizer.zero_grad()  # from here on gradients lie in the flat buffers
    choice = None
    with group.raise_on_all("the first micro-batches"):
        if group.rank == 0:
            choice = execution.choose(
                training.passes,
                training.own_micro_batches(training.plan.micro_batches_at(training.progress.examples)),
                training.optimizer.flat.gradients,  # type: ignore[attr-defined]
                most=execution.stack_limit(group.device, batch.micro) if run.stack == "auto" else run.stack,
                threads=execution.cores_per_worker(run.workers),
                compiled=run.compile,
            )
    training.passes.execution = group.broadcast(choice)


def _named_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> State:
    state = optimizer.state_dict()
    return {
        "state": {names[index]: value for index, value in state["state"].items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
    }


def _load_named_state(optimizer: torch.optim.Optimizer, names: Sequence[str], saved: State) -> None:
    current = optimizer.state_dict()["param_groups"]
    if set(saved["state"]) - set(names) or len(saved["groups"]) != len(current):
        raise UserError(
            "the checkpoint's optimizer state is of other parameters; resume with the recipe it came from"
        )
    number = {name: index for index, name in enumerate(names)}
    optimizer.load_state_dict(
        {
            "state": {number[name]: value for name, value in saved["state"].items()},
            "param_groups": [
                {**group, "params": now["params"]}
                for group, now in zip(saved["groups"], current, strict=True)
            ],
        }
    )
