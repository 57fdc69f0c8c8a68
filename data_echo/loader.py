"""The loader of a worker: requests examples in advance, keeps them while they echo, serves micro-batches."""

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
from data_echo.prepare.example_form import PreparedArrays
from data_echo.prepare.preparer import Preparer, PrepareRequest

# Requests are small enough to be spread over processes and to return soon, and large enough that the cost of
# sending them is negligible.
_REQUEST_EXAMPLES = 512
_REQUEST_BYTES = 8 * 2**20
_REQUEST_S = 0.05
_LEAST_DEPTH = 8  # requests


class EchoLoader:
    """Micro-batches of some lanes of a schedule, from any position on.

    The buffer is a cache: a loader that starts in the middle reads again what still echoes.

    Args:
        schedule: what to serve.
        preparer: prepares the examples; not closed with the loader.
        split: the split of the task's data.
        lanes: the lanes that this worker serves.
        position: the run's micro-batch number at which it starts.
        device: the device of the micro-batches.
        seed: the seed of the draws after the echo.
        depth: the most pending requests: the bound on work and memory ahead of need. None: two for each of
            the preparer's processes, and at least eight.
        fresh_augment: whether each copy of an example is augmented anew (echo before augmentation) or all
            alike (after it).
        on_host: keep waiting examples in the host's memory, where the device's is too small for the capacity.

    Attributes:
        waited_s: seconds spent waiting for arrays so far.

    Raises:
        DataError: the depth is below 1.
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
            raise DataError(f"loader: depth: {depth} pending requests", "at least 1")
        self._schedule = schedule
        self._preparer = preparer
        self._split = split
        self._device = device
        self._seed = seed
        self._depth = depth
        self._fresh_augment = fresh_augment
        self._reader = LaneReader(schedule, lanes)
        self._lanes = {lane: _Lane(schedule, lane, position, place) for place, lane in enumerate(lanes)}
        self._buffer = ExampleBuffer(device, len(lanes) * _REQUEST_EXAMPLES, on_host)
        self._request_examples = _REQUEST_EXAMPLES
        self._pending = 0
        self._fresh = self._echoed = 0
        self._latest: MicroBatch | None = None
        self.waited_s = 0.0
        self._request_ahead()

    def serves(self, j: int) -> bool:
        """Whether micro-batch j belongs to one of this loader's lanes."""
        return j % self._schedule.lanes in self._lanes

    def served(self, j: int) -> MicroBatch:
        """The examples of micro-batch j: arrays [micro]."""
        return self._reader.micro_batch(j)

    def micro_batch(self, j: int) -> tuple[dict[str, torch.Tensor], Draws]:
        """Micro-batch j, tensors [micro, ...] on the device, and the draws for its augmentation.

        j must rise from call to call.

        Raises:
            ExampleError: an example of it could not be read or prepared.
        """
        lane_step, number = divmod(j, self._schedule.lanes)
        lane, served = self._lanes[number], self._reader.micro_batch(j)
        self._buffer.release(lane.enter(lane_step))
        while (rows := lane.rows(served.fresh)) is None:
            self._receive(lane)
        batch = self._buffer.gather(rows)
        self._buffer.release(lane.forget(served.fresh[served.last]))
        self._request_ahead()
        fresh = len(rows) - int(np.count_nonzero(served.echo))
        self._fresh += fresh
        self._echoed += len(rows) - fresh
        self._latest = served
        echo = served.echo if self._fresh_augment else np.zeros_like(served.echo)
        return batch, Draws(self._seed, "augment", served.pass_number, served.index, echo, self._device)

    def counters(self) -> dict[str, float]:
        """Counters of this loader so far, by name.

        `fresh` and `echoed` examples served; `held` examples in the buffer, its `buffer_bytes`; `age`: the
        mean number of fresh examples that the run has served since those of the latest micro-batch were
        fresh; `orders`: pending requests; `received_bytes` from the preparer; `waited_s`, seconds spent
        waiting for arrays; `prepared` examples came from `processes` that worked `work_s` on them, which
        makes `upstream_s` per fresh example if all of them were always busy; `skipped` bad examples.
        """
        latest = self._latest
        ages = np.zeros(1) if latest is None else (latest.fresh.max() - latest.fresh) * self._schedule.lanes
        return {
            "fresh": self._fresh,
            "echoed": self._echoed,
            "held": self._buffer.held,
            "buffer_bytes": self._buffer.bytes,
            "age": float(ages.mean()),
            "orders": self._pending,  # named like its metric, train/echo/orders
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
        """Drop all examples; pending requests are left to the preparer."""
        self._lanes.clear()
        self._buffer = ExampleBuffer(self._device, 0)

    def _request_ahead(self) -> None:
        depth = self._depth or max(_LEAST_DEPTH, 2 * self._preparer.processes)
        while self._pending < depth:
            # Lanes advance together, so the one with the fewest requested examples runs dry first.
            self._request(min(self._lanes.values(), key=lambda lane: (lane.requested, lane.batches_away)))

    def _request(self, lane: _Lane) -> None:
        fresh = lane.next_needed(self._request_examples)
        pass_number, index = self._schedule.order.example_of(lane.number, fresh)
        lane.pending.append((self._preparer.submit(PrepareRequest(self._split, pass_number, index)), fresh))
        self._pending += 1

    def _receive(self, lane: _Lane) -> None:
        """Store the arrays of a lane's oldest pending request."""
        if not lane.pending:
            self._request(lane)
        pending, fresh = lane.pending.popleft()
        self._pending -= 1
        started = time.perf_counter()
        arrays = self._preparer.collect(pending)
        self.waited_s += time.perf_counter() - started
        self._buffer.release(lane.keep(fresh, self._buffer.put(arrays)))
        self._request_examples = self._fitting(arrays)

    def _fitting(self, arrays: PreparedArrays) -> int:
        """Examples of a request that is neither too large nor too long, judged by one that was collected."""
        examples, stats = len(next(iter(arrays.values()))), self._preparer.stats
        by_size = _REQUEST_BYTES * examples // max(1, sum(array.nbytes for array in arrays.values()))
        by_time = int(_REQUEST_S * stats.examples / max(stats.work_s, 1e-9))
        return max(1, min(_REQUEST_EXAMPLES, by_size, by_time))


class _Lane:
    """Places of a lane's examples: in a pending request, or in a row of the buffer."""

    def __init__(self, schedule: Schedule, number: int, position: int, place: int) -> None:
        self.number = number
        self.batches_away = (number - position) % schedule.lanes
        self.pending: deque[tuple[Any, Ints]] = deque()
        self.requested = 0
        self._schedule = schedule
        lane_step = (position + self.batches_away) // schedule.lanes
        self._segment = schedule.segment_of(lane_step)
        self._floor = schedule.first_live(lane_step)
        self._rows = np.full(self._ring_size(), -1)  # fresh number n has its place at n mod size
        self._first, self._following = schedule.needs(number, lane_step)
        # Lanes begin with requests of different lengths, so that later ones are not all due at one lane step.
        sizes = max(1, _REQUEST_EXAMPLES // schedule.micro)
        self._next_size = min(_REQUEST_EXAMPLES, schedule.micro * (1 + place % sizes))

    def next_needed(self, most: int) -> Ints:
        """Fresh numbers of the next request, `most` at most."""
        size, self._next_size = min(most, self._next_size), _REQUEST_EXAMPLES
        self.requested += size
        first, self._first = self._first[:size], self._first[size:]
        begin, self._following = self._following, self._following + size - len(first)
        return np.concatenate([first, np.arange(begin, self._following)])

    def enter(self, lane_step: int) -> Ints:
        """Begin a lane step; returns the rows that are not needed after a change of the factor there."""
        segment = self._schedule.segment_of(lane_step)
        if segment == self._segment:
            return np.zeros(0, np.int64)
        self._segment = segment
        floor = self._schedule.first_live(lane_step)
        dropped = self.forget(np.arange(self._schedule.first_live(lane_step - 1), floor))
        self._floor = floor
        kept = np.arange(floor, floor + len(self._rows))
        before, self._rows = self._rows, np.full(max(len(self._rows), self._ring_size()), -1)
        self._rows[kept % len(self._rows)] = before[kept % len(before)]
        return dropped

    def keep(self, fresh: Ints, rows: Ints) -> Ints:
        """Record the rows of examples; returns the rows of those that are no longer needed."""
        needed = fresh >= self._floor
        self._rows[fresh[needed] % len(self._rows)] = rows[needed]
        return rows[~needed]

    def rows(self, fresh: Ints) -> Ints | None:
        """Rows of examples; None while one of them has not arrived."""
        rows = self._rows[fresh % len(self._rows)]
        return None if rows.min() < 0 else rows

    def forget(self, fresh: Ints) -> Ints:
        """Rows of examples that are not served again."""
        places = fresh % len(self._rows)
        rows = self._rows[places]
        self._rows[places] = -1
        return rows[rows >= 0]

    def _ring_size(self) -> int:
        return self._schedule.span() + 2 * _REQUEST_EXAMPLES
