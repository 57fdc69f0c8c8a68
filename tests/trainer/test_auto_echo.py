"""What a run tells MLflow of its echo."""

from pathlib import Path
from typing import Any

import pytest

from tests.trainer.plans import spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, recipe
from trainer.run_folder import journal
from trainer.tracking import metrics
from trainer.tracking.progress import TrackingProgress
from trainer.worker import run_worker

TOLD = {
    "train/fresh_examples",
    "train/echoed_examples",
    "train/echo/factor",
    "train/echo/held",
    "train/echo/buffer_bytes",
    "train/echo/age",
    "train/echo/upstream_s",
    "train/echo/downstream_s",
    "train/echo/idle",
    "train/echo/received_bytes",
    "train/echo/processes",
    "train/echo/skipped",
}


def steps_in_mlflow(folder: Path) -> list[dict[str, float]]:
    """Each step's metrics by name, as the writer translates the journal."""
    lines = [line for line in journal.read(folder) if line["kind"] == "step"]
    return [
        {name: value for name, value, *_ in metrics.entry([line], TrackingProgress("")).metrics}
        for line in lines
    ]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("echo", [{"factor": 1.5}, {"factor": "auto", "cap": 2}])
def test_every_step_tells_of_the_echo(
    process_group: ProcessGroup, tmp_path: Path, workers: int, echo: dict[str, Any]
):
    chosen = recipe(echo=echo, train={"epochs": 3})
    outcome, *_ = process_group.run(workers, run_worker, spec(chosen, tmp_path, NoisyTask))
    assert outcome.status == "FINISHED"
    told = steps_in_mlflow(tmp_path)
    assert told
    for step in told:
        assert step.keys() >= TOLD
        assert step["train/fresh_examples"] + step["train/echoed_examples"] == step["train/served_examples"]
        assert 1 <= step["train/echo/factor"] <= 2
        assert 0 <= step["train/echo/idle"] <= 1
        assert step["train/echo/upstream_s"] > 0
        assert step["train/echo/downstream_s"] > 0
        assert step["train/echo/received_bytes"] > 0
        assert step["train/echo/processes"] == 1
    if echo["factor"] == 1.5:
        assert {step["train/echo/factor"] for step in told} == {1.5}
        assert max(step["train/echo/age"] for step in told) > 0
        assert told[-1]["train/echo/held"] > 0
