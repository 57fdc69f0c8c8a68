"""Random numbers of examples: a counter-based generator, whose numbers are hashed and need no state.

Every (seed, stage, pass, index, echo) has a SplitMix64 stream of its own and each call takes its next
numbers, so a draw does not depend on the process, the micro-batch or the device. Integers and uniforms have
the same bits in NumPy and in torch on CPU and CUDA. Normals are computed with float64 logarithms and cosines
and then rounded to float32: libraries that differ in the last bit of float64 disagree in about one of 10^8.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from data_echo.order.hashing import GAMMA, Ints, key, mix

if TYPE_CHECKING:
    import torch

_BITS_32 = 2**32 - 1


class Draws:
    """Draws of n examples at once: each result is [n, *shape].

    Args:
        seed: the run's.
        stage: the draws' purpose, "prepare" or "augment" in a run; different purposes draw independently.
        pass_number, index, echo: int64 [n]: which examples, and which copy of them.
        device: the results are torch tensors there; None for NumPy arrays.
    """

    def __init__(
        self,
        seed: int,
        stage: str,
        pass_number: Ints,
        index: Ints,
        echo: Ints,
        device: torch.device | str | None = None,
    ) -> None:
        self._origin = (seed, zlib.crc32(stage.encode()), pass_number, index, echo)
        self._device = device
        self._keys: Any = None  # hashed at the first draw: most tasks draw nothing
        self._drawn = 0

    def uniform(self, *shape: int) -> Any:
        """float32 in [0, 1): multiples of 2^-24."""
        return self._float32(self._top_24(shape)) * 2.0**-24

    def bernoulli(self, p: float, *shape: int) -> Any:
        """bool, True with probability p (rounded up to a multiple of 2^-24)."""
        return self._top_24(shape) < math.ceil(p * 2**24)

    def integers(self, low: int, high: int, *shape: int) -> Any:
        """int64 in [low, high), high - low at most 2^31; probabilities differ by 2^-31 at most."""
        return low + ((((self._bits(shape) >> 32) & _BITS_32) * (high - low)) >> 32)

    def normal(self, *shape: int) -> Any:
        """float32 from the standard normal distribution (Box and Muller 1958)."""
        bits = self._bits(shape)
        radius, angle = self._float64((bits >> 32) & _BITS_32), self._float64(bits & _BITS_32)
        maths = np if self._device is None else _torch()
        normal = maths.sqrt(-2 * maths.log((radius + 1) * 2.0**-32)) * maths.cos(angle * (2.0**-31 * math.pi))
        return self._float32(normal)

    def _top_24(self, shape: tuple[int, ...]) -> Any:
        return (self._bits(shape) >> 40) & (2**24 - 1)

    def _bits(self, shape: tuple[int, ...]) -> Any:
        """The next 64 bits of each example's stream for every element: int64 [n, *shape]."""
        if self._keys is None:
            self._keys = self._hashed()
        first, self._drawn = self._drawn, self._drawn + math.prod(shape)
        steps = np.arange(first + 1, self._drawn + 1) * GAMMA
        if self._device is not None:
            steps = _torch().from_numpy(steps).to(self._device)
        return mix(self._keys[:, None] + steps).reshape(len(self._keys), *shape)

    def _hashed(self) -> Any:
        hashed = key(*self._origin)
        return hashed if self._device is None else _torch().from_numpy(hashed).to(self._device)

    def _float32(self, numbers: Any) -> Any:
        return numbers.astype(np.float32) if self._device is None else numbers.float()

    def _float64(self, numbers: Any) -> Any:
        return numbers.astype(np.float64) if self._device is None else numbers.double()


def _torch() -> Any:
    """torch, imported only when tensors are drawn: the pool's processes start without it."""
    import torch

    return torch


class Draw:
    """Draws of one example in NumPy: the same numbers as its row of `Draws`, without the first dimension."""

    def __init__(self, seed: int, stage: str, pass_number: int, index: int, echo: int = 0) -> None:
        self._origin = (seed, stage, pass_number, index, echo)
        self._draws: Draws | None = None

    @property
    def was_used(self) -> bool:
        """Whether anything was drawn."""
        return self._draws is not None

    def uniform(self, *shape: int) -> Any:
        """float32 in [0, 1)."""
        return self._one().uniform(*shape)[0]

    def bernoulli(self, p: float, *shape: int) -> Any:
        """bool, True with probability p."""
        return self._one().bernoulli(p, *shape)[0]

    def integers(self, low: int, high: int, *shape: int) -> Any:
        """int64 in [low, high)."""
        return self._one().integers(low, high, *shape)[0]

    def normal(self, *shape: int) -> Any:
        """float32 from the standard normal distribution."""
        return self._one().normal(*shape)[0]

    def _one(self) -> Draws:
        if self._draws is None:
            seed, stage, pass_number, index, echo = self._origin
            self._draws = Draws(seed, stage, np.array([pass_number]), np.array([index]), np.array([echo]))
        return self._draws
