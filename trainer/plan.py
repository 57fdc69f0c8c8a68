"""The plan: everything that a recipe derives, computed before the run, shown and kept with it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer import schedule
from trainer.errors import Problem, RecipeError
from trainer.recipe import Recipe
from trainer.task import SPLITS, Task, load


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against its data and its model. Lengths are in examples served to the model."""

    recipe: Recipe
    examples: dict[str, int]  # by split
    steps: int
    total_examples: int  # of the schedules; the last step may go past it
    fresh_examples: int
    peak_lr: float
    warmup_examples: int
    parameters: int
    state_bytes: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step, K."""
        return self.recipe.batch.size // self.recipe.batch.micro

    def micro_batches_at(self, served: int) -> int:
        """Micro-batches of the step that follows `served` examples."""
        return self.micro_batches

    @property
    def served_examples(self) -> int:
        """Examples served at the end of the last step."""
        return self.steps * self.recipe.batch.size

    @property
    def largest_workers(self) -> int:
        """The most workers that each have something to do in every step."""
        return min(self.micro_batches, self.recipe.batch.lanes)

    @property
    def busiest_share(self) -> float:
        """The share of a step's micro-batches that its busiest worker computes, in the mean over steps."""
        return busiest_share(self.micro_batches, self.recipe.batch.lanes, self.recipe.run.workers)

    def lines(self) -> list[str]:
        """The plan for the screen, one aligned line per question."""
        rows = [*self._batch_rows(), *self._schedule_rows(), *self._data_rows()]
        width = max(len(title) for title, _ in rows)
        return [f"{title:<{width}}  {text}" for title, text in rows]

    def _batch_rows(self) -> list[tuple[str, str]]:
        batch, run = self.recipe.batch, self.recipe.run
        return [
            ("run", f"{self.recipe.name}: {self.recipe.task.use}, seed {self.recipe.seed}"),
            ("model", f"{self.parameters:,} parameters; {_bytes(4 * self.parameters)} of weights"),
            ("optimizer", f"{self.recipe.optimizer.name}; {_bytes(self.state_bytes)} of state per worker"),
            (
                "batch",
                f"{batch.size:,} = {self.micro_batches} micro-batches of {batch.micro}; {batch.lanes} lanes",
            ),
            (
                "workers",
                f"{run.workers} of at most {self.largest_workers}; "
                f"the busiest computes {self.busiest_share:.0%} of each step",
            ),
        ]

    def _schedule_rows(self) -> list[tuple[str, str]]:
        scale, warmup = self.recipe.schedule.scale, self.recipe.schedule.warmup
        base = f"{self.recipe.optimizer.hyper['lr']:g}"
        rule = (
            f" = {base} scaled from batch {scale.base_batch} by rule {scale.rule}" if scale.base_batch else ""
        )
        way = f"{warmup.shape} over {self.warmup_examples:,} examples ({warmup})" if warmup else "none"
        epochs = self.served_examples / self.examples["train"]
        return [
            ("learning rate", f"{self.peak_lr:.4g}{rule}"),
            ("warm-up", way),
            ("decay", self.recipe.schedule.decay.shape),
            ("steps", f"{self.steps:,}, serving {self.served_examples:,} examples ({epochs:.4g} epochs)"),
        ]

    def _data_rows(self) -> list[tuple[str, str]]:
        echo = self.recipe.echo
        sizes = ", ".join(f"{self.examples[split]:,} {split}" for split in SPLITS)
        passes = self.fresh_examples / self.examples["train"]
        before, after = "source and prepare (pool)", "augment, forward and backward (worker)"
        middle = f"echo × {echo.factor:g}" if echo.factor > 1 else "no echo"
        return [
            ("data", sizes),
            ("fresh examples", f"{self.fresh_examples:,} ({passes:.4g} passes over the training data)"),
            ("stages", f"{before} → {middle} → {after}"),
        ]


def make(recipe: Recipe, task: Task | None = None) -> Plan:
    """Resolve a recipe; RecipeError names what its task, its data or its model contradict."""
    import optim

    try:
        task = task or load(recipe.task)
    except RecipeError as error:
        raise RecipeError([recipe.problem(p.key, p.wrong, p.right) for p in error.problems]) from error
    examples = _count_examples(recipe, task)
    n = examples["train"]
    _refuse_large_batch(recipe, n)
    parameters = _parameters(recipe, task)
    total = schedule.in_examples(
        recipe.train, examples_per_epoch=n, total_examples=0, batch_size=recipe.batch.size
    )
    steps = math.ceil(total / recipe.batch.size)
    rate = schedule.LearningRate(recipe, n, total)
    return Plan(
        recipe=recipe,
        examples=examples,
        steps=steps,
        total_examples=total,
        fresh_examples=echo_schedule(recipe, n).fresh_served(
            steps * (recipe.batch.size // recipe.batch.micro)
        ),
        peak_lr=rate.peak,
        warmup_examples=rate.warmup_examples,
        parameters=sum(p.numel() for p in parameters),
        state_bytes=optim.state_bytes(recipe.optimizer.name, parameters, **recipe.optimizer.hyper),
    )


def echo_schedule(recipe: Recipe, train_examples: int) -> Any:
    """The recipe's order and echo, as `data_echo.Schedule`."""
    from data_echo import DataError, Schedule

    try:
        return Schedule(
            examples=train_examples,
            lanes=recipe.batch.lanes,
            micro=recipe.batch.micro,
            factor=recipe.echo.factor,
            capacity=recipe.echo.capacity,
            seed=recipe.seed,
        )
    except DataError as error:
        wrong, _, right = str(error).partition("; ")
        raise RecipeError([recipe.problem("echo", wrong, right)]) from error


def busiest_share(micro_batches: int, lanes: int, workers: int) -> float:
    """Mean over steps of the largest share that one worker has of a step's micro-batches.

    Micro-batch j is lane j mod lanes, and lane l belongs to worker l mod workers.
    """
    steps = lanes // math.gcd(micro_batches, lanes)  # after these the pattern repeats
    largest = 0
    for step in range(steps):
        first = step * micro_batches
        owners = Counter(j % lanes % workers for j in range(first, first + micro_batches))
        largest += max(owners.values())
    return largest / (steps * micro_batches)


def _count_examples(recipe: Recipe, task: Task) -> dict[str, int]:
    examples, problems = {}, []
    for split in SPLITS:
        try:
            examples[split] = len(task.source(split))
        except Exception as error:
            problems.append(_raised(recipe, f"source({split!r})", error))
            continue
        if examples[split] == 0:
            problems.append(recipe.problem("task", f"the {split} split is empty", "give it examples"))
    if problems:
        raise RecipeError(problems)
    return examples


def _refuse_large_batch(recipe: Recipe, train_examples: int) -> None:
    if recipe.batch.size > train_examples:
        largest = train_examples // recipe.batch.micro * recipe.batch.micro
        right = (
            f"the largest that fits is {largest}"
            if largest
            else f"micro {recipe.batch.micro} does not fit either"
        )
        wrong = f"is {recipe.batch.size}, and the training data has {train_examples} examples"
        raise RecipeError([recipe.problem("batch.size", wrong, right)])


def _parameters(recipe: Recipe, task: Task) -> list[Any]:
    """The trainable parameters of the task's model, made without memory where the model allows it."""
    import torch

    try:
        try:
            with torch.device("meta"):
                model = task.model()
        except Exception:  # a model that looks at its numbers while it is made
            model = task.model()
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    except Exception as error:
        raise RecipeError([_raised(recipe, "model()", error)]) from error


def _raised(recipe: Recipe, where: str, error: Exception) -> Problem:
    wrong = f"{where} of {recipe.task.use} raised {type(error).__name__}: {error}"
    return recipe.problem("task", wrong, "mend the task or its arguments")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
