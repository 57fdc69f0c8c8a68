"""Worker groups on Ray that train the trials of a sweep side by side, each reserved whole. A group whose
worker dies is made anew, and trains the same trials again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cluster.experiments.course import Order
from cluster.experiments.trials import Trial
from cluster.ray_cluster import Phase, connected, lost_process
from cluster.ray_launcher import CALM
from cluster.ray_places import Places
from cluster.ray_workers import MOST_RESTARTS, Worker, resources_of_each, standings_on
from trainer.errors import RunFailed, UserError

if TYPE_CHECKING:
    from cluster.experiments.runner import Runner

LOOK_INTERVAL_S = 0.2  # between looks at the cluster


class TrialWorker(Worker):
    """One process of a group, which keeps data and choices from trial to trial."""

    def meet(self, standing: tuple[int, int, int], meeting_point: str, growth: float, device: str) -> None:
        """Join the others of the group.

        Args:
            standing: rank, number of workers, rank among those of this node.
            growth: of the steps from one evaluation to the next.
        """
        import torch.distributed as dist

        from cluster.experiments.runner import Runner
        from trainer.distributed.group import WorkerGroup

        rank, size, local_rank = standing
        os.environ["LOCAL_RANK"] = str(local_rank)
        if size > 1:
            dist.init_process_group(init_method=meeting_point, rank=rank, world_size=size)
        self.runner: Runner = Runner(growth, WorkerGroup.join(device))

    def run(self, orders: Sequence[Order]) -> list[Trial]:
        """Train trials with the group."""
        return self.runner.run(orders)


class TrialGroup:
    """`width` workers that train one trial, or one stack of them, at a time."""

    def __init__(
        self, width: int, resources: dict[str, float], growth: float, device: str, say: Callable[[str], None]
    ) -> None:
        self.growth, self.device = growth, device
        self.places = Places(width, width, resources, 0, say)
        self.workers: list[Any] = []
        self.is_over = False

    def run(self, orders: Sequence[Order]) -> list[Trial]:
        """Train trials, again where a worker dies."""
        from ray.exceptions import RayError

        for restart in range(MOST_RESTARTS + 1):
            try:
                if not self.workers:
                    self._start()
                return _answers([worker.run.remote(orders) for worker in self.workers])[0]
            except RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, UserError | RunFailed):
                    raise cause from None
                self.end()
                if restart == MOST_RESTARTS or self.is_over:
                    raise RunFailed(f"a group of workers failed: {str(error).splitlines()[-1]}") from error
        raise AssertionError("the last restart raises")

    def end(self) -> None:
        """End the workers."""
        import ray

        while self.workers:
            ray.kill(self.workers.pop())

    def close(self) -> None:
        """End the workers for good, and give their places back."""
        self.is_over = True
        self.end()
        self.places.close()

    def _start(self) -> None:
        import ray

        actor = ray.remote(TrialWorker)
        self.workers = [self.places.started(actor, place) for place in self.places.wait(_refuse_lost)]
        ready = _answers([worker.ready.remote() for worker in self.workers])
        meeting_point = ready[0][1]
        _answers(
            [
                worker.meet.remote(standing, meeting_point, self.growth, self.device)
                for worker, standing in zip(
                    self.workers, standings_on([node for node, _ in ready]), strict=True
                )
            ]
        )


class RayGroups:
    """Some groups, each trains what is submitted once it is free."""

    def __init__(self, groups: Sequence[TrialGroup]) -> None:
        self.groups = groups
        self._free: SimpleQueue[TrialGroup] = SimpleQueue()
        for group in groups:
            self._free.put(group)
        self._threads = ThreadPoolExecutor(len(groups), thread_name_prefix="group")

    def submit(self, orders: Sequence[Order]) -> Future[list[Trial]]:
        """See `sweep.Groups`."""
        return self._threads.submit(self._train, orders)

    def close(self) -> None:
        """End all groups; what they train is lost."""
        for group in self.groups:
            group.close()
        self._threads.shutdown(cancel_futures=True)

    def _train(self, orders: Sequence[Order]) -> list[Trial]:
        group = self._free.get()
        try:
            return group.run(orders)
        finally:
            self._free.put(group)


@contextmanager
def on_ray(
    address: str | None,
    count: int,
    width: int,
    growth: float,
    device: str,
    phase: Phase,
    say: Callable[[str], None],
) -> Iterator[RayGroups]:
    """`count` groups of `width` workers on the cluster at `address`, or for None on one of our own."""
    os.environ.update(CALM)
    with connected(address, count * width, phase, say):
        resources = resources_of_each(device)
        groups = RayGroups([TrialGroup(width, resources, growth, device, say) for _ in range(count)])
        try:
            yield groups
        finally:
            if lost_process() is None:
                groups.close()


def _answers(calls: Sequence[Any]) -> list[Any]:
    """What calls return, waited for as futures: Ray itself would wait for a cluster that has died."""
    pending = [call.future() for call in calls]
    while wait(pending, LOOK_INTERVAL_S).not_done and not any(_failed(each) for each in pending):
        _refuse_lost()
    return [each.result() for each in pending]


def _failed(future: Future) -> bool:
    return future.done() and future.exception() is not None


def _refuse_lost() -> None:
    if (what := lost_process()) is not None:
        raise RunFailed(what)
