"""A database that is made in memory is the one that MLflow would have made, and replaces none."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from trainer.tracking import database


def content(file: Path) -> dict[str, list[tuple]]:
    """The schema of a database and its rows, without the times at which they were made.

    In which order a table has its constraints differs each time that MLflow makes it.
    """
    with closing(sqlite3.connect(file)) as connection:
        schema = connection.execute("SELECT type, name, sql FROM sqlite_master ORDER BY 1, 2").fetchall()
        found: dict[str, list[tuple]] = {
            "schema": [(kind, name, sorted(re.split(r"[\s,]+", sql or ""))) for kind, name, sql in schema]
        }
        for kind, name, _ in schema:
            if kind == "table":
                rows = connection.execute(f"SELECT * FROM {name}")
                timeless = [i for i, (title, *_) in enumerate(rows.description) if "time" not in title]
                found[name] = [tuple(row[i] for i in timeless) for row in rows]
    return found


def test_it_is_what_mlflow_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    database.make(f"sqlite:///{tmp_path}/below/ours.db")
    MlflowClient(f"sqlite:///{tmp_path}/theirs.db")
    ours = content(tmp_path / "below/ours.db")
    assert ours == content(tmp_path / "theirs.db")
    assert ours["experiments"], "the default one"
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["ours.db"]


def test_what_is_there_stays(tmp_path: Path):
    file = tmp_path / "mlflow.db"
    file.write_text("of another version")
    database.make(f"sqlite:///{file}")
    assert file.read_text() == "of another version"


def test_what_another_process_makes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mlflow

    file, client = tmp_path / "mlflow.db", mlflow.MlflowClient

    def slower(uri: str) -> mlflow.MlflowClient:
        file.write_text("of another process")
        return client(uri)

    monkeypatch.setattr(mlflow, "MlflowClient", slower)
    database.make(f"sqlite:///{file}")
    assert file.read_text() == "of another process"
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    "uri", ["http://127.0.0.1:1", "postgresql://h/db", "sqlite:///{folder}/a.db?mode=rw"]
)
def test_other_addresses_are_left_to_mlflow(tmp_path: Path, uri: str):
    database.make(uri.format(folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_left_to_mlflow_too(tmp_path: Path):
    (tmp_path / "file").touch()
    database.make(f"sqlite:///{tmp_path}/file/mlflow.db")
    assert (tmp_path / "file").is_file()
