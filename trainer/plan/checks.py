"""What a recipe contradicts in its data, its schedules and its model. Checks look; they change nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.errors import with_advice
from trainer.plan.schedules import BatchStages, LearningRate
from trainer.recipe.durations import LARGEST, Duration
from trainer.recipe.parallel import FsdpSection
from trainer.recipe.schedule import ExponentialDecay, StepDecay
from trainer.recipe.schema import Contradiction, Recipe, least_capacity
from trainer.recipe.train import StochasticAverage

if TYPE_CHECKING:
    from torch import nn

MOST_SERVED = 10**15  # examples of a run: far from the largest number that counts them
MOST_HELD = 10  # times the training data: a buffer holds examples of several passes, but not of so many
SMALLEST = 1e-30  # of learning rates: fp32 knows nothing smaller
NEVER = 1000  # an interval of so many trainings is a mistake


def data(recipe: Recipe, train_examples: int) -> Iterator[Contradiction]:
    """Batches and blocks that the training data cannot fill."""
    batch, largest = recipe.batch, max(recipe.batch.sizes)
    if largest > train_examples:
        fits = train_examples // batch.micro * batch.micro
        right = f"the largest that fits is {fits}" if fits else f"micro {batch.micro} does not fit either"
        key, verb = ("batch.size", "is") if largest == batch.size else ("batch.growth", "grows to")
        yield key, f"{verb} {largest}, and there are {train_examples} training examples", right
    if batch.shuffle.block > train_examples:
        wrong = f"is {batch.shuffle.block}, and there are {train_examples} training examples"
        yield "batch.shuffle.block", wrong, "give the rows that are read together, or 1"
    capacity = recipe.echo.capacity or 0
    most = MOST_HELD * max(train_examples, least_capacity(batch, recipe.echo))
    if capacity > most:
        wrong = f"is {capacity}, and there are {train_examples} training examples"
        yield "echo.capacity", wrong, f"the largest of use is {most}"


def length(recipe: Recipe, total: int) -> Iterator[Contradiction]:
    """A training of no example, or of more than can be counted."""
    key = f"train.{recipe.train.unit}"
    if total < 1:
        yield key, f"is {recipe.train}, less than one example", "give more"
    if total > MOST_SERVED:
        yield key, f"is {recipe.train}, more than {MOST_SERVED:.0e} examples", "give less"


def schedule(recipe: Recipe, stages: BatchStages, rate: LearningRate) -> Iterator[Contradiction]:
    """Batches that never begin, stretches that outlast training, milestones that are never met."""
    starts, total = [stage.start for stage in stages.stages], rate.total_examples
    in_turn = "let each begin after the one before it, and before the end"
    if not _are_in_turn(starts, total):
        yield "batch.growth", f"its stages begin at examples {_few(starts)} of {total}", in_turn
    yield from _stretches(recipe, rate)
    decay, average = recipe.schedule.decay, recipe.train.average
    if isinstance(decay, StepDecay):
        places = [rate.in_examples(milestone) for milestone in decay.at]
        if not _are_in_turn(places, total):
            yield "schedule.decay.at", f"its milestones are at examples {_few(places)} of {total}", in_turn
    if isinstance(average, StochasticAverage) and rate.in_examples(average.start) >= total:
        wrong = f"begins at example {rate.in_examples(average.start)} of {total}"
        yield "train.average.start", wrong, "let it begin before training ends"
    most = NEVER * max(total, rate.examples_per_epoch)
    for key, every in {"eval": recipe.eval.every, "checkpoint": recipe.checkpoint.every}.items():
        if every and every.unit != "minutes" and rate.in_examples(every) > most:
            wrong = f"is {every}, over {NEVER} times as long as training"
            yield f"{key}.every.{every.unit}", wrong, "give a length within training"
    if not SMALLEST <= rate.peak <= LARGEST:
        rule = recipe.schedule.scale.rule
        key = "optimizer.lr" if rule == "none" else "schedule.scale"
        yield (
            key,
            f"makes a rate of {rate.peak:.4g} by rule {rule}",
            f"the rate should be between {SMALLEST:g} and {LARGEST:g}",
        )


def _stretches(recipe: Recipe, rate: LearningRate) -> Iterator[Contradiction]:
    """Parts of the schedule that are longer than training, each alone and together."""
    schedule, total = recipe.schedule, rate.total_examples
    parts: dict[str, Duration | None] = {"warmup": schedule.warmup, "cooldown": schedule.cooldown}
    if isinstance(schedule.decay, ExponentialDecay):
        parts["decay.hold"] = schedule.decay.hold
        if rate.in_examples(schedule.decay.every) < 1:
            wrong = f"is {schedule.decay.every}, less than one example"
            yield f"schedule.decay.every.{schedule.decay.every.unit}", wrong, "give more"
    lengths = {key: (part, rate.in_examples(part)) for key, part in parts.items() if part is not None}
    for key, (part, examples) in lengths.items():
        if examples > total:
            wrong = f"takes {examples} of {total} examples"
            yield f"schedule.{key}.{part.unit}", wrong, "let it end before training does"
    together = sum(examples for _, examples in lengths.values())
    if together > total and all(examples <= total for _, examples in lengths.values()):
        names = " and ".join(lengths)
        yield "schedule", f"{names} take {together} of {total} examples", "let them fit into training"


def _are_in_turn(places: Sequence[int], total: int) -> bool:
    """Whether places rise and lie within training."""
    return sorted(set(places)) == list(places) and places[-1] < total


def _few(places: Sequence[int]) -> str:
    """All of a few places; of many the first and the last."""
    shown = places if len(places) <= 6 else [*places[:4], "…", places[-1]]
    return ", ".join(map(str, shown))


def model(recipe: Recipe, model: nn.Module) -> Iterator[Contradiction]:
    """Patterns that match nothing in the model, and requests that it has no use for.

    Args:
        model: with the parameters that the recipe freezes taken out of training.
    """
    from trainer.compute import activation_checkpointing

    names = [name for name, _ in model.named_parameters()]
    for key, patterns in {"zero": recipe.init.zero, "freeze": recipe.init.freeze}.items():
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                wrong = f"{pattern} matches none of the model's parameters"
                yield f"init.{key}", wrong, f"they are {', '.join(names)}"
    if not any(parameter.requires_grad for parameter in model.parameters()):
        yield "init.freeze", "leaves no parameter to train", "freeze fewer"
    wanted: list[tuple[str, bool | tuple[str, ...]]] = [("true", True)]
    if recipe.run.recompute is not True:
        wanted = [(pattern, (pattern,)) for pattern in recipe.run.recompute or ()]
    for shown, blocks in wanted:
        if not activation_checkpointing.blocks(model, blocks):
            modules = ", ".join(name for name, _ in model.named_modules() if name) or "none"
            yield "run.recompute", f"{shown} finds no block of the model", f"its modules are {modules}"
    if recipe.run.fsdp is not None:
        yield from _spread(recipe.run.fsdp, model)
    if recipe.run.channels_last and not any(parameter.dim() == 4 for parameter in model.parameters()):
        yield "run.channels_last", "is true, and the model has no convolution over images", "leave it out"


def _spread(fsdp: FsdpSection, model: nn.Module) -> Iterator[Contradiction]:
    """What cannot be spread over workers by its rows."""
    from trainer.compute import activation_checkpointing

    right = "let run.parallel be ddp"
    for name, parameter in model.named_parameters():
        if not parameter.dim() or not parameter.numel():
            wrong = f"is fsdp, and {name} of shape {tuple(parameter.shape)} has no rows"
            yield "run.parallel", wrong, f"give it a shape of one dimension, or {right}"
    for pattern in fsdp.units or ():
        if not activation_checkpointing.blocks(model, (pattern,)):
            modules = ", ".join(name for name, _ in model.named_modules() if name) or "none"
            yield "run.parallel.fsdp.units", f"{pattern} finds no module", f"the model's are {modules}"
    units = activation_checkpointing.blocks(model, fsdp.units or True)
    first: dict[nn.Parameter, tuple[str, str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), "")
        other, before = first.setdefault(parameter, (unit, name))
        if other != unit:
            wrong = f"is fsdp, and {before} and {name} are one parameter in two units"
            yield "run.parallel", wrong, f"let run.parallel.fsdp.units hold neither or both, or {right}"


def groups(recipe: Recipe, model: nn.Module) -> Iterator[Contradiction]:
    """Patterns of the optimizer's groups that match no parameter."""
    import optim

    for key in ("no_decay", "no_adapt", "lr_multipliers"):
        try:
            optim.group_parameters(model, **{key: getattr(recipe.optimizer, key)})
        except ValueError as error:
            wrong, right = with_advice(error, "give patterns of the model's parameter names")
            yield f"optimizer.{key}", wrong, right
