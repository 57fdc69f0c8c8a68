"""What MLflow refuses, loses or never gets, and how little of a run that costs."""

import json
import os
import sqlite3

import pytest

from tests.trainer.tracked_runs import losses, start_writer, tracked, write_run
from trainer.run_folder import layout
from trainer.tracking import writer as tracking
from trainer.tracking.progress import TrackingProgress
from trainer.tracking.refusals import LastingRefusal


def test_a_metric_of_any_name_arrives_and_a_refused_entry_holds_nothing_up(database, tmp_path, monkeypatch):
    folder = tmp_path / "tiny-001"
    journal = write_run(folder, end=None)
    named = {"recall@1": 0.25, "a//b": 0.5, "m" * 300: 1.0, "count": 10**400}
    journal.write("evaluation", split="test", step=3, examples=2**70, metrics=named)
    journal.write("end", status="FINISHED", reason="\ud800\0", metrics={})
    journal.close()
    from mlflow import MlflowClient

    real = MlflowClient.log_batch

    def picky(self, run_id, metrics=(), params=(), tags=(), **other):
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        if any(entry.key in ("train/loss", "optimizer.lr") for entry in (*metrics, *params)):
            raise MlflowException("no such thing here", INVALID_PARAMETER_VALUE)
        return real(self, run_id, metrics=metrics, params=params, tags=tags, **other)

    monkeypatch.setattr(MlflowClient, "log_batch", picky)
    tracking.tracker(folder).sync()
    _, run = tracked(database)
    assert run.data.metrics["test/recall_x40_1"] == 0.25
    assert run.data.metrics["test/a_x2f_/b"] == 0.5
    assert "test/recall_x40_1: test/recall@1" in run.data.tags["lockstep.renamed"].splitlines()
    assert {"train/gradient_norm", "test/accuracy"} <= run.data.metrics.keys()
    assert "train/loss" not in run.data.metrics
    assert "optimizer.lr" not in run.data.params
    assert run.data.params["optimizer.name"] == "lamb"
    assert "metrics: train/loss: MlflowException: no such thing here" in run.data.tags["lockstep.refused"]
    assert run.info.status == "FINISHED"


def test_a_deleted_experiment_is_no_outage_and_the_cure_is_said_at_once(database, tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    client.delete_experiment(client.create_experiment("default"))
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    with pytest.raises(LastingRefusal, match=r"is deleted; restore it with `mlflow experiments restore"):
        tracking.tracker(folder, lambda: True).run()  # it would try for ever
    assert "track.experiment" in TrackingProgress.load(folder).error


@pytest.mark.parametrize(
    ("uri", "cure"),
    [
        ("{folder}/mlruns", "mlflow migrate-filestore"),
        ("foo://x/y", "set track.uri to"),
        ("mssql+pyodbc://h/db", "install pyodbc"),
        ("sqlite:///other-version.db", "mlflow db upgrade"),
        ("sqlite:///no-database.db", "is no SQLite database"),
    ],
)
def test_a_store_that_will_never_answer_is_no_outage(database, tmp_path, monkeypatch, uri, cure):
    (tmp_path / "no-database.db").write_text("something else " * 100)
    other = tmp_path / "other-version.db"
    other.write_bytes(database.read_bytes())
    with sqlite3.connect(other) as connection:
        connection.execute("update alembic_version set version_num = 'abcdef'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    write_run(tmp_path / "tiny-001").close()
    with pytest.raises(LastingRefusal, match=cure):
        tracking.tracker(tmp_path / "tiny-001", lambda: True).run()


@pytest.mark.parametrize(
    "loss",
    ["another database", "deleted database", "damaged", "of other types", "deleted run", "behind its end"],
)
def test_where_the_remembered_run_is_gone_another_begins_from_the_journal(
    database, empty_database, tmp_path, loss
):
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    assert start_writer(folder, os.getpid()).wait(60) == 0
    if loss.endswith("database"):
        database.unlink()
        if loss == "another database":
            database.write_bytes(empty_database.read_bytes())
    elif loss == "deleted run":
        client, run = tracked(database)
        client.delete_run(run.info.run_id)
    else:
        progress = json.loads((folder / layout.TRACKING).read_text())
        damaged = {
            "of other types": progress | {"offset": "x"},
            "behind its end": progress | {"offset": 10**9},
        }
        (folder / layout.TRACKING).write_text(json.dumps(damaged.get(loss)) if loss in damaged else '{"uri"')
    tracking.tracker(folder).sync()
    assert losses(database) == [(512, 1.0), (1024, 0.5), (1536, 1 / 3)]
    assert tracked(database)[1].info.status == "FINISHED"


def test_a_run_that_was_begun_and_not_remembered_is_found_again(database, tmp_path):
    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    tracker = tracking.tracker(folder)
    tracker.prepare()
    (folder / layout.TRACKING).unlink()  # as after a crash between MLflow's answer and our note of it
    tracking.tracker(folder).sync()
    assert tracked(database)[1].info.run_id == tracker.progress.run_id


def test_an_interrupted_upload_of_the_model_leaves_one_model_in_the_end(database, tmp_path, monkeypatch):
    import mlflow
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "tiny-001"
    write_run(folder).close()
    model = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10))
    save_file(model.state_dict(), folder / "model.safetensors")

    class Killed(BaseException):
        pass

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_model_artifacts", killed)
        with pytest.raises(Killed):
            tracking.tracker(folder).sync()
    for _ in range(2):
        tracking.tracker(folder).sync()
        mlflow.set_tracking_uri(f"sqlite:///{database}")
        experiment = tracked(database)[1].info.experiment_id
        (logged,) = mlflow.search_logged_models([experiment], output_format="list")
        assert str(logged.status) == "READY"


def test_a_store_of_artifacts_that_is_away_holds_no_metric_up(database, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    folder = tmp_path / "tiny-001"
    write_run(folder).close()

    def away(*_, **__):
        raise ConnectionError("the bucket is away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", away)
        with pytest.raises(ConnectionError):
            tracking.tracker(folder).sync()
    assert len(losses(database)) == 3
    assert tracked(database)[1].info.status == "FINISHED"
    tracking.tracker(folder).sync()
    client, run = tracked(database)
    assert "recipe.yaml" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}


def test_the_artifacts_of_a_database_lie_beside_it(database, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    write_run(tmp_path / "tiny-001").close()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.chdir(tmp_path / "elsewhere")
    tracking.tracker(tmp_path / "tiny-001").sync()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert list(tmp_path.glob("mlruns/*/artifacts/recipe.yaml"))
