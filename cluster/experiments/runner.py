"""Trains trials one after another inside one worker group, which keeps what they share: the task, its data,
evaluation blocks, and how steps are computed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from cluster.experiments.course import Course, Order
from cluster.experiments.shared_data import SharedData, TaskInputs
from cluster.experiments.trials import Trial
from trainer.build import build
from trainer.compute.execution import Execution
from trainer.compute.stacked import Batch, NotStackable, StackedModels
from trainer.distributed.group import WorkerGroup
from trainer.loop import NotFinite, steps
from trainer.plan.plan import resolve
from trainer.recipe.schema import Recipe
from trainer.training import Training

MOST_PARAMETERS = 1 << 20  # of a model that gains from being stacked with others


class Runner:
    """One worker of a group that trains trials; all workers of the group are given the same ones.

    Args:
        growth: of the steps from one evaluation to the next.
        group: the workers that train each trial together.
        inputs: what this process has loaded already.
    """

    def __init__(self, growth: float, group: WorkerGroup, inputs: TaskInputs | None = None) -> None:
        self.growth, self.group, self.inputs = growth, group, inputs or TaskInputs()
        self._shared: dict[int, SharedData] = {}  # by the identity of its inputs
        self._executions: dict[tuple[str, int], Execution] = {}
        self._compared: set[str] = set()  # arms whose stacked gradients are those of one by one
        self.alone: dict[str, str] = {}  # why an arm's trials are trained one by one

    def run(self, orders: Sequence[Order]) -> list[Trial]:
        """Train trials of one cell: all of them as one tensor program, or else the first one."""
        arm = orders[0].cell.arm
        if arm not in self.alone and (reason := self._why_alone(orders[0].recipe)):
            self.alone[arm] = reason
        if arm not in self.alone:
            try:
                return self._stacked(orders)
            except NotStackable as reason:
                self.alone[arm] = str(reason)
        return [self._one(orders[0])]

    def _data(self, recipe: Recipe) -> SharedData:
        """What trials of a recipe's task share."""
        inputs = self.inputs.of(recipe)
        if id(inputs) not in self._shared:
            self._shared[id(inputs)] = SharedData(inputs, self.group)
        return self._shared[id(inputs)]

    def _why_alone(self, recipe: Recipe) -> str | None:
        """Why trials of a recipe cannot be one tensor program, as far as the recipe tells."""
        train, data = recipe.train, self._data(recipe)
        reasons = {
            "run.reduction is exact": recipe.run.reduction == "exact",
            f"a group has {self.group.size} workers": self.group.size > 1,
            f"train.precision is {train.precision}": train.precision != "fp32",
            f"train.guard.policy is {train.guard.policy}": train.guard.policy != "stop",
            "echo.factor is auto": recipe.echo.factor == "auto",
            "run.recompute is asked for": bool(recipe.run.recompute),
            "prepared examples are random or too many to keep": data.kept.arrays("train") is None,
        }
        return next((reason for reason, is_so in reasons.items() if is_so), None)

    def _one(self, order: Order) -> Trial:
        began_at = time.perf_counter()
        data, training = self._data(order.recipe), self._training(order)
        course = Course(order, self.growth, training.plan.steps)
        try:
            for step in steps(training):
                if course.wants(step.step):
                    course.measured(
                        step.step, data.evaluation("validation", order.recipe).measure(training.model)
                    )
                if course.end:
                    break
        except NotFinite:
            course.diverged(training.progress.step + 1)
        finally:
            training.loader.close()
        if course.wants_test:
            course.test = data.evaluation("test", order.recipe).measure(training.model)
        return course.trial(time.perf_counter() - began_at)

    def _training(self, order: Order, execution: Execution | None = None) -> Training:
        known, data = (order.cell.arm, order.cell.batch), self._data(order.recipe)
        plan = resolve(order.recipe, data.inputs)
        execution = execution or self._executions.get(known)
        training = build(plan, data.inputs.task, self.group, data.preparer(order.recipe), execution=execution)
        self._executions[known] = training.execution
        return training

    def _stacked(self, orders: Sequence[Order]) -> list[Trial]:
        """Train trials as one tensor program, each to its own end."""
        began_at = time.perf_counter()
        trainings = [self._training(order, Execution()) for order in orders]
        first = trainings[0]
        if first.plan.parameters * len(orders) > MOST_PARAMETERS:
            raise NotStackable(f"a model of {first.plan.parameters:,} parameters gains nothing by it")
        stack, data = self._stack(orders[0].cell.arm, trainings), self._data(first.recipe)
        courses = [Course(order, self.growth, first.plan.steps) for order in orders]
        size, step = first.recipe.batch.size, 0
        while any(course.end is None for course in courses):
            rates = [training.rate.rate(step * size, size) for training in trainings]
            sums = stack.backward(_loaded(trainings, step))
            finite = stack.update(sums, rates, first.recipe.train.clip_norm).tolist()
            step += 1
            for course, is_finite in zip(courses, finite, strict=True):
                if not is_finite and course.end is None:
                    course.diverged(step)
            due = [k for k, course in enumerate(courses) if course.end is None and course.wants(step)]
            measured = data.measure(stack, "validation") if due else []
            for k in due:
                courses[k].measured(step, measured[k])
                if courses[k].wants_test:
                    courses[k].test = data.measure(stack, "test")[k]
        seconds = (time.perf_counter() - began_at) / len(orders)
        return [course.trial(seconds) for course in courses]

    def _stack(self, arm: str, trainings: Sequence[Training]) -> StackedModels:
        """The trainings' models as one; NotStackable where an arm's first stack shows other gradients."""
        models = [training.model for training in trainings]
        groups = [[dict(group) for group in training.optimizer.param_groups] for training in trainings]
        stack = StackedModels(
            self._data(trainings[0].recipe).inputs.task, models, groups, trainings[0].recipe.optimizer.name
        )
        if arm not in self._compared:
            if (reason := stack.differs(models, _loaded(trainings, 0))) is not None:
                raise NotStackable(reason)
            for training in trainings:
                training.forward_backward.rewind(0)
            self._compared.add(arm)
        return stack


def _loaded(trainings: Sequence[Training], step: int) -> Batch:
    """The global batch of each training's step, [trainings, examples, ...]."""
    each = trainings[0].plan.micro_batches
    micro_batches = range(step * each, (step + 1) * each)
    batches = [training.forward_backward.load(micro_batches) for training in trainings]
    return {name: torch.stack([batch[name] for batch in batches]) for name in batches[0]}
