"""How weights move: optimizers that are their papers, as ordinary ``torch.optim.Optimizer``s.

Everything public is reachable from here; torch is imported when the first name is used.
"""

import importlib
from typing import Any

_HOME = {
    "build": "registry",
    "names": "registry",
    "hyperparameters": "registry",
    "state_bytes": "registry",
    "Grouping": "grouping",
    "group_parameters": "grouping",
    "describe": "help",
    "table": "help",
    "Lookahead": "lookahead",
    "Average": "averaging",
    "ema": "averaging",
    "swa": "averaging",
    "GradientlessDescent": "gradient_free",
    "finite_difference": "gradient_free",
    "forward_gradient": "gradient_free",
    "FlatOptimizer": "flattening",
    "Rule": "rule",
    "Adafactor": "rules.adafactor",
    "AdaX": "rules.adax",
    "Amos": "rules.amos",
    "FunnelledSGDM": "rules.funnelled_sgdm",
    "LAMB": "rules.lamb",
    "LARS": "rules.lars",
    "Lion": "rules.lion",
    "NovoGrad": "rules.novograd",
    "SM3": "rules.sm3",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'optim' has no attribute {name!r}")
    return getattr(importlib.import_module(f"optim.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
