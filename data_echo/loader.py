"""The feed of one worker: orders examples ahead of need, keeps them while they echo, serves micro-batches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from data_echo.buffer import ExampleBuffer
from data_echo.draws import Draws
from data_echo.errors import DataError
from data_echo.order.hashing import Ints
from data_echo.order.schedule import LaneReader, MicroBatch, Schedule
from data_echo.prepare.preparer import PreparedArrays, Preparer, PrepareRequest

# Orders are small enough to share out and to start soon, and large enough that their own cost vanishes.
_ORDER_EXAMPLES = 512
_ORDER_BYTES = 8 * 2**20
_ORDER_S = 0.05
_LEAST_DEPTH = 8  # orders


class EchoLoader:
    """Micro-batches of some lanes of a schedule, from any position on.

    The buffer is a cache: a feed that starts in the middle reads again what is still to be echoed.

    Args:
        schedule: what to serve.
        preparer: does the orders; not closed with the feed.
        split: of the task's data.
        lanes: which lanes this worker serves.
        position: the run's micro-batch number from which on it does.
        device: where micro-batches are wanted.
        seed: of the draws after the echo.
        depth: orders under way at once, at most: the bound on work and memory ahead of need. None: two for
            each of the preparer's processes, and eight at least.
        fresh_augment: whether each copy of an example is augmented anew (echo before augmentation) or all
            alike (after it).
        on_host: keep waiting examples in the host's memory, where the device's is too small for the capacity.
    """

    def __init__(
        self,
        schedule: Schedule,
        preparer: Preparer,
        *,
        split: str = "train",
        lanes: Sequence[int],
        position: int = 0,
        device: torch.device | str = "cpu",
        seed: int = 0,
        depth: int | None = None,
        fresh_augment: bool = True,
        on_host: bool = False,
    ) -> None:
        if depth is not None and depth < 1:
            raise DataError(f"feed: depth: {depth} orders under way; at least 1")
        self._schedule = schedule
        self._preparer = preparer
        self._split = split
        self._device = device
        self._seed = seed
        self._depth = depth
        self._fresh_augment = fresh_augment
        self._reader = LaneReader(schedule, lanes)
        self._lanes = {lane: _Lane(schedule, lane, position, place) for place, lane in enumerate(lanes)}
        self._buffer = ExampleBuffer(device, len(lanes) * _ORDER_EXAMPLES, on_host)
        self._order_examples = _ORDER_EXAMPLES
        self._under_way = 0
        self._fresh = self._echoed = 0
        self._latest: MicroBatch | None = None
        self.waited_s = 0.0
        self._order_ahead()

    def serves(self, j: int) -> bool:
        """Whether micro-batch j is of one of this feed's lanes."""
        return j % self._schedule.lanes in self._lanes

    def served(self, j: int) -> MicroBatch:
        """Which examples micro-batch j serves."""
        return self._reader.micro_batch(j)

    def micro_batch(self, j: int) -> tuple[dict[str, torch.Tensor], Draws]:
        """Micro-batch j on the device, and the draws for its augmentation. j rises from call to call.

        Raises:
            ExampleError: an example of it could not be read or prepared.
        """
        turn, number = divmod(j, self._schedule.lanes)
        lane, served = self._lanes[number], self._reader.micro_batch(j)
        self._buffer.release(lane.enter(turn))
        while (rows := lane.rows(served.fresh)) is None:
            self._receive(lane)
        batch = self._buffer.gather(rows)
        self._buffer.release(lane.forget(served.fresh[served.last]))
        self._order_ahead()
        fresh = len(rows) - int(np.count_nonzero(served.echo))
        self._fresh += fresh
        self._echoed += len(rows) - fresh
        self._latest = served
        echo = served.echo if self._fresh_augment else np.zeros_like(served.echo)
        return batch, Draws(self._seed, "augment", served.pass_number, served.index, echo, self._device)

    def counters(self) -> dict[str, float]:
        """What this feed has done so far.

        `fresh` and `echoed` examples served; `held` examples in the buffer, its `buffer_bytes`; `age`: how
        many fresh examples the run has been dealt since those of the latest micro-batch were, in the mean;
        `orders` under way; `received_bytes` from the preparer; `waited_s`, seconds spent waiting for blocks;
        `prepared` examples came from `processes` that worked `work_s` on them, which makes `upstream_s` per
        fresh example if all of them were always busy; `skipped` bad examples.
        """
        latest = self._latest
        ages = np.zeros(1) if latest is None else (latest.fresh.max() - latest.fresh) * self._schedule.lanes
        return {
            "fresh": self._fresh,
            "echoed": self._echoed,
            "held": self._buffer.held,
            "buffer_bytes": self._buffer.bytes,
            "age": float(ages.mean()),
            "orders": self._under_way,
            "received_bytes": self._buffer.bytes_received,
            "waited_s": self.waited_s,
            "processes": self._preparer.processes,
            "prepared": self._preparer.stats.examples,
            "work_s": self._preparer.stats.work_s,
            "upstream_s": self.upstream_s(),
            "skipped": len(self._preparer.stats.skipped),
        }

    def upstream_s(self) -> float:
        """Seconds per fresh example if every process of the preparer were always busy; 0 before the first."""
        stats = self._preparer.stats
        return stats.work_s / max(1, stats.examples) / max(1, self._preparer.processes)

    def close(self) -> None:
        """Forget everything; orders under way are left to the preparer."""
        self._lanes.clear()
        self._buffer = ExampleBuffer(self._device, 0)

    def _order_ahead(self) -> None:
        depth = self._depth or max(_LEAST_DEPTH, 2 * self._preparer.processes)
        while self._under_way < depth:
            # Lanes advance together, so the one with the least ordered runs dry first.
            self._order(min(self._lanes.values(), key=lambda lane: (lane.ordered, lane.turns_away)))

    def _order(self, lane: _Lane) -> None:
        fresh = lane.next_needed(self._order_examples)
        pass_number, index = self._schedule.deal.dealt(lane.number, fresh)
        lane.waiting.append((self._preparer.submit(PrepareRequest(self._split, pass_number, index)), fresh))
        self._under_way += 1

    def _receive(self, lane: _Lane) -> None:
        """Take in the block that a lane has waited for longest."""
        if not lane.waiting:
            self._order(lane)
        ticket, fresh = lane.waiting.popleft()
        self._under_way -= 1
        started = time.perf_counter()
        block = self._preparer.collect(ticket)
        self.waited_s += time.perf_counter() - started
        self._buffer.release(lane.keep(fresh, self._buffer.put(block)))
        self._order_examples = self._fitting(block)

    def _fitting(self, block: PreparedArrays) -> int:
        """Examples of an order that is neither too large nor too long, judged by a block that came."""
        examples, stats = len(next(iter(block.values()))), self._preparer.stats
        by_size = _ORDER_BYTES * examples // max(1, sum(array.nbytes for array in block.values()))
        by_time = int(_ORDER_S * stats.examples / max(stats.work_s, 1e-9))
        return max(1, min(_ORDER_EXAMPLES, by_size, by_time))


class _Lane:
    """Where a lane's examples are: ordered, or in which row of the buffer."""

    def __init__(self, schedule: Schedule, number: int, position: int, place: int) -> None:
        self.number = number
        self.turns_away = (number - position) % schedule.lanes
        self.waiting: deque[tuple[Any, Ints]] = deque()
        self.ordered = 0
        self._schedule = schedule
        turn = (position + self.turns_away) // schedule.lanes
        self._stretch = schedule.stretch_of(turn)
        self._floor = schedule.first_live(turn)
        self._rows = np.full(self._ring_size(), -1)  # fresh number n has its place at n mod size
        self._first, self._following = schedule.needs(number, turn)
        # Lanes begin with orders of different lengths, so that later ones are not all due in the same round.
        sizes = max(1, _ORDER_EXAMPLES // schedule.micro)
        self._order_size = min(_ORDER_EXAMPLES, schedule.micro * (1 + place % sizes))

    def next_needed(self, most: int) -> Ints:
        """Fresh numbers of the next order, `most` at most."""
        size, self._order_size = min(most, self._order_size), _ORDER_EXAMPLES
        self.ordered += size
        first, self._first = self._first[:size], self._first[size:]
        begin, self._following = self._following, self._following + size - len(first)
        return np.concatenate([first, np.arange(begin, self._following)])

    def enter(self, turn: int) -> Ints:
        """Begin a turn; returns the rows of what a change of the schedule makes useless there."""
        stretch = self._schedule.stretch_of(turn)
        if stretch == self._stretch:
            return np.zeros(0, np.int64)
        self._stretch = stretch
        floor = self._schedule.first_live(turn)
        dropped = self.forget(np.arange(self._schedule.first_live(turn - 1), floor))
        self._floor = floor
        kept = np.arange(floor, floor + len(self._rows))
        before, self._rows = self._rows, np.full(max(len(self._rows), self._ring_size()), -1)
        self._rows[kept % len(self._rows)] = before[kept % len(before)]
        return dropped

    def keep(self, fresh: Ints, rows: Ints) -> Ints:
        """Note where examples are; returns the rows of those that are no longer needed."""
        needed = fresh >= self._floor
        self._rows[fresh[needed] % len(self._rows)] = rows[needed]
        return rows[~needed]

    def rows(self, fresh: Ints) -> Ints | None:
        """Where examples are; None while one of them has not arrived."""
        rows = self._rows[fresh % len(self._rows)]
        return None if rows.min() < 0 else rows

    def forget(self, fresh: Ints) -> Ints:
        """Rows of examples that are not served again."""
        places = fresh % len(self._rows)
        rows = self._rows[places]
        self._rows[places] = -1
        return rows[rows >= 0]

    def _ring_size(self) -> int:
        return self._schedule.span() + 2 * _ORDER_EXAMPLES
