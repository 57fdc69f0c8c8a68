"""The plan: everything that a recipe derives, computed before the run, shown and kept with it."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from trainer import schedule
from trainer.errors import Problem, RecipeError
from trainer.recipe import Recipe
from trainer.schedule import Stages
from trainer.task import SPLITS, Task, load


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against its data and its model. Lengths are in examples served to the model."""

    recipe: Recipe
    examples: dict[str, int]  # by split
    stages: Stages
    steps: int
    total_examples: int  # the length that the schedules are stretched over
    served_examples: int  # at the end of the last step, which may go past the total
    fresh_examples: int
    peak_lr: float
    warmup_examples: int
    parameters: int
    state_bytes: int

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step at `batch.size`, K."""
        return self.recipe.batch.size // self.recipe.batch.micro

    def micro_batches_at(self, served: int) -> int:
        """Micro-batches of the step that follows `served` examples."""
        return self.stages.at(served).batch_size // self.recipe.batch.micro

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches of the largest step."""
        return max(self.recipe.batch.sizes) // self.recipe.batch.micro

    @property
    def largest_workers(self) -> int:
        """The most workers that each have something to do in every step."""
        return min(min(self.recipe.batch.sizes) // self.recipe.batch.micro, self.recipe.batch.lanes)

    @property
    def busiest_share(self) -> float:
        """The share of a step's micro-batches that its busiest worker computes, in the mean over steps."""
        return self._busiest_share(self.recipe.batch.size)

    def lines(self) -> list[str]:
        """The plan for the screen, one aligned line per question."""
        rows = [*self._model_rows(), *self._batch_rows(), *self._rate_rows(), *self._data_rows()]
        width = max(len(title) for title, _ in rows)
        return [f"{title:<{width}}  {text}" for title, text in rows]

    def _busiest_share(self, batch_size: int) -> float:
        batch = self.recipe.batch
        return busiest_share(batch_size // batch.micro, batch.lanes, self.recipe.run.workers)

    def _model_rows(self) -> list[tuple[str, str]]:
        rule, weights, state = (
            self.recipe.optimizer.name,
            _bytes(4 * self.parameters),
            _bytes(self.state_bytes),
        )
        return [
            ("run", f"{self.recipe.name}: {self.recipe.task.use}, seed {self.recipe.seed}"),
            ("model", f"{self.parameters:,} parameters: {weights} of weights, {state} of {rule} state"),
        ]

    def _batch_rows(self) -> list[tuple[str, str]]:
        batch, workers = self.recipe.batch, self.recipe.run.workers
        pieces = f"{self.micro_batches} micro-batches of {batch.micro}, dealt to {batch.lanes} lanes"
        share = "" if batch.growth else f"; the busiest computes {self.busiest_share:.0%} of each step"
        rows = [
            ("batch", f"{batch.size:,} = {pieces}"),
            ("workers", f"{workers} of at most {self.largest_workers}{share}"),
        ]
        if batch.growth:
            shares = [
                f"{stage.batch_size:,} from {stage.start:,} on ({self._busiest_share(stage.batch_size):.0%})"
                for stage in self.stages.stages
            ]
            shown = shares if len(shares) <= 4 else [*shares[:2], "…", shares[-1]]
            rows.append(("batch growth", f"{', '.join(shown)}; the share is the busiest worker's"))
        return rows

    def _rate_rows(self) -> list[tuple[str, str]]:
        schedule = self.recipe.schedule
        scale, warmup, cooldown = schedule.scale, schedule.warmup, schedule.cooldown
        base = f"{self.recipe.optimizer.hyper['lr']:g}"
        rule = (
            f" = {base} scaled from batch {scale.base_batch} by rule {scale.rule}"
            if scale.rule != "none"
            else ""
        )
        up = f"{warmup.shape} over {self.warmup_examples:,} examples ({warmup})" if warmup else "none"
        down = f", {cooldown.shape} cool-down over the last {cooldown}" if cooldown else ""
        epochs = self.served_examples / self.examples["train"]
        return [
            ("learning rate", f"{self.peak_lr:.4g}{rule}"),
            ("warm-up", up),
            ("decay", f"{schedule.decay.shape}{down}"),
            ("steps", f"{self.steps:,}, serving {self.served_examples:,} examples ({epochs:.4g} epochs)"),
        ]

    def _data_rows(self) -> list[tuple[str, str]]:
        echo = self.recipe.echo
        passes = self.fresh_examples / self.examples["train"]
        middle = f"echo × {echo.factor:g} (of {echo.capacity:,} examples)" if echo.factor > 1 else "no echo"
        return [
            ("data", ", ".join(f"{self.examples[split]:,} {split}" for split in SPLITS)),
            ("fresh examples", f"{self.fresh_examples:,} ({passes:.4g} passes over the training data)"),
            ("stages", f"pool: source, prepare → {middle} → worker: augment, forward, backward"),
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
    _refuse_large_batches(recipe, n)
    parameters = _parameters(recipe, task)
    size = recipe.batch.size
    total = schedule.in_examples(recipe.train, examples_per_epoch=n, total_examples=0, batch_size=size)
    rate = schedule.LearningRate(recipe, n, total)
    stages = schedule.Stages(recipe, n, total)
    _refuse_idle_stages(recipe, stages, total)
    steps, served = stages.steps(total)
    return Plan(
        recipe=recipe,
        examples=examples,
        stages=stages,
        steps=steps,
        total_examples=total,
        served_examples=served,
        fresh_examples=echo_schedule(recipe, n).fresh_served(served // recipe.batch.micro),
        peak_lr=rate.peak,
        warmup_examples=rate.warmup_examples,
        parameters=sum(parameter.numel() for parameter in parameters),
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


def _refuse_large_batches(recipe: Recipe, train_examples: int) -> None:
    batch, largest = recipe.batch, max(recipe.batch.sizes)
    if largest > train_examples:
        fits = train_examples // batch.micro * batch.micro
        right = f"the largest that fits is {fits}" if fits else f"micro {batch.micro} does not fit either"
        key, wrong = ("batch.size", "is") if largest == batch.size else ("batch.growth", "grows to")
        wrong = f"{wrong} {largest}, and there are {train_examples} training examples"
        raise RecipeError([recipe.problem(key, wrong, right)])


def _refuse_idle_stages(recipe: Recipe, stages: Stages, total_examples: int) -> None:
    starts = [stage.start for stage in stages.stages]
    if sorted(set(starts)) != starts or starts[-1] >= total_examples:
        wrong = f"its stages begin at examples {', '.join(map(str, starts))} of {total_examples}"
        right = "let each begin after the one before it, and before the end"
        raise RecipeError([recipe.problem("batch.growth", wrong, right)])


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
