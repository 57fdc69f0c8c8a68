"""The plan: everything that a recipe derives, computed before the run, shown and kept with it."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.compute import initial_weights as weights
from trainer.errors import RecipeError
from trainer.plan import schedules as schedule
from trainer.plan.schedules import BatchStages
from trainer.recipe.messages import in_bytes
from trainer.recipe.schema import Contradiction, Recipe
from trainer.task import SPLITS, Task, load

if TYPE_CHECKING:
    from data_echo import Source


@dataclass(frozen=True)
class Plan:
    """A recipe resolved against its data and its model. Lengths are in examples served to the model."""

    recipe: Recipe
    examples: dict[str, int]  # by split
    stages: BatchStages
    steps: int
    total_examples: int  # the length that the schedules are stretched over
    served_examples: int  # at the end of the last step, which may go past the total
    fresh_examples: int
    peak_lr: float
    warmup_examples: int
    parameters: int
    state_bytes: int
    recomputed: tuple[str, ...]  # names of the blocks that compute their activations again
    task: Task = field(repr=False, compare=False)
    sources: dict[str, "Source"] = field(repr=False, compare=False)  # by split

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
        return self.recipe.batch.largest_workers

    @property
    def busiest_share(self) -> float:
        """The share of a step's micro-batches that its busiest worker computes, in the mean over steps."""
        return self._busiest_share(self.recipe.batch.size)

    def lines(self, more: Sequence[tuple[str, str]] = ()) -> list[str]:
        """The plan for the screen, one aligned line per question, and `more` of them."""
        rows = [*self._model_rows(), *self._batch_rows(), *self._rate_rows(), *self._data_rows()]
        rows += [*self._pass_rows(), *more]
        width = max(len(title) for title, _ in rows)
        return [f"{title:<{width}}  {text}" for title, text in rows]

    def _busiest_share(self, batch_size: int) -> float:
        batch = self.recipe.batch
        return busiest_share(batch_size // batch.micro, batch.lanes, self.recipe.run.workers)

    def _model_rows(self) -> list[tuple[str, str]]:
        recipe = self.recipe
        held, state = in_bytes(4 * self.parameters), in_bytes(self.state_bytes)
        sizes = f"{held} of weights, {state} of {recipe.optimizer.name} state"
        return [
            ("run", f"{recipe.name}: {recipe.task.use}, seed {recipe.seed}"),
            ("model", f"{self.parameters:,} parameters: {sizes}"),
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
        scaled = f" = {base} scaled from batch {scale.base_batch} by rule {scale.rule}"
        rule = "" if scale.rule == "none" else scaled
        up = f"{warmup.shape} over {self.warmup_examples:,} examples ({warmup})" if warmup else "none"
        down = f", {cooldown.shape} cool-down over the last {cooldown}" if cooldown else ""
        epochs = self.served_examples / self.examples["train"]
        return [
            ("learning rate", f"{self.peak_lr:.4g}{rule}"),
            ("warm-up", up),
            ("decay", f"{schedule.decay.shape}{down}"),
            ("steps", f"{self.steps:,}, serving {self.served_examples:,} examples ({epochs:.4g} epochs)"),
        ]

    def _pass_rows(self) -> list[tuple[str, str]]:
        """How passes are computed, where it is not as usual."""
        train, run, blocks = self.recipe.train, self.recipe.run, self.recomputed
        shown = ", ".join(blocks if len(blocks) <= 4 else [*blocks[:2], "…", blocks[-1]])
        ways = {
            f"{train.precision} autocast": train.precision != "fp32",
            "a loss scale": train.precision == "fp16",
            "compiled": run.compile,
            "channels last": run.channels_last,
            f"activations of {len(blocks)} blocks recomputed ({shown})": bool(blocks),
        }
        said = [way for way, is_so in ways.items() if is_so]
        return [("passes", ", ".join(said))] if said else []

    def _data_rows(self) -> list[tuple[str, str]]:
        echo = self.recipe.echo
        passes = self.fresh_examples / self.examples["train"]
        factor = f"1 to {echo.cap:g}" if echo.factor == "auto" else f"{echo.factor:g}"
        middle = f"echo × {factor} (of {echo.capacity:,} examples)" if echo.largest > 1 else "no echo"
        most = "at most " if echo.factor == "auto" else ""
        stages = ["pool: source, prepare", middle, "worker: augment, forward, backward"]
        if echo.at != "before_augment":
            stages = ["pool: source, prepare", "worker: augment", middle, "forward, backward"]
        return [
            ("data", ", ".join(f"{self.examples[split]:,} {split}" for split in SPLITS)),
            ("order", self._order()),
            ("fresh examples", f"{most}{self.fresh_examples:,} ({passes:.4g} passes over the training data)"),
            ("stages", " → ".join(stages)),
        ]

    def _order(self) -> str:
        """How a pass orders the rows, and what would read them at less cost."""
        shuffle, source = self.recipe.batch.shuffle, self.sources["train"]
        if shuffle.block > 1:
            among = f"{shuffle.window} blocks ({shuffle.block * shuffle.window:,} rows)"
            return f"blocks of {shuffle.block:,} rows permuted, rows shuffled among {among}"
        together = source.rows_together() if hasattr(source, "rows_together") else 1
        hint = f"; read by {together:,}: batch.shuffle.block {together} is cheaper" if together > 1 else ""
        return f"all rows permuted{hint}"


def make(recipe: Recipe, task: Task | None = None) -> Plan:
    """Resolve a recipe; RecipeError names what its task, its data or its model contradict."""
    import optim

    try:
        task = task or load(recipe.task)
    except RecipeError as error:
        raise RecipeError([recipe.problem(p.key, p.wrong, p.right) for p in error.problems]) from error
    sources = _sources(recipe, task)
    examples = {split: len(source) for split, source in sources.items()}
    n, size = examples["train"], recipe.batch.size
    total = schedule.in_examples(recipe.train, examples_per_epoch=n, total_examples=0, batch_size=size)
    rate = schedule.LearningRate(recipe, n, total)
    stages = schedule.BatchStages(recipe, n, total)
    model = _model(recipe, task)
    if recipe.init.from_ is not None:
        weights.find(recipe.init.from_, recipe.checkpoint.dir)
    refuse(
        recipe,
        [
            *_large_batches(recipe, n),
            *_large_blocks(recipe, n),
            *_idle_stages(stages, total),
            *_endless_warmup(recipe, rate),
            *_zero(recipe, model),
            *_freeze(recipe, model),
            *_idle_ways(recipe, model),
            *_idle_patterns(recipe, model),
        ],
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
        recomputed=_recomputed(model, recipe.run.recompute),
        task=task,
        sources=sources,
    )


def echo_schedule(recipe: Recipe, train_examples: int) -> Any:
    """The recipe's order and echo, as `data_echo.Schedule`."""
    from data_echo import DataError, Schedule

    batch, echo = recipe.batch, recipe.echo
    try:
        return Schedule(
            train_examples,
            batch.lanes,
            batch.micro,
            1 if echo.factor == "auto" else echo.factor,
            echo.capacity or 0,
            recipe.seed,
            whole_batches=echo.at == "batch",
            max_age=echo.max_age,
            block=batch.shuffle.block,
            window=batch.shuffle.window,
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


def refuse(recipe: Recipe, contradictions: Sequence[Contradiction]) -> None:
    """Raise RecipeError when there are any, each at the place of its key."""
    if contradictions:
        raise RecipeError([recipe.problem(*contradiction) for contradiction in contradictions])


def _sources(recipe: Recipe, task: Task) -> dict[str, "Source"]:
    """The task's data by split, none of it empty."""
    sources: dict[str, Source] = {}
    contradictions, cause = [], None
    for split in SPLITS:
        try:
            sources[split] = task.source(split)
            is_empty = len(sources[split]) == 0
        except Exception as error:
            if cause is None or str(error) != str(cause):  # one cause often takes all splits away
                contradictions.append(_raised(f"source({split!r}) of {recipe.task.use}", error))
            cause = error
        else:
            if is_empty:
                wrong = f"the {split} split of {recipe.task.use} is empty"
                contradictions.append(("task", wrong, "give it examples"))
    try:
        refuse(recipe, contradictions)
    except RecipeError as error:
        raise error from cause
    return sources


def _large_batches(recipe: Recipe, train_examples: int) -> Iterator[Contradiction]:
    batch, largest = recipe.batch, max(recipe.batch.sizes)
    if largest > train_examples:
        fits = train_examples // batch.micro * batch.micro
        right = f"the largest that fits is {fits}" if fits else f"micro {batch.micro} does not fit either"
        key, verb = ("batch.size", "is") if largest == batch.size else ("batch.growth", "grows to")
        yield key, f"{verb} {largest}, and there are {train_examples} training examples", right


def _large_blocks(recipe: Recipe, train_examples: int) -> Iterator[Contradiction]:
    block = recipe.batch.shuffle.block
    if block > train_examples:
        wrong = f"is {block}, and there are {train_examples} training examples"
        yield "batch.shuffle.block", wrong, "give the rows that are read together, or 1"


def _idle_stages(stages: BatchStages, total_examples: int) -> Iterator[Contradiction]:
    starts = [stage.start for stage in stages.stages]
    if sorted(set(starts)) != starts or starts[-1] >= total_examples:
        wrong = f"its stages begin at examples {', '.join(map(str, starts))} of {total_examples}"
        yield "batch.growth", wrong, "let each begin after the one before it, and before the end"


def _endless_warmup(recipe: Recipe, rate: schedule.LearningRate) -> Iterator[Contradiction]:
    warmup = recipe.schedule.warmup
    if warmup and rate.warmup_examples > rate.total_examples:
        wrong = f"takes {rate.warmup_examples} of {rate.total_examples} examples"
        yield f"schedule.warmup.{warmup.unit}", wrong, "let it end before training does"


def _freeze(recipe: Recipe, model: Any) -> Iterator[Contradiction]:
    """Freeze what the recipe freezes, and name the patterns that freeze nothing or everything."""
    for pattern in recipe.init.freeze:
        if not weights.freeze(model, pattern):
            names = ", ".join(name for name, _ in model.named_parameters())
            yield "init.freeze", f"{pattern} matches none of the model's parameters", f"they are {names}"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield "init.freeze", "leaves no parameter to train", "freeze fewer"


def _zero(recipe: Recipe, model: Any) -> Iterator[Contradiction]:
    """Patterns that let nothing start at zero."""
    for pattern in recipe.init.zero:
        if not weights.zero(model, pattern):
            names = ", ".join(name for name, _ in model.named_parameters())
            yield "init.zero", f"{pattern} matches none of the model's parameters", f"they are {names}"


def _idle_ways(recipe: Recipe, model: Any) -> Iterator[Contradiction]:
    """What is asked of forward and backward passes that the model has no use for."""
    wanted = recipe.run.recompute
    for shown, pattern in [("true", True)] if wanted is True else [(p, (p,)) for p in wanted or ()]:
        if not _recomputed(model, pattern):
            names = ", ".join(name for name, _ in model.named_modules() if name) or "none"
            yield "run.recompute", f"{shown} finds no block of the model", f"its modules are {names}"
    if recipe.run.channels_last and not any(parameter.dim() == 4 for parameter in model.parameters()):
        yield "run.channels_last", "is true, and the model has no convolution over images", "leave it out"


def _recomputed(model: Any, wanted: bool | Sequence[str]) -> tuple[str, ...]:
    from trainer.compute import activation_checkpointing as recomputing  # brings torch

    return tuple(recomputing.blocks(model, wanted))


def _idle_patterns(recipe: Recipe, model: Any) -> Iterator[Contradiction]:
    """Patterns of the optimizer's groups that match no parameter."""
    import optim

    for key in ("no_decay", "no_adapt", "lr_multipliers"):
        try:
            optim.group_parameters(model, **{key: getattr(recipe.optimizer, key)})
        except ValueError as error:
            wrong, _, right = str(error).partition("; ")
            yield f"optimizer.{key}", wrong, right or "give patterns of the model's parameter names"


def _model(recipe: Recipe, task: Task) -> Any:
    """The task's model, made without memory where it allows that, and without moving the random numbers."""
    import torch

    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return task.model()
        except Exception:  # a model that looks at its numbers while it is made
            try:
                return task.model()
            except Exception as error:
                contradiction = _raised(f"model() of {recipe.task.use}", error)
                raise RecipeError([recipe.problem(*contradiction)]) from error


def _raised(where: str, error: Exception) -> Contradiction:
    """An error of the task's, which may say itself what would be right, after a semicolon."""
    wrong, _, right = str(error).partition("; ")
    return "task", f"{where} raised {type(error).__name__}: {wrong}", right or "mend the task"
