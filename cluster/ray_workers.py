"""The worker group on Ray: plain actors in one placement group, and how they start again after a failure.

Law 1 makes restarts simple: where to go on is in the run's folder, on any number of workers. Processes that
live through the death of another one are used again, with all that they have imported.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.watch import Hung, Watch
from trainer.errors import RunFailed
from trainer.run_folder import layout
from trainer.run_folder.checkpoints import Checkpoints
from trainer.run_folder.journal import Journal

if TYPE_CHECKING:
    from trainer.distributed.pulse import Report

MOST_RESTARTS = 3  # in a row without a new checkpoint
LOOK_INTERVAL_S = 0.2  # between looks at the cluster while it trains
SURVIVING_S = 10.0  # what workers have to notice that another one is gone, before they are replaced, too
STARTING_S = 60.0  # what the others have to come up, where one died while it started
WATCH = "watch"  # the thread in which workers answer while they train
PLACING_S = 10.0  # until the user is told what the group waits for


class WorkersHung(Exception):  # noqa: N818
    """Workers did not move any more, and were ended."""


class Worker:
    """One process of the group. It outlives a failed attempt."""

    def __init__(self) -> None:
        import trainer.worker  # noqa: F401 (torch and the rest, while the other processes start)
        from trainer.distributed.pulse import Pulse

        self.pulse = Pulse()

    def report(self) -> Report:
        """What it does now. In a thread of its own, while `train` has another one."""
        return self.pulse.report()

    def node(self) -> str:
        """The node that it runs on, once it is ready."""
        import ray

        return ray.get_runtime_context().get_node_id()

    def meeting_point(self) -> str:
        """An address of this node at which the workers can meet."""
        import ray
        from ray._common.network_utils import find_free_port

        return f"tcp://{ray.util.get_node_ip_address()}:{find_free_port()}"

    def train(
        self, spec: Any, pool: Any, place: tuple[int, int, int], meeting_point: str, began_at: float
    ) -> None:
        """Meet the others, then train as one worker of the group.

        Args:
            pool: arguments of `PoolPreparer`.
            place: rank, number of workers, rank among those of this node.
        """
        import torch.distributed as dist

        from data_echo.prepare.ray_pool import PoolPreparer
        from trainer.distributed.pulse import Pulse
        from trainer.worker import run_worker

        self.pulse = Pulse()
        rank, size, local_rank = place
        folder = Path(spec.folder)
        if not folder.is_dir():
            raise RunFailed(
                f"checkpoint.dir: {folder} is not there on every node; give a folder that all nodes share"
            )
        os.environ["LOCAL_RANK"] = str(local_rank)
        try:
            if size > 1:
                dist.init_process_group(init_method=meeting_point, rank=rank, world_size=size)
            if rank == 0:
                _note(folder, "stage", name=f"{size} workers", seconds=time.time() - began_at)
            run_worker(spec, PoolPreparer(*pool), self.pulse)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class WorkerActors:
    """The actors of a run: `size` workers, and the pool's, reserved together or not at all."""

    def __init__(self, size: int, resources: dict[str, float], pool_size: int, say: Callable[[str], None]):
        import ray
        from ray.util.placement_group import placement_group

        self.size, self.resources = size, resources
        bundles = [resources] * size + [{"CPU": 1}] * pool_size
        self.reserved = placement_group(bundles, strategy="PACK")
        ready = self.reserved.ready()
        if not ray.wait([ready], timeout=PLACING_S)[0]:
            wanted = f"{size} workers with {resources} each and {pool_size} CPUs for the pool"
            say(f"waiting for {wanted}; the cluster has {_totals(ray.cluster_resources())} in all")
            ray.get(ready)
        self.workers = [self._started(rank) for rank in range(size)]

    def placed(self, bundle: int) -> Any:
        """Where an actor of a bundle goes: workers come first, then the pool's."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self.reserved, bundle)

    def train(self, spec: Any, pool: Any, began_at: float, is_ours: bool, lost: Callable[[], Any]) -> None:
        """Train, and start again with the survivors and with new workers in the place of dead ones.

        Args:
            is_ours: whether the cluster is this machine's, where a file can be the meeting point.
            lost: what of the cluster has died, if anything.

        Raises:
            RunFailed: it failed too often, or the cluster is gone.
        """
        restarts, newest = 0, _newest_step(spec.folder)
        while (failure := self._attempt(spec, pool, began_at, is_ours, lost)) is not None:
            if isinstance(failure, RunFailed):
                raise failure
            before, newest = newest, _newest_step(spec.folder)
            restarts = 1 if newest > before else restarts + 1
            if restarts > MOST_RESTARTS:
                often = f"{MOST_RESTARTS} restarts in a row brought no new checkpoint"
                raise RunFailed(f"{_in_a_line(failure)}; {often}")
            _note(spec.folder, "restart", reason=_in_a_line(failure))
            began_at = time.time()

    def close(self) -> None:
        """End all workers, and give back what was reserved."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for worker in self.workers:
            ray.kill(worker)
        remove_placement_group(self.reserved)

    def _started(self, rank: int) -> Any:
        import ray

        options = {"num_cpus": self.resources["CPU"], "num_gpus": self.resources.get("GPU", 0)}
        actor: Any = ray.remote(concurrency_groups={WATCH: 1})(Worker)  # type: ignore[call-overload]
        return actor.options(**options, scheduling_strategy=self.placed(rank)).remote()

    def _attempt(
        self, spec: Any, pool: Any, began_at: float, is_ours: bool, lost: Callable[[], Any]
    ) -> Exception | None:
        """Train once. None when all are done; else the failure that explains the others, with the group
        ready for the next attempt.
        """
        from ray.exceptions import RayError

        try:
            nodes = _answers([worker.node.remote() for worker in self.workers], lost)
            meeting_point = (
                f"file://{spec.folder}/{layout.RAY}/{secrets.token_hex(8)}"
                if is_ours
                else _answers([self.workers[0].meeting_point.remote()], lost)[0]
            )
        except RayError as error:  # one died while it started
            self._replace_the_dead(STARTING_S)
            return error
        places = [(rank, self.size, nodes[:rank].count(node)) for rank, node in enumerate(nodes)]
        pending = {
            worker.train.remote(spec, pool, place, meeting_point, began_at).future()
            for worker, place in zip(self.workers, places, strict=True)
        }
        failures: list[Exception] = []
        deadline = float("inf")
        watch = Watch(self.size, spec.plan.recipe.run.hung_after_s, self._ask)
        while pending and time.monotonic() < deadline:
            done, pending = wait(pending, LOOK_INTERVAL_S, FIRST_COMPLETED)
            if (what := lost()) is not None:
                raise RunFailed(what)
            failures += filter(None, map(_failure, done))
            if not failures and (hung := watch.look()) is not None:
                failures.append(WorkersHung(hung.reason))
                self._kill(hung)
            if failures and deadline == float("inf"):
                deadline = time.monotonic() + SURVIVING_S
        if failures:
            self._replace_the_dead(LOOK_INTERVAL_S)
        return min(failures, key=_explains_others, default=None)

    def _ask(self, rank: int) -> Future[Report]:
        return self.workers[rank].report.options(concurrency_group=WATCH).remote().future()

    def _kill(self, hung: Hung) -> None:
        import ray

        for rank in hung.ranks:
            ray.kill(self.workers[rank])

    def _replace_the_dead(self, patience_s: float) -> None:
        """A new worker for each that is dead, or does not answer: it is busy with the attempt that failed."""
        import ray

        ready = [worker.node.remote() for worker in self.workers]
        deadline = time.monotonic() + patience_s
        for rank, answer in enumerate(ready):
            try:
                ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except Exception:
                ray.kill(self.workers[rank])
                self.workers[rank] = self._started(rank)


def _answers(calls: Sequence[Any], lost: Callable[[], Any]) -> list[Any]:
    """What calls return, waited for as futures: Ray itself would wait for a cluster that has died."""
    pending = [call.future() for call in calls]
    while wait(pending, LOOK_INTERVAL_S).not_done:
        if (what := lost()) is not None:
            raise RunFailed(what)
    return [each.result() for each in pending]


def _failure(done: Future) -> Exception | None:
    """What went wrong with a call; None where nothing did."""
    error = done.exception()
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RunFailed) else error if isinstance(error, Exception) else None


def _explains_others(failure: Exception) -> int:
    """Order of failures: a run that stopped itself, a worker that died, and what the others made of that."""
    from ray.exceptions import RayActorError

    if isinstance(failure, RunFailed | WorkersHung):
        return 0
    return 1 if isinstance(failure, RayActorError) else 2


def _note(folder: str | Path, kind: str, **fields: Any) -> None:
    """A line in the journal of a run."""
    with closing(Journal(folder)) as journal:
        journal.write(kind, **fields)


def _newest_step(folder: str) -> str:
    newest = Checkpoints(Path(folder) / layout.CHECKPOINTS, keep=1).newest_name()
    return newest or ""


def _in_a_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _totals(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))


def resources_of_each(device: str) -> dict[str, float]:
    """What each worker reserves: a CPU, and a GPU where the cluster has any and the recipe allows it."""
    import ray

    has_gpus = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    return {"CPU": 1, "GPU": 1} if has_gpus else {"CPU": 1}
