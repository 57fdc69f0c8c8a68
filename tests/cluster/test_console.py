"""What a run looks like, on a terminal and without one."""

import io
import math
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console as RichConsole

from cluster import console as screens
from cluster.console import Console
from tests.cluster.commands import environment
from trainer.run_folder.journal import Journal, Line

STEPS = 10


def step(number: int) -> dict[str, Any]:
    return {"step": number, "examples": 10 * number, "fresh": 5 * number, "loss": 0.25, "learning_rate": 0.01}


def shown(folder, *, is_terminal: bool = False) -> str:
    """What the screen shows of ten steps with a validation after each, and a test."""
    stream = io.StringIO()
    console = Console(stream)
    if is_terminal:
        console.rich = RichConsole(file=stream, force_terminal=True, width=100, highlight=False)
    journal = Journal(folder)
    journal.write("stage", name="history", seconds=1.0)
    with console.following(folder, journal.size, total_examples=10 * STEPS):
        journal.write("stage", name="model", seconds=1.25)
        for number in range(1, STEPS + 1):
            journal.write("step", **step(number))
            journal.write(
                "evaluation", split="validation", step=number, examples=0, metrics={"accuracy": number / 100}
            )
        journal.write("evaluation", split="test", step=STEPS, examples=0, metrics={"accuracy": 0.5})
        journal.write("end", status="FINISHED", reason=None, metrics={})
    journal.close()
    return stream.getvalue()


def test_without_a_terminal_progress_is_plain_lines_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(screens, "PLAIN_INTERVAL_S", math.inf)
    text = shown(tmp_path)
    assert "history" not in text
    assert "model (1.2 s)" in text
    assert "\x1b" not in text
    steps = [line.split()[:3] for line in text.splitlines() if "loss" in line]
    assert steps == [["100.0%", "step", "10"]]
    assert "echo 2.00" in text


def test_a_piped_log_has_every_evaluation_and_a_terminal_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr(screens, "PLAIN_INTERVAL_S", math.inf)
    piped = shown(tmp_path)
    assert piped.count("validation at step") == STEPS
    assert "test at step 10: accuracy 0.5" in piped
    (tmp_path / "terminal").mkdir()
    terminal = shown(tmp_path / "terminal", is_terminal=True)
    assert "validation at step 10: accuracy 0.1" in terminal
    assert terminal.count("validation at step") == 1


def test_everything_is_shown_where_there_is_time_between(tmp_path, monkeypatch):
    monkeypatch.setattr(screens, "PLAIN_INTERVAL_S", 0.0)
    text = shown(tmp_path)
    assert [f"step {n}  " in text for n in range(1, STEPS + 1)] == [True] * STEPS
    assert text.count("validation at step") == STEPS


def test_on_a_terminal_a_bar_moves_and_goes_away(tmp_path):
    text = shown(tmp_path, is_terminal=True)
    assert "━" in text
    assert "100% " in text
    assert "loss 0.25" in text


def test_pace_and_what_is_left_come_from_the_last_seconds(tmp_path):
    progress = screens._Progress(Console(io.StringIO()).rich, total_examples=1000)
    lines: list[Line] = [{"kind": "step", "time": float(t), **step(10 * t)} for t in range(1, 5)]
    for line in lines:
        progress.show(line)
    assert progress._text(lines[-1]).startswith("100 examples/s  ")
    assert progress._text(lines[-1]).endswith("  0:06 left")
    again: Line = {"kind": "step", "time": 9.0, **step(10)}
    progress.show(again)  # the run went back to a checkpoint: its pace is not known yet
    assert "examples/s" not in progress._text(again)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (86400, "24:00:00")]
)
def test_durations(seconds, text):
    assert screens._duration(seconds) == text


NOISY = """
import os, subprocess, sys
from pathlib import Path
from cluster.console import Console
console = Console()
with console.alone(Path("noise.log")):
    print("from python")
    os.write(2, b"from c\\n")
    subprocess.run(["echo", "from a child"])
    console.say("for the user")
print("and after")
"""


def test_only_the_screen_reaches_the_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", NOISY],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["for the user", "and after"]
    assert done.stderr == ""
    assert (tmp_path / "noise.log").read_text().splitlines() == ["from python", "from c", "from a child"]
