"""Fixtures of the tests of tracking: databases of MLflow."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory) -> Path:
    """MLflow takes seconds to make its tables; once is enough."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database, tmp_path, monkeypatch) -> Path:
    """A database of the test's own, and the working folder with it."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return tmp_path / "mlflow.db"
