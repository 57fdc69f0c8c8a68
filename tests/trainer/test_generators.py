"""Law 1 with code that draws from the generators of Python, NumPy and torch instead of from its `draw`."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, leg, ready, recipe, trace
from trainer.errors import RunFailed


class Jitter(nn.Module):
    """Adds noise of all three generators in the forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        noise = random.gauss(0, 0.1) + np.random.standard_normal() * 0.1
        return x + noise + 0.1 * torch.randn_like(x)


class DrawingTask(NoisyTask):
    """Draws everywhere, and never from `draw`."""

    def model(self) -> nn.Module:
        return nn.Sequential(Jitter(), *super().model())

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        noise = 0.1 * random.random() + 0.1 * np.random.rand() + 0.1 * float(torch.rand(()))
        return {**example, "x": example["x"] + np.float32(noise)}

    def augment(self, batch: dict[str, Tensor], draw: Any) -> dict[str, Tensor]:
        noise = torch.rand_like(batch["x"]) + random.random() + float(np.random.rand())
        return {**batch, "x": batch["x"] + 0.1 * noise}


class SometimesDrawing(NoisyTask):
    """Draws for a few examples only."""

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        noise = np.random.rand() if example["id"] % 7 == 3 else 0.0
        return {**example, "x": example["x"] + np.float32(noise)}


@pytest.mark.parametrize("name", ["DrawingTask", "SometimesDrawing"])
def test_code_that_draws_from_global_generators_is_reproducible(
    process_group: ProcessGroup, tmp_path: Path, name: str
):
    chosen = recipe(task={"use": f"tests.trainer.test_generators:{name}"}, train={"epochs": 3})
    (alone,) = process_group.run(1, trace, chosen)
    for workers in (2, 3):
        traces = process_group.run(workers, trace, chosen)
        assert all(each.losses == alone.losses and each.bits() == alone.bits() for each in traces)
    process_group.run(2, leg, chosen, str(tmp_path), 5)
    resumed, *_ = process_group.run(3, leg, chosen, str(tmp_path), len(alone.losses))
    assert resumed.bits() == alone.bits()


class Counting(nn.Module):
    """Keeps count of its forward passes, and lets it matter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x * (1 + 0.01 * self.calls)


class Unseedable(nn.Module):
    """Draws from a generator of its own that nobody can seed."""

    def forward(self, x: Tensor) -> Tensor:
        return x + float(np.random.default_rng().standard_normal())


class WithModule(NoisyTask):
    """The noisy task with one more module in front."""

    def __init__(self, module: type[nn.Module]) -> None:
        super().__init__(dropout=0.0)
        self.module = module

    def model(self) -> nn.Module:
        return nn.Sequential(self.module(), *super().model())


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Counting, "changes the model's buffer 0.calls"), (Unseedable, "gives another gradient each time")],
)
def test_what_depends_on_the_worker_is_refused_where_sums_are_exact_and_told_elsewhere(
    module: type[nn.Module], reason: str
):
    with pytest.raises(RunFailed, match=f"run.reduction: is exact, and the forward pass {reason}"):
        ready(recipe(), task=WithModule(module))
    training = ready(recipe(run={"reduction": "fast"}), task=WithModule(module))
    assert reason in training.execution.reason
    assert "depend on which worker" in training.execution.reason
