"""The preprocessing pool in processes of this machine, for runs without Ray."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from data_echo.errors import DataError
from data_echo.prepare.example_form import PreparedArrays
from data_echo.prepare.preparer import (
    PreparedResult,
    PrepareRequest,
    PrepareStats,
    PrepareWorker,
    PreparingTask,
)

_worker: PrepareWorker  # one in each process of the pool


@dataclass
class _PendingRequest:
    request: PrepareRequest
    result: Future[PreparedResult]


class ProcessPreparer:
    """Prepares examples in processes; one that dies is replaced and its requests are repeated.

    Args:
        make_task: makes the task in each process; picklable.
        seed, skip_bad: see `PrepareWorker`.
        processes: how many.

    Raises:
        DataError: there are no processes.
    """

    def __init__(
        self, make_task: Callable[[], PreparingTask], seed: int, processes: int, *, skip_bad: bool = False
    ) -> None:
        if processes < 1:
            raise DataError(f"pool: processes: {processes}", "at least 1")
        self.processes = processes
        self.stats = PrepareStats()
        self._worker_arguments = (make_task, seed, skip_bad)
        self._executor = self._started()

    def submit(self, request: PrepareRequest) -> _PendingRequest:
        """Start a request."""
        return _PendingRequest(request, self._submitted(request))

    def collect(self, pending: _PendingRequest) -> PreparedArrays:
        """Wait for a request's arrays; raises what `PrepareWorker.prepare` raised."""
        while True:
            try:
                return self.stats.count(pending.result.result())
            except BrokenProcessPool:
                pending.result = self._submitted(pending.request)

    def close(self) -> None:
        """End the processes."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submitted(self, request: PrepareRequest) -> Future[PreparedResult]:
        try:
            return self._executor.submit(_prepare, request)
        except BrokenProcessPool:
            self._executor.shutdown(wait=True)
            self._executor = self._started()
            return self._executor.submit(_prepare, request)

    def _started(self) -> ProcessPoolExecutor:
        # Each gets a fresh interpreter: a fork of a process that holds threads or CUDA may hang.
        fresh = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self.processes, fresh, _begin, self._worker_arguments)


def _begin(make_task: Callable[[], PreparingTask], seed: int, skip_bad: bool) -> None:
    global _worker
    _worker = PrepareWorker(make_task, seed, skip_bad)


def _prepare(request: PrepareRequest) -> PreparedResult:
    return _worker.prepare(request)
