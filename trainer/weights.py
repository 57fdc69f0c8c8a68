"""Weights to start from: out of a safetensors file, a checkpoint, or another run."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from trainer import checkpoint
from trainer.errors import Refusal

Weights = dict[str, Tensor]


def read(start: str, runs: str) -> Weights:
    """The model's tensors by name, from what `init.from` names; a run's own name is looked up in the folder `runs`.

    Raises Refusal when there is nothing of the kind."""
    for path in (Path(start), Path(runs) / start):
        found = _tensors(path)
        if found is not None:
            return found
    raise Refusal(
        f"init.from: is {start}, and there are no weights there or in {runs}; "
        "give a .safetensors file, a checkpoint's folder, or a run with a checkpoint"
    )


def put(weights: Weights, model: nn.Module, start: str) -> None:
    """Load weights into a model, every tensor of it. Refusal names what does not fit."""
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    problems = [f"{name} is missing there" for name in missing] + [f"{name} is unknown" for name in unknown] + shapes
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise Refusal(
            f"init.from: {start} is of another model: {'; '.join(problems[:3])}{more}; give weights of this task's model"
        )
    model.load_state_dict(weights)


def _tensors(path: Path) -> Weights | None:
    """The weights at a path, if there are any."""
    if path.suffix == ".safetensors" and path.is_file():
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise Refusal(f"init.from: {path} cannot be read ({error}); give a whole safetensors file") from error
    if (path / "manifest.json").is_file():
        return checkpoint.load(path)["model"]
    if (path / "model.safetensors").is_file():
        return _tensors(path / "model.safetensors")
    newest = checkpoint.Checkpoints(path / "checkpoints", keep=1).newest_whole()
    return None if newest is None else checkpoint.load(newest)["model"]
