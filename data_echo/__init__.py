"""How examples arrive: sources, the order, the preprocessing pool, the echo buffer, the loader."""

from __future__ import annotations

import importlib
from typing import Any

# The module of each name. Modules are imported at first use: the pool's processes start without torch.
_HOMES = {
    "DataError": "errors",
    "ExampleError": "errors",
    "Source": "sources.source",
    "ArraySource": "sources.source",
    "ImageFolderSource": "sources.image_folder",
    "ParquetSource": "sources.parquet",
    "TarSource": "sources.tar",
    "TextSource": "sources.text",
    "Draw": "draws",
    "Draws": "draws",
    "ShuffledOrder": "order.permutation",
    "MicroBatch": "order.schedule",
    "Schedule": "order.schedule",
    "order_lines": "order.listing",
    "PrepareRequest": "prepare.preparer",
    "Preparer": "prepare.preparer",
    "InlinePreparer": "prepare.preparer",
    "KeptPreparer": "prepare.kept",
    "ProcessPreparer": "prepare.processes",
    "FactorController": "echo_controller",
    "EchoLoader": "loader",
}
# Former names of exported classes.
_FORMER = {"Deal": "ShuffledOrder", "Feed": "EchoLoader", "Order": "PrepareRequest"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    name = _FORMER.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
