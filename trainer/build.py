"""From a plan, a task and perhaps a checkpoint to a worker that is ready for its next step.

Everything is built in one order, the same on every worker.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import optim
from data_echo import EchoLoader, Preparer, Schedule
from optim.engine.chunks import EngineName
from optim.flat import FlatOptimizer
from trainer.compute import activation_checkpointing, autotune, initial_weights
from trainer.compute.batch_norm import BatchNorms
from trainer.compute.execution import Execution, cores_per_worker, keep_freed_memory, stack_limit
from trainer.compute.forward_backward import ForwardBackward
from trainer.compute.precision import LossScale
from trainer.compute.weight_averaging import RunningAverage
from trainer.distributed.fully_sharded import ExactlySharded, FullySharded
from trainer.distributed.group import WorkerGroup
from trainer.distributed.reduction import ExactReduction, FastReduction, Reduction
from trainer.distributed.sharded_state import ShardedOptimizer
from trainer.plan.plan import Plan, echo_schedule
from trainer.plan.schedules import LearningRate
from trainer.recipe.schema import Recipe
from trainer.run_folder.checkpoints import State
from trainer.run_folder.decisions import Decisions
from trainer.task import Task
from trainer.training import Progress, Training

NONE_TAKEN = Decisions()


def build(
    plan: Plan,
    task: Task,
    group: WorkerGroup,
    preparer: Preparer,
    state: State | None = None,
    decisions: Decisions = NONE_TAKEN,
    execution: Execution | None = None,
) -> Training:
    """A worker ready for its first step, or for the one after `state` was saved (by any number of workers).
    `decisions` are those that the run took before, `execution` one that was found for this model and batch.
    """
    if group.device.type == "cpu":
        keep_freed_memory()
    recipe = plan.recipe
    progress = Progress(**state["progress"]) if state else Progress()
    model, micro = _model(recipe, task, group, state), recipe.batch.micro
    norms = BatchNorms(model, group.device, micro // (recipe.batch.bn_group or micro))
    activation_checkpointing.checkpoint_activations(model, plan.checkpointed_blocks)
    optimizer, names = _optimizer(recipe, plan, model, group)
    schedule = _schedule(plan, decisions)
    forward_backward = ForwardBackward(
        task,
        model,
        norms,
        partial(_loader, recipe, group, schedule, preparer),
        position=progress.position,
        seed=recipe.seed,
        device=group.device,
        precision=recipe.train.precision,
        scale=LossScale(**state["scale"]) if state else LossScale.of(recipe.train.precision, micro),
    )
    training = Training(
        plan=plan,
        group=group,
        model=model,
        optimizer=optimizer,
        names=names,
        norms=norms,
        forward_backward=forward_backward,
        reduction=_reduction(plan, group, model, optimizer, len(forward_backward.statistics)),
        rate=LearningRate(recipe, plan.examples["train"], plan.total_examples),
        schedule=schedule,
        progress=progress,
        decisions=decisions,
    )
    training.average = _average(training, state)
    training.execute(execution or _execution(training, state))
    _spread(training)
    if state is not None:
        training.load_optimizer(state)
    return training


def _is_spread(recipe: Recipe, group: WorkerGroup) -> bool:
    """Whether workers hold parts of the model: one alone holds it whole."""
    return recipe.run.fsdp is not None and group.size > 1


def _spread(training: Training) -> None:
    """Where the recipe says so, give each worker its part of the model and of its average, and an optimizer
    of those parts. Not before: averages are copies of a whole model, and trials are one worker's alone.
    """
    recipe, model, reduction = training.recipe, training.model, training.reduction
    if not isinstance(reduction, FullySharded):
        return
    fsdp = recipe.run.fsdp
    with training.group.raise_on_all("the first micro-batches"):
        training.forward_backward.spare(training.progress.position)
    training.optimizer.zero_grad()
    units = activation_checkpointing.blocks(model, (fsdp and fsdp.units) or True)
    reduction.wrap(units, [] if training.average is None else [training.average.model])
    training.optimizer, training.names = _optimizer(recipe, training.plan, model, training.group)


def _model(recipe: Recipe, task: Task, group: WorkerGroup, state: State | None) -> nn.Module:
    random.seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)
    torch.manual_seed(recipe.seed)
    model = task.model().to(group.device)
    if recipe.run.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.register_forward_pre_hook(_channels_last)
    initial_weights.freeze(model, recipe.init.freeze)
    initial_weights.zero(model, recipe.init.zero)
    if recipe.init.from_ is not None:
        initial_weights.put(initial_weights.find(recipe.init.from_, recipe.checkpoint.dir), model)
    if group.size > 1:  # a model may draw its first weights from anywhere
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)
    if state is not None:
        model.load_state_dict(state["model"])
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


def _schedule(plan: Plan, decisions: Decisions) -> Schedule:
    """The order of examples and echoes, with the echo factors that were decided so far."""
    schedule = echo_schedule(plan.recipe, plan.examples["train"])
    for position, factor in decisions.echo_factors:
        schedule.change(position, factor)
    return schedule


def _optimizer(
    recipe: Recipe, plan: Plan, model: nn.Module, group: WorkerGroup
) -> tuple[FlatOptimizer | ShardedOptimizer, list[str]]:
    """The optimizer, and the names of its parameters in its order."""
    section = recipe.optimizer
    grouping = optim.group_parameters(
        model,
        no_decay=section.no_decay,
        no_adapt=section.no_adapt,
        lr_multipliers=section.lr_multipliers,
    )
    engine: EngineName = "exact" if recipe.run.reduction == "exact" else "auto"
    hyper = {**section.hyper, "lr": plan.peak_lr}
    make = partial(optim.build, section.name, engine=engine, **hyper)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    names = [name_of[p] for each in grouping.groups for p in each["params"]]
    if recipe.run.shards_state and group.size > 1:
        return ShardedOptimizer(grouping.groups, make, group), names
    return make(grouping.groups, flatten=not _is_spread(recipe, group)), names


def _reduction(
    plan: Plan,
    group: WorkerGroup,
    model: nn.Module,
    optimizer: FlatOptimizer | ShardedOptimizer,
    statistics: int,
) -> Reduction:
    is_exact = plan.recipe.run.reduction == "exact"
    if _is_spread(plan.recipe, group) and is_exact:
        return ExactlySharded(group, model, statistics, plan.most_micro_batches)
    if _is_spread(plan.recipe, group):
        return FullySharded(group, model, statistics)
    if is_exact:
        return ExactReduction(group, optimizer, statistics, plan.most_micro_batches)
    return FastReduction(group, optimizer, statistics)


def _loader(
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


def _average(training: Training, state: State | None) -> RunningAverage | None:
    section = training.recipe.train.average
    if section is None:
        return None
    average = RunningAverage(training.model, section, training.in_examples)
    if state is not None:
        average.average.load_state_dict(state["average"])
    return average


def _execution(training: Training, state: State | None) -> Execution:
    """How steps are computed: as the checkpoint says while nothing else is asked for, otherwise tried."""
    run = training.recipe.run
    asked = run.model_dump(include={"stack", "compile", "reduction"})
    asked["device"] = training.group.device.type
    if state is not None and state["execution"]["asked"] == asked:
        return Execution(**state["execution"])
    return replace(_tried(training), asked=asked)


def _tried(training: Training) -> Execution:
    """Rank 0 tries, everyone follows: the same choice everywhere."""
    run, batch, group = training.recipe.run, training.recipe.batch, training.group
    training.optimizer.zero_grad()  # from here on gradients lie in the flat buffers, if there are any
    compute, gradients = training.forward_backward, training.reduction.gradients()
    micro_batches = training.plan.micro_batches_at(training.progress.examples)
    choice = Execution()
    with group.raise_on_all("the first micro-batches"):
        if group.rank == 0 and run.reduction == "exact":
            training.execute(choice)
            autotune.refuse_dependence_on_workers(
                compute, training.own_micro_batches(micro_batches), gradients
            )
        elif group.rank == 0:
            choice = autotune.choose(
                compute,
                training.own_micro_batches(micro_batches),
                gradients,
                most=stack_limit(group.device, batch.micro) if run.stack == "auto" else run.stack,
                threads=cores_per_worker(group.size),
                compiled=run.compile,
            )
    return group.broadcast(choice)
