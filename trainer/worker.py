"""One run of one recipe, as every worker sees it: build or resume, iterate the loop, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from data_echo import InlinePreparer, Preparer
from trainer.adaptive import auto_echo as echoing
from trainer.adaptive.bad_examples import SkippedExamples
from trainer.compute.evaluation import Evaluation
from trainer.distributed.group import WorkerGroup
from trainer.errors import RunFailed, UserError
from trainer.loop import NotFinite, Step, steps
from trainer.plan import plan as planning
from trainer.plan.provenance import Provenance
from trainer.recipe.durations import Interval, SavingInterval
from trainer.recipe.schema import Recipe
from trainer.recorder import Recorder
from trainer.run_folder.decisions import RATE_FACTOR, STOP
from trainer.task import Task
from trainer.training import Training, build


@dataclass(frozen=True)
class RunSpec:
    """What every worker of a run is told. It travels between processes."""

    recipe: Recipe
    folder: str
    make_task: Callable[[], Task]
    provenance: Provenance = field(default_factory=dict)
    profile: int = 0  # steps to profile; 0: none


@dataclass(frozen=True)
class Outcome:
    """How a run ended: FINISHED with the test metrics, or FAILED with the reason."""

    status: str
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run_worker(order: RunSpec, preparer: Preparer | None = None) -> Outcome:
    """Train as one worker of the group this process belongs to; all workers return the same outcome.

    Goes on from the newest whole checkpoint in the run's folder, if there is one. Without a `preparer` the
    examples are prepared in line. A run that stops itself (RunFailed) returns a FAILED outcome: trying again
    would stop it again.
    """
    group = WorkerGroup.join(order.recipe.run.device)
    task = order.make_task()
    skip_bad = order.recipe.task.skip_bad > 0
    own = preparer or InlinePreparer(task, order.recipe.seed, skip_bad=skip_bad)
    record = Recorder(order, group)
    try:
        metrics = _train(order.recipe, group, task, own, record)
        record.write("end", status="FINISHED", reason=None, metrics=metrics)
        return Outcome("FINISHED", metrics=metrics)
    except (RunFailed, UserError) as error:
        record.write("end", status="FAILED", reason=str(error), metrics={})
        return Outcome("FAILED", str(error))
    except KeyboardInterrupt:
        record.write("end", status="KILLED", reason="interrupted", metrics={})
        raise
    finally:
        own.close()
        record.close()
        group.leave()


def _train(
    recipe: Recipe, group: WorkerGroup, task: Task, preparer: Preparer, record: Recorder
) -> dict[str, float]:
    """Train to the end, going back to the last checkpoint where the recipe's guard says so; the test
    metrics.
    """
    plan = planning.make(recipe, task)
    validation, test = (
        Evaluation(task, split, plan.examples[split], recipe.batch.micro, preparer, group)
        for split in ("validation", "test")
    )
    skipped = SkippedExamples(recipe.task.skip_bad, preparer, group)
    while True:
        with record.stage("model and optimizer"):
            state, decisions = record.resume()
            training = build(recipe, plan, task, group, preparer, state, decisions)
        record.write("start", **_circumstances(training))
        record.write("rewind", step=training.progress.step)
        try:
            _follow(training, validation, skipped, record)
            break
        except NotFinite as error:
            training.loader.close()
            _roll_back(training, error, record)
    if training.average is not None:
        training.average.reestimate_batch_norm(training)
    metrics = _evaluate(test, training, record)
    record.export(training)
    record.checkpoints.wait()
    return metrics


def _follow(training: Training, validation: Evaluation, skipped: SkippedExamples, record: Recorder) -> None:
    """Iterate the loop to its end, or to an earlier one that the recipe names."""
    recipe = training.recipe
    echo = execution = None
    if recipe.echo.factor == "auto":
        cap = min(recipe.echo.cap, training.schedule.largest_factor())
        echo = echoing.AutomaticFactor(cap, training.decisions.echo_factors)
    for step in record.profiled(steps(training)):
        if training.passes.execution is not execution:  # at first, and when memory ran out
            execution = training.passes.execution
            record.write("execution", step=step.step, **asdict(execution))
        record.write("step", **_numbers(training, step))
        skipped.after_step(record)
        if echo is not None:
            echo.after(step, training, record)
        stop, metrics = _budget_spent(training, record), None
        if training.finished or stop or (recipe.eval.every and _passed(recipe.eval.every, step, training)):
            metrics = _evaluate(validation, training, record)
            stop = _target_reached(training, metrics, record) or stop
        is_best = metrics is not None and record.checkpoints.is_among_best(metrics)
        if training.finished or stop or is_best or _save_due(recipe.checkpoint.every, step, training, record):
            record.save(training, metrics)
        if stop:
            record.write("stop", step=step.step, examples=step.examples, reason=stop)
            break
    if not training.is_finite():
        raise NotFinite("the last update made weights that are not finite; lower optimizer.lr")


def _roll_back(training: Training, error: NotFinite, record: Recorder) -> None:
    """Decide to go on from the last checkpoint at a lower rate; raise the error again if that is not to
    be.
    """
    guard = training.recipe.train.guard
    if guard.policy != "roll_back" or len(training.decisions.rate_factors) >= guard.most:
        raise error
    state, _ = record.resume()
    position = state["progress"]["position"] if state else 0
    record.decide(position, RATE_FACTOR, guard.rate_factor)


def _budget_spent(training: Training, record: Recorder) -> str | None:
    """Why the run ends here, if a budget is spent. Rank 0's clock decides for all, and the decision is
    kept.
    """
    budget = training.recipe.train.budget
    if budget.fresh and training.schedule.fresh_served(training.progress.position) >= budget.fresh:
        return f"{budget.fresh} fresh examples were served"
    if budget.minutes:
        is_late = training.group.broadcast(time.time() - record.began_at >= 60 * budget.minutes)
        if is_late:
            record.decide(training.progress.position, STOP, f"{budget.minutes:g} minutes")
            return f"{budget.minutes:g} minutes have passed"
    return None


def _target_reached(training: Training, metrics: dict[str, float], record: Recorder) -> str | None:
    """Why the run ends here, if the target metric is reached; the first time is noted exactly."""
    target = training.recipe.train.target
    if target is None:
        return None
    if target.metric not in metrics:
        raise RunFailed(f"train.target: the task has no metric {target.metric}; it has {', '.join(metrics)}")
    value = metrics[target.metric]
    if not target.reached(value):
        return None
    progress = training.progress
    record.write(
        "target",
        metric=target.metric,
        value=value,
        step=progress.step,
        examples=progress.examples,
        fresh=training.schedule.fresh_served(progress.position),
        seconds=time.time() - record.began_at,
    )
    return f"{target.metric} reached {value:.4g}"


def _evaluate(evaluation: Evaluation, training: Training, record: Recorder) -> dict[str, float]:
    """The metrics of a split, those of the averaged weights beside them."""
    metrics = evaluation.measure(training.model)
    if training.average is not None:
        averaged = evaluation.measure(training.average.model)
        metrics |= {f"average_{name}": value for name, value in averaged.items()}
    progress = training.progress
    record.write(
        "evaluation", split=evaluation.split, step=progress.step, examples=progress.examples, metrics=metrics
    )
    return metrics


def _passed(every: Interval, step: Step, training: Training) -> bool:
    """Whether this step crossed a multiple of an interval."""
    length = max(1, training.in_examples(every))
    return step.examples // length > (step.examples - step.batch) // length


def _save_due(every: SavingInterval, step: Step, training: Training, record: Recorder) -> bool:
    if every.minutes is not None:  # rank 0's clock alone decides: saving changes nothing
        return time.monotonic() - record.saved_at >= 60 * every.minutes
    return _passed(every, step, training)


def _numbers(training: Training, step: Step) -> dict[str, Any]:
    fresh = training.schedule.fresh_served(training.progress.position)
    seconds = {f"{name}_s": value for name, value in step.seconds.items()}
    return {
        "step": step.step,
        "examples": step.examples,
        "fresh": fresh,
        "passes": fresh / training.plan.examples["train"],
        "loss": step.loss,
        "learning_rate": step.learning_rate,
        "gradient_norm": step.gradient_norm,
        "loss_scale": step.loss_scale,
        "skipped": step.skipped,
        "batch": step.batch,
        **seconds,
        "step_s": sum(step.seconds.values()),
        "echo": echoing.counters(training, step),
    }


def _circumstances(training: Training) -> dict[str, Any]:
    return {
        "name": training.recipe.name,
        "workers": training.group.size,
        "device": str(training.group.device),
        "total_examples": training.plan.total_examples,
        "code_version": version("lockstep-training"),
        "torch": torch.__version__,
    }
