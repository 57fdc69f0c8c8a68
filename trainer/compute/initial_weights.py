"""Weights to start from, out of a safetensors file, a checkpoint or another run, and those that stay as they
start.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import Problem, RecipeError, UserError
from trainer.run_folder.layout import CHECKPOINTS, MANIFEST, MODEL

if TYPE_CHECKING:
    from torch import Tensor, nn


def find(start: str, runs: str) -> Path:
    """The safetensors file, or the checkpoint's folder, that `init.from` names.

    A run stands for its trained model, or its newest checkpoint while it has none; its name is looked up in
    the folder `runs`. Raises RecipeError when there is nothing of the kind.
    """
    try:
        if (found := _found(start, runs)) is not None:
            return found
    except OSError as error:
        wrong = f"is {start}, which cannot be read ({error.strerror})"
        raise RecipeError([Problem(None, None, "init.from", wrong, "give one that can")]) from error
    wrong = f"is {start}, and there are no weights there or in {runs}"
    right = "give a .safetensors file, a checkpoint's folder, or a run with a checkpoint"
    raise RecipeError([Problem(None, None, "init.from", wrong, right)])


def _found(start: str, runs: str) -> Path | None:
    from trainer.run_folder.checkpoints import Checkpoints

    for path in (Path(start), Path(runs) / start):
        if path.suffix == ".safetensors" and path.is_file():
            return path
        if (path / MANIFEST).is_file():
            return path
        if (path / MODEL).is_file():
            return path / MODEL
        if (newest := Checkpoints(path / CHECKPOINTS, keep=1).newest_whole()) is not None:
            return newest
    return None


def put(path: Path, model: nn.Module) -> None:
    """Load the weights that `find` found into a model, every tensor of it. UserError names what does not
    fit.
    """
    weights, wanted = _read(path), model.state_dict()
    problems = [f"{name} is missing there" for name in sorted(wanted.keys() - weights.keys())]
    problems += [f"{name} is unknown" for name in sorted(weights.keys() - wanted.keys())]
    problems += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} in the model"
        for name, tensor in wanted.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(
            f"init.from: {path} is of another model: {'; '.join(problems[:3])}{more}; "
            "give weights of this task's model"
        )
    model.load_state_dict(weights)


def zero(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the parameters whose names match a pattern start at zero."""
    for parameter in _matching(model, patterns):
        parameter.data.zero_()


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match a pattern out of training."""
    for parameter in _matching(model, patterns):
        parameter.requires_grad_(False)


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    named = model.named_parameters()
    return [p for name, p in named if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _read(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        from trainer.run_folder.checkpoints import load

        return load(path)["model"]
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise UserError(
            f"init.from: {path}: cannot be read ({error}); give a whole safetensors file"
        ) from error
