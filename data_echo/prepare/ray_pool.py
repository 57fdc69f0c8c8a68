"""The preprocessing pool: Ray actors on any node of the cluster that turn orders into blocks.

Orders are pure work. Ray restarts an actor that dies and sends it its orders again; an actor that is gone for
good is left out and its orders go to the others.
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
from data_echo.prepare.preparer import (
    Prepared,
    PreparedArrays,
    PrepareRequest,
    Prepares,
    PrepareStats,
    PrepareWorker,
)

# Shares of its time that a worker waits: above the one its pool is too small, below the other maybe too big.
_WAITING, _IDLE = 0.1, 0.01
_BUSY = 0.7  # how busy the actors may be after one has left


class PoolActor:
    """One process of the pool.

    Args:
        make_task: gives the task; called with the first order, so that its errors come back like any other.
        seed, skip_bad: see `PrepareWorker`.
    """

    def __init__(self, make_task: Callable[[], Prepares], seed: int, skip_bad: bool) -> None:
        self._workbench = PrepareWorker(make_task, seed, skip_bad)
        self._busy_s = 0.0

    def ready(self) -> None:
        """Answer, now that the process is there."""

    def prepare(self, order: PrepareRequest) -> tuple[Prepared | DataError, float]:
        """Do an order; returns also the seconds that this actor has worked in all, for whomever.

        What is wrong with an order is returned too, since Ray would bury it in a traceback.
        """
        started = time.perf_counter()
        try:
            done: Prepared | DataError = self._workbench.prepare(order)
        except DataError as error:
            done = error
        self._busy_s += time.perf_counter() - started
        return done, self._busy_s


@dataclass(frozen=True)
class Growth:
    """How a pool may grow beyond the actors it began with. Can be sent to workers, which share what they add.

    Args:
        name: of the pool, its own within the cluster's namespace.
        most: actors in all.
        make_task, seed, skip_bad, options: as the pool was started with.
        window_s: seconds over which demand is measured.
    """

    name: str
    most: int
    make_task: Callable[[], Prepares]
    seed: int
    skip_bad: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    window_s: float = 5.0

    def actor(self, number: int) -> Any:
        """The pool's actor of a number, started unless another worker has done so."""
        named = {"name": f"{self.name}-{number}", "get_if_exists": True, **self.options}
        return _actor(self.make_task, self.seed, self.skip_bad, named)


def start_pool(
    make_task: Callable[[], Prepares], seed: int, size: int, *, skip_bad: bool = False, **options: Any
) -> list[Any]:
    """Start actors, spread over the nodes; returns their handles, which can be sent to workers.

    Args:
        make_task: gives the task in each actor; picklable.
        seed, skip_bad: see `PrepareWorker`.
        size: how many.
        options: of Ray's actors; by default one CPU each, restarted and their orders repeated without end.
    """
    if size < 1:
        raise DataError(f"pool: size: {size} actors; at least 1")
    return [_actor(make_task, seed, skip_bad, options) for _ in range(size)]


def _actor(make_task: Callable[[], Prepares], seed: int, skip_bad: bool, options: dict[str, Any]) -> Any:
    lasting = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
    return ray.remote(PoolActor).options(**(lasting | options)).remote(make_task, seed, skip_bad)


@dataclass
class _Ticket:
    order: PrepareRequest
    actor: Any
    result: Future[tuple[Prepared | DataError, float]]


class PoolPreparer:
    """Prepares examples in a pool's actors.

    Args:
        actors: handles from `start_pool`; several workers may share them.
        growth: how the pool may grow and shrink by what this worker waits; None: it stays as it is.
    """

    def __init__(self, actors: Sequence[Any], growth: Growth | None = None) -> None:
        self.stats = PrepareStats()
        self._orders_at = dict.fromkeys(actors, 0)
        self._demand = _Demand(growth, len(actors)) if growth else None

    @property
    def processes(self) -> int:
        """Actors that take orders."""
        return len(self._orders_at)

    def submit(self, order: PrepareRequest) -> _Ticket:
        """Hand in an order, to the actor with the fewest of ours."""
        if self._demand:
            for actor in self._demand.arrived():
                self._orders_at.setdefault(actor, 0)
        if not self._orders_at:
            raise DataError("pool: no actor is left; a cluster with a CPU for each")
        actor = min(self._orders_at, key=self._orders_at.__getitem__)
        self._orders_at[actor] += 1
        # As a future, Ray brings and unpacks the block while this thread does something else.
        return _Ticket(order, actor, actor.prepare.remote(order).future())

    def collect(self, ticket: _Ticket) -> PreparedArrays:
        """Wait for an order's block."""
        started = time.perf_counter()
        while True:
            try:
                prepared, busy_s = ticket.result.result()
                break
            except (ActorDiedError, ActorUnavailableError, ObjectLostError):
                self._orders_at.pop(ticket.actor, None)
                again = self.submit(ticket.order)
                ticket.actor, ticket.result = again.actor, again.result
        if ticket.actor in self._orders_at:
            self._orders_at[ticket.actor] -= 1
        if self._demand:
            self._demand.waited(time.perf_counter() - started, ticket.actor, busy_s)
            self._orders_at.pop(self._demand.leaving(), None)
        if isinstance(prepared, DataError):
            raise prepared
        return self.stats.count(prepared)

    def close(self) -> None:
        """Nothing is held; the actors belong to whoever started them."""


class _Demand:
    """Adds an actor while this worker waits, and lets one go while the pool could do with fewer."""

    def __init__(self, growth: Growth, first: int) -> None:
        self._growth = growth
        self._first = first
        self._added: list[Any] = []
        self._joining: tuple[Any, Any] | None = None  # an actor on its way, and what tells that it has come
        self._begin()

    def waited(self, seconds: float, actor: Any, busy_s: float) -> None:
        """Note a wait, and the seconds that an actor has worked in all."""
        self._waited_s += seconds
        self._busy_s.setdefault(actor, []).append(busy_s)

    def arrived(self) -> list[Any]:
        """Actors that take orders from now on. One that finds no CPU never comes; nobody waits for it."""
        if self._joining and ray.wait([self._joining[1]], timeout=0)[0]:
            self._added.append(self._joining[0])
            self._joining = None
            self._begin()
            return self._added[-1:]
        return []

    def leaving(self) -> Any:
        """An actor that is to get no more orders, once per window at most, or None."""
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
        """A new window."""
        self._began = time.perf_counter()
        self._waited_s = 0.0
        self._busy_s: dict[Any, list[float]] = {}
