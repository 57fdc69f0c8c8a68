"""Follows a run's journal into MLflow. A process of its own, so that training never waits for tracking.

`python -m trainer.tracking.writer FOLDER PARENT` prepares the database while the run starts, then logs the
journal in batches. A server that is down or a database that is locked only makes it fall behind: it tries
again, and `tracking.json` in the run folder says how far it got, so that `lockstep sync RUN` goes on from
there. Timestamps and steps come from the journal, so what is logged twice lands on itself.

Nothing from the process's environment is recorded: credentials for the server and its storage live there.
"""

import importlib.metadata
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.journal import Line, Tail, read
from trainer.tracking.address import address, shown
from trainer.tracking.metrics import entry
from trainer.tracking.progress import TrackingProgress

WRITE_INTERVAL_S = 1.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between attempts
MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 5000  # what one request to MLflow may hold
QUIET_MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # this module tries again itself, and can be stopped meanwhile
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

logger = logging.getLogger("lockstep.tracking")


class Tracker:
    """Brings one run into MLflow. `keep_trying` says whether there is still somebody to do it for."""

    def __init__(self, folder: Path, recipe: Recipe, keep_trying: Callable[[], bool] = lambda: False) -> None:
        self.folder, self.recipe, self.keep_trying = folder, recipe, keep_trying
        self.uri = address(recipe)
        self.progress = TrackingProgress.load(folder) or TrackingProgress(shown(self.uri))
        self.progress.uri = shown(self.uri)
        self.tail = Tail(folder, self.progress.offset)

    def run(self) -> None:
        """Follow the journal to its end, or until nobody is there any more who could write it."""
        self._persist(self.prepare)
        last: Line | None = None
        while last is None or last["kind"] != "end":
            is_abandoned = not self.keep_trying()
            lines = self._persist(self.write)
            if lines:
                last = lines[-1]
            elif is_abandoned:
                last = self._abandoned()
            else:
                time.sleep(WRITE_INTERVAL_S)
        self._persist(lambda: self.finish(last))

    def sync(self) -> None:
        """Bring what is missing, without trying again: who asked for it is there to see what is wrong."""
        self.prepare()
        self.write()
        *_, last = read(self.folder)
        self.finish(last if last["kind"] == "end" else self._abandoned())

    def prepare(self) -> None:
        """Make database, experiment and run where there are none, with all that is known beforehand."""
        from mlflow import MlflowClient

        self.client = MlflowClient(self.uri)
        if self.progress.run_id is None:
            self.progress.run_id = self._create_run()
            self._save()
        if not self.progress.described:
            self._log(params=self.recipe.flat())
            for name in (layout.RECIPE, layout.PLAN):
                self._artifact(name)
            self.client.log_dict(self.progress.run_id, environment(), "environment.json")
            self.progress.described = True
        self.client.update_run(self.progress.run_id, status="RUNNING")
        self._save()

    def write(self) -> list[Line]:
        """Log what the journal has gained, and return it."""
        before = replace(self.progress)
        lines = self.tail.lines()
        if lines:
            found = entry(lines, self.progress)
            try:
                self._log(metrics=found.metrics, tags=found.tags)
            except Exception:
                self.progress, self.tail.offset = before, before.offset
                raise
            self.progress.offset = self.tail.offset
            self._save()
        return lines

    def finish(self, end: Line) -> None:
        """The full journal, the model, and the run's last status."""
        self._artifact(layout.JOURNAL)
        if (self.folder / layout.PROFILE).exists():
            self.client.log_artifacts(self._run_id, str(self.folder / layout.PROFILE), layout.PROFILE)
        if end["status"] == "FINISHED" and (self.folder / layout.MODEL).exists():
            self._artifact(layout.MODEL)
            self._log(tags={"lockstep.model": self._log_model()})
        self.client.set_terminated(self._run_id, end["status"], end_time=round(end["time"] * 1000))
        self._save()

    @property
    def _run_id(self) -> str:
        assert self.progress.run_id is not None, "prepare comes first"
        return self.progress.run_id

    def _save(self) -> None:
        self.progress.error = None
        self.progress.save(self.folder)

    def _abandoned(self) -> Line:
        reason = "the process that trained it is gone"
        self._persist(lambda: self._log(tags={"lockstep.reason": reason}))
        return {"kind": "end", "status": "KILLED", "reason": reason, "time": time.time()}

    def _persist(self, action: Callable[[], Any]) -> Any:
        """Do it, however often it takes. What keeps it from being done stands in the state for all to see."""
        pause_s = SHORTEST_PAUSE_S
        while True:
            try:
                return action()
            except Exception as error:
                self.progress.error = f"{type(error).__name__}: {error}".splitlines()[0]
                self.progress.save(self.folder)
                if not self.keep_trying():
                    raise
                logger.warning("MLflow did not take it; again in %.1f s", pause_s, exc_info=True)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _create_run(self) -> str:
        name = self.recipe.track.experiment
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        began_at = next((line["time"] for line in read(self.folder)), time.time())
        tags = {"mlflow.source.name": "lockstep", "lockstep.folder": str(self.folder)}
        run = self.client.create_run(experiment_id, round(began_at * 1000), tags, run_name=self.folder.name)
        self.progress.experiment_id = experiment_id
        return run.info.run_id

    def _log(
        self,
        metrics: Sequence[tuple] = (),
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        pairs = [Param(key, value[:LONGEST_VALUE]) for key, value in (params or {}).items()]
        labels = [RunTag(key, value[:LONGEST_VALUE]) for key, value in (tags or {}).items()]
        if labels:
            self.client.log_batch(self._run_id, tags=labels)
        for start in range(0, len(pairs), MOST_PARAMS):
            self.client.log_batch(self._run_id, params=pairs[start : start + MOST_PARAMS])
        for start in range(0, len(metrics), MOST_METRICS):
            some = [Metric(*point) for point in metrics[start : start + MOST_METRICS]]
            self.client.log_batch(self._run_id, metrics=some)

    def _artifact(self, name: str) -> None:
        if (self.folder / name).exists():
            self.client.log_artifact(self._run_id, str(self.folder / name))

    def _log_model(self) -> str:
        """Log the model as a graph, which loads without pickle or anybody's code; say what came of it."""
        import mlflow

        from trainer.tracking.model_export import log_graph, trained_model

        mlflow.set_tracking_uri(self.uri)
        try:
            model, inputs = trained_model(self.folder, self.recipe)
            with mlflow.start_run(self._run_id):
                log_graph(model, inputs)
        except Exception as error:
            logger.warning("the model was not logged", exc_info=True)
            return f"only its weights: {type(error).__name__}: {error}"
        return "logged"


def environment() -> dict[str, Any]:
    """Where the run is computed: machine, Python, all distributions; no environment variables."""
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": dict(sorted(packages.items())),
    }


def tracker(folder: Path, keep_trying: Callable[[], bool] = lambda: False) -> Tracker:
    """The tracker of the run in a folder."""
    from trainer.recipe import loader

    os.environ |= QUIET_MLFLOW
    return Tracker(folder, loader.parse((folder / layout.RECIPE).read_text(), layout.RECIPE), keep_trying)


def main(folder: str, parent: str) -> None:
    """The writer process: as `run`, for as long as its parent lives."""
    os.nice(10)  # training comes first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who ends a whole job still wants its end to be written
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    tracker(Path(folder), lambda: os.getppid() == int(parent)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
