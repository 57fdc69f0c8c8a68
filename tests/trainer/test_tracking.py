"""The MLflow writer: what it makes of a journal, and what it does when MLflow is not there."""

import itertools
import json
import math
import os
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.tracked_runs import RECIPE, lines_of, losses, start_writer, step, tracked, write_run
from trainer.errors import UserError
from trainer.recipe import loader as recipes
from trainer.recipe.schema import flattened
from trainer.run_folder import layout
from trainer.run_folder.journal import read
from trainer.tracking import address, metrics
from trainer.tracking import tracker as trackers
from trainer.tracking import writer as tracking
from trainer.tracking.progress import TrackingProgress

# What lines come to


def test_steps_become_metrics_over_served_examples():
    (line,) = lines_of([step(3)], [1700000000.5])
    points = {
        name: (value, ms, at) for name, value, ms, at in metrics.entry([line], TrackingProgress("")).metrics
    }
    assert points["train/loss"] == (1 / 3, 1700000000500, 1536)
    assert points["train/examples_per_s"] == (512.0, 1700000000500, 1536)
    assert points["train/echo/age"] == (3.0, 1700000000500, 1536)
    assert {"train/fresh_examples", "train/gradient_norm", "train/time/communication_s"} <= points.keys()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_leaves_a_gap(value):
    (line,) = lines_of([step(1, loss=value)], [0.0])
    points = {name: point for name, point, _, _ in metrics.entry([line], TrackingProgress("")).metrics}
    assert math.isnan(points["train/loss"])


@given(
    gaps=st.lists(st.floats(0.01, 3), min_size=1, max_size=60),
    cut=st.integers(0, 60),
    unthinned=st.integers(0, 10),
)
def test_later_steps_come_at_most_once_a_second_however_the_journal_is_cut(gaps, cut, unthinned):
    times = [1000 + sum(gaps[: i + 1]) for i in range(len(gaps))]
    lines = lines_of([step(i + 1) for i in range(len(gaps))], times)
    before = metrics.UNTHINNED_STEPS
    metrics.UNTHINNED_STEPS = unthinned
    try:
        whole = metrics.entry(lines, TrackingProgress("")).metrics
        state = TrackingProgress("")
        pieces = metrics.entry(lines[:cut], state).metrics + metrics.entry(lines[cut:], state).metrics
    finally:
        metrics.UNTHINNED_STEPS = before
    assert pieces == whole
    kept = [at // 512 for name, _, _, at in whole if name == "train/loss"]
    assert kept[:unthinned] == list(range(1, len(gaps) + 1))[:unthinned]
    late = [times[number - 1] for number in kept[unthinned:]]
    assert all(b - a >= metrics.THIN_TO_S for a, b in itertools.pairwise(late))


def test_sections_become_flat_parameters():
    values = {"a": 1, "b": {"c": None, "d": [1.5, True], "e": {}}, "f": "text"}
    assert flattened(values) == {"a": "1", "b.c": "null", "b.d": "[1.5, true]", "b.e": "{}", "f": "text"}


# Where it goes


def test_the_address_is_the_recipes_or_the_environments_or_the_working_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    default = recipes.parse(RECIPE)
    assert address.address(default.track) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@tracking:5000")
    assert address.address(default.track) == "http://me:secret@tracking:5000"
    assert address.shown(address.address(default.track)) == "http://tracking:5000"
    named = recipes.parse(RECIPE, overrides=["track.uri=sqlite:///other.db"])
    assert address.address(named.track) == f"sqlite:///{tmp_path}/other.db"


def test_a_recipe_with_a_password_is_refused():
    recipe = recipes.parse(RECIPE, overrides=["track.uri=http://me:secret@tracking:5000"])
    with pytest.raises(UserError, match="holds a password") as refusal:
        address.address(recipe.track)
    assert "secret" not in str(refusal.value)


# In MLflow itself


def test_a_run_is_all_there_and_syncing_again_changes_nothing(database, tmp_path):
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    tracking.tracker(folder).sync()
    client, run = tracked(database)
    times = [line["time"] for line in read(folder)]
    assert run.info.status == "FINISHED"
    assert (run.info.start_time, run.info.end_time) == (round(1000 * times[0]), round(1000 * times[-1]))
    assert run.data.params["optimizer.name"] == "lamb"
    assert run.data.params["task.with.hidden"] == "4"
    assert run.data.tags["lockstep.workers"] == "2"
    assert run.data.metrics["test/accuracy"] == 0.5
    assert losses(database) == [(512, 1.0), (1024, 0.5), (1536, 1 / 3)]
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"recipe.yaml", "plan.txt", "environment.json", "journal.jsonl"}

    state = (folder / layout.TRACKING).read_text()
    tracking.tracker(folder).sync()
    assert (folder / layout.TRACKING).read_text() == state
    forgetful = json.loads(state) | {"offset": 0, "steps": 0, "thinned_at": 0.0}
    (folder / layout.TRACKING).write_text(json.dumps(forgetful))
    tracking.tracker(folder).sync()  # as after a crash between MLflow's answer and our note of it
    assert losses(database) == [(512, 1.0), (1024, 0.5), (1536, 1 / 3)]


def test_the_environment_of_the_process_is_not_recorded(database, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-very-secret-thing")
    write_run(tmp_path / "tiny-001").close()
    tracking.tracker(tmp_path / "tiny-001").sync()
    holders = [
        path for path in tmp_path.rglob("*") if path.is_file() and b"a-very-secret" in path.read_bytes()
    ]
    assert holders == []


def test_a_failed_run_says_why_and_a_resumed_one_goes_on_in_the_same_place(database, tmp_path):
    folder = tmp_path / "tiny-001"
    journal = write_run(folder, end="FAILED")
    tracking.tracker(folder).sync()
    _, failed = tracked(database)
    assert (failed.info.status, failed.data.tags["lockstep.reason"]) == ("FAILED", "the reason")
    journal.write("start", name="tiny", workers=1, code_version="0.1.0")
    journal.write("rewind", step=3)
    journal.write("step", **step(4))
    journal.write("end", status="FINISHED", reason=None, metrics={})
    journal.close()
    tracking.tracker(folder).sync()
    _, resumed = tracked(database)
    assert resumed.info.run_id == failed.info.run_id
    assert (resumed.info.status, resumed.data.tags["lockstep.reason"]) == ("FINISHED", "")
    assert resumed.data.tags["lockstep.workers"] == "1"
    assert len(losses(database)) == 4


def test_a_run_whose_process_died_is_killed(database, tmp_path):
    write_run(tmp_path / "tiny-001", end=None).close()
    tracking.tracker(tmp_path / "tiny-001").sync()
    _, run = tracked(database)
    assert run.info.status == "KILLED"
    assert "is gone" in run.data.tags["lockstep.reason"]


def test_a_server_that_is_down_is_told_of_and_nothing_is_lost(database, tmp_path, monkeypatch):
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    monkeypatch.setattr(trackers, "SHORTEST_PAUSE_S", 0.01)
    attempts = iter([True, True, False])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(Exception, match=r"127\.0\.0\.1"):
        tracking.tracker(folder, lambda: next(attempts)).run()
    state = TrackingProgress.load(folder)
    assert state is not None
    assert state.error is not None
    assert state.offset == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracking.tracker(folder).sync()
    assert len(losses(database)) == 3
    assert tracked(database)[1].info.status == "FINISHED"


@pytest.mark.slow  # MLflow itself waits 20 s for a lock
def test_a_locked_database_is_tried_again_until_it_answers(database, tmp_path, monkeypatch):
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    monkeypatch.setattr(trackers, "SHORTEST_PAUSE_S", 0.01)
    tracker = tracking.tracker(folder, lambda: True)
    tracker.prepare()
    lock = sqlite3.connect(database)
    lock.execute("BEGIN EXCLUSIVE")
    real, failures = tracker.write, []

    def watched():
        try:
            return real()
        except Exception as error:
            failures.append(str(error))
            lock.rollback()
            raise

    monkeypatch.setattr(tracker, "write", watched)
    monkeypatch.setattr(tracker, "prepare", lambda: None)
    tracker.run()
    lock.close()
    assert len(failures) == 1
    assert "locked" in failures[0]
    assert len(losses(database)) == 3
    state = TrackingProgress.load(folder)
    assert state is not None
    assert state.error is None


def test_the_model_loads_and_predicts_without_pickle_and_without_our_code(database, tmp_path, monkeypatch):
    import mlflow
    import numpy as np
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    model = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10))
    save_file(model.state_dict(), folder / "model.safetensors")
    tracking.tracker(folder).sync()
    client, run = tracked(database)
    assert run.data.tags["lockstep.model"] == "logged"
    assert run.info.status == "FINISHED"
    assert "model.safetensors" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    (logged,) = mlflow.search_logged_models([run.info.experiment_id], output_format="list")
    pixels = np.random.default_rng(0).random((7, 64), dtype=np.float32)
    predicted = mlflow.pyfunc.load_model(logged.model_uri).predict(pixels)
    np.testing.assert_allclose(
        predicted, model(torch.from_numpy(pixels)).detach().numpy(), rtol=1e-5, atol=1e-6
    )


def test_a_model_that_is_no_graph_leaves_its_weights_and_says_so(database, tmp_path):
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    (folder / "model.safetensors").write_bytes(b"not weights")
    tracking.tracker(folder).sync()
    _, run = tracked(database)
    assert run.info.status == "FINISHED"
    assert run.data.tags["lockstep.model"].startswith("only its weights: ")


# What MLflow refuses


# As a process


def test_the_writer_ends_with_the_run_and_when_its_parent_is_gone(database, tmp_path):
    journal = write_run(tmp_path / "tiny-001", end=None)
    writer = start_writer(tmp_path / "tiny-001", os.getpid())
    while (state := TrackingProgress.load(tmp_path / "tiny-001")) is None or not state.offset:
        assert writer.poll() is None
        time.sleep(0.05)
    assert tracked(database)[1].info.status == "RUNNING"
    journal.write("end", status="KILLED", reason="interrupted", metrics={})
    journal.close()
    assert writer.wait(60) == 0
    assert tracked(database)[1].info.status == "KILLED"


def test_the_writer_of_a_dead_run_marks_it_and_ends(database, tmp_path):
    write_run(tmp_path / "tiny-001", end=None).close()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert start_writer(tmp_path / "tiny-001", dead.pid).wait(60) == 0
    _, run = tracked(database)
    assert (run.info.status, len(losses(database))) == ("KILLED", 3)


def test_a_writer_that_was_killed_is_made_good_by_a_later_one(database, tmp_path):
    journal = write_run(tmp_path / "tiny-001", end=None)
    writer = start_writer(tmp_path / "tiny-001", os.getpid())
    while (state := TrackingProgress.load(tmp_path / "tiny-001")) is None or not state.run_id:
        time.sleep(0.02)
    writer.kill()
    writer.wait(60)
    journal.write("end", status="FINISHED", reason=None, metrics={})
    journal.close()
    tracking.tracker(tmp_path / "tiny-001").sync()
    _, run = tracked(database)
    assert (run.info.status, len(losses(database))) == ("FINISHED", 3)
    assert run.data.params["batch.size"] == "512"
