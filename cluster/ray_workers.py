"""The worker group on Ray: plain actors in one placement group, and how they start again after a failure.

Law 1 makes restarts simple: where to go on is in the run's folder, on any number of workers. So a group that
has lost a place goes on with fewer, and grows again where there is room. Processes that live through the
death of another one are used again, with all that they have imported.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.ray_places import Places
from cluster.watch import UNMEASURED, Watch, named
from trainer.errors import RunFailed
from trainer.run_folder import journal, layout
from trainer.run_folder.checkpoints import Checkpoints
from trainer.run_folder.outcome import PAUSED

if TYPE_CHECKING:
    from trainer.distributed.pulse import Report

MOST_RESTARTS = 3  # in a row without a new checkpoint
LOOK_INTERVAL_S = 0.2  # between looks at the cluster while it trains
STARTING_LOOK_S = 1.0  # and while workers start, whose cores it would take
SURVIVING_S = 10.0  # what workers have to notice that another one is gone, before they are replaced, too
ANSWERING_S = 1.0  # and to say that they are free for the next attempt
STARTING_S = 60.0  # what the others have to come up, where one died while it started
WATCH = "watch"  # the thread in which workers answer while they train


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

    def ready(self) -> tuple[str, str]:
        """The node that it runs on, and an address there at which a group can meet; once it is ready."""
        import ray
        from ray._common.network_utils import find_free_port

        address = f"tcp://{ray.util.get_node_ip_address()}:{find_free_port()}"
        return ray.get_runtime_context().get_node_id(), address

    def train(
        self, spec: Any, pool: Any, standing: tuple[int, int, int], meeting_point: str, began_at: float
    ) -> str:
        """Meet the others, then train as one worker of the group; the status with which that ended.

        Args:
            pool: arguments of `PoolPreparer`.
            standing: rank, number of workers, rank among those of this node.
        """
        import torch.distributed as dist

        from data_echo.prepare.ray_pool import PoolPreparer
        from trainer.distributed.pulse import Pulse
        from trainer.worker import run_worker

        self.pulse = Pulse()
        rank, size, local_rank = standing
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
                name = f"{size} worker{'s' * (size > 1)}"
                journal.append(folder, "stage", name=name, seconds=time.time() - began_at)
            return run_worker(spec, PoolPreparer(*pool), self.pulse).status
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class WorkerActors:
    """The workers of a run, each in one of its places, and how they start again with as many as there is room
    for.

    Args:
        lost: what of the cluster has died, if anything.
    """

    def __init__(self, places: Places, lost: Callable[[], str | None]):
        self.places, self.lost = places, lost
        self.workers: dict[int, Any] = {}  # by place; their order is that of the ranks
        self.coming: dict[int, tuple[Any, Future]] = {}  # that start while the others train
        self.size = 0  # of the last attempt's group

    def train(self, spec: Any, pool: Any, began_at: float, is_ours: bool) -> None:
        """Train, and start again: with the survivors and with new workers in the place of dead ones, with
        fewer where places are lost, with more where they come back.

        Args:
            is_ours: whether the cluster is this machine's, where a file can be the meeting point.

        Raises:
            RunFailed: it failed too often, or the cluster is gone.
        """
        restarts, newest = 0, _newest_step(spec.folder)
        while (failure := self._attempt(spec, pool, began_at, is_ours)) is not None:
            if isinstance(failure, RunFailed):
                raise failure
            before, newest = newest, _newest_step(spec.folder)
            began_at = time.time()
            if isinstance(failure, _MoreRoom):
                continue
            restarts = 1 if newest > before else restarts + 1
            if restarts > MOST_RESTARTS:
                often = f"{MOST_RESTARTS} restarts in a row brought no new checkpoint"
                raise RunFailed(f"{_in_a_line(failure)}; {often}")
            journal.append(spec.folder, "restart", reason=_in_a_line(failure), trace=str(failure))

    def close(self) -> None:
        """End all workers."""
        self._end(*self.workers)
        self._take_in_who_has_come()
        self._end(*self.workers)

    def _attempt(self, spec: Any, pool: Any, began_at: float, is_ours: bool) -> Exception | None:
        """Train once. None when all are done; else the failure that explains the others."""
        from ray.exceptions import RayError

        request = Path(spec.folder) / layout.REGROUP
        request.unlink(missing_ok=True)
        try:
            nodes, meeting_point = self._gathered(spec)
        except (RayError, WorkersHung) as error:  # one died while it started
            self._end_the_dead(STARTING_S)
            return error
        if is_ours:
            meeting_point = f"file://{spec.folder}/{layout.RAY}/{secrets.token_hex(8)}"
        ranked = [self.workers[place] for place in sorted(self.workers)]
        standings = standings_on(nodes)
        ranks = {
            worker.train.remote(spec, pool, standing, meeting_point, began_at).future(): standing[0]
            for worker, standing in zip(ranked, standings, strict=True)
        }
        pending = set(ranks)
        failures: list[Exception] = []
        deadline = float("inf")
        watch = Watch(self.size, spec.plan.recipe.run.hung_after_s, partial(_ask, ranked))
        while pending and time.monotonic() < deadline:
            done, pending = wait(pending, LOOK_INTERVAL_S, FIRST_COMPLETED)
            self._refuse_lost()
            failures += filter(None, (_failure(ranks[each], each) for each in done))
            if not failures and (hung := watch.look()) is not None:
                failures.append(WorkersHung(hung.reason))
                self._end(*(sorted(self.workers)[rank] for rank in hung.ranks))
            if failures and deadline == float("inf"):
                deadline = time.monotonic() + SURVIVING_S
            if self._more_can_join():
                request.touch()
        if failures:
            self._end_the_dead(ANSWERING_S)
        return min(failures, key=_explains_others, default=None)

    def _gathered(self, spec: Any) -> tuple[list[str], str]:
        """A worker in each place that can be used, ready; their nodes, by rank, and where they can meet."""
        answers = None
        while answers is None:
            self._take_in_who_has_come()
            usable = self.places.wait(self._refuse_lost)
            self._end(*(self.workers.keys() - set(usable)))
            for place in usable:
                if place not in self.workers:
                    self.workers[place] = self._started(place)
            answers = self._answers(UNMEASURED * spec.plan.recipe.run.hung_after_s)
        before, self.size = self.size, len(answers)
        if before not in (0, self.size):
            more = f"there is room for {self.size - before} more"
            reason = more if self.size > before else f"there is no more room for {before - self.size}"
            journal.append(spec.folder, "resized", workers=self.size, reason=reason)
        return [node for node, _ in answers], answers[0][1]

    def _more_can_join(self) -> bool:
        """Start workers in places that have come free; whether there are some, and all are ready."""
        for place in self.places.new_further(self.workers.keys() | self.coming.keys()):
            worker = self._started(place)
            self.coming[place] = worker, worker.ready.remote().future()
        if not self.coming or not all(ready.done() for _, ready in self.coming.values()):
            return False
        died = [place for place, (_, ready) in self.coming.items() if ready.exception() is not None]
        for place in died:  # others may start there later; this run goes on without
            del self.coming[place]
        return bool(self.coming)

    def _take_in_who_has_come(self) -> None:
        self.workers |= {place: worker for place, (worker, _) in self.coming.items()}
        self.coming.clear()

    def _started(self, place: int) -> Any:
        import ray

        actor: Any = ray.remote(concurrency_groups={WATCH: 1})(Worker)  # type: ignore[call-overload]
        return self.places.started(actor, place)

    def _end(self, *places: int) -> None:
        import ray

        for place in places:
            ray.kill(self.workers.pop(place))

    def _end_the_dead(self, patience_s: float) -> None:
        """End each that is dead, or does not answer: it is busy with the attempt that failed."""
        import ray

        ready = {place: worker.ready.remote() for place, worker in self.workers.items()}
        deadline = time.monotonic() + patience_s
        for place, answer in ready.items():
            try:
                ray.get(answer, timeout=max(0.0, deadline - time.monotonic()))
            except Exception:
                self._end(place)

    def _answers(self, patience_s: float) -> list[tuple[str, str]] | None:
        """What the workers say when they are ready, by rank; None where a place is lost before that.

        Waited for as futures: Ray itself would wait for a cluster that has died. Those that are not ready in
        time hang, and are ended.
        """
        pending = {self.workers[place].ready.remote().future(): place for place in sorted(self.workers)}
        deadline = time.monotonic() + patience_s
        while waiting := wait(pending, STARTING_LOOK_S).not_done:
            self._refuse_lost()
            late = sorted(pending[each] for each in waiting)
            if not all(map(self.places.is_usable, late)):
                return None
            if time.monotonic() > deadline:
                ranks = [sorted(self.workers).index(place) for place in late]
                self._end(*late)
                raise WorkersHung(f"{named(ranks)} started for {patience_s:.0f} s and did not come up")
        failed = [place for each, place in pending.items() if each.exception() is not None]
        if not all(map(self.places.is_usable, failed)):
            return None
        return [each.result() for each in pending]

    def _refuse_lost(self) -> None:
        if (what := self.lost()) is not None:
            raise RunFailed(what)


class _WorkerDied(Exception):  # noqa: N818
    """The process of a worker has ended, or its node has."""


class _MoreRoom(Exception):  # noqa: N818
    """The group has saved a checkpoint and is to start again with more workers."""


def standings_on(nodes: Sequence[str]) -> list[tuple[int, int, int]]:
    """Rank, number of workers and rank among those of its node, of each worker by the node that it is on."""
    return [(rank, len(nodes), nodes[:rank].count(node)) for rank, node in enumerate(nodes)]


def _ask(workers: list[Any], rank: int) -> Future[Report]:
    return workers[rank].report.options(concurrency_group=WATCH).remote().future()


def _failure(rank: int, done: Future) -> Exception | None:
    """What went wrong with a worker's training; None where nothing did."""
    from ray.exceptions import RayActorError

    error = done.exception()
    if error is None:
        return _MoreRoom() if done.result() == PAUSED else None
    if isinstance(error, RayActorError):
        return _WorkerDied(f"worker {rank} died ({_in_a_line(error)})")
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, RunFailed) else error if isinstance(error, Exception) else None


def _explains_others(failure: Exception) -> int:
    """Order of failures: a run that stopped itself, a worker that died, and what the others made of that."""
    order = {RunFailed: 0, WorkersHung: 0, _WorkerDied: 1, _MoreRoom: 3}
    return next((place for kind, place in order.items() if isinstance(failure, kind)), 2)


def _newest_step(folder: str) -> str:
    newest = Checkpoints(Path(folder) / layout.CHECKPOINTS, keep=1).newest_name()
    return newest or ""


def _in_a_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def resources_of_each(device: str) -> dict[str, float]:
    """What each worker reserves: a CPU, and a GPU where the cluster has any and the recipe allows it."""
    import ray

    has_gpus = device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    return {"CPU": 1, "GPU": 1} if has_gpus else {"CPU": 1}
