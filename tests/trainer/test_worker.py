"""A whole run of a worker: what it leaves behind, and how it ends when something is wrong."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.plans import spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, recipe
from trainer.errors import UserError
from trainer.run_folder import journal, layout
from trainer.worker import Outcome, RunSpec, run_worker

SHORT = recipe(train={"epochs": 2})
FAST = recipe(train={"epochs": 2}, run={"reduction": "fast"})


class BrokenTask(NoisyTask):
    """Something goes wrong with one example, on the worker that serves it."""

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


def order(folder: Path, chosen=SHORT, make_task=NoisyTask) -> RunSpec:
    return spec(chosen, folder, make_task)


def kinds(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in journal.read(folder) if line["kind"] == kind]


def test_a_run_that_others_wait_to_join_saves_and_goes_on_as_if_nothing_had_been(tmp_path: Path):
    (together := tmp_path / "together").mkdir()
    (together / layout.REGROUP).touch()
    assert run_worker(order(together)).status == "PAUSED"
    assert [line["step"] for line in kinds(together, "checkpoint")] == [1]
    assert kinds(together, "end") == []
    (together / layout.REGROUP).unlink()
    (alone := tmp_path / "alone").mkdir()
    assert run_worker(order(together)) == run_worker(order(alone))
    weights = [(folder / layout.MODEL).read_bytes() for folder in (together, alone)]
    assert weights[0] == weights[1]


def test_who_wants_the_end_is_heard_before_those_who_want_to_join(tmp_path: Path):
    (tmp_path / layout.REGROUP).touch()
    (tmp_path / layout.STOP).write_text("enough")
    assert run_worker(order(tmp_path)) == Outcome("KILLED", "enough")


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
    model = NoisyTask().model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_a_finished_run_that_is_started_again_only_says_so(tmp_path: Path):
    first = run_worker(order(tmp_path))
    model = (tmp_path / "model.safetensors").read_bytes()
    assert run_worker(order(tmp_path)) == first
    assert len(kinds(tmp_path, "step")) == 6
    assert (tmp_path / "model.safetensors").read_bytes() == model


def test_the_best_checkpoint_is_made_when_it_is_measured_and_kept(tmp_path: Path):
    section = {"keep": 1, "every": {"epochs": 100}, "best": {"metric": "loss", "mode": "max"}}
    chosen = recipe(train={"epochs": 6}, checkpoint=section)  # the loss falls: the first is the "best"
    assert run_worker(order(tmp_path, chosen)).status == "FINISHED"
    measured = [line for line in kinds(tmp_path, "evaluation") if line["split"] == "validation"]
    best = max(measured, key=lambda line: line["metrics"]["loss"])
    assert best["step"] < measured[-1]["step"], "the last is the best: this run tells nothing"
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {f"step-{best['step']:08d}", f"step-{measured[-1]['step']:08d}"}


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
def test_a_failure_on_one_worker_stops_all_with_its_reason(
    process_group: ProcessGroup, tmp_path: Path, chosen, how: str, reason: str
):
    broken = order(tmp_path, chosen, functools.partial(BrokenTask, how))
    outcomes: list[Outcome] = process_group.run(2, run_worker, broken)
    assert {outcome.status for outcome in outcomes} == {"FAILED"}
    assert all(reason in (outcome.reason or "") for outcome in outcomes)
    (end,) = kinds(tmp_path, "end")
    assert end["status"] == "FAILED"
    assert reason in end["reason"]
    assert not (tmp_path / "model.safetensors").exists()


def test_a_masked_loss_has_the_gradient_of_the_mean_over_the_whole_batch():
    """Unequal counts: the mean of micro-batch means would be another gradient."""
    from tests.trainer.reproducibility import Trace, follow, ready

    chosen = recipe(run={"reduction": "fast"}, train={"epochs": 1})
    training = ready(chosen)
    before = [p.detach().clone() for p in training.model.parameters()]
    task, model = training.forward_backward.task, training.forward_backward.task.model()
    seen: list[dict[str, torch.Tensor]] = []
    backward = training.forward_backward.backward

    def watching(micro_batches, batch, execution):
        seen.append(batch)
        return backward(micro_batches, batch, execution)

    training.forward_backward.backward = watching
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
    from trainer import worker as running

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


class Spoiling(NoisyTask):
    """One example turns the loss into NaN, but only while a file says so: as a passing fault would."""

    def __init__(self, switch: str):
        super().__init__()
        self.switch = Path(switch)

    def loss(self, model, batch):
        total, count = super().loss(model, batch)
        if model.training and self.switch.exists() and (batch["id"] == 50).any():
            return total * float("nan"), count
        return total, count


def spoilt(folder: Path, guard: dict[str, Any], **changes: Any) -> RunSpec:
    (folder / "spoil").touch()
    make_task = functools.partial(Spoiling, str(folder / "spoil"))
    chosen = recipe(train={"epochs": 4, "guard": guard}, checkpoint={"every": {"steps": 1}}, **changes)
    return order(folder, chosen, make_task)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_guard_that_skips_leaves_updates_out_up_to_its_limit(
    process_group: ProcessGroup, tmp_path: Path, workers: int
):
    outcome, *_ = process_group.run(workers, run_worker, spoilt(tmp_path, {"policy": "skip", "most": 50}))
    assert outcome.status == "FINISHED"
    losses = [line["loss"] for line in kinds(tmp_path, "step")]
    assert np.isnan(losses).any()
    assert np.isfinite(losses[-1]) or np.isfinite(losses[-2]), "training went on"
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_guard_that_skipped_often_enough_stops(tmp_path: Path):
    outcome = run_worker(spoilt(tmp_path, {"policy": "skip", "most": 1}))
    assert outcome.status == "FAILED"
    assert np.isnan([line["loss"] for line in kinds(tmp_path, "step")]).sum() == 1


def test_a_guard_that_rolls_back_lowers_the_rate_from_the_checkpoint_on(tmp_path: Path):
    outcome = run_worker(spoilt(tmp_path, {"policy": "roll_back", "most": 2, "rate_factor": 0.5}))
    assert outcome.status == "FAILED", "the fault does not pass"
    decisions = kinds(tmp_path, "decision")
    assert [line["value"] for line in decisions] == [0.5, 0.5]
    (tmp_path / "spoil").unlink()
    before = len(kinds(tmp_path, "step"))
    resumed = spoilt(tmp_path, {"policy": "roll_back", "most": 2, "rate_factor": 0.5})
    (tmp_path / "spoil").unlink()
    assert run_worker(resumed).status == "FINISHED"
    first = kinds(tmp_path, "step")[before]
    untouched = order(tmp_path / "untouched", resumed.plan.recipe)
    (tmp_path / "untouched").mkdir()
    run_worker(untouched)
    rates = {line["step"]: line["learning_rate"] for line in kinds(tmp_path / "untouched", "step")}
    assert first["learning_rate"] == pytest.approx(0.25 * rates[first["step"]])


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_ends_at_its_target(process_group: ProcessGroup, tmp_path: Path, workers: int):
    chosen = recipe(
        train={"epochs": 40, "target": {"metric": "loss", "at_most": 1.55}}, eval={"every": {"steps": 2}}
    )
    outcome, *_ = process_group.run(workers, run_worker, order(tmp_path, chosen))
    assert outcome.status == "FINISHED"
    (target,) = kinds(tmp_path, "target")
    validations = [line for line in kinds(tmp_path, "evaluation") if line["split"] == "validation"]
    assert [line["metrics"]["loss"] <= 1.55 for line in validations] == [False] * (len(validations) - 1) + [
        True
    ]
    assert target["step"] == validations[-1]["step"] == kinds(tmp_path, "step")[-1]["step"]
    assert target["examples"] == 80 * target["step"]
    assert target["fresh"] == kinds(tmp_path, "step")[-1]["fresh"]


def test_a_target_that_the_task_does_not_measure_is_refused_with_what_it_does(tmp_path: Path):
    chosen = recipe(train={"epochs": 1, "target": {"metric": "acuracy", "at_least": 0.9}})
    outcome = run_worker(order(tmp_path, chosen))
    assert outcome.status == "FAILED"
    assert "train.target.metric: is acuracy, and the task measures accuracy, loss; did you" in str(
        outcome.reason
    )
    assert not kinds(tmp_path, "step")


@pytest.mark.parametrize(("budget", "what"), [({"fresh": 200}, "200 fresh"), ({"minutes": 1e-6}, "minutes")])
def test_a_run_ends_when_a_budget_is_spent(
    process_group: ProcessGroup, tmp_path: Path, budget: dict[str, float], what: str
):
    chosen = recipe(train={"epochs": 40, "budget": budget})
    outcomes = process_group.run(2, run_worker, order(tmp_path, chosen))
    assert {outcome.status for outcome in outcomes} == {"FINISHED"}
    (stop,) = kinds(tmp_path, "stop")
    assert what in stop["reason"]
    steps = kinds(tmp_path, "step")
    assert stop["step"] == steps[-1]["step"] < 100
    if "fresh" in budget:
        assert steps[-2]["fresh"] < 200 <= steps[-1]["fresh"]


def test_training_starts_from_the_weights_of_another_run(tmp_path: Path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    run_worker(order(tmp_path / "runs" / "first"))
    trained = load_file(tmp_path / "runs" / "first" / "model.safetensors")
    starts = ["first", str(tmp_path / "runs/first/model.safetensors"), str(tmp_path / "runs/first")]
    (step,) = (tmp_path / "runs/first/checkpoints").iterdir()
    for number, start in enumerate([*starts, str(step)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        frozen = recipe(
            init={"from": start, "freeze": ["0.*", "1.*"]},
            checkpoint={"dir": str(tmp_path / "runs")},
            train={"epochs": 0.3},
        )
        assert run_worker(order(folder, frozen)).status == "FINISHED"
        after = load_file(folder / "model.safetensors")
        assert torch.equal(after["0.weight"], trained["0.weight"]), "frozen: as it started"
        assert not torch.equal(after["4.weight"], trained["4.weight"]), "trained"


def test_weights_of_another_model_are_refused(tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"0.weight": torch.zeros(3, 3), "extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    outcome = run_worker(order(tmp_path, recipe(init={"from": str(tmp_path / "w.safetensors")})))
    assert outcome.status == "FAILED"
    assert "of another model" in str(outcome.reason)
    with pytest.raises(UserError, match="there are no weights there"):
        order(tmp_path, recipe(init={"from": "nowhere"}, checkpoint={"dir": str(tmp_path)}))


class SlowUpstream(NoisyTask):
    """Preparing takes longer than training on it."""

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        prepared = super().prepare(example, draw)
        total = 0.0
        for n in range(20_000):
            total += n
        return prepared


AUTO = {"factor": "auto", "cap": 3, "capacity": 320}


def test_the_automatic_factor_follows_the_speeds_and_a_replay_follows_the_journal(
    process_group: ProcessGroup, tmp_path: Path
):
    chosen = recipe(echo=AUTO, train={"epochs": 16}, checkpoint={"every": {"steps": 20}})
    first = tmp_path / "first"
    first.mkdir()
    outcome, *_ = process_group.run(1, run_worker, order(first, chosen, SlowUpstream))
    assert outcome.status == "FINISHED"
    decisions = [line for line in kinds(first, "decision") if line["what"] == "echo_factor"]
    assert decisions
    assert all(1 < line["value"] <= 3 for line in decisions[:1]), "the upstream is slower: it echoes"
    last = kinds(first, "step")[-1]
    assert last["fresh"] < 0.8 * last["examples"]
    # The same journal of decisions on another number of workers, with a task whose speeds ask for no echo at
    # all.
    replay = tmp_path / "replay"
    replay.mkdir()
    lines = (first / "journal.jsonl").read_text().splitlines(keepends=True)
    (replay / "journal.jsonl").write_text("".join(line for line in lines if '"decision"' in line))
    until = max(line["position"] for line in decisions)
    process_group.run(2, run_worker, order(replay, chosen, NoisyTask))
    served = [
        {
            line["step"]: (line["fresh"], line["loss"])
            for line in kinds(folder, "step")
            if line["step"] * 8 <= until
        }
        for folder in (first, replay)
    ]
    assert served[0] == served[1]


@pytest.mark.parametrize("at", ["after_augment", "batch"])
def test_what_is_echoed_may_be_augmented_examples_or_whole_micro_batches(tmp_path: Path, at: str):
    outcome = run_worker(order(tmp_path, recipe(echo={"factor": 2, "capacity": 160, "at": at})))
    assert outcome.status == "FINISHED"
    last = kinds(tmp_path, "step")[-1]
    assert abs(2 * last["fresh"] - last["examples"]) <= 2 * 160


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_examples_may_be_left_out_and_are_told_once(
    process_group: ProcessGroup, tmp_path: Path, workers: int
):
    chosen = recipe(
        task={"use": "tests.trainer.reproducibility:NoisyTask", "skip_bad": 3}, train={"epochs": 4}
    )
    broken = order(tmp_path, chosen, functools.partial(BrokenTask, "unreadable"))
    outcome, *_ = process_group.run(workers, run_worker, broken)
    assert outcome.status == "FINISHED"
    (skipped,) = [line for line in kinds(tmp_path, "skipped") if line["split"] == "train"]
    assert skipped["index"] == 50
    assert "a corrupted image" in skipped["reason"]


class MostlyBroken(NoisyTask):
    """Every fifth example cannot be prepared."""

    def prepare(self, example: dict[str, Any], draw: Any) -> dict[str, Any]:
        if example["id"] % 5 == 0:
            raise ValueError("a corrupted image")
        return super().prepare(example, draw)


def test_too_many_bad_examples_stop_the_run_on_all_workers(process_group: ProcessGroup, tmp_path: Path):
    chosen = recipe(task={"use": "tests.trainer.reproducibility:NoisyTask", "skip_bad": 3})
    outcomes = process_group.run(2, run_worker, order(tmp_path, chosen, MostlyBroken))
    assert {outcome.status for outcome in outcomes} == {"FAILED"}
    assert all("task.skip_bad allows 3" in str(outcome.reason) for outcome in outcomes)


def test_a_multiplied_learning_rate_moves_its_parameters_so_much_further(tmp_path: Path):
    moved = []
    for factor in (1.0, 3.0):
        folder = tmp_path / str(factor)
        folder.mkdir()
        optimizer = {"name": "sgd", "lr": 0.01, "lr_multipliers": {"4.*": factor}}
        one_step = recipe(optimizer=optimizer, train={"epochs": 0.3}, schedule={"warmup": None})
        assert run_worker(order(folder, one_step)).status == "FINISHED"
        moved.append(load_file(folder / "model.safetensors"))
    torch.manual_seed(3)
    start = NoisyTask().model().state_dict()
    distances = {name: [model[name] - start[name] for model in moved] for name in ("0.weight", "4.weight")}
    assert torch.equal(*distances["0.weight"])
    torch.testing.assert_close(3 * distances["4.weight"][0], distances["4.weight"][1], rtol=1e-3, atol=1e-7)
