"""Autocast, and the loss scale of fp16: torch's rule, inside the laws of a run."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.trainer.plans import spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, Trace, follow, ready, recipe
from trainer.compute import autotune, precision
from trainer.compute.precision import LossScale
from trainer.recipe.schema import Recipe
from trainer.run_folder import journal
from trainer.worker import run_worker


def half(kind: str = "fp16", **changes: Any) -> Recipe:
    train = {"epochs": 4, "precision": kind, **changes.pop("train", {})}
    return recipe(**{"train": train, "run": {"reduction": "exact", "device": "cpu"}, **changes})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=40), st.integers(1, 5))
def test_the_scale_moves_as_that_of_torch(finite: list[bool], growth_steps: int):
    """`torch.amp.GradScaler` sees the same gradients, finite or not."""
    ours = LossScale(2.0**16, 2.0**-100, 2.0**100)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=growth_steps)
    weight = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([weight], lr=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "GROWTH_STEPS", growth_steps)
        for is_finite in finite:
            theirs.scale(weight.sum() * (1.0 if is_finite else float("inf"))).backward()
            theirs.step(sgd)
            theirs.update()
            sgd.zero_grad()
            if is_finite:
                ours.rise()
            else:
                assert ours.fall()
            assert ours.value == theirs.get_scale()
    assert ours.skipped == finite.count(False)


def test_the_scale_has_a_floor_and_a_ceiling_and_one_that_is_no_scale_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precision, "GROWTH_STEPS", 1)
    scale = LossScale.of("fp16", micro=48)
    assert scale.value == 2.0**16 / 64
    assert sum(scale.fall() for _ in range(40)) == 16
    assert scale.value == 1 / 64
    for _ in range(100):
        scale.rise()
    assert np.isfinite(scale.value)
    for kind in ("fp32", "bf16"):
        none = LossScale.of(kind, micro=48)
        none.rise()
        assert not none.fall()
        assert none.value == 1


@pytest.mark.parametrize(("kind", "close"), [("fp16", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_the_gradient_is_that_of_float32_but_for_rounding(kind: str, close: float, reduction: str):
    norms, gradients = [], []
    for chosen in ("fp32", kind):
        training = ready(half(chosen, run={"reduction": reduction, "device": "cpu"}))
        kept = Trace([], [], {}, {}, [])
        follow(training, kept, 1)
        assert {p.dtype for p in training.model.parameters()} == {torch.float32}
        norms.append(kept.norms[0])
        gradients.append(np.concatenate([gradient.ravel() for gradient in kept.gradients]))
    assert norms[1] == pytest.approx(norms[0], rel=close)
    distance = np.linalg.norm(gradients[1] - gradients[0])
    assert 0 < distance < close * np.linalg.norm(gradients[0])


def test_the_gradient_is_clipped_at_its_own_norm_and_not_at_the_scaled_one():
    training = ready(half(train={"clip_norm": 0.05}))
    kept = Trace([], [], {}, {}, [])
    follow(training, kept, 1)
    assert 0.05 < kept.norms[0] < 5
    assert np.sqrt(sum((gradient**2).sum() for gradient in kept.gradients)) == pytest.approx(0.05, rel=1e-3)


def test_an_update_that_overflows_is_skipped_and_everything_else_goes_on():
    training = ready(half(task={"use": "tests.trainer.reproducibility:NoisyTask", "with": {"gain": 1000.0}}))
    before: dict[str, torch.Tensor] = {}
    skipped = 0
    scale = 2.0**16 / 16
    from trainer.loop import steps

    for step in steps(training):
        now = {name: value.clone() for name, value in training.model.state_dict().items()}
        assert step.loss_scale == scale
        assert np.isfinite(step.loss)
        if step.skipped > skipped:
            assert not np.isfinite(step.gradient_norm)
            assert all(torch.equal(now[name], before[name]) for name in before)
            scale /= 2
        else:
            assert np.isfinite(step.gradient_norm)
        assert step.examples == 80 * step.step, "a skipped step's examples were served"
        skipped, before = step.skipped, now
    assert 2 <= skipped < training.progress.step
    assert training.progress.skipped == 0, "the guard had nothing to do with it"


class Vertical(NoisyTask):
    """The loss is finite; its gradient is not, at any scale."""

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = super().loss(model, batch)
        return total + sum(p.sum() * 0.0 for p in model.parameters()).clamp(min=0).sqrt(), count


class Endless(NoisyTask):
    """The loss is infinite, which no scale helps."""

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        total, count = super().loss(model, batch)
        return total / 0.0, count


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("task", "skips"), [(Vertical, 16), (Endless, 0)])
def test_what_no_scale_helps_is_the_guards_affair(
    process_group: ProcessGroup, tmp_path: Path, workers: int, task: type[NoisyTask], skips: int
):
    chosen = half(train={"epochs": 12})
    outcome, *_ = process_group.run(workers, run_worker, spec(chosen, tmp_path, functools.partial(task)))
    assert outcome.status == "FAILED"
    assert f"in fp16 with loss scale {2.0 ** (12 - skips):g}" in outcome.reason
    lines = [line for line in journal.read(tmp_path) if line["kind"] == "step"]
    assert [line["skipped"] for line in lines] == list(range(1, skips + 1))
    assert [line["loss_scale"] for line in lines] == [2.0 ** (12 - n) for n in range(skips)]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_rounding_of_short_numbers_does_not_forbid_stacking(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(autotune, "_seconds", lambda passes, batches, way: -way.stack)
    for gain in (1.0, 1000.0):  # which overflows at the scale that the run starts with
        training = ready(half(kind, run={"reduction": "fast"}), task=NoisyTask(dropout=0.0, gain=gain))
        assert training.execution.stack == 8
        assert training.loss_scale == LossScale.of(kind, 10), "trying left no trace"


def test_the_scale_is_part_of_the_state():
    training = ready(half())
    training.loss_scale.fall()
    resumed = ready(half(), training.state())
    assert dataclasses.asdict(resumed.loss_scale) == dataclasses.asdict(training.loss_scale)
    assert resumed.loss_scale.skipped == 1
