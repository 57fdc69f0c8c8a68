"""The echo pattern of a segment, a part of the stream with one echo factor: pure index arithmetic.

A lane's fresh examples come in blocks of F. Period k serves block k once, in order, and keyed-shuffled
repeats of the blocks k-1 ... k-R, R = ceil(factor) - 1: all of the blocks k-1 ... k-R+1, and of block k-R the
fraction that makes the factor exact in the mean. All blocks of a period differ, so no micro-batch serves an
example twice, except where two passes meet (see `deduplicate`). The first R periods are shorter, while the
buffer fills. Data echoing: Choi et al. 2019, arXiv:1907.05550 ("example echoing").
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data_echo.order.hashing import Ints, key, shuffled

_CHOICE, _MIXTURE = 11, 12  # purposes of keys


@dataclass(frozen=True)
class Slots:
    """What lanes serve in one period: int64 [lanes, micro-batches, slots], bool for `last`.

    Attributes:
        number: the fresh number of the unit in the slot, counted from the segment's first.
        echo: which copy it is; 0 the first.
        last: whether it is the last copy, after which the unit may be forgotten.
    """

    number: Ints
    echo: Ints
    last: np.ndarray


class EchoPattern:
    """Echoes of units (single examples, or whole micro-batches that echo together), the same for every lane.

    Lane steps (a lane's micro-batches), fresh numbers and periods count from 0 at the segment's start.

    Args:
        slots: units per micro-batch.
        factor: how often each unit is served in the mean, at least 1.
        block_batches: F in micro-batches: F = slots * block_batches.
        seed: the shuffles' seed.

    Attributes:
        block: F, units.
        max_repeats: R, the most copies of a unit after its first.
    """

    def __init__(self, slots: int, factor: Fraction, block_batches: int, seed: int) -> None:
        self.slots = slots
        self.factor = factor
        self.block_batches = block_batches
        self.block = slots * block_batches
        self.max_repeats = -(-(factor - 1).numerator // (factor - 1).denominator)
        self._last_fraction = factor - self.max_repeats
        self._seed = seed

    def start(self, period: int) -> int:
        """Micro-batches of a lane before a period."""
        whole_blocks = sum(max(0, period - repeat) for repeat in range(1, self.max_repeats))
        last_repeats = self._last_repeats(period - self.max_repeats) if self.max_repeats else 0
        return self.block_batches * (period + whole_blocks) + last_repeats

    def locate(self, lane_step: int) -> int:
        """The period of a lane step."""
        low, high = 0, lane_step // self.block_batches + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.start(middle) <= lane_step else (low, middle)
        return low

    def fresh_before(self, lane_step: int) -> int:
        """Fresh units in the first `lane_step` micro-batches of a lane."""
        period = self.locate(lane_step)
        first, end = self.start(period), self.start(period + 1)
        return self.block * period + (lane_step - first) * self.block // (end - first)

    def period(self, period: int, lanes: Ints) -> Slots:
        """What some lanes serve in a period."""
        count = len(lanes)
        fresh = np.broadcast_to(np.arange(self.block) + period * self.block, (count, self.block))
        number, echo = [fresh], [np.zeros_like(fresh)]
        if most := min(self.max_repeats, period):
            repeated = [self._repeated(period - repeat, repeat, lanes) for repeat in range(1, most + 1)]
            copies = [np.full_like(units, repeat) for repeat, units in enumerate(repeated, start=1)]
            count = sum(units.shape[1] for units in repeated)
            mixture = shuffled(key(self._seed, _MIXTURE, lanes, period), count)
            number.append(np.take_along_axis(np.concatenate(repeated, axis=1), mixture, axis=1))
            echo.append(np.take_along_axis(np.concatenate(copies, axis=1), mixture, axis=1))
        batches = self.start(period + 1) - self.start(period)
        places = _places(batches, self.slots, self.block)
        numbers = np.concatenate(number, axis=1)[:, places]
        echoes = np.concatenate(echo, axis=1)[:, places]
        return Slots(numbers, echoes, self._last(period, lanes, numbers, echoes))

    def repeated_after(self, period: int, lane: int) -> Ints:
        """Fresh numbers of a lane's blocks up to `period` that a later period serves again."""
        blocks = range(max(0, period + 1 - self.max_repeats), period + 1)
        again = [self._repeated(block, period + 1 - block, np.array([lane]))[0] for block in blocks]
        return np.concatenate([*again, np.zeros(0, np.int64)])

    def _repeated(self, block: int, repeat: int, lanes: Ints) -> Ints:
        """Fresh numbers of a block that are served again `repeat` periods after it: [lanes, units]."""
        count = self.block
        if repeat == self.max_repeats:
            count = self.slots * (self._last_repeats(block + 1) - self._last_repeats(block))
        if count == self.block:
            return np.broadcast_to(np.arange(self.block) + block * self.block, (len(lanes), self.block))
        return shuffled(key(self._seed, _CHOICE, lanes, block), self.block)[:, :count] + block * self.block

    def _last_repeats(self, blocks: int) -> int:
        """Micro-batches that serve the last repeats (number R) of a lane's first blocks."""
        fraction = self._last_fraction
        return max(0, blocks) * self.block_batches * fraction.numerator // fraction.denominator

    def _last(self, period: int, lanes: Ints, numbers: Ints, echoes: Ints) -> np.ndarray:
        """Whether no later copy comes: at repeat R, or at the one before it for what repeat R leaves out."""
        last = echoes == self.max_repeats
        block = period - (self.max_repeats - 1)
        if self._last_fraction < 1 and block >= 0:
            ends = np.ones((len(lanes), self.block), bool)
            again = self._repeated(block, self.max_repeats, lanes)
            np.put_along_axis(ends, again - block * self.block, False, axis=1)
            lane, batch, slot = np.nonzero(echoes == self.max_repeats - 1)
            last[lane, batch, slot] = ends[lane, numbers[lane, batch, slot] - block * self.block]
        return last


@lru_cache(16)
def _places(batches: int, slots: int, block: int) -> Ints:
    """Place of each slot [batches, slots] in (fresh block, then repeats): fresh demand even to one unit."""
    ends = np.arange(batches + 1) * block // batches
    first, fresh = ends[:-1, None], np.diff(ends)[:, None]
    slot = np.arange(slots)
    repeats = block + np.arange(batches)[:, None] * slots - first + slot - fresh
    return np.where(slot < fresh, first + slot, repeats)
