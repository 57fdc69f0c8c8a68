"""Training on Ray: a worker group and a pool, on a cluster of our own or on one that is already there."""

import os
import shutil
import time
from functools import partial

from cluster.driver import LaunchContext, Launcher
from cluster.ray_cluster import connected, lost_process
from cluster.reach import refuse_silent_cluster
from trainer.errors import UserError
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout

WORKERS_PER_CORE = 2  # that a machine can carry
CALM = {
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

    gpus, cores = torch.cuda.device_count() if recipe.run.device != "cpu" else 0, os.cpu_count() or 1
    most = gpus or WORKERS_PER_CORE * cores
    has = f"{gpus} GPUs" if gpus else f"{cores} cores, for at most {WORKERS_PER_CORE} workers each"
    if recipe.run.device == "cuda" and not gpus:
        raise UserError("run.device: is cuda, and this machine has no GPU; give auto or cpu")
    if recipe.run.fewest_workers > most:
        raise UserError(
            f"run.workers: is {recipe.run.fewest_workers}, and this machine has {has}; "
            f"give {most} or less, or the --address of a larger cluster"
        )


def launch(context: LaunchContext, address: str | None) -> None:
    """Train on Ray, and leave nothing running."""
    os.environ.update(CALM)
    run = context.recipe.run
    most = max(run.fewest_workers, WORKERS_PER_CORE * (os.cpu_count() or 1))
    cpus = min(most, run.most_workers) + run.pool.max
    with connected(address, cpus, context.phase, context.console.say):
        began_at = time.time()
        with context.console.waiting("starting the workers"):
            train_on_ray(context, began_at, is_ours=address is None)


def train_on_ray(context: LaunchContext, began_at: float, is_ours: bool) -> None:
    """Train one run on a cluster that is connected; others may follow on it."""
    from cluster.ray_places import Places
    from cluster.ray_workers import WorkerActors, resources_of_each
    from data_echo.prepare.ray_pool import Growth, start_pool

    recipe, make_task = context.recipe, context.spec.make_task
    run, skip_bad = recipe.run, recipe.task.skip_bad > 0
    meeting = context.folder / layout.RAY
    shutil.rmtree(meeting, ignore_errors=True)
    meeting.mkdir()
    resources, say = resources_of_each(run.device), context.console.say
    places = Places(run.fewest_workers, run.most_workers, resources, run.pool.min, say)
    group = WorkerActors(places, lost_process)
    try:
        pool = [
            actor
            for number in range(run.pool.min)
            for actor in start_pool(
                make_task,
                recipe.seed,
                1,
                skip_bad=skip_bad,
                scheduling_strategy=places.pool_strategy(number),
            )
        ]
        growth = Growth(f"pool of {context.folder.name}", run.pool.max, make_task, recipe.seed, skip_bad)
        preparing = (pool, growth if run.pool.max > run.pool.min else None)
        group.train(context.spec, preparing, began_at, is_ours)
    finally:
        if lost_process() is None:
            group.close()
            places.close()
        shutil.rmtree(meeting, ignore_errors=True)
