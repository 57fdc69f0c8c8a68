"""The schedule of a run: which examples each micro-batch serves, and which copies, from its number alone.

A *lane* is a logical data shard: an independent subsequence of the stream, which belongs to one worker at a
time. There are L lanes, as the recipe says, on any number of workers. Micro-batch j of the run belongs to
lane j mod L; j div L is its *lane step*, the number of the lane's micro-batches before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_echo.errors import DataError
from data_echo.order.deduplicate import separate_duplicates
from data_echo.order.echo_pattern import EchoPattern
from data_echo.order.hashing import Ints
from data_echo.order.permutation import ShuffledOrder

_PLAIN_BLOCK_BATCHES = 4  # without echo blocks only bound what duplicates are swapped within
# Slots whose schedule is computed at once: NumPy's cost per call vanishes, memory stays small.
_GROUP_SLOTS = 2**14


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The examples of a micro-batch in serving order: arrays [micro] (in groups [..., micro]).

    Attributes:
        pass_number, index: int64: which example, in which pass over the data.
        echo: int64: which copy of it; 0 is the first.
        fresh: int64: its number among its lane's fresh examples.
        last: bool: whether no later copy comes.
    """

    pass_number: Ints
    index: Ints
    echo: Ints
    fresh: Ints
    last: np.ndarray

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> MicroBatch:
        """A micro-batch whose arrays are these, each changed by `change`."""
        arrays = (self.pass_number, self.index, self.echo, self.fresh, self.last)
        return MicroBatch(*(change(array) for array in arrays))


class _EchoSegment(NamedTuple):
    """A part of the stream with one echo factor: the lane step and fresh number where it starts."""

    lane_step: int
    fresh: int
    pattern: EchoPattern


class _Period(NamedTuple):
    """One period of one segment: the lane steps `start` to `end` - 1."""

    segment: int
    number: int
    start: int
    end: int


class Schedule:
    """The order and the echoes of a whole run; its position is the micro-batch number j alone.

    Each example is served `factor` times in the mean (exact, within what the buffer holds), and never twice
    in a micro-batch while a period has room for that. No data is read.

    Args:
        examples: N, the dataset's length.
        lanes: L (see the module).
        micro: b, examples per micro-batch.
        factor: e >= 1, a real number, taken as the decimal it is written as.
        capacity: examples waiting for their next copy, in all lanes together; unused at factor 1.
        seed: the seed of every shuffle.
        whole_batches: echo whole micro-batches ("batch echoing") instead of examples.
        max_age: bound on the examples that the run serves between an example's first copy and its last; None:
            the capacity's.
        block, window: see `ShuffledOrder`.

    Raises:
        DataError: the micro-batch, the factor, the capacity or `max_age` cannot work.
    """

    def __init__(
        self,
        examples: int,
        lanes: int,
        micro: int,
        factor: float | Fraction = 1,
        capacity: int = 0,
        seed: int = 0,
        *,
        whole_batches: bool = False,
        max_age: int | None = None,
        block: int = 1,
        window: int = 16,
    ) -> None:
        self.order = ShuffledOrder(examples, lanes, seed, block=block, window=window)
        if not 1 <= micro <= examples:
            raise DataError(f"schedule: micro: {micro} of {examples} examples", f"between 1 and {examples}")
        self.lanes = lanes
        self.micro = micro
        self.capacity = capacity
        self.max_age = max_age
        self._unit = micro if whole_batches else 1
        self._segments = [_EchoSegment(0, 0, self._pattern(factor))]
        self._cached = lru_cache(2 * lanes)(self._compute)

    def micro_batch(self, j: int) -> MicroBatch:
        """What micro-batch j serves: arrays [micro]."""
        lane_step, lane = divmod(j, self.lanes)
        period = self._period_of(lane_step)
        return self._cached(period, (lane,)).each(lambda array: array[0, lane_step - period.start])

    def fresh_served(self, j: int) -> int:
        """Fresh examples in micro-batches 0 ... j-1 of the whole run."""
        lane_step, ahead = divmod(j, self.lanes)
        return ahead * self.fresh_before(lane_step + 1) + (self.lanes - ahead) * self.fresh_before(lane_step)

    def fresh_before(self, lane_step: int) -> int:
        """Fresh examples in the first `lane_step` micro-batches of each lane."""
        segment = self._segments[self.segment_of(lane_step)]
        return segment.fresh + segment.pattern.fresh_before(lane_step - segment.lane_step) * self._unit

    def factor(self, j: int) -> Fraction:
        """The echo factor in force at micro-batch j."""
        return self._segments[self.segment_of(j // self.lanes)].pattern.factor

    def largest_factor(self) -> float:
        """The largest factor that the capacity allows."""
        return 1 + self.capacity / (self.lanes * self.micro)

    def change(self, position: int, factor: float | Fraction) -> int:
        """Change the factor at the end of the period that holds `position`; returns the position of that end.

        Examples that still wait for a copy there are dropped and the buffer fills again; the order of fresh
        examples continues. No micro-batch from `position` on may have been served. A change that is not yet
        in force is replaced.

        Raises:
            DataError: the factor is below 1, or the capacity or `max_age` is too small for it.
        """
        current = self._segments[-1]
        step = max(-(-position // self.lanes), current.lane_step)
        period = self._period_of(step)
        number, start = (period.number, step) if period.start == step else (period.number + 1, period.end)
        fresh = current.fresh + number * current.pattern.block * self._unit
        self._segments.append(_EchoSegment(start, fresh, self._pattern(factor)))
        return start * self.lanes

    def segment_of(self, lane_step: int) -> int:
        """Number of the segment of a lane step: the changes of the factor up to there."""
        number = len(self._segments) - 1
        while self._segments[number].lane_step > lane_step:
            number -= 1
        return number

    def first_live(self, lane_step: int) -> int:
        """The smallest fresh number that a lane may still serve at this step or later."""
        period = self._period_of(lane_step)
        segment = self._segments[period.segment]
        oldest = max(0, period.number - segment.pattern.max_repeats)
        return segment.fresh + oldest * segment.pattern.block * self._unit

    def needs(self, lane: int, lane_step: int) -> tuple[Ints, int]:
        """Fresh examples to read so that a lane can serve from this step on, starting with an empty buffer.

        Returns:
            fresh numbers, int64 [n], in the order in which they are needed, and the number from which on
            all are needed, counting upwards.
        """
        period = self._period_of(lane_step)
        segment = self._segments[period.segment]
        following = segment.fresh + (period.number + 1) * segment.pattern.block * self._unit
        if lane_step == period.start and not (segment.pattern.max_repeats and period.number):
            return np.zeros(0, np.int64), following - segment.pattern.block * self._unit
        soon = self._cached(period, (lane,)).fresh[0, lane_step - period.start :].ravel()
        later = segment.fresh + self._examples(segment.pattern.repeated_after(period.number, lane))
        return np.concatenate([soon, np.setdiff1d(later, soon)]), following

    def span(self) -> int:
        """The most fresh numbers from the oldest that a lane may still serve to the newest of its period."""
        patterns = (segment.pattern for segment in self._segments)
        return max((pattern.max_repeats + 1) * pattern.block for pattern in patterns) * self._unit

    def _pattern(self, factor: float | Fraction) -> EchoPattern:
        exact = Fraction(str(factor))
        if exact < 1:
            raise DataError(f"schedule: factor: {factor} serves examples less than once", "at least 1")
        return EchoPattern(self.micro // self._unit, exact, self._block_batches(exact), self.order.seed)

    def _block_batches(self, factor: Fraction) -> int:
        """Micro-batches in a block, so that (factor - 1) blocks of each lane fill the capacity."""
        if factor == 1:
            return _PLAIN_BLOCK_BATCHES
        least = self.lanes * self.micro * (factor - 1)
        if self.capacity < least:
            raise DataError(
                f"schedule: capacity: {self.capacity} examples cannot hold the echoes of {self.lanes} lanes "
                f"of {self.micro} at factor {float(factor):g}",
                f"at least {math.ceil(least)}",
            )
        # Near factor 1 blocks would grow without bound: a quarter of a copy is the least that counts.
        batches = self.capacity // (self.lanes * self.micro * max(factor - 1, Fraction(1, 4)))
        if self.max_age is not None:
            least_age = math.ceil(factor) * factor * self.lanes * self.micro
            if self.max_age < least_age:
                raise DataError(
                    f"schedule: max_age: {self.max_age} examples are too few for the echoes of "
                    f"{self.lanes} lanes of {self.micro}",
                    f"at least {math.ceil(least_age)}",
                )
            batches = min(batches, self.max_age // least_age)
        return max(1, int(batches))

    def _period_of(self, lane_step: int) -> _Period:
        number = self.segment_of(lane_step)
        first, _, pattern = self._segments[number]
        period = pattern.locate(lane_step - first)
        return _Period(number, period, first + pattern.start(period), first + pattern.start(period + 1))

    def _compute(self, period: _Period, lanes: tuple[int, ...]) -> MicroBatch:
        """What some lanes serve in a period: arrays [lanes, micro-batches, micro]."""
        segment, column = self._segments[period.segment], np.array(lanes)
        slots = segment.pattern.period(period.number, column)
        fresh = segment.fresh + self._examples(slots.number)
        pass_number, index = self.order.example_of(column[:, None, None], fresh)
        echo, last = (np.repeat(array, self._unit, axis=2) for array in (slots.echo, slots.last))
        served = MicroBatch(pass_number, index, echo, fresh, last)
        if self._unit == 1 and pass_number.min() != pass_number.max():
            taken = separate_duplicates(index, echo == 0)
            if taken is not None:
                shape = (len(lanes), -1)
                served = served.each(
                    lambda array: np.take_along_axis(array.reshape(shape), taken, axis=1).reshape(index.shape)
                )
        return served

    def _examples(self, units: Ints) -> Ints:
        """Fresh numbers of the examples in units [..., n]: [..., n * unit]."""
        if self._unit == 1:
            return units
        return (units[..., None] * self._unit + np.arange(self._unit)).reshape(*units.shape[:-1], -1)


class LaneReader:
    """Micro-batches of some lanes, read in rising order; periods of several lanes are computed at once."""

    def __init__(self, schedule: Schedule, lanes: Sequence[int]) -> None:
        self._schedule = schedule
        self._lanes = tuple(lanes)
        self._held: dict[int, tuple[_Period, int, MicroBatch]] = {}  # lane: its period, its row of the arrays

    def micro_batch(self, j: int) -> MicroBatch:
        """What micro-batch j, of one of the lanes, serves: arrays [micro]."""
        lane_step, lane = divmod(j, self._schedule.lanes)
        if not self._holds(lane_step, lane):
            self._read(lane_step, lane)
        period, row, served = self._held[lane]
        return served.each(lambda array: array[row, lane_step - period.start])

    def _holds(self, lane_step: int, lane: int) -> bool:
        if lane not in self._held:
            return False
        period = self._held[lane][0]
        current = period.segment == self._schedule.segment_of(lane_step)
        return current and period.start <= lane_step < period.end

    def _read(self, lane_step: int, lane: int) -> None:
        schedule = self._schedule
        period = schedule._period_of(lane_step)
        together = max(1, _GROUP_SLOTS // ((period.end - period.start) * schedule.micro))
        first = self._lanes.index(lane) // together * together
        group = self._lanes[first : first + together]
        served = schedule._compute(period, group)
        for row, member in enumerate(group):
            self._held[member] = (period, row, served)
