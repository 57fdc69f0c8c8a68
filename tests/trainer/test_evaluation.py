"""Metrics of a split: right for any range of values, and independent of how training was computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_echo import ArraySource, InlinePreparer
from tests.trainer.plans import spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, ready, recipe
from trainer.compute.evaluation import Evaluation
from trainer.distributed.group import WorkerGroup
from trainer.worker import run_worker

ROWS = 64


class Prices:
    """A regression in dollars: targets of 450,000 ± 100,000, and a model that predicts about 0."""

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.y = 450_000 + 1e5 * random.standard_normal(ROWS)
        self.x = random.standard_normal((ROWS, 3)).astype(np.float32)

    def model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def source(self, split: str) -> ArraySource:
        return ArraySource({"x": self.x, "y": self.y.astype(np.float32)})

    def prepare(self, example: Any, draw: Any) -> Any:
        return example

    def augment(self, batch: Any, draw: Any) -> Any:
        return batch

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        errors = model(batch["x"])[:, 0] - batch["y"]
        return (errors**2).sum(), torch.tensor(len(errors))

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        total, count = self.loss(model, batch)
        return {"in_cents": (1e30 * total.double(), count)}


def evaluate(block: int) -> dict[str, float]:
    """What one worker of its group measures of an untrained model."""
    torch.manual_seed(0)
    task = Prices()
    group = WorkerGroup.join("cpu")
    return Evaluation(task, "test", ROWS, block, InlinePreparer(task, 0), group).measure(task.model())


@pytest.mark.parametrize("block", [5, 64])
def test_metrics_of_any_size_are_means(process_group: ProcessGroup, block: int):
    task = Prices()
    torch.manual_seed(0)
    with torch.no_grad():
        errors = task.model()(torch.from_numpy(task.x))[:, 0] - torch.from_numpy(task.y.astype(np.float32))
    expected = float((errors.double() ** 2).mean())
    assert expected > 1e11
    alone, *_ = process_group.run(1, evaluate, block)
    assert alone["loss"] == pytest.approx(expected, rel=1e-6)
    assert alone["in_cents"] == pytest.approx(1e30 * expected, rel=1e-6)
    assert process_group.run(3, evaluate, block) == [alone] * 3, "bitwise, on every worker"


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_large_targets_train_in_both_reductions(tmp_path: Path, reduction: str):
    chosen = recipe(
        task={"use": "tests.trainer.test_evaluation:Prices"},
        batch={"size": 16, "micro": 8, "lanes": 2},
        optimizer={"name": "adam", "lr": 1000.0},
        schedule={"warmup": None, "decay": {"shape": "constant"}},
        echo={"factor": 1},
        train={"epochs": 200},
        run={"reduction": reduction},
    )
    outcome = run_worker(spec(chosen, tmp_path, Prices))
    assert outcome.status == "FINISHED", outcome.reason
    assert outcome.metrics["loss"] < 4e10, "from 2e11"


class Untracked(NoisyTask):
    """Batch norm that keeps no running statistics: in evaluation, too, it takes those of its input."""

    def model(self) -> nn.Module:
        norm = nn.BatchNorm1d(24, track_running_stats=False)
        return nn.Sequential(nn.Linear(12, 24), norm, nn.ReLU(), nn.Linear(24, 5))


def test_evaluation_does_not_depend_on_how_training_was_stacked():
    training = ready(recipe(run={"stack": 4, "reduction": "fast"}), task=Untracked())
    evaluation = Evaluation(Untracked(), "test", 200, 20, InlinePreparer(Untracked(), 0), training.group)
    before = evaluation.measure(training.model)
    for stack in (4, 1, 2):
        training.norms.stack(stack)
        assert evaluation.measure(training.model) == before
