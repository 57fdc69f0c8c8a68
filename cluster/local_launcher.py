"""Training without Ray: in this process, or in the processes that torchrun started."""

import os
from collections.abc import Sequence
from pathlib import Path

from cluster import driver
from cluster.console import Screen


def in_process(run: driver.LaunchContext) -> None:
    """Train in this process; examples are prepared in line."""
    from trainer.worker import run_worker

    with run.screen.waiting("building the model, first step"):
        run_worker(run.order)


def is_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def train_under_torchrun(path: str, overrides: Sequence[str], options: driver.TrainOptions) -> None:
    """Train as one of torchrun's processes. The first has the screen, the run's folder and its tracking."""
    is_first = os.environ["RANK"] == "0"
    screen = Screen(None if is_first else open(os.devnull, "w"))  # noqa: SIM115 (lives as long as the process)
    screen.say(f"lockstep: {path}, {os.environ['WORLD_SIZE']} processes of torchrun")
    planned = driver.prepare(path, (*overrides, f"run.workers={os.environ['WORLD_SIZE']}"), screen)
    if is_first:
        driver.train(planned, _as_first, screen, options)
    else:
        _as_one_more(planned)


def _as_first(run: driver.LaunchContext) -> None:
    from trainer.distributed.group import WorkerGroup

    WorkerGroup.join(run.order.recipe.run.device).broadcast(run.order.folder)
    in_process(run)


def _as_one_more(planned: driver.PlannedRecipe) -> None:
    from trainer.distributed.group import WorkerGroup
    from trainer.errors import RunFailed
    from trainer.worker import run_worker

    folder = WorkerGroup.join(planned.recipe.run.device).broadcast(None)
    outcome = run_worker(driver.order(planned.recipe, Path(folder)))
    if outcome.status != "FINISHED":
        raise RunFailed(outcome.reason)
