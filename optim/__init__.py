"""How weights move: optimizers that are their papers, as ordinary ``torch.optim.Optimizer``s.

Everything public is reachable from here; torch is imported when the first name is used.
"""

import importlib
import re
from pathlib import Path
from typing import Any

import optim.rules

_HOME = {
    "build": "registry",
    "names": "registry",
    "hyperparameters": "registry",
    "state_bytes": "registry",
    "FlatOptimizer": "flat",
    "Grouping": "grouping",
    "group_parameters": "grouping",
    "layer_decay": "grouping",
    "describe": "help",
    "table": "help",
    "Lookahead": "lookahead",
    "ScheduleFree": "schedule_free",
    "Average": "averaging",
    "ema": "averaging",
    "swa": "averaging",
    "passport": "variants",
    "Passport": "variants",
    "GradientlessDescent": "gradient_free",
    "finite_difference": "gradient_free",
    "forward_gradient": "gradient_free",
    "Rule": "rule",
}


def _rules() -> dict[str, str]:
    """The module of each class in `optim/rules`, read from the files: importing them would bring torch."""
    files = [path for folder in optim.rules.__path__ for path in Path(folder).glob("[!_]*.py")]
    return {
        name: f"rules.{path.stem}"
        for path in files
        for name in re.findall(r"^class (\w+)\(\w+\):", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


__all__ = sorted([*_HOME, *_rules()])


def __getattr__(name: str) -> Any:
    home = _HOME.get(name) or ({} if name.startswith("_") else _rules()).get(name)
    if home is None:
        raise AttributeError(f"module 'optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"optim.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOME, *_rules()])
