"""Plans and runs of recipes whose task is at hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.plan.inputs import Inputs
from trainer.plan.plan import Plan, resolve
from trainer.recipe.schema import Recipe
from trainer.worker import RunSpec


def planned(recipe: Recipe, task: Any) -> Plan:
    """The plan of a recipe with this task instead of the one that it names."""
    return resolve(recipe, Inputs.of(recipe, task))


def spec(recipe: Recipe, folder: str | Path, make_task: Callable[[], Any], **more: Any) -> RunSpec:
    """A run of a recipe with this task instead of the one that it names."""
    return RunSpec(planned(recipe, make_task()), str(folder), make_task, **more)
