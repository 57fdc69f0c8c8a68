"""Training on Ray: on a cluster of our own that ends with the run, or on one that is already there.

The workers are Ray Train's, which places them, notices when one dies and starts the group again; where to go
on is in the run's folder. Everything that is particular to this version of Ray Train stands in this module.

A cluster of our own listens on the loopback interface only, in all its processes, and knows no other token
than the one made for it.
"""

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from cluster.driver import LaunchContext
from trainer.errors import RunFailed, UserError
from trainer.recipe.schema import Recipe
from trainer.run_folder.journal import Journal

MOST_RESTARTS = 3  # of the worker group, after a worker or its node died
WORKERS_PER_CORE = 2
FILES = "lockstep-"  # how the folders of our own clusters begin, followed by the driver's process number
ENDING_S = 10.0  # what the last processes of a cluster may take to end
OURS = ("cluster", "data_echo", "optim", "trainer")
NOT_UPLOADED = ["/runs/", "/mlruns/", "mlflow.db*", ".git/", ".venv/", "__pycache__/"]
CALM = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # the user's relative paths are relative to the folder of the command
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # who asks for no GPU sees none
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # not 15: training is what the machine is for
    "RAY_DEDUP_LOGS": "0",  # the log holds all that the workers print
}
LOOPBACK_ONLY = {
    # What Ray sets on systems that cannot form clusters: node address 127.0.0.1, and every port bound to it.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",  # none of ours could use the processes that it starts
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
}


def on(address: str | None) -> Callable[[LaunchContext], None]:
    """How to launch on the cluster at `address`; None: on one of our own."""
    return partial(launch, address=address)


def address_of(address: str | None) -> str | None:
    """The address of the cluster to use: the one named, else RAY_ADDRESS; None for one of our own."""
    named = address or os.environ.get("RAY_ADDRESS")
    return None if named == "local" else named


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


def launch(run: LaunchContext, address: str | None) -> None:
    """Train on Ray, and leave nothing running."""
    os.environ.update(CALM)
    with _connected(run, address):
        began_at = time.time()
        with run.screen.waiting(f"starting {run.order.recipe.run.workers} workers"):
            _in_background(partial(_train, run, began_at, is_ours=address is None))


def _connected(run: LaunchContext, address: str | None) -> AbstractContextManager[None]:
    return _own_cluster(run) if address is None else _existing_cluster(run, address)


@contextmanager
def _own_cluster(run: LaunchContext) -> Iterator[None]:
    """A cluster on this machine that lives as long as the body and keeps its files in one folder."""
    _sweep()
    folder = Path(tempfile.mkdtemp(prefix=f"{FILES}{os.getpid()}-", dir="/tmp"))  # for sockets: a short path
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(LOOPBACK_ONLY, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    _make_importable(Path.cwd())
    settings = run.order.recipe.run
    try:
        with run.stage("Ray"):
            _start(
                address="local",
                num_cpus=settings.workers + settings.pool.max,  # logical: all of ours can be placed at once
                include_dashboard=False,
                _temp_dir=str(folder),
            )
        yield
    finally:
        _stop()
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder that processes which are about to end may still write to."""
    deadline = time.monotonic() + ENDING_S
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.1)


@contextmanager
def _existing_cluster(run: LaunchContext, address: str) -> Iterator[None]:
    """A cluster that somebody else started; our packages and the working folder are sent to its nodes."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # an open cluster has to be asked for, with "disabled"
    try:
        with run.stage(f"Ray at {address}"):
            _start(address=address, runtime_env=None if in_job() else code_for_workers())
        yield
    finally:
        _stop()


def _start(**options: Any) -> None:
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    signal.signal(signal.SIGTERM, handler)  # Ray has put one there that knows nothing of the run


def _stop() -> None:
    import ray

    ray.shutdown()


def _sweep() -> None:
    """Remove what clusters of drivers that were killed have left."""
    for folder in Path("/tmp").glob(f"{FILES}*-*"):
        owner = folder.name.removeprefix(FILES).partition("-")[0]
        if owner.isdecimal() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def in_job() -> bool:
    """Whether this process is the entry point of a Ray job, which has brought its code with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def code_for_workers() -> dict[str, Any]:
    """The runtime environment that brings the user's folder and our packages to other machines."""
    root = Path(__file__).resolve().parents[1]
    return {
        "working_dir": str(Path.cwd()),
        "py_modules": [str(root / name) for name in OURS],
        "excludes": NOT_UPLOADED,
    }


def _make_importable(folder: Path) -> None:
    """What is started from here finds the user's modules."""
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))


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
    thread.join()
    if failures:
        raise failures[0]


def _train(run: LaunchContext, began_at: float, is_ours: bool) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    from data_echo.prepare.ray_pool import Growth, start_pool

    recipe, make_task = run.order.recipe, run.order.make_task
    pool, skip_bad = recipe.run.pool, recipe.task.skip_bad > 0
    actors = start_pool(make_task, recipe.seed, pool.min, skip_bad=skip_bad)
    growth = Growth(f"pool of {run.folder.name}", pool.max, make_task, recipe.seed, skip_bad)
    storage = run.folder / ".ray"
    shutil.rmtree(storage, ignore_errors=True)
    trainer = _trainer_class()(
        work,
        train_loop_config={
            "order": run.order,
            "actors": actors,
            "growth": growth if pool.max > pool.min else None,
            "began_at": began_at,
            "is_ours": is_ours,
        },
        scaling_config=ScalingConfig(num_workers=recipe.run.workers, resources_per_worker=_resources(recipe)),
        run_config=RunConfig(
            name=run.folder.name,
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
    folder = Path(config["order"].folder)
    if not folder.is_dir():
        raise RunFailed(
            f"checkpoint.dir: {folder} is not there on every node; give a folder that all nodes share"
        )
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
    run_worker(config["order"], PoolPreparer(config["actors"], config["growth"]))


def _meeting_point(folder: Path, is_ours: bool) -> str:
    """Where the workers meet: on one machine in a file, which opens no port; across machines an address."""
    if is_ours:
        return f"file://{folder}/.ray/{secrets.token_hex(8)}"
    import ray
    from ray._common.network_utils import find_free_port

    return f"tcp://{ray.util.get_node_ip_address()}:{find_free_port()}"
