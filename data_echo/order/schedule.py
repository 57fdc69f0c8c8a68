"""Which examples every micro-batch of a run serves, and which copies: computed from its number alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data_echo.errors import DataError
from data_echo.order.deduplicate import spread_repeats
from data_echo.order.echo_pattern import Segment
from data_echo.order.hashing import Ints
from data_echo.order.permutation import ShuffledOrder

_PLAIN_BLOCK_BATCHES = 4  # without echo a block is only what `spread_repeats` may swap within
_GROUP_SLOTS = (
    2**14
)  # slots whose schedule is computed at once: NumPy's cost per call vanishes, memory stays small


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The examples of a micro-batch in serving order: arrays [micro] (in groups [..., micro]).

    Attributes:
        pass_number, index: int64: which example, met in which pass over the data.
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
        """The same with every array changed alike."""
        arrays = (self.pass_number, self.index, self.echo, self.fresh, self.last)
        return MicroBatch(*(change(array) for array in arrays))


class _Stretch(NamedTuple):
    """A segment in its place in the run: the lane's micro-batch and fresh number where it starts."""

    turn: int
    fresh: int
    segment: Segment


class _Period(NamedTuple):
    """One period of one stretch: a lane's micro-batches `start` to `end` - 1."""

    stretch: int
    number: int
    start: int
    end: int


class Schedule:
    """Order and echo of a whole run. The position is one integer, the micro-batch number j; no data is read.

    Micro-batch j is the next one of lane j mod lanes. Each example is served `factor` times in the mean
    (exact, within what the buffer holds), and never twice in a micro-batch while a period has room for that.

    Args:
        examples: N, the dataset's length.
        lanes: L, independent streams, each on one worker at a time.
        micro: b, examples per micro-batch.
        factor: e >= 1, a real number, taken as the decimal it is written as.
        capacity: examples waiting for their next copy, in all lanes together; without meaning at factor 1.
        seed: of every shuffle.
        whole_batches: echo whole micro-batches ("batch echoing") instead of examples.
        max_age: bound on the examples that the run serves between an example's first copy and its last; None:
            the capacity's.
        block, window: see `ShuffledOrder`.
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
        self.deal = ShuffledOrder(examples, lanes, seed, block=block, window=window)
        if not 1 <= micro <= examples:
            raise DataError(f"schedule: micro: {micro} of {examples} examples; between 1 and {examples}")
        self.lanes = lanes
        self.micro = micro
        self.capacity = capacity
        self.max_age = max_age
        self._unit = micro if whole_batches else 1
        self._stretches = [_Stretch(0, 0, self._segment(factor))]
        self._cached = lru_cache(2 * lanes)(self._compute)

    def micro_batch(self, j: int) -> MicroBatch:
        """What micro-batch j serves: arrays [micro]."""
        turn, lane = divmod(j, self.lanes)
        period = self._period_of(turn)
        return self._cached(period, (lane,)).each(lambda array: array[0, turn - period.start])

    def fresh_served(self, j: int) -> int:
        """Fresh examples in micro-batches 0 ... j-1 of the whole run."""
        turn, ahead = divmod(j, self.lanes)
        return ahead * self.fresh_before(turn + 1) + (self.lanes - ahead) * self.fresh_before(turn)

    def fresh_before(self, turn: int) -> int:
        """Fresh examples in the first `turn` micro-batches of each lane."""
        stretch = self._stretches[self.stretch_of(turn)]
        return stretch.fresh + stretch.segment.fresh_before(turn - stretch.turn) * self._unit

    def factor(self, j: int) -> Fraction:
        """The echo factor in force at micro-batch j."""
        return self._stretches[self.stretch_of(j // self.lanes)].segment.factor

    def largest_factor(self) -> float:
        """The factor that the capacity just allows, should it change."""
        return 1 + self.capacity / (self.lanes * self.micro)

    def change(self, position: int, factor: float | Fraction) -> int:
        """Let another factor rule from the end of the period in which `position` lies; returns where that is.

        What is still to be echoed there is forgotten and the buffer fills anew; the deal of fresh examples
        goes on. No micro-batch from `position` on may have been served. A change that has yet to come to
        force is replaced.
        """
        current = self._stretches[-1]
        turn = max(-(-position // self.lanes), current.turn)
        period = self._period_of(turn)
        number, start = (period.number, turn) if period.start == turn else (period.number + 1, period.end)
        fresh = current.fresh + number * current.segment.block * self._unit
        self._stretches.append(_Stretch(start, fresh, self._segment(factor)))
        return start * self.lanes

    def stretch_of(self, turn: int) -> int:
        """How many changes have happened before a lane's micro-batch `turn`."""
        number = len(self._stretches) - 1
        while self._stretches[number].turn > turn:
            number -= 1
        return number

    def first_live(self, turn: int) -> int:
        """The smallest fresh number that a lane may still serve at its micro-batch `turn` or later."""
        period = self._period_of(turn)
        stretch = self._stretches[period.stretch]
        oldest = max(0, period.number - stretch.segment.taps)
        return stretch.fresh + oldest * stretch.segment.block * self._unit

    def needs(self, lane: int, turn: int) -> tuple[Ints, int]:
        """What to read so that a lane can serve from its micro-batch `turn` on, starting with nothing.

        Returns:
            fresh numbers in the order of need, and the one from which all higher ones follow, counting
            upwards.
        """
        period = self._period_of(turn)
        stretch = self._stretches[period.stretch]
        following = stretch.fresh + (period.number + 1) * stretch.segment.block * self._unit
        if turn == period.start and not (stretch.segment.taps and period.number):
            return np.zeros(0, np.int64), following - stretch.segment.block * self._unit
        soon = self._cached(period, (lane,)).fresh[0, turn - period.start :].ravel()
        later = stretch.fresh + self._examples(stretch.segment.shown_after(period.number, lane))
        return np.concatenate([soon, np.setdiff1d(later, soon)]), following

    def span(self) -> int:
        """Fresh numbers from a lane's oldest live one to the newest of its current period, at most."""
        return max((segment.taps + 1) * segment.block for _, _, segment in self._stretches) * self._unit

    def _segment(self, factor: float | Fraction) -> Segment:
        exact = Fraction(str(factor))
        if exact < 1:
            raise DataError(f"schedule: factor: {factor} serves examples less than once; at least 1")
        return Segment(self.micro // self._unit, exact, self._block_batches(exact), self.deal.seed)

    def _block_batches(self, factor: Fraction) -> int:
        """Micro-batches in a block, so that (factor - 1) blocks of each lane fill the capacity."""
        if factor == 1:
            return _PLAIN_BLOCK_BATCHES
        least = self.lanes * self.micro * (factor - 1)
        if self.capacity < least:
            raise DataError(
                f"schedule: capacity: {self.capacity} examples cannot hold the echoes of {self.lanes} lanes "
                f"of {self.micro} at factor {float(factor):g}; at least {math.ceil(least)}"
            )
        # Near factor 1 a block would outgrow all bounds: a quarter of a copy is the least that counts.
        batches = self.capacity // (self.lanes * self.micro * max(factor - 1, Fraction(1, 4)))
        if self.max_age is not None:
            least_age = math.ceil(factor) * factor * self.lanes * self.micro
            if self.max_age < least_age:
                raise DataError(
                    f"schedule: max_age: {self.max_age} examples are too few for the echoes of "
                    f"{self.lanes} lanes of {self.micro}; at least {math.ceil(least_age)}"
                )
            batches = min(batches, self.max_age // least_age)
        return max(1, int(batches))

    def _period_of(self, turn: int) -> _Period:
        number = self.stretch_of(turn)
        first, _, segment = self._stretches[number]
        period = segment.locate(turn - first)
        return _Period(number, period, first + segment.start(period), first + segment.start(period + 1))

    def _compute(self, period: _Period, lanes: tuple[int, ...]) -> MicroBatch:
        """What lanes serve in a period: arrays [lanes, micro-batches, micro]."""
        stretch, column = self._stretches[period.stretch], np.array(lanes)
        slots = stretch.segment.period(period.number, column)
        fresh = stretch.fresh + self._examples(slots.number)
        pass_number, index = self.deal.dealt(column[:, None, None], fresh)
        echo, last = (np.repeat(array, self._unit, axis=2) for array in (slots.echo, slots.last))
        served = MicroBatch(pass_number, index, echo, fresh, last)
        if self._unit == 1 and pass_number.min() != pass_number.max():
            order = spread_repeats(index, echo == 0)
            if order is not None:
                shape = (len(lanes), -1)
                served = served.each(
                    lambda array: np.take_along_axis(array.reshape(shape), order, axis=1).reshape(index.shape)
                )
        return served

    def _examples(self, units: Ints) -> Ints:
        """Fresh numbers of the examples in units [..., n]: [..., n * unit]."""
        if self._unit == 1:
            return units
        return (units[..., None] * self._unit + np.arange(self._unit)).reshape(*units.shape[:-1], -1)


class LaneReader:
    """Reads micro-batches of some lanes in rising order, computing the periods of several lanes at once."""

    def __init__(self, schedule: Schedule, lanes: Sequence[int]) -> None:
        self._schedule = schedule
        self._lanes = tuple(lanes)
        self._held: dict[int, tuple[_Period, int, MicroBatch]] = {}  # lane: its period, its row of the arrays

    def micro_batch(self, j: int) -> MicroBatch:
        """What micro-batch j serves, j mod L among the lanes: arrays [micro]."""
        turn, lane = divmod(j, self._schedule.lanes)
        if not self._holds(turn, lane):
            self._read(turn, lane)
        period, row, served = self._held[lane]
        return served.each(lambda array: array[row, turn - period.start])

    def _holds(self, turn: int, lane: int) -> bool:
        if lane not in self._held:
            return False
        period = self._held[lane][0]
        return period.start <= turn < period.end and period.stretch == self._schedule.stretch_of(turn)

    def _read(self, turn: int, lane: int) -> None:
        schedule = self._schedule
        period = schedule._period_of(turn)
        together = max(1, _GROUP_SLOTS // ((period.end - period.start) * schedule.micro))
        first = self._lanes.index(lane) // together * together
        group = self._lanes[first : first + together]
        served = schedule._compute(period, group)
        for row, member in enumerate(group):
            self._held[member] = (period, row, served)
