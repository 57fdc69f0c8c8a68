"""Follows a run's journal into MLflow. A process of its own, so that training never waits for tracking.

`python -m trainer.tracking.writer FOLDER PARENT` prepares the database while the run starts, then logs the
journal in batches. A server that is down or a database that is locked only makes it fall behind: it tries
again, and `tracking.json` in the run folder says how far it got, so that `lockstep sync RUN` goes on from
there. Timestamps and steps come from the journal, so what is logged twice lands on itself.

Nothing from the process's environment is recorded: credentials for the server and its storage live there.
"""

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import UserError
from trainer.recipe.schema import Recipe
from trainer.run_folder.journal import FILE_NAME as JOURNAL
from trainer.run_folder.journal import Line, Tail, read

NOWHERE = "none"  # the address of a run that is not tracked, unless `lockstep sync` is asked for
STATE_FILE = "tracking.json"
MODEL = "model.safetensors"
PROFILE = "profile"  # a folder of files
WRITE_INTERVAL_S = 1.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0  # between attempts
UNTHINNED_STEPS = 1000  # the first steps of a run are all shown, later ones once a second
THIN_TO_S = 1.0
MOST_METRICS, MOST_PARAMS, LONGEST_VALUE = 1000, 100, 5000  # what one request to MLflow may hold
QUIET_MLFLOW = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # this module tries again itself, and can be stopped meanwhile
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

logger = logging.getLogger("lockstep.tracking")


def wanted(recipe: Recipe) -> bool:
    """Whether the run is to be tracked: MLflow is installed and `track.uri` is not "none"."""
    return recipe.track.uri != NOWHERE and importlib.util.find_spec("mlflow") is not None


def address(recipe: Recipe) -> str:
    """A recipe's tracking address: its own, else MLFLOW_TRACKING_URI's, else SQLite in the working folder.

    Raises:
        UserError: the recipe's address holds a password; recipes are stored with runs and logged.
    """
    if recipe.track.uri and urlsplit(recipe.track.uri).password:
        raise UserError(
            "track.uri: holds a password, and recipes are kept with their runs; set MLFLOW_TRACKING_URI, or "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, in the environment"
        )
    return resolved(recipe.track.uri if recipe.track.uri != NOWHERE else None)


def resolved(uri: str | None) -> str:
    """An address as it is, or the default one; a database file with its whole path."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    file = uri.removeprefix("sqlite:///")
    return f"sqlite:///{Path(file).absolute()}" if file != uri else uri


def shown(uri: str) -> str:
    """An address without the user's name and password in it."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if parts.password else uri


@dataclass
class TrackingProgress:
    """How far a run has been tracked; kept in its folder."""

    uri: str  # as it may be shown
    run_id: str | None = None
    offset: int = 0  # bytes of the journal that MLflow has
    experiment_id: str | None = None
    described: bool = False  # parameters, recipe and environment are there
    steps: int = 0  # step lines seen
    thinned_at: float = 0.0  # time of the last step that was logged
    trouble: str | None = None  # what keeps MLflow from going on, if anything

    @classmethod
    def load(cls, folder: Path) -> "TrackingProgress | None":
        """The state in a run folder; None when nothing was tracked yet."""
        try:
            return cls(**json.loads((folder / STATE_FILE).read_text()))
        except FileNotFoundError:
            return None

    def save(self, folder: Path) -> None:
        """Replace the state in the run folder, at once or not at all."""
        draft = folder / f".{STATE_FILE}"
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(folder / STATE_FILE)


@dataclass
class Entry:
    """What some journal lines come to in MLflow."""

    metrics: list[tuple[str, float, int, int]] = field(
        default_factory=list
    )  # name, value, ms, served examples
    tags: dict[str, str] = field(default_factory=dict)


def entry(lines: Iterable[Line], state: TrackingProgress) -> Entry:
    """Translate journal lines. Steps of long runs are thinned; `state` remembers how far that went."""
    result = Entry()
    for line in lines:
        match line["kind"]:
            case "start":
                own = {key: value for key, value in line.items() if key not in ("kind", "time")}
                result.tags |= {f"lockstep.{key}": str(value) for key, value in own.items()}
            case "step":
                state.steps += 1
                if state.steps <= UNTHINNED_STEPS or line["time"] - state.thinned_at >= THIN_TO_S:
                    state.thinned_at = line["time"]
                    result.metrics += _points(line, _step_metrics(line))
            case "evaluation":
                named = {f"{line['split']}/{name}": value for name, value in line["metrics"].items()}
                result.metrics += _points(line, named)
            case "execution":
                result.tags["lockstep.execution"] = line["reason"]
            case "decision":
                result.tags[f"lockstep.decision.{line['what']}"] = f"{line['value']} at {line['position']}"
            case "accepted":
                result.tags["lockstep.accepted"] = "\n".join(line["changes"])
            case "end":
                result.tags["lockstep.reason"] = str(line.get("reason") or "")
    return result


def _step_metrics(line: Line) -> dict[str, Any]:
    """A step's metrics; MLflow makes a section of all that has the same prefix, and sorts the sections."""
    names = ("loss", "learning_rate", "gradient_norm", "loss_scale", "skipped", "batch", "step", "passes")
    named = {name: line[name] for name in names if name in line}
    named |= {"served_examples": line["examples"], "fresh_examples": line["fresh"]}
    named["echoed_examples"] = line["examples"] - line["fresh"]
    if line["step_s"]:
        named["examples_per_s"] = line["batch"] / line["step_s"]
    named |= {f"time/{name}": value for name, value in line.items() if name.endswith("_s")}
    named |= {f"echo/{name}": value for name, value in line.get("echo", {}).items()}
    return {f"train/{name}": value for name, value in named.items()}


def _points(line: Line, named: dict[str, Any]) -> Iterator[tuple[str, float, int, int]]:
    for name, value in named.items():
        if isinstance(value, int | float):
            yield name, _drawable(value), round(line["time"] * 1000), line["examples"]


def _drawable(value: float) -> float:
    """MLflow stores infinity as the largest double, which ruins the chart: infinity becomes NaN, a gap."""
    return float(value) if math.isfinite(value) else math.nan


class Tracker:
    """Brings one run into MLflow. `keep_trying` says whether there is still somebody to do it for."""

    def __init__(self, folder: Path, recipe: Recipe, keep_trying: Callable[[], bool] = lambda: False) -> None:
        self.folder, self.recipe, self.keep_trying = folder, recipe, keep_trying
        self.uri = address(recipe)
        self.state = TrackingProgress.load(folder) or TrackingProgress(shown(self.uri))
        self.state.uri = shown(self.uri)
        self.tail = Tail(folder, self.state.offset)

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
        if self.state.run_id is None:
            self.state.run_id = self._create_run()
            self._save()
        if not self.state.described:
            self._log(params=flat(self.recipe.model_dump(mode="json", by_alias=True)))
            for name in ("recipe.yaml", "plan.txt"):
                self._artifact(name)
            self.client.log_dict(self.state.run_id, environment(), "environment.json")
            self.state.described = True
        self.client.update_run(self.state.run_id, status="RUNNING")
        self._save()

    def write(self) -> list[Line]:
        """Log what the journal has gained, and return it."""
        before = replace(self.state)
        lines = self.tail.lines()
        if lines:
            found = entry(lines, self.state)
            try:
                self._log(metrics=found.metrics, tags=found.tags)
            except Exception:
                self.state, self.tail.offset = before, before.offset
                raise
            self.state.offset = self.tail.offset
            self._save()
        return lines

    def finish(self, end: Line) -> None:
        """The full journal, the model, and the run's last status."""
        self._artifact(JOURNAL)
        if (self.folder / PROFILE).exists():
            self.client.log_artifacts(self._run_id, str(self.folder / PROFILE), PROFILE)
        if end["status"] == "FINISHED" and (self.folder / MODEL).exists():
            self._artifact(MODEL)
            self._log(tags={"lockstep.model": self._log_model()})
        self.client.set_terminated(self._run_id, end["status"], end_time=round(end["time"] * 1000))
        self._save()

    @property
    def _run_id(self) -> str:
        assert self.state.run_id is not None, "prepare comes first"
        return self.state.run_id

    def _save(self) -> None:
        self.state.trouble = None
        self.state.save(self.folder)

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
                self.state.trouble = f"{type(error).__name__}: {error}".splitlines()[0]
                self.state.save(self.folder)
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
        self.state.experiment_id = experiment_id
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

        from trainer.tracking.model_export import trained_model

        mlflow.set_tracking_uri(self.uri)
        try:
            model, inputs = trained_model(self.folder, self.recipe)
            with mlflow.start_run(self._run_id):
                _log_graph(model, inputs)
        except Exception as error:
            logger.warning("the model was not logged", exc_info=True)
            return f"only its weights: {type(error).__name__}: {error}"
        return "logged"


def _log_graph(model: Any, inputs: tuple[Any, ...]) -> None:
    """Log `model`, traced by torch.export with the arrays `inputs`, its first dimension free."""
    import mlflow
    import numpy as np
    import torch
    from mlflow.models import ModelSignature
    from mlflow.types import Schema

    names = [None] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    specs: list[Any] = [_free_batch(array, name) for array, name in zip(inputs, names, strict=True)]
    output = model(*map(torch.from_numpy, inputs)).detach().numpy()
    mlflow.pytorch.log_model(
        model,
        name="model",
        input_example=inputs[0] if len(inputs) == 1 else inputs,
        signature=ModelSignature(Schema(specs), Schema([_free_batch(output, None)])),
        pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
        serialization_format="pt2",
    )


def _free_batch(array: Any, name: str | None) -> Any:
    from mlflow.types import TensorSpec

    return TensorSpec(array.dtype, (-1, *array.shape[1:]), name)


def environment() -> dict[str, Any]:
    """Where the run is computed: machine, Python, all distributions; no environment variables."""
    packages = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": dict(sorted(packages.items())),
    }


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested sections as `section.key` with JSON values; texts as they are."""
    result: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return result


def tracker(folder: Path, keep_trying: Callable[[], bool] = lambda: False) -> Tracker:
    """The tracker of the run in a folder."""
    from trainer.recipe import loader as door

    os.environ |= QUIET_MLFLOW
    return Tracker(folder, door.parse((folder / "recipe.yaml").read_text(), "recipe.yaml"), keep_trying)


def main(folder: str, parent: str) -> None:
    """The writer process: as `run`, for as long as its parent lives."""
    os.nice(10)  # training comes first
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # who ends a whole job still wants its end to be written
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    tracker(Path(folder), lambda: os.getppid() == int(parent)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
