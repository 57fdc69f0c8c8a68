"""Evaluation of a run that was trained, in this process."""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.recipe import loader
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.journal import Journal, read
from trainer.run_folder.outcome import Outcome

if TYPE_CHECKING:
    from trainer.plan.inputs import Inputs


def evaluate(folder: Path, split: str) -> list[str]:
    """Measure the metrics of a split with a run's trained weights (and their average), or with those of its
    newest checkpoint; note them in its journal, and return them as lines.

    A run that trained to its end and failed in its test is finished by a test that succeeds.

    Raises:
        UserError: it has no weights, or it is being trained.
        RunFailed: the task fails on the split.
    """
    with layout.locked(folder):
        recipe = loader.read(folder / layout.RECIPE)
        from trainer.plan.inputs import Inputs
        from trainer.run_folder.checkpoints import Checkpoints

        inputs = Inputs.of(recipe)
        weights: Path | None = folder / layout.MODEL
        is_trained = (folder / layout.MODEL).is_file()
        if not is_trained:
            weights = Checkpoints(folder / layout.CHECKPOINTS, keep=1).newest_whole()
        if weights is None:
            raise UserError(f"{folder}: has no trained weights and no whole checkpoint; resume it first")
        metrics = _measured(recipe, inputs, split, weights)
        if is_trained and (folder / layout.AVERAGE).is_file():
            averaged = _measured(recipe, inputs, split, folder / layout.AVERAGE)
            metrics |= {f"average_{name}": value for name, value in averaged.items()}
        _note(folder, split, metrics, is_trained)
    lines = [f"  {name} {value:.6g}" for name, value in metrics.items()]
    return [f"{split}, with {layout.relative_to_cwd(weights)}:", *lines]


def _measured(recipe: Recipe, inputs: "Inputs", split: str, weights: Path) -> dict[str, float]:
    from data_echo import InlinePreparer
    from trainer.compute import initial_weights
    from trainer.compute.evaluation import Evaluation
    from trainer.distributed.group import WorkerGroup

    task, group = inputs.task, WorkerGroup.join(recipe.run.device)
    model = task.model()
    initial_weights.put(weights, model)
    preparer = InlinePreparer(task, recipe.seed, skip_bad=recipe.task.skip_bad > 0)
    evaluation = Evaluation(task, split, inputs.examples[split], recipe.evaluation_micro, preparer, group)
    return evaluation.measure(model.to(group.device))


def _note(folder: Path, split: str, metrics: dict[str, float], is_trained: bool) -> None:
    """Write what the run would have written, had the evaluation been part of it. The end stays last."""
    before, last = Outcome.read(folder), {"step": 0, "examples": 0}
    for line in read(folder):
        if line["kind"] == "step":
            last = {"step": line["step"], "examples": line["examples"]}
    journal = Journal(folder)
    journal.write("evaluation", split=split, metrics=metrics, **last)
    if before is not None:
        is_finished_now = is_trained and split == "test"
        (Outcome("FINISHED", metrics=metrics) if is_finished_now else before).write(journal)
    journal.close()
