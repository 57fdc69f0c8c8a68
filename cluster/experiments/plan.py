"""From a sweep's file to the recipe of each of its trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import driver
from cluster.experiments.trials import Axes, Cell
from trainer.errors import Problem, RecipeError, refuse
from trainer.plan.carry import RULES, carried, has
from trainer.recipe import loader
from trainer.recipe.messages import nearest
from trainer.recipe.schema import Contradiction, Recipe
from trainer.recipe.sweep import Sweep

MOST_CELLS = 10_000
RECIPE = "recipe."  # before a key of the sweep's recipe
BASE = "base"  # the name of the one arm of a sweep without arms


@dataclass(frozen=True)
class SweepPlan:
    """A sweep with the recipe of each of its arms, at the recipe's own batch. The sweep holds its recipe's
    values, and not the path of their file.
    """

    sweep: Sweep
    arms: dict[str, Recipe]

    @property
    def first_recipe(self) -> Recipe:
        """The first arm's, which says for all where the sweep runs, is kept and tracked."""
        return next(iter(self.arms.values()))

    def strands(self) -> list[tuple[str, Axes]]:
        """What is searched independently: each arm at each value of the further axes."""
        keys = list(self.sweep.also)
        axes = [
            tuple(zip(keys, values, strict=True)) for values in itertools.product(*self.sweep.also.values())
        ]
        return [(arm, each) for arm in self.arms for each in axes]

    def cells(self) -> list[Cell]:
        """Every cell of the sweep."""
        return [Cell(arm, batch, axes) for arm, axes in self.strands() for batch in self.sweep.batches]

    def recipe(self, cell: Cell, rate: float, seed: int) -> Recipe:
        """The recipe of one trial. RecipeError where its values contradict each other."""
        base = self.arms[cell.arm]
        values = base.model_dump(mode="json")
        for key, value in cell.axes:
            put(values, key, value)
        values, _ = carried(values, cell.batch, self.sweep.carry)
        values["seed"] = seed
        values["optimizer"]["lr"] = rate
        values["schedule"]["scale"] = {"rule": "none"}
        values["eval"] = {"every": None, "micro": base.evaluation_micro}
        values["train"]["target"] = self.sweep.target.model_dump(mode="json", exclude={"evaluate"})
        if "echo.capacity" not in dict(cell.axes):  # else the smallest that shuffles at this batch
            values["echo"]["capacity"] = None
        return loader.of_values(values, f"{self.sweep.name}, {cell}")


def read(path: str | Path, overrides: Sequence[str] = ()) -> SweepPlan:
    """The sweep in the file at `path`, with `key.sub=value` overrides; `recipe.key=value` sets the recipe's.

    Raises:
        RecipeError: with every mistake, those of the arms' recipes included, each with its file and line.
        UserError: a file cannot be read, or holds a secret.
    """
    draft = loader.Draft.of(loader.text_of(path, "a sweep"), str(path))
    of_recipe = [override for override in overrides if override.startswith(RECIPE)]
    for override in overrides:
        if override not in of_recipe:
            draft.override(override)
    sweep = draft.checked(Sweep, lambda: _contradictions(draft))
    base = _base(sweep, draft, Path(path).parent)
    for override in of_recipe:
        base.override(override.removeprefix(RECIPE))
    sweep = sweep.model_copy(update={"recipe": deepcopy(base.values)})
    problems: list[Problem] = []
    arms: dict[str, Recipe] = {}
    for name in sweep.arms or {BASE: {}}:
        try:
            arms[name] = _arm(base, draft.part(f"arms.{name}"))
        except RecipeError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    refuse(problems)
    plan = SweepPlan(sweep, arms)
    refuse([*_refused_cells(plan, draft), *_idle_rules(plan, draft)])
    for arm, axes in plan.strands():
        driver.refuse_secrets(plan.recipe(Cell(arm, sweep.batches[0], axes), 1.0, 0))
    return plan


def is_sweep(path: str | Path) -> bool:
    """Whether a file is a sweep's, and not a recipe's. UserError where it cannot be read."""
    draft = loader.Draft.of(loader.text_of(path, "a recipe or a sweep"), str(path))
    return "recipe" in draft.values


def _base(sweep: Sweep, draft: loader.Draft, folder: Path) -> loader.Draft:
    """What the sweep's recipe says."""
    if isinstance(sweep.recipe, dict):
        return draft.part("recipe")
    path = folder / sweep.recipe
    return loader.Draft.of(loader.text_of(path, "a recipe"), str(path))


def _arm(base: loader.Draft, changes: loader.Draft) -> Recipe:
    """The recipe with the sections that an arm changes."""
    arm = base.copy()
    arm.lay_over(changes)
    recipe = arm.recipe()
    if recipe.batch.growth is not None:
        right = "leave it out: a sweep compares batches that stay"
        raise RecipeError([recipe.problem("batch.growth", "grows the batch", right)])
    return recipe


def _contradictions(draft: loader.Draft) -> Iterator[Contradiction]:
    """Rules that are none, axes of other than plain values, and more cells than anybody could wait for."""
    for name, rule in draft.at("carry").items():
        known = [each for each in RULES if each != "lr"]  # whose best value is what is searched for
        if name not in known:
            yield f"carry.{name}", "is nothing that follows the batch", nearest(name, known)
        elif rule not in RULES[name]:
            yield f"carry.{name}", f"is {rule}, no rule for it", nearest(rule, RULES[name])
    for key, values in draft.at("also").items():
        if isinstance(values, list) and any(isinstance(value, list | dict) for value in values):
            yield (
                f"also.{key}",
                "holds lists or sections",
                "give plain values, each key inside as its own axis",
            )
    axes = [draft.values.get("batches"), draft.values.get("arms"), *draft.at("also").values()]
    cells = math.prod(max(1, len(each)) for each in axes if isinstance(each, list | dict))
    if cells > MOST_CELLS:
        yield "batches", f"make {cells} cells with the arms and axes", f"let them be {MOST_CELLS} at most"


def _refused_cells(plan: SweepPlan, draft: loader.Draft) -> Iterator[Problem]:
    """A problem for the first cell of each strand whose recipe is wrong."""
    for arm, axes in plan.strands():
        for batch in plan.sweep.batches:
            cell = Cell(arm, batch, axes)
            try:
                plan.recipe(cell, plan.arms[arm].optimizer.hyper["lr"], 0)
            except RecipeError as error:
                told = error.problems[0]
                key = "also" if axes else "batches"
                wrong = f"makes a recipe that is refused, {cell}: {told.key} {told.wrong}"
                yield Problem(*draft.places[key], key, wrong, told.right)
                break


def _idle_rules(plan: SweepPlan, draft: loader.Draft) -> Iterator[Problem]:
    """Rules for what no arm's recipe has."""
    recipes = [base.model_dump(mode="json") for base in plan.arms.values()]
    for name in plan.sweep.carry:
        if not any(has(values, name) for values in recipes):
            key = f"carry.{name}"
            yield Problem(*draft.places[key], key, f"no arm's recipe has {name}", "leave it out")


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a recipe's key, `section.name`, to a value."""
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value
