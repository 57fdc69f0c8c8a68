"""The echo schedule of a stretch of the stream with constant settings: pure index arithmetic.

A lane's fresh examples come in blocks of F. Period k shows block k once, in order, and keyed-shuffled repeats
of the blocks k-1 ... k-T, T = ceil(factor) - 1: all of the blocks k-1 ... k-T+1, and of block k-T the share
that makes the factor exact in the mean. All blocks of a period differ, so no micro-batch shows an example
twice, except where two passes meet (see `repair`). The first T periods are shorter, while the buffer fills.
Data echoing: Choi et al. 2019, arXiv:1907.05550 ("example echoing").
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from data_echo.order.hashing import Ints, key, shuffled

_CHOICE, _MIXTURE = 11, 12  # what a key is for


@dataclass(frozen=True)
class Slots:
    """What lanes serve in one period: int64 [lanes, micro-batches, slots], bool for `last`.

    Attributes:
        number: the fresh number of what stands in the slot, counted from the segment's first.
        echo: which copy it is; 0 the first.
        last: whether it is the last copy, after which it may be forgotten.
    """

    number: Ints
    echo: Ints
    last: np.ndarray


class Segment:
    """A schedule of units (single examples, or whole micro-batches that echo together) for every lane alike.

    Args:
        slots: units per micro-batch.
        factor: how often each unit is served in the mean, at least 1.
        block_batches: F in micro-batches: F = slots * block_batches.
        seed: of the shuffles.
    """

    def __init__(self, slots: int, factor: Fraction, block_batches: int, seed: int) -> None:
        self.slots = slots
        self.factor = factor
        self.block_batches = block_batches
        self.block = slots * block_batches
        self.taps = -(-(factor - 1).numerator // (factor - 1).denominator)
        self._last_share = factor - self.taps
        self._seed = seed

    def start(self, period: int) -> int:
        """Micro-batches of a lane before its period."""
        whole_taps = sum(max(0, period - tap) for tap in range(1, self.taps))
        last_tap = self._repeated(period - self.taps) if self.taps else 0
        return self.block_batches * (period + whole_taps) + last_tap

    def locate(self, turn: int) -> int:
        """The period that holds a lane's micro-batch number `turn`."""
        low, high = 0, turn // self.block_batches + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.start(middle) <= turn else (low, middle)
        return low

    def fresh_before(self, turn: int) -> int:
        """Fresh units in a lane's first `turn` micro-batches."""
        period = self.locate(turn)
        first, end = self.start(period), self.start(period + 1)
        return self.block * period + (turn - first) * self.block // (end - first)

    def period(self, period: int, lanes: Ints) -> Slots:
        """What the lanes serve in a period."""
        count = len(lanes)
        fresh = np.broadcast_to(np.arange(self.block) + period * self.block, (count, self.block))
        number, echo = [fresh], [np.zeros_like(fresh)]
        if taps := min(self.taps, period):
            shown = [self._shown_again(period - tap, tap, lanes) for tap in range(1, taps + 1)]
            copies = [np.full_like(again, tap) for tap, again in enumerate(shown, start=1)]
            repeats = sum(again.shape[1] for again in shown)
            mixture = shuffled(key(self._seed, _MIXTURE, lanes, period), repeats)
            number.append(np.take_along_axis(np.concatenate(shown, axis=1), mixture, axis=1))
            echo.append(np.take_along_axis(np.concatenate(copies, axis=1), mixture, axis=1))
        batches = self.start(period + 1) - self.start(period)
        places = _places(batches, self.slots, self.block)
        numbers = np.concatenate(number, axis=1)[:, places]
        echoes = np.concatenate(echo, axis=1)[:, places]
        return Slots(numbers, echoes, self._last(period, lanes, numbers, echoes))

    def shown_after(self, period: int, lane: int) -> Ints:
        """Fresh numbers of a lane's blocks up to `period` that a later period serves again."""
        blocks = range(max(0, period + 1 - self.taps), period + 1)
        again = [self._shown_again(block, period + 1 - block, np.array([lane]))[0] for block in blocks]
        return np.concatenate([*again, np.zeros(0, np.int64)])

    def _shown_again(self, block: int, tap: int, lanes: Ints) -> Ints:
        """Fresh numbers of a block that appear `tap` periods after it: [lanes, repeats]."""
        count = self.block
        if tap == self.taps:
            count = self.slots * (self._repeated(block + 1) - self._repeated(block))
        if count == self.block:
            return np.broadcast_to(np.arange(self.block) + block * self.block, (len(lanes), self.block))
        return shuffled(key(self._seed, _CHOICE, lanes, block), self.block)[:, :count] + block * self.block

    def _repeated(self, blocks: int) -> int:
        """Micro-batches that the last tap repeats of a lane's first blocks."""
        share = self._last_share
        return max(0, blocks) * self.block_batches * share.numerator // share.denominator

    def _last(self, period: int, lanes: Ints, numbers: Ints, echoes: Ints) -> np.ndarray:
        """Whether no later copy comes: at the last tap, or before it for what the last tap leaves out."""
        last = echoes == self.taps
        block = period - (self.taps - 1)
        if self._last_share < 1 and block >= 0:
            ends = np.ones((len(lanes), self.block), bool)
            again = self._shown_again(block, self.taps, lanes)
            np.put_along_axis(ends, again - block * self.block, False, axis=1)
            lane, batch, slot = np.nonzero(echoes == self.taps - 1)
            last[lane, batch, slot] = ends[lane, numbers[lane, batch, slot] - block * self.block]
        return last


@lru_cache(16)
def _places(batches: int, slots: int, block: int) -> Ints:
    """Where each slot [batches, slots] looks in (fresh block, then repeats): fresh demand is even to one."""
    ends = np.arange(batches + 1) * block // batches
    first, fresh = ends[:-1, None], np.diff(ends)[:, None]
    slot = np.arange(slots)
    repeats = block + np.arange(batches)[:, None] * slots - first + slot - fresh
    return np.where(slot < fresh, first + slot, repeats)
