"""Follows a run's journal into MLflow. A process of its own, so that training never waits for tracking.

`python -m trainer.tracking.writer FOLDER PARENT` prepares the database after the first step, then logs the
journal in batches. A server that is down or a database that is locked only makes it fall behind: it tries
again, and `tracking.json` in the run folder says how far it got, so that `lockstep sync RUN` goes on from
there. Timestamps and steps come from the journal, so what is logged twice lands on itself.

Nothing from the process's environment is recorded: credentials for the server and its storage live there.
"""

import hashlib
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

from trainer.errors import first_line
from trainer.recipe.redaction import Veil, hidden
from trainer.recipe.schema import Recipe
from trainer.run_folder import layout
from trainer.run_folder.journal import PLANNED, Line, Tail, last, read
from trainer.tracking import database
from trainer.tracking.address import address, shown
from trainer.tracking.metrics import entry
from trainer.tracking.names import fit, fit_title, fit_value
from trainer.tracking.progress import TrackingProgress
from trainer.tracking.refusals import LastingRefusal, is_gone, lasting, send_in_parts

WRITE_INTERVAL_S = 1.0
FIRST_LOOKS_S = 0.2  # at the journal, before the first step
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between attempts
MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 5000  # what one request to MLflow may hold
KEY, RENAMED, REFUSED = "lockstep.run", "lockstep.renamed", "lockstep.refused"  # tags of our own
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
        remembered = TrackingProgress.load(folder)
        self.uri = address(recipe, remembered.uri if remembered and remembered.run_id else None)
        self.progress = remembered or TrackingProgress(shown(self.uri))
        self.progress.uri = shown(self.uri)
        self.tail = Tail(folder, self.progress.offset)
        if self.tail.offset > self.tail.size:  # another journal lies here
            self.progress = TrackingProgress(shown(self.uri))
            self.tail.offset = 0

    def run(self) -> None:
        """Follow the journal to its end, or until nobody is there any more who could write it.

        What takes a core for seconds, MLflow's import and its database, waits for the first step.
        """
        while self.keep_trying() and not self._has_stepped():
            time.sleep(FIRST_LOOKS_S)
        self._persist(self.prepare)
        end: Line | None = None
        while end is None:
            is_abandoned = not self.keep_trying()
            lines = self._persist(self.write)
            if lines and lines[-1]["kind"] == "end":
                end = lines[-1]
            elif not lines and is_abandoned:
                end = self._abandoned()
            elif not lines:
                time.sleep(WRITE_INTERVAL_S)
        self._persist(lambda: self.finish(end))

    def _has_stepped(self) -> bool:
        """Whether the run has made a step, or ended, since its command began it or resumed it."""
        kinds: list[str] = []
        for line in read(self.folder):
            kinds = [] if line["kind"] == "stage" and line["name"] == PLANNED else [*kinds, line["kind"]]
        return "step" in kinds or "end" in kinds

    def sync(self) -> None:
        """Bring what is missing, without trying again: who asked for it is there to see what is wrong."""
        self.prepare()
        self.write()
        end = last(self.folder)
        self.finish(end if end and end["kind"] == "end" else self._abandoned())

    def prepare(self) -> None:
        """Make database, experiment and run where there are none, with all that is known beforehand."""
        from mlflow import MlflowClient

        database.make(self.uri)
        self.client = MlflowClient(self.uri)
        if self.progress.run_id is not None and self._is_gone():
            logger.warning("the run is no longer in this MLflow; another one is begun from the journal")
            self.progress = TrackingProgress(shown(self.uri))
            self.tail.offset = 0
        if self.progress.run_id is None:
            self.progress.run_id = self._run()
            self._save()
        self.client.update_run(self.progress.run_id, status="RUNNING")
        try:
            self._describe()
        except Exception:  # a store of artifacts that is away holds no metric up: `finish` tries again
            logger.warning("MLflow did not take the run's description", exc_info=True)
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
        """The full journal, the model, and the run's last status, whatever else is refused."""
        failure = None
        try:
            self._describe()
            self._artifact(layout.JOURNAL)
            if (self.folder / layout.PROFILE).exists():
                self.client.log_artifacts(self._run_id, str(self.folder / layout.PROFILE), layout.PROFILE)
            if end["status"] == "FINISHED" and (self.folder / layout.MODEL).exists():
                self._artifact(layout.MODEL)
                self._log(tags={"lockstep.model": self._log_model()})
        except Exception as error:
            failure = error
        self.client.set_terminated(self._run_id, end["status"], end_time=round(end["time"] * 1000))
        if failure is not None:
            raise failure
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
        """Do it, however often it takes. What keeps it from being done stands in the state for all to see.

        Raises:
            LastingRefusal: trying again would not help.
        """
        pause_s = SHORTEST_PAUSE_S
        while True:
            try:
                return action()
            except Exception as error:
                refusal = lasting(error)
                self.progress.error = str(refusal or first_line(error))
                self.progress.save(self.folder)
                if refusal is not None:
                    raise refusal from error
                if not self.keep_trying():
                    raise
                logger.warning("MLflow did not take it; again in %.1f s", pause_s, exc_info=True)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _is_gone(self) -> bool:
        """Whether the remembered run is not in this MLflow: it is another one, or was deleted there."""
        try:
            return self.client.get_run(self._run_id).info.lifecycle_stage != "active"
        except Exception as error:
            if is_gone(error):
                return True
            raise

    def _run(self) -> str:
        """The run of this folder in MLflow: one that was begun and not remembered, else a new one."""
        experiment_id = self.progress.experiment_id = self._experiment()
        first = next(read(self.folder), None)
        key = hashlib.sha256(f"{self.folder.name} {first}".encode()).hexdigest()[:32]
        begun = (
            self.client.search_runs([experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1)
            if first
            else []
        )
        if begun:
            return begun[0].info.run_id
        began_at = first["time"] if first else time.time()
        tags = {"mlflow.source.name": "lockstep", "lockstep.folder": hidden(str(self.folder)), KEY: key}
        name = fit_title(self.folder.name)
        return self.client.create_run(experiment_id, round(began_at * 1000), tags, run_name=name).info.run_id

    def _experiment(self) -> str:
        name = fit_title(self.recipe.track.experiment)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            return self.client.create_experiment(name, artifact_location=_beside(self.uri))
        if experiment.lifecycle_stage != "active":
            raise LastingRefusal(
                f"the experiment {name} is deleted; restore it with `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`, or set track.experiment to another"
            )
        return experiment.experiment_id

    def _describe(self) -> None:
        """The recipe as parameters and as a file, the plan, the environment; once."""
        if self.progress.described:
            return
        self._log(params=self.recipe.flat())
        for name in (layout.RECIPE, layout.PLAN):
            self._artifact(name)
        self.client.log_dict(self._run_id, environment(), "environment.json")
        self.progress.described = True

    def _log(
        self,
        metrics: Sequence[tuple] = (),
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
    ) -> None:
        """Send entries under names that MLflow takes. What it refuses is left out and said in a tag."""
        from mlflow.entities import Metric, Param, RunTag

        def value(text: str) -> str:
            return fit_value(hidden(text), LONGEST_VALUE)

        points = [Metric(fit(name), *rest) for name, *rest in metrics]
        pairs = [Param(fit(key), value(text)) for key, text in (params or {}).items()]
        labels = [RunTag(fit(key), value(text)) for key, text in (tags or {}).items()]
        given = {*(name for name, *_ in metrics), *(params or {}), *(tags or {})}
        renamed = {name: fit(name) for name in given if fit(name) != name}
        refused = [
            *self._send(labels, "tags", MOST_PARAMS),
            *self._send(pairs, "params", MOST_PARAMS),
            *self._send(points, "metrics", MOST_METRICS),
        ]
        notes = {
            **({RENAMED: "\n".join(f"{sent}: {name}" for name, sent in renamed.items())} if renamed else {}),
            **({REFUSED: "\n".join(refused)} if refused else {}),
        }
        for key, text in notes.items():
            before = self.client.get_run(self._run_id).data.tags.get(key, "").splitlines()
            lines = dict.fromkeys([*before, *text.splitlines()])
            self._send([RunTag(key, value("\n".join(lines)))], "tags", MOST_PARAMS)

    def _send(self, entries: list[Any], what: str, most: int) -> list[str]:
        """Send some of one sort, as many at a time as a request may hold; a line for each that is refused."""
        refused: list[str] = []
        for start in range(0, len(entries), most):
            some = entries[start : start + most]
            for lost, error in send_in_parts(some, lambda part: self._send_batch(what, part)):
                refused.append(f"{what}: {lost.key}: {first_line(error)}")
                logger.warning("MLflow refused %s", refused[-1])
        return refused

    def _send_batch(self, what: str, entries: list[Any]) -> None:
        requests: dict[str, Any] = {what: entries}
        self.client.log_batch(self._run_id, **requests)

    def _artifact(self, name: str) -> None:
        if (self.folder / name).exists():
            self.client.log_artifact(self._run_id, str(self.folder / name))

    def _log_model(self) -> str:
        """Log the model as a graph, which loads without pickle or anybody's code; say what came of it.

        One that is there is not logged again; what an interrupted upload left of one is removed.
        """
        import mlflow

        from trainer.tracking.model_export import log_graph, logged_before, trained_model

        mlflow.set_tracking_uri(self.uri)
        try:
            if logged_before(self.client, self._run_id):
                return "logged"
            model, inputs = trained_model(self.folder, self.recipe)
            with mlflow.start_run(self._run_id):
                log_graph(model, inputs)
        except Exception as error:
            logger.warning("the model was not logged", exc_info=True)
            self.progress.note = f"has the model's weights, not its graph: {first_line(error)}"
            return f"only its weights: {first_line(error)}"
        return "logged"


def _beside(uri: str) -> str | None:
    """Where a database's artifacts go: beside its file; None: where the server says."""
    file = uri.removeprefix("sqlite:///")
    return None if file == uri else str(Path(file).parent / "mlruns")


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
