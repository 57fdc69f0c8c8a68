"""Training on Ray: workers, pool, and how they start again.

The workers are Ray Train's, which places them, notices when one dies and starts the group again; where to go
on is in the run's folder. Everything that is particular to this version of Ray Train stands in this module.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from cluster.driver import LaunchContext, Launcher
from cluster.ray_cluster import connected, lost_process
from cluster.reach import refuse_silent_cluster
from trainer.errors import RunFailed, UserError
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.journal import Journal

MOST_RESTARTS = 3  # of the worker group, after a worker or its node died
WORKERS_PER_CORE = 2
LOOK_INTERVAL_S = 0.2  # between looks at the cluster's processes while it trains
CALM = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the user's relative paths are relative to the folder of the command
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asks for no GPU sees none
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not 15: training is what the machine is for
    "RAY_DEDUP_LOGS": "0",  # the log holds all that the workers print
}


def on(address: str | None) -> Launcher:
    """How to launch on the cluster at `address`; None: on one of our own."""
    return partial(launch, address=address)


def address_of(address: str | None) -> str | None:
    """The address of the cluster to use: the one named, else RAY_ADDRESS; None for one of our own.

    UserError where nobody answers there.
    """
    named = address or os.environ.get("RAY_ADDRESS")
    if named is None or named == "local":
        return None
    refuse_silent_cluster(named, "--address" if address else "RAY_ADDRESS")
    return named


def refuse_what_does_not_fit(recipe: Recipe) -> None:
    """Refuse more workers than this machine can carry."""
    import torch

    gpus = torch.cuda.device_count() if recipe.run.device != "cpu" else 0
    cores = os.cpu_count() or 1
    most = gpus or WORKERS_PER_CORE * cores
    has = f"{gpus} GPUs" if gpus else f"{cores} cores, for at most {WORKERS_PER_CORE} workers each"
    if recipe.run.device == "cuda" and not gpus:
        raise UserError("run.device: is cuda, and this machine has no GPU; give auto or cpu")
    if recipe.run.workers > most:
        raise UserError(
            f"run.workers: is {recipe.run.workers}, and this machine has {has}; "
            f"give {most} or less, or the --address of a larger cluster"
        )


def launch(context: LaunchContext, address: str | None) -> None:
    """Train on Ray, and leave nothing running."""
    os.environ.update(CALM)
    with connected(context, address):
        began_at = time.time()
        with context.console.waiting(f"starting {context.recipe.run.workers} workers"):
            _in_background(partial(_train, context, began_at, is_ours=address is None))


def _in_background(work: Callable[[], None]) -> None:
    """Run in a thread and wait for it. Ray Train takes SIGINT over where it runs in the main thread."""
    failures: list[BaseException] = []

    def body() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=body, name="Ray Train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_INTERVAL_S)
        if (lost := lost_process()) is not None:
            raise RunFailed(lost)
    if failures:
        raise failures[0]


def _train(context: LaunchContext, began_at: float, is_ours: bool) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from data_echo.prepare.ray_pool import Growth, start_pool

    recipe, make_task = context.recipe, context.spec.make_task
    pool, skip_bad = recipe.run.pool, recipe.task.skip_bad > 0
    actors = start_pool(make_task, recipe.seed, pool.min, skip_bad=skip_bad)
    growth = Growth(f"pool of {context.folder.name}", pool.max, make_task, recipe.seed, skip_bad)
    storage = context.folder / layout.RAY
    shutil.rmtree(storage, ignore_errors=True)
    trainer = _trainer_class()(
        work,
        train_loop_config={
            "spec": context.spec,
            "actors": actors,
            "growth": growth if pool.max > pool.min else None,
            "began_at": began_at,
            "is_ours": is_ours,
        },
        scaling_config=ScalingConfig(num_workers=recipe.run.workers, resources_per_worker=_resources(recipe)),
        run_config=RunConfig(
            name=context.folder.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=MOST_RESTARTS),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunFailed(_why(error)) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _trainer_class() -> Any:
    """Ray Train's trainer without what only its data sets and lasting clusters need, a process each.

    The cleaner of placement groups stays where the cluster outlives the run.
    """
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [each for each in super()._create_default_callbacks() if not isinstance(each, left_out)]

    return Trainer


def _resources(recipe: Recipe) -> dict[str, float]:
    import ray

    has_gpus = recipe.run.device != "cpu" and ray.cluster_resources().get("GPU", 0) > 0
    return {"CPU": 1, "GPU": 1} if has_gpus else {"CPU": 1}


def _why(error: Exception) -> str:
    failures = getattr(error, "worker_failures", {})
    told = [f"worker {rank}: {str(failure).strip().splitlines()[-1]}" for rank, failure in failures.items()]
    return "; ".join(told) or str(error).strip().splitlines()[-1]


def work(config: dict[str, Any]) -> None:
    """What each worker of Ray Train does: meet the others, then train as one worker of the group."""
    import ray.train
    import torch.distributed as dist
    from ray.train.collective import broadcast_from_rank_zero

    from data_echo.prepare.ray_pool import PoolPreparer
    from trainer.worker import run_worker

    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    folder = Path(config["spec"].folder)
    if not folder.is_dir():
        raise RunFailed(
            f"checkpoint.dir: {folder} is not there on every node; give a folder that all nodes share"
        )
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))  # whatever the node's shell had there
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    if size > 1:
        meeting_point = broadcast_from_rank_zero(
            _meeting_point(folder, config["is_ours"]) if rank == 0 else None
        )
        dist.init_process_group(init_method=meeting_point, rank=rank, world_size=size)
    if rank == 0:
        journal = Journal(folder)
        journal.write("stage", name=f"{size} workers", seconds=time.time() - config["began_at"])
        journal.close()
    run_worker(config["spec"], PoolPreparer(config["actors"], config["growth"]))


def _meeting_point(folder: Path, is_ours: bool) -> str:
    """Where the workers meet: on one machine in a file, which opens no port; across machines an address."""
    if is_ours:
        return f"file://{folder}/{layout.RAY}/{secrets.token_hex(8)}"
    import ray
    from ray._common.network_utils import find_free_port

    return f"tcp://{ray.util.get_node_ip_address()}:{find_free_port()}"
