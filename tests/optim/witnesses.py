"""Other libraries' optimizers, where they are installed: witnesses, never oracles."""

import importlib
import importlib.util
import sys
import types
from typing import Any


def timm_optimizer(module_name: str, class_name: str) -> Any:
    """An optimizer of timm's, loaded without the rest of timm, which needs torchvision; None if absent."""
    found = importlib.util.find_spec("timm")
    if found is None:
        return None
    names = ("timm", "timm.optim")
    kept = {name: sys.modules.get(name) for name in names}
    [folder] = found.submodule_search_locations or [""]
    for name, path in zip(names, (folder, f"{folder}/optim"), strict=True):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [path]
    try:
        return getattr(importlib.import_module(f"timm.optim.{module_name}"), class_name)
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def pytorch_optimizer(class_name: str) -> Any:
    """An optimizer of pytorch_optimizer's; None where it is absent."""
    if importlib.util.find_spec("pytorch_optimizer") is None:
        return None
    return getattr(importlib.import_module("pytorch_optimizer"), class_name)
