"""Law 1 under Ray: the same bits as in one process, through the loss of a worker too."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cluster.commands import WAIT_S, Command, journal, run, wait_for_checkpoint
from tests.cluster.processes import Process, remaining, until
from trainer.run_folder.checkpoints import Checkpoints, load

RECIPE = """
name: noisy
seed: 3
task: {use: noisy:NoisyTask}
batch: {size: 70, micro: 10, lanes: 8}
optimizer: {name: lamb, lr: 0.02}
schedule: {warmup: {share: 0.2}, decay: {shape: polynomial}}
echo: {factor: 1.5, capacity: 160}
train: {epochs: 6}
checkpoint: {every: {steps: 3}}
run: {workers: 3, pool: {min: 1, max: 1}, reduction: exact, device: cpu}
track: {uri: none}
"""
AGENTS_END_S = 120.0  # Ray's own agents notice late that their driver is gone
SUBJECT = Path(__file__).parents[1] / "trainer" / "reproducibility.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "noisy.yaml").write_text(RECIPE)
    shutil.copy(SUBJECT, tmp_path / "noisy.py")
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
    alone = run("train", "noisy.yaml", "--local", cwd=folder)
    assert alone.process.returncode == 0, alone.output
    ray = run("train", "noisy.yaml", "--set", f"run.workers={workers}", cwd=folder)
    assert ray.process.returncode == 0, ray.output
    assert traces(folder, "noisy-001") == traces(folder, "noisy-002")


LONGER = ("--set", "train.epochs=240", "--set", "run.workers=2", "--set", "eval.every.epochs=80")
LAST_STEP = 696  # far enough from the last point that the run does not end before its process


@pytest.fixture
def alone(folder: Path) -> tuple:
    """The traces of the same run in one process, which nothing happened to."""
    undisturbed = run("train", "noisy.yaml", "--local", *LONGER, cwd=folder)
    assert undisturbed.process.returncode == 0, undisturbed.output
    return traces(folder, "noisy-001")


def wait_for_step(folder: Path, step: int) -> None:
    """Until the run has come this far, with a checkpoint on the way."""
    wait_for_checkpoint(folder)
    until(lambda: any(line["step"] >= step for line in journal(folder, "step")), WAIT_S)


def kill(family: list[Process], name: str) -> None:
    victims = [process for process in family if name in process.command]
    assert victims, [process.command[:60] for process in family]
    os.kill(victims[-1].pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("victim", "steps"),
    [
        ("ray::Worker", (20, 150, 420)),  # a run's worker group is started again three times at most
        ("ray::Worker", (280, 500)),
        ("PoolActor", (15, 120, 230, 340, 450)),
    ],
)
def test_the_same_bits_however_often_a_process_is_killed(folder: Path, alone: tuple, victim: str, steps):
    command = Command("train", "noisy.yaml", *LONGER, cwd=folder)
    families = []
    for step in steps:
        wait_for_step(folder / "runs/noisy-002", step)
        families += (family := command.family())
        kill(family, victim)
    assert command.wait() == 0, command.output
    assert remaining(families) == []
    assert traces(folder, "noisy-002") == alone


def test_the_same_bits_however_often_the_driver_is_killed(folder: Path, alone: tuple):
    families: list[Process] = []
    resume: tuple[str, ...] = ()
    for step in (10, 130, 250, 370, 480):
        command = Command("train", "noisy.yaml", *LONGER, *resume, cwd=folder)
        wait_for_step(folder / "runs/noisy-002", step)
        families += command.family()
        os.kill(command.process.pid, signal.SIGKILL)
        assert command.wait() == -signal.SIGKILL
        resume = ("--resume",)
    last = run("train", "noisy.yaml", *LONGER, "--resume", cwd=folder)
    assert last.process.returncode == 0, last.output
    assert remaining(families, AGENTS_END_S) == []
    assert traces(folder, "noisy-002") == alone
    assert max(traces(folder, "noisy-002")[0]) == LAST_STEP
