"""What the user's task gives for a few examples of each split, tried before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.errors import Problem, RecipeError, TaskError, refuse, with_advice
from trainer.plan.plan import Plan
from trainer.recipe.messages import in_bytes, nearest
from trainer.recipe.schema import Contradiction, Recipe
from trainer.task import SPLITS, Task
from trainer.task_calls import described, shapes

if TYPE_CHECKING:
    from torch import Tensor, nn

PURPOSE = "rehearsal"  # of its draws
FEW = 4  # examples of each split, evenly spread
LARGEST_MODEL = 2 << 30  # bytes of weights that are worth making for it


def rows(plan: Plan, task: Task) -> list[tuple[str, str]]:
    """For each split what prepare, augment, loss and metrics return. RecipeError with all that goes wrong."""
    import torch

    told: list[tuple[str, str]] = []
    problems: dict[str, Problem] = {}  # by what is wrong: one cause often takes all splits away
    model = None
    with torch.random.fork_rng(devices=[]):
        for split in SPLITS:
            try:
                if model is None and 4 * plan.parameters <= LARGEST_MODEL:
                    model = task.model()
                steps = dict(_steps(plan, task, split, model))
            except Exception as error:
                problem = _problem(plan.recipe, split, error)
                problems.setdefault(problem.wrong.removeprefix(f"{split}: "), problem)
            else:
                told.append((split, "; ".join(f"{step}: {text}" for step, text in steps.items())))
    refuse(list(problems.values()))
    return told


def unknown_metrics(recipe: Recipe, names: Collection[str]) -> Iterator[Contradiction]:
    """Metrics that the recipe wants and the task has not; `names` are those of one evaluation."""
    known = [*names, *(f"average_{name}" for name in names if recipe.train.average)]
    wanted = {"train.target": recipe.train.target, "checkpoint.best": recipe.checkpoint.best}
    for key, section in wanted.items():
        if section is not None and section.metric not in known:
            wrong = f"is {section.metric}, and the task measures {', '.join(known)}"
            yield f"{key}.metric", wrong, nearest(section.metric, known)


def _steps(plan: Plan, task: Task, split: str, model: nn.Module | None) -> Iterator[tuple[str, str]]:
    import torch

    batch, place = _prepared(plan, task, split)
    yield "prepare", shapes(batch)
    if split == "train":
        batch = task.augment(batch, place)
        yield "augment", shapes(batch)
    if model is None:
        yield "model", f"not run here: {in_bytes(4 * plan.parameters)} of weights"
    elif split == "train":
        yield "loss", _pair(task.loss(model.train(), batch))
    else:
        with torch.inference_mode():
            metrics: dict[str, Any] = dict(task.metrics(model.eval(), batch))
            if "loss" not in metrics:
                metrics["loss"] = task.loss(model, batch)
        refuse([plan.recipe.problem(*told) for told in unknown_metrics(plan.recipe, metrics)])
        yield "metrics", ", ".join(f"{name} {_pair(pair)}" for name, pair in metrics.items())


def _prepared(plan: Plan, task: Task, split: str) -> tuple[dict[str, Tensor], Any]:
    """A few examples of a split, prepared, and the draws for their augmentation."""
    import torch

    from data_echo import Draws, InlinePreparer, PrepareRequest

    recipe = plan.recipe
    preparer = InlinePreparer(task, recipe.seed, skip_bad=recipe.task.skip_bad > 0)
    few = np.unique(np.linspace(0, plan.examples[split] - 1, FEW).astype(np.int64))
    block = preparer.collect(preparer.submit(PrepareRequest(split, np.zeros_like(few), few)))
    size = min(FEW, recipe.batch.micro)
    batch = {
        name: torch.from_numpy(np.resize(array, (size, *array.shape[1:]))) for name, array in block.items()
    }
    place = np.zeros(size, np.int64)
    return batch, Draws(recipe.seed, PURPOSE, place, np.arange(size), place, device="cpu")


def _pair(pair: Any) -> str:
    return f"({', '.join(map(described, pair))})"


def _problem(recipe: Recipe, split: str, error: Exception) -> Problem:
    if isinstance(error, RecipeError):
        return error.problems[0]
    wrong, right = with_advice(error, "fix the task")
    kind = "" if isinstance(error, TaskError) or hasattr(error, "trace") else f"{type(error).__name__}: "
    return recipe.problem("task", f"{split}: {kind}{wrong.removeprefix(f'{split}: ')}", right)
