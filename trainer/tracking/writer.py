"""The process that follows a journal into MLflow, so that training never waits for tracking.

`python -m trainer.tracking.writer FOLDER PARENT` follows the run or the sweep in a folder for as long as the
process that trains it lives.
"""

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from trainer.recipe import loader
from trainer.recipe.redaction import Veil
from trainer.run_folder import layout
from trainer.tracking.refusals import LastingRefusal
from trainer.tracking.run import RunTracker
from trainer.tracking.sweep import SweepTracker
from trainer.tracking.tracker import Tracker

QUIET_MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # trackers try again themselves, and can be stopped meanwhile
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


def tracker(folder: Path, keep_trying: Callable[[], bool] = lambda: False) -> Tracker:
    """The tracker of the run or the sweep in a folder."""
    os.environ |= QUIET_MLFLOW
    if layout.is_sweep(folder):
        return SweepTracker(folder, keep_trying)
    return RunTracker(folder, loader.parse((folder / layout.RECIPE).read_text(), layout.RECIPE), keep_trying)


def main(folder: str, parent: str) -> None:
    """The writer process: as `run`, for as long as its parent lives."""
    os.nice(10)  # training comes first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who ends a whole job still wants its end to be written
    sys.stdout, sys.stderr = Veil(sys.stdout), Veil(sys.stderr)
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    try:
        tracker(Path(folder), lambda: os.getppid() == int(parent)).run()
    except LastingRefusal as refusal:
        sys.exit(f"MLflow does not take the run: {refusal}")
    finally:
        sys.stderr.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
