"""The global generators that a user's code may draw from: those of Python, NumPy and torch.

Draws of a task come from `Draws`, which needs no seeding. Code that calls `random`, `np.random` or torch
without a generator of its own draws from these; they are seeded where it runs, from what it runs for.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def seed(*parts: object) -> None:
    """Seed all of them from anything with a stable text. Takes about 7 microseconds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little") >> 1
    random.seed(key)
    np.random.seed(key % 2**32)
    if torch := sys.modules.get("torch"):  # the pool's processes start without it
        # Not torch.manual_seed, which takes 100 microseconds to look for devices that are not there.
        torch.default_generator.manual_seed(key)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(key)


@contextmanager
def untouched() -> Iterator[None]:
    """They stand afterwards where they stood before; draws of the body leave no trace."""
    import torch

    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def state() -> tuple[Any, ...]:
    """Where they stand; equal as long as nothing was drawn."""
    _, keys, position, *_ = np.random.get_state(legacy=True)
    states: list[Any] = [random.getstate(), np.asarray(keys).tobytes(), position]
    if torch := sys.modules.get("torch"):
        states.append(torch.get_rng_state().numpy().tobytes())
        if torch.cuda.is_initialized():
            states.append(torch.cuda.get_rng_state().numpy().tobytes())
    return tuple(states)
