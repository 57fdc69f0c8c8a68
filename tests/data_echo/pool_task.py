"""A task for pools, in a module of its own so that their processes need not import torch."""

import os
import time
from typing import Any

import numpy as np

from data_echo import ArraySource

EXAMPLES = 300
HEAVY_BYTES = 20_000


class Task:
    """Examples hold the id of the process that prepared them; one may be bad, and each may take a while."""

    def __init__(self, bad: int = -1, pause_s: float = 0.0) -> None:
        self.bad = bad
        self.pause_s = pause_s

    def source(self, split: str) -> ArraySource:
        return ArraySource({"index": np.arange(EXAMPLES)})

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        if example["index"] == self.bad:
            raise ValueError("bad number")
        if self.pause_s:
            time.sleep(self.pause_s)
        return {"index": example["index"], "drawn": draw.uniform(3), "process": np.int64(os.getpid())}


class Heavy:
    """Examples of 20 kB."""

    def source(self, split: str) -> ArraySource:
        return ArraySource({"index": np.arange(20_000)})

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        return {"index": example["index"], "payload": np.full(HEAVY_BYTES, example["index"] % 256, np.uint8)}


class Changing(Task):
    """The dtype changes with the second half of the examples."""

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        index = example["index"]
        return {"y": index if index < EXAMPLES // 2 else float(index)}


class Unbuildable:
    def __init__(self) -> None:
        raise RuntimeError("no such dataset")
