"""Commands that only show something."""

from pathlib import Path

import pytest

import optim
from data_echo import Schedule
from tests.cluster.commands import run, user_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


def test_check_prints_the_order_that_a_run_serves(folder: Path):
    command = run("check", "tiny.yaml", "--order", "6", cwd=folder)
    assert command.process.returncode == 0, command.output
    lines = command.output.splitlines()
    assert len(lines) == 6
    schedule = Schedule(examples=64, lanes=4, micro=8)
    for j, line in enumerate(lines):
        served = schedule.micro_batch(j).index.tolist()
        assert [int(name.partition(":")[2]) for name in line.partition(": ")[2].split()] == served


def test_check_draws_the_learning_rate(folder: Path):
    command = run("check", "tiny.yaml", "--plot", "--set", "schedule.warmup={share: 0.5}", cwd=folder)
    drawing = command.output[command.output.index("learning rate\n") :]
    rising = [line.rstrip()[-1] for line in drawing.splitlines()[1:] if "█" in line]
    assert rising
    assert "256 examples" in drawing


def test_optimizers_are_shown_from_their_docstrings(tmp_path: Path):
    table = run("optimizers", cwd=tmp_path)
    assert table.process.returncode == 0, table.output
    assert all(f"`{name}`" in table.output for name in optim.names())
    assert "arXiv:1904.00962" in run("optimizers", "lamb", cwd=tmp_path).output
    unknown = run("optimizers", "lmab", cwd=tmp_path)
    assert unknown.process.returncode == 2
    assert "did you mean lamb?" in unknown.output
