"""The order of fresh examples: which example is the f-th fresh one of a lane."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from data_echo.errors import DataError
from data_echo.order.hashing import Ints, key, permuted

# Up to this size a whole pass is permuted at once and kept: NumPy's cost per call would dominate.
_TABLE_EXAMPLES = 2**13
_ROWS, _BLOCKS, _WINDOWS = 1, 2, 3  # what a key is for


class ShuffledOrder:
    """The endless order of fresh examples: one permutation of the dataset after another.

    Fresh position g = f L + l belongs to lane l, and is place g mod N of the permutation of pass g div N.
    Every pass over the data has each example once, in an order that is a function of (seed, pass); all lanes
    advance at the same rate and no pass drops its last examples. Any position costs the same.

    Args:
        examples: N, the dataset's length.
        lanes: L (see `order.schedule`).
        seed: the permutations' seed.
        block: rows that should be read together (a row group, a shard). Above 1, blocks are permuted and rows
            are shuffled within windows of `window` successive blocks, so that a source reads each block once
            per pass.
        window: blocks per window.

    Raises:
        DataError: `examples`, `lanes`, `block` or `window` is below 1.
    """

    def __init__(self, examples: int, lanes: int, seed: int, *, block: int = 1, window: int = 16) -> None:
        for name, value in {"examples": examples, "lanes": lanes, "block": block, "window": window}.items():
            if value < 1:
                raise DataError(f"shuffled order: {name}: {value} is too few", "at least 1")
        self.examples = examples
        self.lanes = lanes
        self.seed = seed
        self.block = block
        self.window = window
        self._table = lru_cache(32)(self._whole_pass)

    def example_of(self, lane: int | Ints, fresh: Ints) -> tuple[Ints, Ints]:
        """Pass number and example index of a lane's fresh examples: both int64 [broadcast of the arguments].

        Args:
            lane: the lanes' numbers.
            fresh: numbers among the lane's fresh examples, counted from 0.
        """
        pass_number, place = np.divmod(fresh * self.lanes + lane, self.examples)
        if self.examples > _TABLE_EXAMPLES:
            return pass_number, self._index(pass_number, place)
        first, last = int(pass_number.min()), int(pass_number.max())
        tables = np.stack([self._table(number) for number in range(first, last + 1)])
        return pass_number, tables[pass_number - first, place]

    def _index(self, pass_number: Ints, place: Ints) -> Ints:
        if self.block == 1:
            return permuted(place, self.examples, key(self.seed, _ROWS, pass_number))
        return self._within_blocks(pass_number, place)

    def _whole_pass(self, pass_number: int) -> Ints:
        return self._index(np.array([pass_number]), np.arange(self.examples))

    def _within_blocks(self, pass_number: Ints, place: Ints) -> Ints:
        whole_blocks = self.examples // self.block
        rows = self.block * self.window
        window, offset = np.divmod(place, rows)
        # Rows that fill no whole block come after the last one, so that every window has a known size.
        size = np.minimum(rows, self.examples - window * rows)
        offset = permuted(offset, size, key(self.seed, _WINDOWS, pass_number, window))
        number, row = np.divmod(window * rows + offset, self.block)
        whole = number < whole_blocks
        if whole.any():
            keys = np.broadcast_to(key(self.seed, _BLOCKS, pass_number), number.shape)
            number[whole] = permuted(number[whole], whole_blocks, keys[whole])
        return number * self.block + row
