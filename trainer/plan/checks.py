"""What a recipe contradicts in its data, its schedules and its model. Checks look; they change nothing."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.errors import with_advice
from trainer.plan.schedules import BatchStages, LearningRate
from trainer.recipe.schema import Contradiction, Recipe

if TYPE_CHECKING:
    from torch import nn


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


def schedule(recipe: Recipe, stages: BatchStages, rate: LearningRate) -> Iterator[Contradiction]:
    """Batches that never begin, and a warm-up that outlasts training."""
    starts, total = [stage.start for stage in stages.stages], rate.total_examples
    if sorted(set(starts)) != starts or starts[-1] >= total:
        wrong = f"its stages begin at examples {', '.join(map(str, starts))} of {total}"
        yield "batch.growth", wrong, "let each begin after the one before it, and before the end"
    warmup = recipe.schedule.warmup
    if warmup and rate.warmup_examples > total:
        wrong = f"takes {rate.warmup_examples} of {total} examples"
        yield f"schedule.warmup.{warmup.unit}", wrong, "let it end before training does"


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
    if recipe.run.channels_last and not any(parameter.dim() == 4 for parameter in model.parameters()):
        yield "run.channels_last", "is true, and the model has no convolution over images", "leave it out"


def groups(recipe: Recipe, model: nn.Module) -> Iterator[Contradiction]:
    """Patterns of the optimizer's groups that match no parameter."""
    import optim

    for key in ("no_decay", "no_adapt", "lr_multipliers"):
        try:
            optim.group_parameters(model, **{key: getattr(recipe.optimizer, key)})
        except ValueError as error:
            wrong, right = with_advice(error, "give patterns of the model's parameter names")
            yield f"optimizer.{key}", wrong, right
