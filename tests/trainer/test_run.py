"""A whole run of a worker: what it leaves behind, and how it ends when something is wrong."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.crew import Crew
from tests.trainer.spine import SpineTask, recipe
from trainer import journal
from trainer.run import Outcome, RunOrder, run_worker

SHORT = recipe(train={"epochs": 2})
FAST = recipe(train={"epochs": 2}, run={"reduction": "fast"})


class BrokenTask(SpineTask):
    """Something goes wrong with one example, on whichever worker it is dealt to."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        if self.how == "unreadable" and example["id"] == 50:
            raise ValueError("a corrupted image")
        prepared = super().prepare(example, draw)
        if self.how == "NaN in the data" and example["id"] == 50:
            prepared["x"] = prepared["x"] * np.float32("nan")
        if self.how == "label out of range" and example["id"] == 50:
            prepared["y"] = np.int64(99)
        if self.how == "no example counts":
            prepared["counts"] = np.False_
        return prepared


def order(folder: Path, chosen=SHORT, make_task=SpineTask) -> RunOrder:
    return RunOrder(chosen, str(folder), make_task)


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(folder) if line["kind"] == kind]


def test_a_finished_run_leaves_journal_checkpoint_and_model(tmp_path: Path):
    outcome = run_worker(order(tmp_path))
    assert outcome.status == "FINISHED"
    assert set(outcome.metrics) == {"accuracy", "loss"}
    steps = kinds(tmp_path, "step")
    assert [line["step"] for line in steps] == list(range(1, 7))
    assert [line["examples"] for line in steps] == [80 * n for n in range(1, 7)]
    assert all(0 <= line["fresh"] <= line["examples"] for line in steps)
    assert all(np.isfinite(line["loss"]) for line in steps)
    for name in ("wait_s", "compute_s", "communication_s", "optimizer_s"):
        assert all(0 <= line[name] <= line["step_s"] for line in steps)
    assert [line["split"] for line in kinds(tmp_path, "evaluation")] == ["validation", "validation", "test"]
    assert kinds(tmp_path, "end")[0]["status"] == "FINISHED"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    model = SpineTask().model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_finished_run_that_is_started_again_only_says_so(tmp_path: Path):
    first = run_worker(order(tmp_path))
    model = (tmp_path / "model.safetensors").read_bytes()
    assert run_worker(order(tmp_path)) == first
    assert len(kinds(tmp_path, "step")) == 6
    assert (tmp_path / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("unreadable", "a corrupted image"),
        ("NaN in the data", "the loss is nan"),
        ("label out of range", "out of bounds"),
        ("no example counts", "counted no example"),
    ],
)
@pytest.mark.parametrize("chosen", [SHORT, FAST], ids=["exact", "fast"])
def test_trouble_on_one_worker_stops_all_with_its_reason(
    crew: Crew, tmp_path: Path, chosen, how: str, reason: str
):
    broken = order(tmp_path, chosen, functools.partial(BrokenTask, how))
    outcomes: list[Outcome] = crew.run(2, run_worker, broken)
    assert {outcome.status for outcome in outcomes} == {"FAILED"}
    assert all(reason in (outcome.reason or "") for outcome in outcomes)
    (end,) = kinds(tmp_path, "end")
    assert end["status"] == "FAILED"
    assert reason in end["reason"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_masked_loss_has_the_gradient_of_the_mean_over_the_whole_batch():
    """Unequal counts: the mean of micro-batch means would be another gradient."""
    from tests.trainer.spine import Trace, follow, ready

    chosen = recipe(run={"reduction": "fast"}, train={"epochs": 1})
    training = ready(chosen)
    before = [p.detach().clone() for p in training.model.parameters()]
    task, model = training.passes.task, training.passes.task.model()
    seen: list[dict[str, torch.Tensor]] = []
    backward = training.passes.backward

    def watching(micro_batches, batch):
        seen.append(batch)
        return backward(micro_batches, batch)

    training.passes.backward = watching
    model.load_state_dict(dict(zip(dict(model.named_parameters()), before, strict=True)), strict=False)
    kept = Trace([], [], {}, {}, [])
    for dropout in (
        m for net in (training.model, model) for m in net.modules() if isinstance(m, torch.nn.Dropout)
    ):
        dropout.p = 0.0
    follow(training, kept, 1)
    total, count = torch.zeros(()), torch.zeros(())
    for batch in seen:  # batch norm is over micro-batches here too
        for piece in range(len(batch["x"]) // 10):
            part = {key: value[10 * piece : 10 * piece + 10] for key, value in batch.items()}
            loss, counted = task.loss(model, part)
            total, count = total + loss, count + counted
    assert len({int(b["counts"].sum()) for b in seen}) > 1, "the counts do differ"
    (total / count).backward()
    for ours, theirs in zip(kept.gradients, model.parameters(), strict=True):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_an_interrupted_run_is_marked_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trainer import run as running

    def interrupted(training):
        for step in steps(training):
            if step.step == 4:
                raise KeyboardInterrupt
            yield step

    steps = running.steps
    chosen = recipe(train={"epochs": 2}, checkpoint={"every": {"steps": 1}})
    with monkeypatch.context() as patch:
        patch.setattr(running, "steps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_worker(order(tmp_path, chosen))
    assert kinds(tmp_path, "end")[-1]["status"] == "KILLED"
    run_worker(order(tmp_path, chosen))
    assert kinds(tmp_path, "rewind")[-1]["step"] == 3
    assert kinds(tmp_path, "end")[-1]["status"] == "FINISHED"
    uninterrupted = tmp_path / "uninterrupted"
    uninterrupted.mkdir()
    run_worker(order(uninterrupted, chosen))
    assert (tmp_path / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
