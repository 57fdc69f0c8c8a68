"""Workers that hang under Ray are noticed, named and replaced."""

import os
import signal
from pathlib import Path

import pytest

from tests.cluster.commands import TASK, Command, journal, run, user_folder, wait_for_checkpoint
from tests.cluster.processes import remaining

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SOON = ("--set", "run.hung_after_s=8")
HANGS = """
        self.calls = getattr(self, "calls", 0) + 1
        while self.calls > 20 and os.environ["LOCAL_RANK"] == "1":
            pass
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


def test_a_stopped_worker_is_named_and_replaced(folder):
    command = Command("train", "tiny.yaml", "--set", "train.epochs=1000000", *SOON, cwd=folder)
    wait_for_checkpoint(folder / "runs/tiny-001")
    family = command.family()
    victim = next(each for each in family if each.command.startswith("ray::Worker"))
    os.kill(victim.pid, signal.SIGSTOP)
    command.wait_for("resuming from step")
    family += command.family()
    command.send(signal.SIGINT)
    assert command.wait() == 130, command.output
    (restart,) = journal(folder / "runs/tiny-001", "restart")
    assert "gives no sign of life for 8 s, in step" in restart["reason"]
    assert restart["reason"] in command.output
    assert remaining(family) == []


def test_an_endless_loop_in_the_task_is_named_by_its_line_and_ends_the_run_at_last(folder):
    head = "    def loss(self, model, batch):\n"
    (folder / "my_task.py").write_text("import os\n" + TASK.replace(head, head + HANGS))
    changes = ("checkpoint.every.steps=100000", "train.epochs=100", "eval.every=null")
    never = [argument for change in changes for argument in ("--set", change)]
    command = run("train", "tiny.yaml", *SOON, *never, cwd=folder)
    assert command.process.returncode == 1, command.output
    restarts = journal(folder / "runs/tiny-001", "restart")
    assert len(restarts) == 3
    assert all("worker 1 has been at" in restart["reason"] for restart in restarts)
    assert all("my_task.py:" in restart["reason"] for restart in restarts)
    (end,) = journal(folder / "runs/tiny-001", "end")
    assert end["status"] == "FAILED"
    assert "3 restarts in a row brought no new checkpoint" in end["reason"]
