"""`lockstep runs`: what is there, how it differs, what can go."""

from contextlib import closing
from pathlib import Path
from shutil import copytree

import pytest

from cluster import runs
from tests.cluster.commands import run, user_folder
from trainer.errors import UserError
from trainer.run_folder import layout
from trainer.run_folder.journal import Journal
from trainer.run_folder.outcome import Outcome


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


def write_sweep(folder: Path, *lines: tuple[str, dict], end: bool = True) -> None:
    """The folder of a sweep, as its journal tells it."""
    folder.mkdir(parents=True)
    (folder / layout.SWEEP).touch()
    target = {"metric": "loss", "at_most": 0.2}
    arms = {"lamb": {"track": {}}, "adam": {"track": {}}}
    with closing(Journal(folder)) as journal:
        journal.write("sweep", name="s", target=target, arms=list(arms), batches=[64, 128], recipes=arms)
        for kind, fields in lines:
            journal.write(kind, **fields)
        if end:
            Outcome("FINISHED").write(journal)


def test_sweeps_are_listed_as_sweeps_with_where_each_arm_needs_the_fewest_steps(tmp_path: Path):
    def trial(batch: int, seed: int, steps: float, **other) -> tuple[str, dict]:
        cell = {"arm": "lamb", "batch": batch, "axes": {}, "rate": 0.5, "seed": seed, "stage": "report"}
        lengths = {"trained_steps": 60, "examples": 1000, "seconds": 1.0, "curve": [], "end": "reached"}
        return "trial", {"key": f"{batch} {seed}", "steps": steps, **cell, **lengths, **other}

    def best(batch: int) -> tuple[str, dict]:
        return "best", {"arm": "lamb", "batch": batch, "axes": {}, "rate": 0.5}

    lines = [best(64), trial(64, 0, 50.0), best(128), trial(128, 0, 16.0), trial(128, 1, 25.0)]
    write_sweep(tmp_path / "s-001", *lines, trial(128, 2, 1.0, rate=0.1))
    write_sweep(tmp_path / "s-002", end=False)
    head, first, second = runs.listing(str(tmp_path))
    assert head.split() == ["sweep", "began", "status", "trials", "examples", "fewest", "steps"]
    name, _, _, status, trials, examples, *fewest = first.split()
    assert (name, status, trials, examples) == ("s-001", "FINISHED", "4", "4,000")
    assert " ".join(fewest) == "lamb batch=128: 20 steps at rate 0.5"
    assert second.split()[0] == "s-002"
    assert runs.UNFINISHED in second
    assert runs.prune(str(tmp_path), []) == ["no finished run has checkpoints"]
    for refused in (runs.comparison, runs.prune):
        with pytest.raises(UserError, match="s-001: is a sweep; give runs"):
            refused(str(tmp_path), ["s-001"])


def test_a_folder_of_runs_and_sweeps_has_a_list_of_each(folder: Path, tmp_path: Path):
    copytree(folder / "runs", tmp_path / "runs")
    write_sweep(tmp_path / "runs/s-001")
    lines = runs.listing(str(tmp_path / "runs"))
    assert [line.split()[0] if line else "" for line in lines] == [
        *("run", "tiny-001", "tiny-002", "tiny-003", ""),
        *("sweep", "s-001"),
    ]


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
