"""`lockstep runs`: what is there, how it differs, what can go."""

from pathlib import Path

import pytest

from cluster import runs
from tests.cluster.commands import run, user_folder
from trainer.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs and one that failed."""
    folder = user_folder(tmp_path_factory.mktemp("runs"))
    spoilt = ("--set", "task.with.spoilt_from=0.5")
    for changes in ((), ("--set", "optimizer.lr=0.2"), spoilt):
        run("train", "tiny.yaml", "--local", *changes, cwd=folder)
    return folder


def test_lists_every_run_with_how_it_ended(folder: Path):
    command = run("runs", cwd=folder)
    assert command.process.returncode == 0, command.output
    head, *rows = command.output.splitlines()
    assert head.split() == ["run", "began", "status", "steps", "examples", "test"]
    assert [row.split()[0] for row in rows] == ["tiny-001", "tiny-002", "tiny-003"]
    assert [row.split()[3] for row in rows] == ["FINISHED", "FINISHED", "FAILED"]
    assert rows[0].split()[4:6] == ["8", "256"]
    assert "loss" in rows[0]


def test_compares_what_differs_and_nothing_else(folder: Path):
    lines = runs.comparison(str(folder / "runs"), ["tiny-001", "tiny-002"])
    keys = [line.split("  ")[0] for line in lines[1:]]
    assert keys[0] == "optimizer.lr"
    assert keys[1:] == ["status", "steps", "examples served", "fresh examples", "test loss"]
    assert lines[1].split() == ["optimizer.lr", "0.1", "0.2"]


def test_an_unknown_run_is_refused_with_those_that_are_there(folder: Path):
    with pytest.raises(UserError, match="there are tiny-001, tiny-002, tiny-003"):
        runs.comparison(str(folder / "runs"), ["tiny-001", "tiny-009"])
    command = run("runs", "--dir", "nowhere", cwd=folder)
    assert command.process.returncode == 2
    assert "holds no run" in command.output


def test_prunes_the_checkpoints_of_finished_runs_alone(folder: Path):
    with pytest.raises(UserError, match="not finished"):
        runs.prune(str(folder / "runs"), ["tiny-003"])
    runs.prune(str(folder / "runs"), [])
    left = [path.parent.name for path in (folder / "runs").glob("*/checkpoints")]
    assert left in ([], ["tiny-003"])
    assert (folder / "runs/tiny-001/model.safetensors").exists()
    assert (folder / "runs/tiny-001/journal.jsonl").exists()
