"""One run of one recipe, as every worker sees it: build or resume, iterate the loop, evaluate, save, write
the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_echo import InlinePreparer, Preparer
from trainer import plan as planning
from trainer.checkpoint import Checkpoints, load
from trainer.errors import Refusal, Stopped
from trainer.evaluation import Evaluation
from trainer.group import Group
from trainer.journal import Journal
from trainer.loop import Step, steps
from trainer.recipe import Interval, Recipe, SavingInterval
from trainer.schedule import in_examples
from trainer.task import Task
from trainer.training import Training, build


@dataclass(frozen=True)
class RunOrder:
    """What every worker of a run is told. It travels between processes."""

    recipe: Recipe
    folder: str
    make_task: Callable[[], Task]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: FINISHED with the test metrics, or FAILED with the reason."""

    status: str
    reason: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run_worker(order: RunOrder, preparer: Preparer | None = None) -> Outcome:
    """Train as one worker of the group this process belongs to; all workers return the same outcome.

    Goes on from the newest whole checkpoint in the run's folder, if there is one. Without a `preparer` the
    examples are prepared in line. A run that stops itself (Stopped) returns a FAILED outcome: trying again
    would stop it again.
    """
    recipe = order.recipe
    group = Group.join(recipe.run.device)
    task = order.make_task()
    own = InlinePreparer(task, recipe.seed) if preparer is None else preparer
    record = Record(order, group)
    try:
        return _train(order, group, task, own, record)
    except (Stopped, Refusal) as error:
        record.write("end", status="FAILED", reason=str(error), metrics={})
        return Outcome("FAILED", str(error))
    except KeyboardInterrupt:
        record.write("end", status="KILLED", reason="interrupted", metrics={})
        raise
    finally:
        own.close()
        record.close()
        group.leave()


class Record:
    """What rank 0 writes down of a run: the journal and the checkpoints. On other ranks it does nothing."""

    def __init__(self, order: RunOrder, group: Group):
        self.writes = group.rank == 0
        self.folder = Path(order.folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", order.recipe.checkpoint.keep)
        self.journal = Journal(self.folder) if self.writes else None
        self.saved_step, self.saved_at = 0, time.monotonic()

    def write(self, kind: str, **fields: Any) -> None:
        if self.journal is not None:
            self.journal.write(kind, **fields)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long a stage of the start took."""
        started = time.monotonic()
        yield
        self.write("stage", name=name, seconds=time.monotonic() - started)

    def save(self, training: Training) -> None:
        """A checkpoint of where `training` stands, written beside the loop."""
        progress = training.progress
        if not self.writes or self.saved_step == progress.step:
            return
        path = self.checkpoints.save(progress.step, training.state())
        self.saved_step, self.saved_at = progress.step, time.monotonic()
        self.write("checkpoint", step=progress.step, examples=progress.examples, path=str(path))

    def close(self) -> None:
        self.checkpoints.wait()
        if self.journal is not None:
            self.journal.close()


def _train(order: RunOrder, group: Group, task: Task, preparer: Preparer, record: Record) -> Outcome:
    recipe = order.recipe
    plan = planning.make(recipe, task)
    with record.stage("model and optimizer"):
        training = build(recipe, plan, task, group, preparer, _resume(record, group))
    validation, test = (
        Evaluation(task, split, plan.examples[split], recipe.batch.micro, preparer, group)
        for split in ("validation", "test")
    )
    record.write("start", **_circumstances(training))
    record.write("rewind", step=training.progress.step)
    for step in steps(training):
        record.write("step", **_numbers(training, step))
        if training.finished or (recipe.eval.every and _passed(recipe.eval.every, step, training)):
            _evaluate(validation, training, record)
        if training.finished or _save_due(recipe.checkpoint.every, step, training, record):
            record.save(training)
    metrics = _evaluate(test, training, record)
    if record.writes:
        save_file(_exported(training), record.folder / "model.safetensors")
    record.checkpoints.wait()
    record.write("end", status="FINISHED", reason=None, metrics=metrics)
    return Outcome("FINISHED", metrics=metrics)


def _resume(record: Record, group: Group) -> dict[str, Any] | None:
    """The newest whole checkpoint's state, the same on every worker; None for a run that starts."""
    newest = group.share(record.checkpoints.newest_whole() if group.rank == 0 else None)
    return None if newest is None else load(newest)


def _evaluate(evaluation: Evaluation, training: Training, record: Record) -> dict[str, float]:
    metrics = evaluation.measure(training.model)
    progress = training.progress
    record.write(
        "evaluation", split=evaluation.split, step=progress.step, examples=progress.examples, metrics=metrics
    )
    return metrics


def _passed(every: Interval, step: Step, training: Training) -> bool:
    """Whether this step crossed a multiple of an interval."""
    length = in_examples(
        every,
        examples_per_epoch=training.plan.examples["train"],
        total_examples=training.plan.total_examples,
        batch_size=training.recipe.batch.size,
    )
    return step.examples // max(1, length) > (step.examples - step.batch) // max(1, length)


def _save_due(every: SavingInterval, step: Step, training: Training, record: Record) -> bool:
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
        "batch": step.batch,
        **seconds,
        "step_s": sum(step.seconds.values()),
        "echo": training.feed.counters(),
    }


def _circumstances(training: Training) -> dict[str, Any]:
    return {
        "name": training.recipe.name,
        "workers": training.group.size,
        "device": str(training.group.device),
        "execution": asdict(training.passes.execution),
        "total_examples": training.plan.total_examples,
        "code_version": version("lockstep-training"),
        "torch": torch.__version__,
    }


def _exported(training: Training) -> dict[str, torch.Tensor]:
    """The model's tensors, each with storage of its own as safetensors wants it."""
    return {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in training.model.state_dict().items()
    }
