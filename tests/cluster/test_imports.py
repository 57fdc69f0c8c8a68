"""What each process of a run has imported by its first step: nothing that only some recipes need."""

import json
from pathlib import Path

import pytest

from tests.cluster.commands import TASK, run, user_folder

HEAVY = ["torch._dynamo", "sympy", "pandas", "pyarrow", "mlflow", "ray.train", "ray.data", "sklearn"]
SPY = f"""
import json
import os
import sys
from pathlib import Path


def note(method):
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    title = Path("/proc/self/cmdline").read_text().replace(chr(0), " ")
    marks = {{"ray::Worker": "worker", "PoolActor": "pool", "tracking.writer": "tracking"}}
    role = next((role for mark, role in marks.items() if mark in title), "command")
    with open(Path(__file__).parent / "seen.jsonl", "a") as file:
        file.write(json.dumps([role, loaded]) + chr(10))
"""


def spying(task: str, method: str, arguments: str) -> str:
    head = f"    def {method}(self, {arguments}):\n"
    return task.replace(head, f"{head}        note({method!r})\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = user_folder(tmp_path)
    task = spying(spying(TASK, "loss", "model, batch"), "prepare", "example, draw")
    (folder / "my_task.py").write_text(SPY + task)
    return folder


def seen(folder: Path) -> list[tuple[str, list[str]]]:
    """Role and heavy imports of a process, each time that it called the task."""
    return [tuple(json.loads(line)) for line in (folder / "seen.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "lamb", "adafactor"])
def test_a_run_in_one_process_imports_what_it_needs(folder: Path, optimizer: str):
    chosen = f"optimizer={{name: {optimizer}, lr: 0.1}}"
    command = run("train", "tiny.yaml", "--local", "--set", chosen, cwd=folder)
    assert command.process.returncode == 0, command.output
    assert all(loaded == [] for _, loaded in seen(folder))


@pytest.mark.slow
def test_a_run_on_ray_imports_what_it_needs_in_each_process(folder: Path):
    command = run("train", "tiny.yaml", "--set", "track.uri=null", cwd=folder)
    assert command.process.returncode == 0, command.output
    by_ray = {"pyarrow"}  # Ray's own worker processes import it as they start, and cannot be asked not to
    for role, loaded in seen(folder):
        assert role == "tracking" or set(loaded) <= (by_ray if role in ("worker", "pool") else set()), role
    assert {"worker", "pool", "tracking"} <= {role for role, _ in seen(folder)}
