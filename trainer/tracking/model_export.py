"""The trained model as others use it: a graph of torch.export's, which loads without pickle or the task."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from data_echo import InlinePreparer, PrepareRequest
from trainer import task
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout

READY = "READY"  # what MLflow calls a model whose upload is complete
EXAMPLES = 2  # one would let torch.export take the batch for a constant


def trained_model(folder: Path, recipe: Recipe) -> tuple[nn.Module, tuple[np.ndarray, ...]]:
    """A finished run's model, and the arrays that the task's loss hands to it for two validation examples.

    Raises:
        ValueError: the model takes something else than tensors.
    """
    its_task = task.load(recipe.task)
    model = its_task.model().eval()
    model.load_state_dict(load_file(folder / layout.MODEL))
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


def logged_before(client: Any, run_id: str) -> bool:
    """Whether a run has its model. What an interrupted upload left of one is deleted."""
    experiment_id = client.get_run(run_id).info.experiment_id
    models = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'")
    whole = [model for model in models if str(model.status) == READY]
    for model in models:
        if model not in whole[:1]:
            client.delete_logged_model(model.model_id)
    return bool(whole)


def _batch(its_task: task.Task, seed: int) -> dict[str, torch.Tensor]:
    preparer = InlinePreparer(its_task, seed)
    index = np.arange(EXAMPLES)
    block = preparer.collect(preparer.submit(PrepareRequest("validation", np.zeros_like(index), index)))
    preparer.close()
    return {name: torch.as_tensor(value) for name, value in block.items()}


def log_graph(model: Any, inputs: tuple[Any, ...]) -> None:
    """Log `model`, traced by torch.export with the arrays `inputs`, its first dimension free."""
    import mlflow
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema

    names = [None] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    specs: list[Any] = [_free_batch(array, name) for array, name in zip(inputs, names, strict=True)]
    output = model(*map(torch.from_numpy, inputs)).detach().numpy()
    mlflow.pytorch.log_model(
        model,
        name="model",
        input_example=inputs[0] if len(inputs) == 1 else inputs,
        signature=ModelSignature(Schema(specs), Schema([_free_batch(output, None)])),
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
        serialization_format="pt2",
    )


def _free_batch(array: Any, name: str | None) -> Any:
    from mlflow.types import TensorSpec

    return TensorSpec(array.dtype, (-1, *array.shape[1:]), name)
