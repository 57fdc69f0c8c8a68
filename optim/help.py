"""What the optimizers are, made from their docstrings: help and documentation say the same."""

import inspect
from typing import Any

import torch

from optim.registry import hyperparameters, names, rules, state_bytes
from optim.torch_optimizers import FROM_TORCH


def describe(name: str) -> str:
    """An optimizer's paper, update, state, options and deviations, and its hyperparameters.

    Raises:
        ValueError: an unknown name.
    """
    defaults = "\n".join(f"    {key} = {value!r}" for key, value in hyperparameters(name).items())
    return f"{name}: {_about(name)}\n\nHyperparameters:\n{defaults}"


def table() -> str:
    """All optimizers as a Markdown table."""
    lines = ["| name | optimizer | bytes per parameter | defaults |", "|---|---|---|---|"]
    for name in names():
        title = _about(name).partition("\n")[0]
        options = hyperparameters(name)
        options.pop("maximize", None)
        shown = ", ".join(
            f"{key} {_short(value)}" for key, value in options.items() if not isinstance(value, bool)
        )
        lines.append(f"| `{name}` | {title} | {_bytes_per_parameter(name):.3g} | {shown} |")
    return "\n".join(lines)


def _about(name: str) -> str:
    return inspect.cleandoc(FROM_TORCH[name].about if name in FROM_TORCH else rules()[name].__doc__ or "")


def _bytes_per_parameter(name: str) -> float:
    """Of a matrix [512, 512]; single numbers per tensor count nothing."""
    return round(state_bytes(name, [torch.Size((512, 512))]) / 512**2, 3)


def _short(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "/".join(_short(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
