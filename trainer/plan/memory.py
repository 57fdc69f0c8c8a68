"""What a worker needs of its memory and a run of its disk, estimated before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.plan.plan import Plan
from trainer.recipe.messages import in_bytes
from trainer.task import Task

if TYPE_CHECKING:
    from torch import Tensor, nn


MODES = ("ddp", "ddp, shard_state", "fsdp")  # of run.parallel
PURPOSE = "memory"  # of the probe's draws
PROBED_EXAMPLES = 2  # that are prepared; the micro-batch is filled with them


def rows(plan: Plan, task: Task) -> list[tuple[str, str]]:
    """The estimate for the screen: question and answer."""
    told = [("each worker", _memory(plan, task)), ("disk", _disk(plan))]
    if plan.recipe.run.most_workers > 1:
        others = [mode for mode in MODES if mode != _mode(plan)]
        told[1:1] = [(f"with parallel: {mode}", _held(plan, mode)[1]) for mode in others]
    return told


def _mode(plan: Plan) -> str:
    """How the recipe spreads the model."""
    run = plan.recipe.run
    return "fsdp" if run.fsdp else "ddp, shard_state" if run.shards_state else "ddp"


def _held(plan: Plan, parallel: str) -> tuple[int, str]:
    """Bytes that a worker holds of weights, gradients and state, and the same in words."""
    is_spread = parallel == "fsdp" and plan.recipe.run.most_workers > 1
    weights = 4 * (plan.part_numbers if is_spread else plan.parameters)
    state = plan.state_bytes if parallel == "ddp" else plan.part_state_bytes
    known = f"{in_bytes(weights)} weights + {in_bytes(weights)} gradients + {in_bytes(state)} state"
    return 2 * weights + state, f"{known} + the unit at work" if is_spread else known


def _memory(plan: Plan, task: Task) -> str:
    held, known = _held(plan, _mode(plan))
    try:
        activations = activation_bytes(plan, task)
    except Exception as error:  # the user's own code, under tensors that have no numbers
        reason = str(getattr(error, "wrong", f"{type(error).__name__}: {error}")).partition("\n")[0]
        return f"{known} + activations that could not be estimated ({reason})"
    whole = in_bytes(held + activations)
    micro = f"activations of a micro-batch of {plan.recipe.batch.micro}"
    return f"{whole} = {known} + {in_bytes(activations)} {micro}"


def _disk(plan: Plan) -> str:
    section, averages = plan.recipe.checkpoint, 1 if plan.recipe.train.average else 0
    each = 4 * plan.parameters * (1 + averages) + plan.state_bytes
    kept = section.keep + (section.best.keep if section.best else 0)
    free = shutil.disk_usage(_existing(Path(section.dir))).free
    counted = f"{kept} checkpoints of {in_bytes(each)} and one being written"
    return f"{in_bytes((kept + 1) * each)} = {counted}; {in_bytes(free)} are free"


def activation_bytes(plan: Plan, task: Task) -> int:
    """Bytes that the forward pass of one micro-batch keeps for the backward pass, counted once per storage.

    The model is made and run on tensors without numbers: neither memory nor time is spent on it. Raises
    what the task raises on them.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from trainer.compute.activation_checkpointing import checkpoint_activations
    from trainer.compute.precision import autocast

    batch, kept = _micro_batch(plan, task), {}
    computing = autocast(plan.recipe.train.precision, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.random.fork_rng(devices=[]):
        model: nn.Module = task.model()
        checkpoint_activations(model, plan.checkpointed_blocks)
        of_the_model = {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in of_the_model:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        inputs: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), computing:
            task.loss(model, inputs)
    return sum(kept.values())


def _micro_batch(plan: Plan, task: Task) -> dict[str, Tensor]:
    """A whole augmented micro-batch, made of copies of the first examples."""
    import torch

    from data_echo import Draws, InlinePreparer, PrepareRequest

    recipe, size = plan.recipe, plan.recipe.batch.micro
    preparer = InlinePreparer(task, recipe.seed)
    few = np.arange(min(PROBED_EXAMPLES, plan.examples["train"]))
    block = preparer.collect(preparer.submit(PrepareRequest("train", np.zeros_like(few), few)))
    batch = {
        name: torch.from_numpy(np.resize(array, (size, *array.shape[1:]))) for name, array in block.items()
    }
    place: Any = np.zeros(size, np.int64)
    return task.augment(batch, Draws(recipe.seed, PURPOSE, place, np.arange(size), place, device="cpu"))


def _existing(folder: Path) -> Path:
    """The nearest folder above that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())
