"""The trained model as others use it: in evaluation mode on the CPU, with an example of what it takes."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from data_echo import InlinePreparer, PrepareRequest
from trainer import task
from trainer.recipe.schema import Recipe

EXAMPLES = 2  # one would let torch.export take the batch for a constant


def trained_model(folder: Path, recipe: Recipe) -> tuple[nn.Module, tuple[np.ndarray, ...]]:
    """A finished run's model, and the arrays that the task's loss hands to it for two validation examples.

    Raises:
        ValueError: the model takes something else than tensors.
    """
    its_task = task.load(recipe.task)
    model = its_task.model().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    taken: list[tuple] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: taken.append((args, kwargs)), with_kwargs=True
    )
    with torch.inference_mode():
        its_task.loss(model, _batch(its_task, recipe.seed))
    hook.remove()
    arguments, named = taken[0]
    if named or not arguments or not all(isinstance(value, torch.Tensor) for value in arguments):
        raise ValueError("its forward takes something else than tensors by position")
    return model, tuple(value.numpy() for value in arguments)


def _batch(its_task: task.Task, seed: int) -> dict[str, torch.Tensor]:
    preparer = InlinePreparer(its_task, seed)
    index = np.arange(EXAMPLES)
    block = preparer.collect(preparer.submit(PrepareRequest("validation", np.zeros_like(index), index)))
    preparer.close()
    return {name: torch.as_tensor(value) for name, value in block.items()}
