"""Trials in this process, one group of one worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from cluster.experiments.course import Order
from cluster.experiments.runner import Runner
from cluster.experiments.shared_data import TaskInputs
from cluster.experiments.trials import Trial
from trainer.distributed.group import WorkerGroup


class LocalGroups:
    """The group that this process is."""

    def __init__(self, growth: float, group: WorkerGroup, inputs: TaskInputs | None = None) -> None:
        self.runner = Runner(growth, group, inputs)

    def submit(self, orders: Sequence[Order]) -> Future[list[Trial]]:
        """Train now."""
        future: Future[list[Trial]] = Future()
        future.set_result(self.runner.run(orders))
        return future


@contextmanager
def in_process(growth: float, device: str, inputs: TaskInputs) -> Iterator[LocalGroups]:
    """The group of this process, which has loaded `inputs` already."""
    with WorkerGroup.joined(device) as group:
        yield LocalGroups(growth, group, inputs)
