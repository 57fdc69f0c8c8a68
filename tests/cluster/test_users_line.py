"""What goes wrong in the user's task is told with the user's line, wherever the task runs."""

import re
from pathlib import Path

import pytest

from tests.cluster.commands import journal, run, run_under_torchrun, user_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


def broken(folder: Path, before: str, after: str) -> int:
    """Break the user's task; returns the line that it breaks in."""
    task = folder / "my_task.py"
    text = task.read_text().replace(before, after)
    assert after in text
    task.write_text(text)
    return 1 + text[: text.index(after)].count("\n")


def breaks_in_metrics(folder: Path) -> int:
    return broken(folder, '{"loss": self.loss(model, batch)}', '{"seen": (batch["z"].sum(), 1)}')


def breaks_in_prepare(folder: Path) -> int:
    return broken(folder, "y = self.slope * example", "y = self.slope * example / {}['gone']")


def told(folder: Path, output: str, said: str) -> None:
    """The screen and the journal have the user's line, and with --debug the screen has the whole chain."""
    assert re.search(said, output), output
    end = journal(folder / "runs/tiny-001", "end")[-1]
    assert end["status"] == "FAILED"
    assert re.search(said, end["reason"])
    assert "in metrics" in end["trace"] or "in prepare" in end["trace"]
    assert not journal(folder / "runs/tiny-001", "step")


@pytest.mark.parametrize("debug", [False, True])
def test_in_one_process(folder, debug):
    line = breaks_in_metrics(folder)
    command = run("train", "tiny.yaml", "--local", *(["--debug"] if debug else []), cwd=folder)
    assert command.process.returncode == 1
    told(
        folder,
        command.output,
        rf"metrics\(\) of Line raised KeyError: 'z' \(my_task.py:{line}\); fix the task",
    )
    assert ('return {"seen": (batch["z"].sum(), 1)}' in command.output) == debug


def test_check_finds_it_first(folder):
    line = breaks_in_metrics(folder)
    command = run("check", "tiny.yaml", cwd=folder)
    assert command.process.returncode == 2
    assert f"tiny.yaml:3: task: validation: metrics() of Line raised KeyError: 'z' (my_task.py:{line})" in (
        command.output
    )


@pytest.mark.slow
def test_under_torchrun(folder):
    line = breaks_in_metrics(folder)
    done = run_under_torchrun(2, "train", "tiny.yaml", "--debug", cwd=folder)
    assert done.returncode != 0
    told(folder, done.stdout + done.stderr, rf"KeyError: 'z' \(my_task.py:{line}\)")
    assert 'return {"seen": (batch["z"].sum(), 1)}' in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("breaks", [breaks_in_metrics, breaks_in_prepare])
def test_on_ray(folder, breaks):
    line = breaks(folder)
    command = run("train", "tiny.yaml", "--debug", cwd=folder)
    assert command.process.returncode == 1
    told(folder, command.output, rf"of Line raised KeyError: '\w+' \(my_task.py:{line}\)")
    assert "remote traceback" in command.output or "Traceback" in command.output
    assert re.search(r"in (metrics|prepare)\n", command.output)
