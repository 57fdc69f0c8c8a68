"""One run of one recipe, as every worker sees it: build or resume, iterate the loop, evaluate, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from data_echo import InlinePreparer, Preparer
from trainer.adaptive.auto_echo import AutomaticFactor
from trainer.adaptive.bad_examples import SkippedExamples
from trainer.adaptive.threads import ThreadRevision
from trainer.build import build
from trainer.compute.evaluation import Evaluation
from trainer.distributed.group import WorkerGroup
from trainer.distributed.pulse import Pulse
from trainer.errors import RunFailed, RunPaused, RunStopped, UserError, trace_of
from trainer.loop import NotFinite, Step, steps
from trainer.plan.plan import Plan
from trainer.plan.provenance import Provenance
from trainer.plan.rehearsal import unknown_metrics
from trainer.recipe.durations import Interval, SavingInterval
from trainer.recorder import Recorder
from trainer.run_folder.decisions import RATE_FACTOR, STOP
from trainer.run_folder.outcome import PAUSED, Outcome
from trainer.task import Task
from trainer.task_calls import checked
from trainer.training import Training


@dataclass(frozen=True)
class RunSpec:
    """What every worker of a run is told: made once by the driver, sent between processes."""

    plan: Plan
    folder: str
    make_task: Callable[[], Task]
    provenance: Provenance = field(default_factory=dict)
    profile: int = 0  # steps to profile; 0: none


def run_worker(spec: RunSpec, preparer: Preparer | None = None, pulse: Pulse | None = None) -> Outcome:
    """Train as one worker of the group this process belongs to; all workers return the same outcome.

    Resumes from the newest whole checkpoint in the run's folder, if there is one. Without a `preparer` the
    examples are prepared in line. A run that stops itself (RunFailed) returns a FAILED outcome: trying again
    would stop it again. Those who watch this worker ask its `pulse`.
    """
    recipe = spec.plan.recipe
    group = WorkerGroup.join(recipe.run.device)
    task = checked(spec.make_task())
    own = preparer or InlinePreparer(task, recipe.seed, skip_bad=recipe.task.skip_bad > 0)
    recorder = Recorder(Path(spec.folder), recipe.checkpoint, group, spec.provenance, spec.profile, pulse)
    try:
        metrics = _train(spec.plan, group, task, own, recorder)
        return recorder.end(Outcome("FINISHED", metrics=metrics))
    except (RunFailed, UserError) as error:
        return recorder.end(Outcome("FAILED", str(error), trace=trace_of(error)))
    except RunPaused:
        return Outcome(PAUSED)
    except RunStopped as stop:
        return recorder.end(Outcome("KILLED", str(stop)))
    except KeyboardInterrupt:
        recorder.end(Outcome("KILLED", "interrupted"))
        raise
    finally:
        own.close()
        recorder.close()
        group.leave()


def _train(
    plan: Plan, group: WorkerGroup, task: Task, preparer: Preparer, recorder: Recorder
) -> dict[str, float]:
    """Train to the end, going back to the last checkpoint where the recipe's guard says so; the test
    metrics.
    """
    recipe = plan.recipe
    block, moved = recipe.evaluation_micro, recorder.pulse.moved
    validation, test = (
        Evaluation(task, split, plan.examples[split], block, preparer, group, moved)
        for split in ("validation", "test")
    )
    skipped = SkippedExamples(recipe.task.skip_bad, preparer, group, recorder.write)
    is_tried = False
    while True:
        with recorder.phase("model and optimizer"):
            state, decisions = recorder.resume()
            training = build(plan, task, group, preparer, state, decisions)
            training.stop_asked = recorder.stop_asked
        if not is_tried:
            with training.reduction.whole(training.model):
                _try_evaluation(validation, training)
            is_tried = True
        recorder.write("start", **_circumstances(training))
        recorder.write("rewind", step=training.progress.step)
        try:
            _follow(training, validation, skipped, recorder)
            break
        except NotFinite as error:
            training.loader.close()
            _roll_back(training, error, recorder)
    if training.average is not None:
        position, micro = training.progress.position, recipe.batch.micro
        with training.reduction.whole(training.average.model):
            training.average.reestimate_batch_norm(training.forward_backward, group, position, micro)
    recorder.export(training)  # before the test, which may fail and can be repeated
    metrics = _evaluate(test, training, recorder)
    recorder.checkpoints.wait()
    return metrics


def _try_evaluation(validation: Evaluation, training: Training) -> None:
    """Evaluate a little before the first step, so that no training is lost to what only evaluation needs."""
    names = validation.rehearse(training.model)
    unknown = [
        ": ".join((key, f"{wrong}; {right}")) for key, wrong, right in unknown_metrics(training.recipe, names)
    ]
    if unknown:
        raise RunFailed("\n".join(unknown))


def _follow(training: Training, validation: Evaluation, skipped: SkippedExamples, recorder: Recorder) -> None:
    """Iterate the loop to its end, or to an earlier one that the recipe names."""
    recipe, progress = training.recipe, training.progress
    factor = _automatic_factor(training, recorder)
    threads, execution = ThreadRevision(training.group), None
    for step in recorder.profiled(steps(training)):
        if training.execution is not execution:  # at first, and when memory ran out
            execution = training.execution
            recorder.write("execution", step=step.step, **asdict(execution))
        counters = training.loader.counters()
        recorder.write("step", **_step_fields(training, step, counters))
        recorder.pulse.stepped(step.step, step.total_s)
        skipped.after_step()
        if factor is not None:
            factor.after_step(step.step, step.batch, step.busy_s, progress.position, counters)
        own = step.batch // recipe.batch.micro // training.group.size
        training.execute(threads.after_step(step.step, step.seconds["compute"], own, training.execution))
        stop, metrics = _budget_spent(training, recorder), None
        if training.finished or stop or (recipe.eval.every and _passed(recipe.eval.every, step, training)):
            metrics = _evaluate(validation, training, recorder)
            stop = _target_reached(training, metrics, recorder) or stop
        is_best = metrics is not None and recorder.checkpoints.is_among_best(metrics)
        due = (
            training.finished
            or stop
            or is_best
            or step.stop_asked
            or _save_due(recipe.checkpoint.every, step, training, recorder)
        )
        if training.group.broadcast(due) if training.reduction.saves_together else due:
            recorder.save(training, metrics)
        if step.stop_asked and not training.finished:
            recorder.checkpoints.wait()
            reason = recorder.stop_reason()
            raise RunPaused if reason is None else RunStopped(reason)
        if stop:
            recorder.write("stop", step=step.step, examples=step.examples, reason=stop)
            break
    if not training.is_finite():
        raise NotFinite("the last update made weights that are not finite; lower optimizer.lr")


def _automatic_factor(training: Training, recorder: Recorder) -> AutomaticFactor | None:
    echo = training.recipe.echo
    if echo.factor != "auto":
        return None
    before = training.decisions.echo_factors
    return AutomaticFactor(echo.cap, before, training.schedule, training.group, recorder.decide)


def _roll_back(training: Training, error: NotFinite, recorder: Recorder) -> None:
    """Decide to go on from the last checkpoint at a lower rate; raise the error again if that is not to
    be.
    """
    guard = training.recipe.train.guard
    if guard.policy != "roll_back" or len(training.decisions.rate_factors) >= guard.most:
        raise error
    state, _ = recorder.resume()
    position = state["progress"]["position"] if state else 0
    recorder.decide(position, RATE_FACTOR, guard.rate_factor)


def _budget_spent(training: Training, recorder: Recorder) -> str | None:
    """Why the run ends here, if a budget is spent. Rank 0's clock decides for all, and the decision is
    kept.
    """
    budget = training.recipe.train.budget
    if budget.fresh and training.schedule.fresh_served(training.progress.position) >= budget.fresh:
        return f"{budget.fresh} fresh examples were served"
    if budget.minutes:
        is_late = training.group.broadcast(time.time() - recorder.began_at >= 60 * budget.minutes)
        if is_late:
            recorder.decide(training.progress.position, STOP, f"{budget.minutes:g} minutes")
            return f"{budget.minutes:g} minutes have passed"
    return None


def _target_reached(training: Training, metrics: dict[str, float], recorder: Recorder) -> str | None:
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
    recorder.write(
        "target",
        metric=target.metric,
        value=value,
        step=progress.step,
        examples=progress.examples,
        fresh=training.schedule.fresh_served(progress.position),
        seconds=time.time() - recorder.began_at,
    )
    return f"{target.metric} reached {value:.4g}"


def _evaluate(evaluation: Evaluation, training: Training, recorder: Recorder) -> dict[str, float]:
    """The metrics of a split; those of the averaged weights too."""
    with training.reduction.whole(training.model):
        metrics = evaluation.measure(training.model)
    if training.average is not None:
        with training.reduction.whole(training.average.model):
            averaged = evaluation.measure(training.average.model)
        metrics |= {f"average_{name}": value for name, value in averaged.items()}
    progress = training.progress
    recorder.write(
        "evaluation", split=evaluation.split, step=progress.step, examples=progress.examples, metrics=metrics
    )
    return metrics


def _passed(every: Interval, step: Step, training: Training) -> bool:
    """Whether this step crossed a multiple of an interval."""
    length = max(1, training.in_examples(every))
    return step.examples // length > (step.examples - step.batch) // length


def _save_due(every: SavingInterval, step: Step, training: Training, recorder: Recorder) -> bool:
    if every.minutes is not None:  # rank 0's clock alone decides: saving changes nothing
        return time.monotonic() - recorder.saved_at >= 60 * every.minutes
    return _passed(every, step, training)


def _step_fields(training: Training, step: Step, counters: dict[str, float]) -> dict[str, Any]:
    """The journal's line of a step. Its `echo` is what this worker's loader has done (see
    `EchoLoader.counters`), the `factor` in force, `downstream_s`, the step's seconds per served example
    without waiting, and `idle`, the fraction of its time that it waited for examples.
    """
    schedule, position = training.schedule, training.progress.position
    fresh = schedule.fresh_served(position)
    echo = {
        **counters,
        "factor": float(schedule.factor(position - 1)),
        "downstream_s": step.busy_s / step.batch,
        "idle": step.seconds.get("wait", 0.0) / max(step.total_s, 1e-9),
    }
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
        **{f"{name}_s": value for name, value in step.seconds.items()},
        "step_s": step.total_s,
        "echo": echo,
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
