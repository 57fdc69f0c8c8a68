"""What a recipe names outside itself: the user's task and its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.errors import Problem, RecipeError, TaskError, refuse
from trainer.recipe.schema import Recipe
from trainer.task import SPLITS, Task, load
from trainer.task_calls import checked

if TYPE_CHECKING:
    from data_echo import Source


@dataclass(frozen=True)
class Inputs:
    """A task and its sources by split, none of them empty."""

    task: Task
    sources: dict[str, Source]

    @classmethod
    def of(cls, recipe: Recipe, task: Task | None = None) -> Inputs:
        """The task that a recipe names (or `task`) and its data. RecipeError where they cannot be had."""
        try:
            task = task or load(recipe.task)
        except RecipeError as error:
            raise recipe.placed(error) from error
        task = checked(task)
        return cls(task, _sources(recipe, task))

    @property
    def examples(self) -> dict[str, int]:
        """The length of each split."""
        return {split: len(source) for split, source in self.sources.items()}

    @property
    def rows_together(self) -> int:
        """Training rows that are read at one go, such as those of a row group; 1 where each is read alone."""
        source: Any = self.sources["train"]
        return source.rows_together() if hasattr(source, "rows_together") else 1

    @property
    def left_out(self) -> tuple[str, ...]:
        """A line on everything that a split's source found and does not read."""
        skipped = {split: getattr(source, "skipped", None) for split, source in self.sources.items()}
        return tuple(
            f"{split}: {line}"
            for split, lines in skipped.items()
            if isinstance(lines, tuple)
            for line in lines
        )

    def model(self, recipe: Recipe) -> Any:
        """The task's model, made without memory where it allows that, and without moving the random numbers.

        What the recipe freezes takes no part in training.
        """
        import torch

        from trainer.compute import initial_weights

        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    model = self.task.model()
            except Exception:  # a model that looks at its numbers while it is made
                try:
                    model = self.task.model()
                except TaskError as error:
                    raise RecipeError([recipe.problem("task", error.wrong, error.right)]) from error
        initial_weights.freeze(model, recipe.init.freeze)
        return model


def _sources(recipe: Recipe, task: Task) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    problems: list[Problem] = []
    cause: BaseException | None = None
    for split in SPLITS:
        try:
            sources[split] = task.source(split)
            is_empty = len(sources[split]) == 0
        except TaskError as error:
            before, cause = cause, error.__cause__ or error
            if before is None or str(cause) != str(before):  # one cause often takes all splits away
                problems.append(recipe.problem("task", error.wrong, error.right))
        else:
            if is_empty:
                wrong = f"the {split} split of {recipe.task.use} is empty"
                problems.append(recipe.problem("task", wrong, "give it examples"))
    if not problems:
        problems += _classes_apart(recipe, sources)
    try:
        refuse(problems)
    except RecipeError as error:
        raise error from cause
    return sources


def _classes_apart(recipe: Recipe, sources: dict[str, Any]) -> list[Any]:
    """A problem where a split's source numbers other classes than the training split's."""
    listed = {split: getattr(source, "classes", None) for split, source in sources.items()}
    own = {split: names for split, names in listed.items() if isinstance(names, tuple)}
    first = own.get("train")
    for split, names in own.items():
        if first is not None and names != first:
            wrong = (
                f"the {split} split of {recipe.task.use} has the classes {_few(names)}, train {_few(first)}"
            )
            return [
                recipe.problem("task", wrong, "give all splits one list, as ImageFolderSource(classes=...)")
            ]
    return []


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(map(str, names[:5])) + (f", ... ({len(names)})" if len(names) > 5 else "")
