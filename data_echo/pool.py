"""The preprocessing pool: Ray actors on any node of the cluster that turn orders into blocks.

Orders are pure work. Ray restarts an actor that dies and sends it its orders again; an actor that is gone for
good is left out and its orders go to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError

from data_echo.errors import DataError
from data_echo.preparer import Block, Order, Prepared, Prepares, Tally, Workbench


class PoolActor:
    """One process of the pool.

    Args:
        make_task: gives the task; called with the first order, so that its errors come back like any other.
        seed, skip_bad: see `Workbench`.
    """

    def __init__(self, make_task: Callable[[], Prepares], seed: int, skip_bad: bool) -> None:
        self._workbench = Workbench(make_task, seed, skip_bad)

    def prepare(self, order: Order) -> Prepared | DataError:
        """Do an order; what is wrong with it is returned, since Ray would bury it in a traceback."""
        try:
            return self._workbench.prepare(order)
        except DataError as error:
            return error


def start_pool(
    make_task: Callable[[], Prepares], seed: int, size: int, *, skip_bad: bool = False, **options: Any
) -> list[Any]:
    """Start actors, spread over the nodes; returns their handles, which can be sent to workers.

    Args:
        make_task: gives the task in each actor; picklable.
        seed, skip_bad: see `Workbench`.
        size: how many.
        options: of Ray's actors; by default one CPU each, restarted and their orders repeated without end.
    """
    if size < 1:
        raise DataError(f"pool: size: {size} actors; at least 1")
    settings = {
        "num_cpus": 1,
        "max_restarts": -1,
        "max_task_retries": -1,
        "scheduling_strategy": "SPREAD",
        **options,
    }
    actor = ray.remote(PoolActor).options(**settings)
    return [actor.remote(make_task, seed, skip_bad) for _ in range(size)]


@dataclass
class _Ticket:
    order: Order
    actor: Any
    result: Any


class PoolPreparer:
    """Prepares examples in a pool's actors.

    Args:
        actors: handles from `start_pool`; several workers may share them.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self.tally = Tally()
        self._orders_at = dict.fromkeys(actors, 0)

    @property
    def processes(self) -> int:
        """Actors that are known to live."""
        return len(self._orders_at)

    def order(self, order: Order) -> _Ticket:
        """Hand in an order, to the actor with the fewest of ours."""
        if not self._orders_at:
            raise DataError("pool: no actor is left; a cluster with a CPU for each")
        actor = min(self._orders_at, key=self._orders_at.__getitem__)
        self._orders_at[actor] += 1
        return _Ticket(order, actor, actor.prepare.remote(order))

    def collect(self, ticket: _Ticket) -> Block:
        """Wait for an order's block."""
        while True:
            try:
                prepared = ray.get(ticket.result)
            except (ActorDiedError, ActorUnavailableError, ObjectLostError):
                self._orders_at.pop(ticket.actor, None)
                again = self.order(ticket.order)
                ticket.actor, ticket.result = again.actor, again.result
                continue
            if ticket.actor in self._orders_at:
                self._orders_at[ticket.actor] -= 1
            if isinstance(prepared, DataError):
                raise prepared
            return self.tally.count(prepared)

    def close(self) -> None:
        """Nothing is held; the actors belong to whoever started them."""
