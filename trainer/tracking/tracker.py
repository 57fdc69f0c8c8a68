"""How a journal is followed into MLflow, whatever it tells of: a run or a sweep.

A server that is down or a database that is locked only makes it fall behind: it tries again, and
`tracking.json` in the folder says how far it got, so that `lockstep sync FOLDER` goes on from there.
Timestamps and steps come from the journal, so what is logged twice lands on itself.

Nothing from the process's environment is recorded: credentials for the server and its storage live there.
"""

import hashlib
import importlib.metadata
import logging
import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from trainer.errors import first_line
from trainer.recipe.redaction import hidden
from trainer.recipe.schema import TrackSection
from trainer.run_folder.journal import Line, Tail, last, read
from trainer.tracking import database, entries
from trainer.tracking.address import SQLITE, address, shown
from trainer.tracking.entries import Point
from trainer.tracking.names import fit_title
from trainer.tracking.progress import TrackingProgress
from trainer.tracking.refusals import LastingRefusal, is_gone, lasting

WRITE_INTERVAL_S = 1.0
FIRST_LOOKS_S = 0.2  # at the journal, before there is anything worth MLflow's import
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between attempts
KEY, KIND = "lockstep.run", "lockstep.kind"  # tags of our own
SOURCE = {"mlflow.source.name": "lockstep"}

logger = logging.getLogger("lockstep.tracking")


class Tracker(ABC):
    """Brings one folder into MLflow. `keep_trying` says whether there is still somebody to do it for."""

    kind: ClassVar[str]  # what the folder holds
    worth: ClassVar[str]  # the kind of lines that are worth MLflow's import

    def __init__(
        self, folder: Path, track: TrackSection, keep_trying: Callable[[], bool] = lambda: False
    ) -> None:
        self.folder, self.track, self.keep_trying = folder, track, keep_trying
        remembered = TrackingProgress.load(folder)
        self.uri = address(track, remembered.uri if remembered and remembered.run_id else None)
        self.progress = remembered or TrackingProgress(shown(self.uri))
        self.progress.uri = shown(self.uri)
        self.tail = Tail(folder, self.progress.offset)
        if self.tail.offset > self.tail.size:  # another journal lies here
            self.progress = TrackingProgress(shown(self.uri))
            self.tail.offset = 0

    @abstractmethod
    def begins(self, line: Line) -> bool:
        """Whether a command begins or resumes what the folder holds with this line."""

    @abstractmethod
    def describe(self) -> None:
        """Log what is known beforehand."""

    @abstractmethod
    def take(self, lines: Sequence[Line]) -> None:
        """Log what the journal has gained."""

    @abstractmethod
    def conclude(self, end: Line) -> None:
        """Log the files, and what is known at the end only."""

    def run(self) -> None:
        """Follow the journal to its end, or until nobody is there any more who could write it.

        What takes a core for seconds, MLflow's import and its database, waits for the first step or trial.
        """
        while self.keep_trying() and not self._has_begun():
            time.sleep(FIRST_LOOKS_S)
        self._persist(self.prepare)
        end: Line | None = None
        while end is None:
            is_abandoned = not self.keep_trying()
            lines = self._persist(self.write)
            if lines and lines[-1]["kind"] == "end":
                end = lines[-1]
            elif not lines and is_abandoned:
                end = self.end() or self._abandoned()
            elif not lines:
                time.sleep(WRITE_INTERVAL_S)
        self._persist(lambda: self.finish(end))

    def _has_begun(self) -> bool:
        """Whether there is something to bring, or an end, since a command began or resumed it."""
        kinds: list[str] = []
        for line in read(self.folder):
            kinds = [] if self.begins(line) else [*kinds, line["kind"]]
        return self.worth in kinds or "end" in kinds

    def sync(self) -> None:
        """Bring what is missing, without trying again: who asked for it is there to see what is wrong."""
        self.prepare()
        self.write()
        self.finish(self.end() or self._abandoned())

    def end(self) -> Line | None:
        """How it ended; None while it goes on, or where it was cut off."""
        newest = last(self.folder)
        return newest if newest and newest["kind"] == "end" else None

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
            try:
                self.take(lines)
            except Exception:
                self.progress, self.tail.offset = before, before.offset
                raise
            self.progress.offset = self.tail.offset
            self._save()
        return lines

    def finish(self, end: Line) -> None:
        """The files and the last status, whatever else is refused."""
        failure = None
        try:
            self._describe()
            self.conclude(end)
        except Exception as error:
            failure = error
        self.client.set_terminated(self.run_id, end["status"], end_time=round(end["time"] * 1000))
        if failure is not None:
            raise failure
        self._save()

    @property
    def experiment_id(self) -> str:
        """MLflow's experiment for the folder."""
        assert self.progress.experiment_id is not None, "prepare comes first"
        return self.progress.experiment_id

    @property
    def run_id(self) -> str:
        """MLflow's run for the folder."""
        assert self.progress.run_id is not None, "prepare comes first"
        return self.progress.run_id

    def log(
        self,
        metrics: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log entries to the folder's run."""
        entries.log(self.client, self.run_id, metrics=metrics, params=params, tags=tags)

    def artifact(self, name: str) -> None:
        """Log a file of the folder, if it is there."""
        if (self.folder / name).exists():
            self.client.log_artifact(self.run_id, str(self.folder / name))

    def _describe(self) -> None:
        """What is known beforehand, and the environment; once."""
        if not self.progress.described:
            self.describe()
            self.client.log_dict(self.run_id, environment(), "environment.json")
            self.progress.described = True

    def _save(self) -> None:
        self.progress.error = None
        self.progress.save(self.folder)

    def _abandoned(self) -> Line:
        reason = "the process that trained it is gone"
        self._persist(lambda: self.log(tags={"lockstep.reason": reason}))
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
            return self.client.get_run(self.run_id).info.lifecycle_stage != "active"
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
        tags = {**SOURCE, "lockstep.folder": hidden(str(self.folder)), KEY: key, KIND: self.kind}
        name = fit_title(self.folder.name)
        return self.client.create_run(experiment_id, round(began_at * 1000), tags, run_name=name).info.run_id

    def _experiment(self) -> str:
        name = fit_title(self.track.experiment)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            return self.client.create_experiment(name, artifact_location=_beside(self.uri))
        if experiment.lifecycle_stage != "active":
            raise LastingRefusal(
                f"the experiment {name} is deleted; restore it with `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`, or set track.experiment to another"
            )
        return experiment.experiment_id


def _beside(uri: str) -> str | None:
    """Where a database's artifacts go: beside its file; None: where the server says."""
    file = uri.removeprefix(SQLITE)
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
