"""Sweeps in MLflow: a run for each, a run below it for each trial, none twice."""

import csv
import io
import json
import math
from contextlib import closing
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.run_folder import layout
from trainer.run_folder.journal import Journal, read
from trainer.tracking import trials
from trainer.tracking import writer as tracking
from trainer.tracking.progress import TrackingProgress

SWEEP = {
    "name": "tiny",
    "target": {"metric": "loss", "at_most": 0.2},
    "arms": ["lamb", "adam"],
    "batches": [64, 256],
    "recipes": {"lamb": {"track": {"uri": None, "experiment": "sweeps"}}},
}


def trial(seed: int, **other):
    """The fields of a trial's line."""
    cell = {"arm": "lamb", "batch": 64, "axes": {"echo.factor": 2}, "rate": 0.03125, "seed": seed}
    lengths = {"steps": 3.5, "trained_steps": 4, "examples": 256, "seconds": 0.5}
    curve = [(1, 2.0), (2, 0.5), (4, 0.125)]
    return {
        "key": f"{seed:x}",
        "stage": "search",
        "end": "reached",
        "curve": curve,
        **cell,
        **lengths,
        **other,
    }


def write_sweep(folder: Path, *lines, end: str | None = "FINISHED", begins: bool = True, **changes) -> None:
    """The folder of a sweep, as far as a tracker can see it. Lines are kinds with their fields."""
    folder.mkdir(exist_ok=True)
    (folder / layout.SWEEP).write_text("name: tiny\n")
    with closing(Journal(folder)) as journal:
        if begins:
            journal.write("sweep", **(SWEEP | changes))
        for kind, fields in lines:
            journal.write(kind, **fields)
        if end:
            journal.write("end", status=end, reason=None)


def tracked(database: Path):
    """What MLflow has: the client, the sweep's run, and the trials' by their names."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    everything = client.search_runs([client.get_experiment_by_name("sweeps").experiment_id])
    (parent,) = [run for run in everything if run.data.tags["lockstep.kind"] == "sweep"]
    children = [run for run in everything if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    named = {run.info.run_name: run for run in children}
    assert len(named) == len(children)
    return client, parent, named


REPORTED = {"stage": "report", "axes": {}}
FIT = {"s_min": 12.5, "b_crit": 400.0, "b_crit_high": math.inf}
LINES = (
    ("trial", trial(101)),
    ("trial", trial(102, rate=0.5, end="diverged", steps=None, curve=[], noise_scale=12.0)),
    ("trial", trial(103, end="stopped", steps=None)),
    ("best", {"arm": "lamb", "batch": 64, "axes": {}, "rate": 0.03125}),
    ("best", {"arm": "adam", "batch": 64, "axes": {}, "rate": None}),
    ("trial", trial(0, **REPORTED, steps=2.0, test={"accuracy": 0.75})),
    ("trial", trial(1, **REPORTED, steps=8.0)),
    ("trial", trial(2, **REPORTED, steps=50.0, rate=1.0)),  # of an earlier best rate
    ("fit", {"arm": "lamb", "axes": {}, "metrics": FIT}),
)


def test_a_sweep_is_a_run_and_each_trial_one_below_it(database, tmp_path):
    folder = tmp_path / "tiny-001"
    write_sweep(folder, *LINES)
    (folder / layout.REPORT).write_text("a page")
    write_sweep(folder, ("forecast", {}), end=None, begins=False)  # as of a recommendation, afterwards
    tracking.tracker(folder).sync()
    client, parent, children = tracked(database)
    assert (parent.info.run_name, parent.info.status) == ("tiny-001", "FINISHED")
    assert parent.data.params["target.at_most"] == "0.2"
    assert parent.data.tags["lockstep.batches"] == "64, 256"
    assert parent.data.metrics["fit/lamb/s_min"] == 12.5
    assert math.isnan(parent.data.metrics["fit/lamb/b_crit_high"])
    assert "best_rate/adam" not in parent.data.metrics
    for name, value in {"best_rate/lamb": 0.03125, "steps_to_target/lamb": 4.0}.items():
        (point,) = client.get_metric_history(parent.info.run_id, name)
        assert (point.step, point.value) == (64, pytest.approx(value))
    paths = {artifact.path for artifact in client.list_artifacts(parent.info.run_id)}
    assert paths == {"sweep.yaml", "journal.jsonl", "trials.csv", "report.html", "environment.json"}

    first = children["lamb batch=64 echo.factor=2 rate=0.03125 seed=101"]
    assert first.data.params == {
        "arm": "lamb",
        "batch": "64",
        "rate": "0.03125",
        "seed": "101",
        "stage": "search",
        "echo.factor": "2",
    }
    wanted = {"steps_to_target": 3.5, "examples_to_target": 224.0, "seconds_to_target": 0.5, "feasible": 1.0}
    assert wanted.items() <= first.data.metrics.items()
    curve = client.get_metric_history(first.info.run_id, "validation/loss")
    assert [(point.step, point.value) for point in curve] == [(64, 2.0), (128, 0.5), (256, 0.125)]
    assert curve[-1].timestamp == first.info.end_time
    lost = children["lamb batch=64 echo.factor=2 rate=0.5 seed=102"]
    assert (lost.info.status, lost.data.metrics["feasible"]) == ("FAILED", 0.0)
    assert lost.data.metrics["noise_scale"] == 12.0
    assert "steps_to_target" not in lost.data.metrics
    assert children["lamb batch=64 echo.factor=2 rate=0.03125 seed=103"].info.status == "KILLED"
    assert children["lamb batch=64 rate=0.03125 seed=0 report"].data.metrics["test/accuracy"] == 0.75


def test_what_was_forgotten_or_comes_again_is_no_trial_twice(database, tmp_path):
    folder = tmp_path / "tiny-001"
    write_sweep(folder, *LINES, end=None)
    tracking.tracker(folder).sync()
    before = {name: run.info.run_id for name, run in tracked(database)[2].items()}
    assert tracked(database)[1].info.status == "KILLED"
    state = json.loads((folder / layout.TRACKING).read_text())
    (folder / layout.TRACKING).write_text(json.dumps(state | {"offset": 0}))
    write_sweep(folder, ("trial", trial(104)), arms=["lamb", "adam", "sgd"])  # resumed, with more arms
    tracking.tracker(folder).sync()
    client, parent, after = tracked(database)
    assert {name: after[name].info.run_id for name in before} == before
    assert len(after) == len(before) + 1
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["lockstep.arms"] == "lamb, adam, sgd"
    assert len(client.get_metric_history(parent.info.run_id, "steps_to_target/lamb")) == 1


def test_a_trial_that_was_trained_again_for_longer_takes_the_place_of_the_first(database, tmp_path):
    folder = tmp_path / "tiny-001"
    write_sweep(folder, ("trial", trial(101, end="stopped", steps=None)), end=None)
    tracking.tracker(folder).sync()
    longer = trial(101, trained_steps=8, steps=7.5, examples=512, curve=[(4, 0.5), (8, 0.25)])
    write_sweep(folder, ("trial", longer))
    for _ in range(2):  # the second time with nothing remembered but the run
        tracking.tracker(folder).sync()
        client, _, children = tracked(database)
        (child,) = children.values()
        assert child.data.metrics["steps_to_target"] == 7.5
        assert len(client.get_metric_history(child.info.run_id, "validation/loss")) == 2
        state = json.loads((folder / layout.TRACKING).read_text())
        (folder / layout.TRACKING).write_text(json.dumps(state | {"offset": 0}))
    rows = list(csv.DictReader(io.StringIO(trials.table(read(folder)))))
    assert [(row["seed"], row["steps"]) for row in rows] == [("101", "7.5")]


@pytest.mark.parametrize("at", ["create_run", "log_batch", "set_terminated"])
def test_an_outage_in_the_middle_of_a_trial_is_made_good(database, tmp_path, monkeypatch, at):
    from mlflow import MlflowClient

    folder = tmp_path / "tiny-001"
    write_sweep(folder, *LINES)
    real, calls = getattr(MlflowClient, at), []

    def away(self, *arguments, **options):
        calls.append(at)
        if len(calls) == 4:
            raise ConnectionError("the server is away")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, at, away)
        with pytest.raises(ConnectionError):
            tracking.tracker(folder).sync()
    assert TrackingProgress.load(folder).offset == 0
    tracking.tracker(folder).sync()
    _, parent, children = tracked(database)
    assert {run.info.status for run in children.values()} == {"FINISHED", "FAILED", "KILLED"}
    assert (len(children), parent.info.status) == (6, "FINISHED")
    assert all("feasible" in run.data.metrics and "seed" in run.data.params for run in children.values())


def test_a_trial_that_mlflow_refuses_holds_no_other_up(database, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    folder = tmp_path / "tiny-001"
    write_sweep(folder, *LINES)
    real = MlflowClient.create_run

    def picky(self, experiment_id, start_time=None, tags=None, run_name=None):
        if run_name.endswith("seed=102"):
            raise MlflowException("no such name here", INVALID_PARAMETER_VALUE)
        return real(self, experiment_id, start_time, tags, run_name)

    monkeypatch.setattr(MlflowClient, "create_run", picky)
    tracking.tracker(folder).sync()
    _, parent, children = tracked(database)
    assert len(children) == 5
    assert parent.info.status == "FINISHED"
    assert "seed=102: MlflowException: no such name here" in parent.data.tags["lockstep.refused"]


def test_many_axes_share_a_parameter():
    axes = {f"key{number}": number for number in range(8)}
    found = trials.params(trial(1, axes=axes))
    assert len(found) <= trials.MOST_PARAMS
    assert found["axes"] == " ".join(f"{key}={value}" for key, value in axes.items())


def test_a_sweep_that_has_not_begun_is_told(tmp_path):
    (tmp_path / layout.SWEEP).touch()
    with pytest.raises(UserError, match="its sweep has not begun"):
        tracking.tracker(tmp_path)
