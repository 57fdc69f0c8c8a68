"""The preprocessing pool in processes of this machine, for runs without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from data_echo.errors import DataError
from data_echo.prepare.preparer import (
    Prepared,
    PreparedArrays,
    PrepareRequest,
    Prepares,
    PrepareStats,
    PrepareWorker,
)

_workbench: PrepareWorker  # one in each process of the pool


@dataclass
class _Ticket:
    order: PrepareRequest
    result: Future[Prepared]


class ProcessPreparer:
    """Prepares examples in processes; one that dies is replaced and what it had to do is done again.

    Args:
        make_task: gives the task in each process; picklable.
        seed, skip_bad: see `PrepareWorker`.
        processes: how many.
    """

    def __init__(
        self, make_task: Callable[[], Prepares], seed: int, processes: int, *, skip_bad: bool = False
    ) -> None:
        if processes < 1:
            raise DataError(f"pool: processes: {processes}; at least 1")
        self.processes = processes
        self.stats = PrepareStats()
        self._workbench = (make_task, seed, skip_bad)
        self._executor = self._started()

    def submit(self, order: PrepareRequest) -> _Ticket:
        """Hand in an order."""
        return _Ticket(order, self._submitted(order))

    def collect(self, ticket: _Ticket) -> PreparedArrays:
        """Wait for an order's block."""
        while True:
            try:
                return self.stats.count(ticket.result.result())
            except BrokenProcessPool:
                ticket.result = self._submitted(ticket.order)

    def close(self) -> None:
        """End the processes."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submitted(self, order: PrepareRequest) -> Future[Prepared]:
        try:
            return self._executor.submit(_prepared, order)
        except BrokenProcessPool:
            self._executor.shutdown(wait=True)
            self._executor = self._started()
            return self._executor.submit(_prepared, order)

    def _started(self) -> ProcessPoolExecutor:
        # A fresh interpreter each: a fork of a process that holds threads or CUDA may hang.
        fresh = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.processes, fresh, _begin, self._workbench)


def _begin(make_task: Callable[[], Prepares], seed: int, skip_bad: bool) -> None:
    global _workbench
    _workbench = PrepareWorker(make_task, seed, skip_bad)


def _prepared(order: PrepareRequest) -> Prepared:
    return _workbench.prepare(order)
