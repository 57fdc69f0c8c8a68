"""Tasks with their data, loaded once for all trials that a process plans or trains."""

from __future__ import annotations

import torch

from data_echo import InlinePreparer, KeptPreparer, Preparer
from trainer.compute.evaluation import Evaluation
from trainer.compute.stacked import EXAMPLES_TOGETHER, StackedModels
from trainer.distributed.group import WorkerGroup
from trainer.plan.inputs import Inputs
from trainer.recipe.schema import Recipe


class TaskInputs:
    """The task that each recipe names with its sources, loaded once."""

    def __init__(self) -> None:
        self._known: dict[str, Inputs] = {}

    def of(self, recipe: Recipe) -> Inputs:
        """The same for all recipes with the same section `task`. RecipeError where they cannot be had."""
        task = recipe.task.model_dump_json()
        if task not in self._known:
            self._known[task] = Inputs.of(recipe)
        return self._known[task]


class SharedData:
    """A task with its data, prepared once where that is the same for all trials."""

    def __init__(self, inputs: Inputs, group: WorkerGroup) -> None:
        self.inputs, self.group = inputs, group
        self.kept = KeptPreparer(InlinePreparer(inputs.task, 0), inputs.examples)
        self._own: tuple[int, Preparer] | None = None  # of the latest seed, where nothing is kept
        self._evaluations: dict[tuple[str, int], Evaluation] = {}

    def preparer(self, recipe: Recipe) -> Preparer:
        """Prepares the examples of a trial."""
        if self.kept.arrays("train") is not None:
            return self.kept
        if self._own is None or self._own[0] != recipe.seed:
            own = InlinePreparer(self.inputs.task, recipe.seed, skip_bad=recipe.task.skip_bad > 0)
            self._own = recipe.seed, own
        return self._own[1]

    def evaluation(self, split: str, recipe: Recipe) -> Evaluation:
        """Evaluates a trial alone."""
        preparer, micro = self.preparer(recipe), recipe.evaluation_micro
        known = self._evaluations.get((split, micro))
        if known is None or known.preparer is not preparer:  # examples of another seed are others
            examples = self.inputs.examples[split]
            known = Evaluation(self.inputs.task, split, examples, micro, preparer, self.group)
            self._evaluations[split, micro] = known
        return known

    def measure(self, stack: StackedModels, split: str) -> list[dict[str, float]]:
        """The mean metrics over a split of each of some stacked trials."""
        arrays = self.kept.arrays(split)
        assert arrays is not None
        sums: dict[str, torch.Tensor] = {}
        most = max(1, EXAMPLES_TOGETHER // stack.size)
        for start in range(0, self.inputs.examples[split], most):
            block = {name: torch.as_tensor(array[start : start + most]) for name, array in arrays.items()}
            for name, pair in stack.metrics(block).items():
                sums[name] = sums.get(name, 0) + torch.stack(pair)
        means = {name: (totals / counts).tolist() for name, (totals, counts) in sums.items()}
        return [{name: values[k] for name, values in means.items()} for k in range(stack.size)]
