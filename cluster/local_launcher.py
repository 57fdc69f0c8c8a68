"""Training without Ray: in this process, or in the processes that torchrun started."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace

from cluster import driver
from cluster.console import Console
from cluster.signals import interruptible

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a process of a group is told


def in_process(context: driver.LaunchContext) -> None:
    """Train in this process; examples are prepared in line."""
    from trainer.worker import run_worker

    with context.console.waiting("building the model, first step"):
        run_worker(context.spec)


def is_torchrun() -> bool:
    """Whether this process is one that torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and all(name in os.environ for name in TORCHRUN)


def leave_torchrun(console: Console) -> None:
    """Forget what another launcher has left in the environment: this run's processes are its own."""
    left = {name: os.environ.pop(name) for name in TORCHRUN if name in os.environ}
    if left:
        told = ", ".join(f"{name}={value}" for name, value in left.items())
        console.say(f"  left out of account, as torchrun did not start this process: {told}")


def train_under_torchrun(path: str, overrides: Sequence[str], options: driver.TrainOptions) -> None:
    """Train as one of torchrun's processes. The first has the screen, the run's folder and its tracking, and
    tells the others what to run.
    """
    size = os.environ["WORLD_SIZE"]
    overrides = (*overrides, f"run.workers={size}")
    if os.environ["RANK"] != "0":
        return _as_one_more(path, overrides)
    console = Console()
    console.say(f"lockstep: {path}, {size} processes of torchrun")
    command = f"torchrun --nproc-per-node {size} -m cluster.cli resume {{run}}"
    options = replace(options, command=command)
    return driver.train(driver.prepare(path, overrides, console), _as_first, console, options)


def _as_first(context: driver.LaunchContext) -> None:
    from trainer.distributed.group import WorkerGroup

    with WorkerGroup.joined(context.recipe.run.device) as group:
        group.broadcast(context.spec)
        in_process(context)


def _as_one_more(path: str, overrides: Sequence[str]) -> None:
    from trainer.distributed.group import WorkerGroup
    from trainer.errors import RunFailed
    from trainer.worker import run_worker

    recipe = driver.read(path, overrides)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the wait for the first one lets no handler of Python run
    with WorkerGroup.joined(recipe.run.device) as group, interruptible() as interruption:
        interruption.request = lambda _: True  # the first one saves, stops, and takes this one along
        outcome = run_worker(group.broadcast(None))
    if outcome.status == "KILLED":
        raise interruption.first or KeyboardInterrupt(outcome.reason)
    if outcome.status != "FINISHED":
        raise RunFailed(outcome.reason or "no reason is known", outcome.trace or "")
