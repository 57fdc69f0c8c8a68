"""Law 1 under Ray: the same bits as in one process, through the loss of a worker too."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cluster.commands import Command, journal, run, wait_for_checkpoint
from tests.cluster.machine import remaining
from trainer.checkpoint import Checkpoints, load

RECIPE = """
name: spine
seed: 3
task: {use: spine:SpineTask}
batch: {size: 70, micro: 10, lanes: 8}
optimizer: {name: lamb, lr: 0.02}
schedule: {warmup: {share: 0.2}, decay: {shape: polynomial}}
echo: {factor: 1.5, capacity: 160}
train: {epochs: 6}
checkpoint: {every: {steps: 3}}
run: {workers: 3, pool: {min: 1, max: 1}, reduction: exact, device: cpu}
track: {uri: none}
"""
SPINE = Path(__file__).parents[1] / "trainer" / "spine.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spine.yaml").write_text(RECIPE)
    shutil.copy(SPINE, tmp_path / "spine.py")
    return tmp_path


def traces(folder: Path, name: str) -> tuple:
    """Losses by step (the last that was told of each), weights, and all of the last checkpoint."""
    losses = {line["step"]: line["loss"] for line in journal(folder / "runs" / name, "step")}
    newest = Checkpoints(folder / "runs" / name / "checkpoints", keep=3).newest_whole()
    assert newest is not None
    return losses, (folder / "runs" / name / "model.safetensors").read_bytes(), flat(load(newest))


def flat(state) -> dict[str, object]:
    if not isinstance(state, dict):
        return {"": state.numpy().tobytes() if hasattr(state, "numpy") else state}
    return {f"{key}/{rest}": leaf for key, value in state.items() for rest, leaf in flat(value).items()}


@pytest.mark.parametrize("workers", [2, 3])
def test_the_same_bits_in_one_process_and_under_ray(folder: Path, workers: int):
    alone = run("train", "spine.yaml", "--local", cwd=folder)
    assert alone.process.returncode == 0, alone.output
    ray = run("train", "spine.yaml", "--set", f"run.workers={workers}", cwd=folder)
    assert ray.process.returncode == 0, ray.output
    assert traces(folder, "spine-001") == traces(folder, "spine-002")


@pytest.mark.parametrize("victim", ["a worker", "the pool"])
def test_the_same_bits_after_a_process_was_killed(folder: Path, victim: str):
    longer = ("--set", "train.epochs=120", "--set", "run.workers=2", "--set", "eval.every.epochs=40")
    alone = run("train", "spine.yaml", "--local", *longer, cwd=folder)
    assert alone.process.returncode == 0, alone.output
    command = Command("train", "spine.yaml", *longer, cwd=folder)
    command.wait_for("step")
    wait_for_checkpoint(folder / "runs/spine-002")
    family = command.family()
    name = {"a worker": "RayTrainWorker", "the pool": "PoolActor"}[victim]
    victims = [process for process in family if name in process.command]
    assert victims, [process.command[:60] for process in family]
    os.kill(victims[0].pid, signal.SIGKILL)
    assert command.wait() == 0, command.output
    assert remaining(family) == []
    assert traces(folder, "spine-001") == traces(folder, "spine-002")
