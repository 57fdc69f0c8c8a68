"""A run or a sweep and MLflow, as its command sees them: the process that brings it there, where it is."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from cluster.console import Console
from cluster.package import in_job
from cluster.signals import left_s
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.tracking import address, writer
from trainer.tracking.progress import TrackingProgress

TRACKING_PATIENCE_S = 60.0  # how long the end waits for a tracking server that answers
FAILING_PATIENCE_S = 5.0  # and for one that does not
INTERRUPTED_PATIENCE_S = 10.0  # and when somebody waits for the prompt


@contextmanager
def tracked(folder: Path, recipe: Recipe, console: Console) -> Iterator[None]:
    """The process that follows a run or a sweep into MLflow, if `recipe` wants it, starts now and has a
    bounded time to finish later.
    """
    if not address.wanted(recipe.track):
        yield
        return
    command = [sys.executable, "-m", "trainer.tracking.writer", str(folder), str(os.getpid())]
    with open(layout.make_private(folder / layout.LOG), "ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | writer.QUIET_MLFLOW | _home_of_a_job(recipe),
            start_new_session=True,  # Ctrl-C is not for the writer: it has the end to write
        )
    over = threading.Event()
    threading.Thread(target=_say_refusal, args=(process, folder, console, over), daemon=True).start()
    patience_s = TRACKING_PATIENCE_S
    try:
        yield
    except KeyboardInterrupt as interrupt:
        patience_s = left_s(interrupt, INTERRUPTED_PATIENCE_S)
        raise
    finally:
        over.set()
        with console.waiting("bringing the rest to MLflow"):
            is_done = _wait(process, folder, patience_s)
        if is_done:
            console.say(how_to_look(folder))
            if (progress := TrackingProgress.load(folder)) and progress.note:
                console.say(f"MLflow {progress.note}")
        else:
            console.say(_behind(folder))


def _home_of_a_job(recipe: Recipe) -> dict[str, str]:
    """A job's working folder ends with it: by default its database lies with its runs."""
    if not in_job() or recipe.track.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return {}
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{Path(recipe.checkpoint.dir).absolute()}/mlflow.db"}


def _say_refusal(process: subprocess.Popen, folder: Path, console: Console, over: threading.Event) -> None:
    """Say at once when MLflow will not take the run, while it goes on."""
    while process.poll() is None and not over.wait(0.5):
        pass
    if not over.is_set() and process.returncode:
        console.say(_behind(folder))


def _behind(folder: Path) -> str:
    reason = (TrackingProgress.load(folder) or TrackingProgress("")).error or "it takes long"
    cure = f"`lockstep sync {layout.relative_to_cwd(folder)}` brings the rest there later"
    return f"MLflow is behind ({reason}); {cure}"


def _wait(process: subprocess.Popen, folder: Path, patience_s: float) -> bool:
    """Whether the tracking process finished its work. One that fails is given less time, and stopped after
    it.
    """
    began_at = time.monotonic()
    while process.poll() is None:
        progress = TrackingProgress.load(folder)
        is_failing = progress is not None and progress.error is not None
        if time.monotonic() - began_at > (FAILING_PATIENCE_S if is_failing else patience_s):
            process.kill()
            process.wait()
            return False
        time.sleep(0.1)
    return process.returncode == 0


def how_to_look(folder: Path) -> str:
    """Where MLflow has the run, and how to open it."""
    progress = TrackingProgress.load(folder)
    if progress is None or progress.run_id is None:
        cure = f"`lockstep sync {layout.relative_to_cwd(folder)}` brings it there"
        return f"MLflow has nothing of {folder.name} yet; {cure}"
    if progress.uri.startswith("http"):
        return f"MLflow: {folder.name} is at {progress.uri}/{page(folder)}"
    place = progress.uri.removeprefix("sqlite:///")
    where = layout.relative_to_cwd(Path(place)) if place != progress.uri else progress.uri
    is_default = progress.uri == address.resolved(None)
    option = "" if is_default else f" --uri {progress.uri}"
    if layout.is_sweep(folder):
        option = f" {layout.relative_to_cwd(folder)}"
    return f"MLflow: {folder.name} is in {where}; open it with `lockstep ui{option}`"


def page(folder: Path) -> str:
    """The path of a run's page in the MLflow UI; of a sweep, the one that compares its trials."""
    progress = TrackingProgress.load(folder)
    assert progress is not None, "it was tracked before"
    runs = f"#/experiments/{progress.experiment_id}/runs"
    if not layout.is_sweep(folder):
        return f"{runs}/{progress.run_id}"
    wanted = quote(f"tags.mlflow.parentRunId = '{progress.run_id}'")
    order = quote("metrics.`steps_to_target`")  # in the order of time MLflow hides trials below their sweep
    return f"{runs}?searchFilter={wanted}&orderByKey={order}&orderByAsc=true&compareRunsMode=CHART"
