"""Folders of runs as the MLflow writer finds them, and what MLflow holds of them afterwards."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.run_folder.journal import Journal

RECIPE = """
name: tiny
task: {use: trainer.tasks.digits:Digits, with: {hidden: 4}}
batch: {size: 512, micro: 64, lanes: 8}
optimizer: {name: lamb, lr: 0.02}
train: {epochs: 4}
"""


def step(number: int, **other: Any) -> dict[str, Any]:
    """The fields of a step's line."""
    seconds = dict.fromkeys(("wait_s", "compute_s", "communication_s", "optimizer_s"), 0.25)
    counts = {"examples": 512 * number, "fresh": 256 * number, "passes": 0.2 * number, "batch": 512}
    numbers = {"loss": 1 / number, "learning_rate": 0.02, "gradient_norm": 1.0, "step_s": 1.0}
    return {"step": number, **counts, **numbers, **seconds, "echo": {"age": 3.0}, **other}


def write_run(folder: Path, steps: int = 3, end: str | None = "FINISHED") -> Journal:
    """The folder of a run, as far as a writer can see it."""
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "plan.txt").write_text("a plan\n")
    journal = Journal(folder)
    journal.write("start", name="tiny", workers=2, code_version="0.1.0")
    for number in range(1, steps + 1):
        journal.write("step", **step(number))
    journal.write("evaluation", split="test", step=steps, examples=512 * steps, metrics={"accuracy": 0.5})
    if end:
        journal.write("end", status=end, reason="the reason", metrics={})
    return journal


def lines_of(steps: list[dict[str, Any]], times: list[float]) -> list[dict[str, Any]]:
    return [{"kind": "step", "time": t, **fields} for t, fields in zip(times, steps, strict=True)]


def tracked(database: Path):
    """The one run that a database holds, and the client that sees it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("default")
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def losses(database: Path) -> list[tuple[int, float]]:
    client, run = tracked(database)
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]


def start_writer(folder: Path, parent: int) -> subprocess.Popen:
    """The writer of a run as a process, for as long as a parent lives."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.tracking.writer", str(folder), str(parent)], cwd=folder.parent
    )
