"""The preprocessing pool: Ray actors on any node of the cluster, which prepare the examples of requests.

Preparing has no side effects. Ray restarts an actor that dies and repeats its requests; an actor that cannot
be restarted is left out and its requests go to the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError

from data_echo.errors import DataError
from data_echo.prepare.example_form import PreparedArrays
from data_echo.prepare.preparer import (
    PreparedResult,
    PrepareRequest,
    PrepareStats,
    PrepareWorker,
    PreparingTask,
)

# Fractions of its time that a worker waits: above the first its pool is too small, below the second it may be
# too large.
_WAITING, _IDLE = 0.1, 0.01
_BUSY = 0.7  # the fraction of their time that actors may work after one has left


class PoolActor:
    """One process of the pool.

    Args:
        make_task: makes the task; called with the first request, so that its errors come back like any other.
        seed, skip_bad: see `PrepareWorker`.
    """

    def __init__(self, make_task: Callable[[], PreparingTask], seed: int, skip_bad: bool) -> None:
        self._worker = PrepareWorker(make_task, seed, skip_bad)
        self._busy_s = 0.0

    def ready(self) -> None:
        """Return as soon as the process has started."""

    def prepare(self, request: PrepareRequest) -> tuple[PreparedResult | DataError, float]:
        """Prepare a request; returns also the seconds that this actor has worked in all, for all workers.

        A `DataError` is returned, not raised, since Ray would wrap it in a traceback.
        """
        started = time.perf_counter()
        try:
            done: PreparedResult | DataError = self._worker.prepare(request)
        except DataError as error:
            done = error
        self._busy_s += time.perf_counter() - started
        return done, self._busy_s


@dataclass(frozen=True)
class Growth:
    """Growth of a pool beyond its first actors. Can be sent to workers, which share the actors that they add.

    Args:
        name: the pool's, unique in the cluster's namespace.
        most: actors in all.
        make_task, seed, skip_bad, options: as the pool was started with.
        window_s: seconds over which demand is measured.
    """

    name: str
    most: int
    make_task: Callable[[], PreparingTask]
    seed: int
    skip_bad: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    window_s: float = 5.0

    def actor(self, number: int) -> Any:
        """Handle of the pool's actor of a number, which is started unless another worker has started it."""
        named = {"name": f"{self.name}-{number}", "get_if_exists": True, **self.options}
        return _actor(self.make_task, self.seed, self.skip_bad, named)


def start_pool(
    make_task: Callable[[], PreparingTask], seed: int, size: int, *, skip_bad: bool = False, **options: Any
) -> list[Any]:
    """Start actors, spread over the nodes; returns their handles, which can be sent to workers.

    Args:
        make_task: makes the task in each actor; picklable.
        seed, skip_bad: see `PrepareWorker`.
        size: how many.
        options: of Ray's actors; by default one CPU each, restarts and repeated requests without limit.

    Raises:
        DataError: the size is below 1.
    """
    if size < 1:
        raise DataError(f"pool: size: {size} actors", "at least 1")
    return [_actor(make_task, seed, skip_bad, options) for _ in range(size)]


def _actor(make_task: Callable[[], PreparingTask], seed: int, skip_bad: bool, options: dict[str, Any]) -> Any:
    lasting = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
    return ray.remote(PoolActor).options(**(lasting | options)).remote(make_task, seed, skip_bad)


@dataclass
class _PendingRequest:
    request: PrepareRequest
    actor: Any
    result: Future[tuple[PreparedResult | DataError, float]]


class PoolPreparer:
    """Prepares examples in a pool's actors.

    Args:
        actors: handles from `start_pool`; several workers may share them.
        growth: how the pool may grow and shrink with the time that this worker waits; None: never.
    """

    def __init__(self, actors: Sequence[Any], growth: Growth | None = None) -> None:
        self.stats = PrepareStats()
        self._pending_at = dict.fromkeys(actors, 0)
        self._demand = _Demand(growth, len(actors)) if growth else None

    @property
    def processes(self) -> int:
        """Actors that take requests."""
        return len(self._pending_at)

    def submit(self, request: PrepareRequest) -> _PendingRequest:
        """Send a request to the actor with the fewest of this worker.

        Raises:
            DataError: no actor is left.
        """
        if self._demand:
            for actor in self._demand.arrived():
                self._pending_at.setdefault(actor, 0)
        if not self._pending_at:
            raise DataError("pool: no actor is left", "a cluster with a CPU for each")
        actor = min(self._pending_at, key=self._pending_at.__getitem__)
        self._pending_at[actor] += 1
        # With a future, Ray fetches and unpacks the arrays while this thread does something else.
        return _PendingRequest(request, actor, actor.prepare.remote(request).future())

    def collect(self, pending: _PendingRequest) -> PreparedArrays:
        """Wait for a request's arrays; raises what `PrepareWorker.prepare` raised."""
        started = time.perf_counter()
        while True:
            try:
                result, busy_s = pending.result.result()
                break
            except (ActorDiedError, ActorUnavailableError, ObjectLostError):
                self._pending_at.pop(pending.actor, None)
                again = self.submit(pending.request)
                pending.actor, pending.result = again.actor, again.result
        if pending.actor in self._pending_at:
            self._pending_at[pending.actor] -= 1
        if self._demand:
            self._demand.waited(time.perf_counter() - started, pending.actor, busy_s)
            self._pending_at.pop(self._demand.leaving(), None)
        if isinstance(result, DataError):
            raise result
        return self.stats.count(result)

    def close(self) -> None:
        """Do nothing: the actors belong to the caller of `start_pool`."""


class _Demand:
    """Adds an actor while this worker waits, and removes one while fewer would do."""

    def __init__(self, growth: Growth, first: int) -> None:
        self._growth = growth
        self._first = first
        self._added: list[Any] = []
        self._joining: tuple[Any, Any] | None = None  # an actor that is starting, and its `ready` call
        self._begin()

    def waited(self, seconds: float, actor: Any, busy_s: float) -> None:
        """Record a wait, and the seconds that an actor has worked in all."""
        self._waited_s += seconds
        self._busy_s.setdefault(actor, []).append(busy_s)

    def arrived(self) -> list[Any]:
        """Actors that take requests from now on. Nothing waits for one that finds no CPU."""
        if self._joining and ray.wait([self._joining[1]], timeout=0)[0]:
            self._added.append(self._joining[0])
            self._joining = None
            self._begin()
            return self._added[-1:]
        return []

    def leaving(self) -> Any:
        """An actor that is to get no more requests, or None; once per window at most."""
        elapsed = time.perf_counter() - self._began
        if elapsed < self._growth.window_s or self._joining:
            return None
        size, waiting = self._first + len(self._added), self._waited_s / elapsed
        busy = sum(max(0.0, seconds[-1] - seconds[0]) for seconds in self._busy_s.values()) / elapsed
        self._begin()
        if waiting > _WAITING and size < self._growth.most:
            actor = self._growth.actor(size)
            self._joining = (actor, actor.ready.remote())
        elif waiting < _IDLE and self._added and busy < _BUSY * (size - 1):
            return self._added.pop()
        return None

    def _begin(self) -> None:
        """Begin a new window of measurement."""
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self._busy_s: dict[Any, list[float]] = {}
