"""How examples arrive: sources, the order, the preprocessing pool, the echo buffer."""

from __future__ import annotations

import importlib
from typing import Any

# What stands where; modules are imported when first asked for, so that the pool's processes start without
# torch.
_HOMES = {
    "DataError": "errors",
    "ExampleError": "errors",
    "Source": "source",
    "ArraySource": "source",
    "ImageFolderSource": "folders",
    "ParquetSource": "parquet",
    "TarSource": "shards",
    "TextSource": "text",
    "Draw": "draws",
    "Draws": "draws",
    "Deal": "deal",
    "MicroBatch": "schedule",
    "Schedule": "schedule",
    "order_lines": "listing",
    "Order": "preparer",
    "Preparer": "preparer",
    "InlinePreparer": "preparer",
    "ProcessPreparer": "processes",
    "FactorController": "factor",
    "Feed": "feed",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
