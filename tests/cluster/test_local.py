"""`lockstep train --local` as a user sees it: output, folder, exit code."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.commands import (
    Command,
    environment,
    journal,
    run,
    run_under_torchrun,
    torchrun,
    user_folder,
    wait_for_checkpoint,
)
from tests.cluster.processes import descendants, remaining, until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


@pytest.fixture
def without_ray_and_mlflow(tmp_path_factory) -> str:
    """A PYTHONPATH on which Ray and MLflow cannot be imported."""
    blocked = tmp_path_factory.mktemp("blocked")
    for name in ("ray", "mlflow"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} is not here')")
    return str(blocked)


def test_trains_the_users_own_code_without_ray_and_mlflow(folder, without_ray_and_mlflow):
    command = run("train", "tiny.yaml", "--local", cwd=folder, PYTHONPATH=without_ray_and_mlflow)
    assert command.process.returncode == 0, command.output
    lines = command.output.splitlines()
    assert lines[0] == "lockstep train tiny.yaml"
    assert "run folder: runs/tiny-001" in command.output
    assert "100.0%  step 8" in command.output
    assert "test at step 8: loss" in command.output
    kept = {path.name for path in (folder / "runs/tiny-001").iterdir()}
    assert kept == {"recipe.yaml", "plan.txt", "journal.jsonl", "checkpoints", "model.safetensors"}
    assert journal(folder / "runs/tiny-001", "end")[-1]["status"] == "FINISHED"


@pytest.mark.slow
def test_a_second_run_gets_a_folder_of_its_own(folder):
    for number in ("001", "002"):
        command = run("train", "tiny.yaml", "--local", cwd=folder)
        assert f"run folder: runs/tiny-{number}" in command.output
    losses = [[line["loss"] for line in journal(folder / f"runs/tiny-{n}", "step")] for n in ("001", "002")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_is_marked_and_can_go_on(folder, number, code):
    command = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    command.wait_for("validation at step")
    family = command.family()
    command.send(number)
    assert command.wait() == code, command.output
    assert "Traceback" not in command.output
    assert remaining(family) == []
    (end,) = journal(folder / "runs/tiny-001", "end")
    assert end["status"] == "KILLED"
    assert end["reason"] == f"interrupted by {number.name}"
    last = journal(folder / "runs/tiny-001", "step")[-1]["step"]
    newest = max((folder / "runs/tiny-001/checkpoints").glob("step-*/manifest.json")).parent.name
    assert newest == f"step-{last:08d}"  # none of its steps is lost
    told = "`lockstep resume runs/tiny-001 --local` goes on from step"
    assert f"{told} {last}" in command.output
    assert not (folder / "runs/tiny-001/.stop").exists()


@pytest.mark.parametrize("pause_s", [0.0, 0.3, 1.5])
def test_a_second_signal_leaves_no_run_unmarked(folder, pause_s):
    command = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    command.wait_for("validation at step")
    family = command.family()
    command.send(signal.SIGTERM)
    time.sleep(pause_s)
    with contextlib.suppress(ProcessLookupError):
        command.send(signal.SIGINT)
    first = {143} if pause_s else {143, 130}  # of two that come together, either may be handled first
    assert command.wait() in first, command.output
    assert remaining(family) == []
    (end,) = journal(folder / "runs/tiny-001", "end")
    assert end["status"] == "KILLED"


def test_a_step_that_takes_too_long_is_not_waited_for(folder):
    code = (folder / "my_task.py").read_text()
    slow = code.replace("def augment(self, batch, draw):", "def augment(self, batch, draw):\n        SLOW")
    slow = slow.replace("SLOW", "import time, pathlib; time.sleep(3600 * pathlib.Path('slow').exists())")
    (folder / "my_task.py").write_text(slow)
    command = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    command.wait_for("validation at step")
    (folder / "slow").touch()
    began_at = time.monotonic()
    command.send(signal.SIGTERM)
    assert command.wait() == 143, command.output
    assert time.monotonic() - began_at < 30
    assert journal(folder / "runs/tiny-001", "end")[-1]["status"] == "KILLED"


def test_resume_goes_on_where_the_run_was_and_refuses_another_recipe(folder):
    command = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    wait_for_checkpoint(folder / "runs/tiny-001")
    command.send(signal.SIGINT)
    command.wait()
    # The journal may lack the last one's line: an interrupt may come between the checkpoint and its line.
    newest = max((folder / "runs/tiny-001/checkpoints").glob("step-*")).name

    refused = run("train", "tiny.yaml", "--local", "--resume", cwd=folder)
    assert refused.process.returncode == 2
    assert "train.epochs: is 4.0, and the run began with 1000000.0" in refused.output

    again = Command("train", "tiny.yaml", "--local", "--resume", "--set", "train.epochs=1000000", cwd=folder)
    again.wait_for("resuming from step")
    again.send(signal.SIGINT)
    again.wait()
    assert f"step-{journal(folder / 'runs/tiny-001', 'rewind')[-1]['step']:08d}" == newest
    assert not (folder / "runs/tiny-002").exists()


@pytest.mark.parametrize("name", ["tiny", "tiny-001", "runs/tiny-001"])
def test_a_run_is_resumed_by_name_with_the_recipe_and_the_overrides_that_it_began_with(folder, name):
    command = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    wait_for_checkpoint(folder / "runs/tiny-001")
    command.send(signal.SIGINT)
    command.wait()
    (folder / "tiny.yaml").unlink()
    again = Command("resume", name, "--local", cwd=folder)
    again.wait_for("resuming from step")
    again.send(signal.SIGINT)
    assert again.wait() == 130
    assert "epochs: 1000000" in (folder / "runs/tiny-001/recipe.yaml").read_text()
    unknown = run("resume", "teny", "--local", cwd=folder)
    assert unknown.process.returncode == 2
    assert "teny: is no run in runs; there are tiny-001" in unknown.output


def test_a_test_that_fails_costs_no_training_and_can_be_repeated(folder):
    task = (folder / "my_task.py").read_text()
    spoilt = task.replace("return [(i - 32)", "return ['?'] * 64 if split == 'test' else [(i - 32)")
    (folder / "my_task.py").write_text(spoilt)
    command = run("train", "tiny.yaml", "--local", "--set", "train.average={kind: ema}", cwd=folder)
    assert command.process.returncode == 1
    assert "evaluating test" in command.output
    (folder / "my_task.py").write_text(task)
    steps = len(journal(folder / "runs/tiny-001", "step"))
    repeated = run("evaluate", "tiny", cwd=folder)
    assert repeated.process.returncode == 0, repeated.output
    whole = run("train", "tiny.yaml", "--local", "--set", "train.average={kind: ema}", cwd=folder)
    assert whole.process.returncode == 0
    ends = [journal(folder / f"runs/tiny-00{number}", "end")[-1] for number in (1, 2)]
    assert ends[0]["status"] == "FINISHED"
    assert ends[0]["metrics"] == ends[1]["metrics"]
    assert len(journal(folder / "runs/tiny-001", "step")) == steps
    other = run("evaluate", "tiny-001", "--split", "validation", cwd=folder)
    assert other.process.returncode == 0
    assert journal(folder / "runs/tiny-001", "end")[-1]["metrics"] == ends[0]["metrics"]
    shutil.rmtree(folder / "runs/tiny-002/checkpoints")
    (folder / "runs/tiny-002/model.safetensors").unlink()
    none = run("evaluate", "tiny-002", cwd=folder)
    assert none.process.returncode == 2
    assert "has no trained weights and no whole checkpoint" in none.output


def test_a_run_without_a_whole_checkpoint_begins_again_and_says_so(folder):
    endless = ("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000")
    never = ("--set", "checkpoint.every.steps=1000000000")
    command = Command(*endless, *never, cwd=folder)
    command.wait_for("validation at step")
    command.send(signal.SIGKILL)
    command.wait()
    again = Command(*endless, *never, "--resume", cwd=folder)
    again.wait_for("validation at step")
    again.send(signal.SIGINT)
    again.wait()
    assert "no whole checkpoint there: the run begins again at its first step" in again.output
    assert [line["step"] for line in journal(folder / "runs/tiny-001", "rewind")] == [0, 0]


def test_what_a_run_may_be_resumed_with_is_said_by_its_user(folder):
    endless = ("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000")
    mirror = ("--set", "checkpoint.mirror=copies")
    command = Command(*endless, *mirror, cwd=folder)
    wait_for_checkpoint(folder / "copies/tiny-001")
    command.send(signal.SIGINT)
    command.wait()
    assert f"mirror: file://{folder}/copies/tiny-001" in command.output
    shutil.rmtree(folder / "runs")

    code = (folder / "my_task.py").read_text()
    (folder / "my_task.py").write_text(code.replace("range(64)", "range(63)"))
    refused = run(*endless, *mirror, "--resume", cwd=folder)
    assert refused.process.returncode == 2
    assert "code: my_task.py: is " in refused.output
    assert "data: train.examples: is 63, and the checkpoint was made with 64" in refused.output
    assert "--accept code --accept data resumes all the same" in refused.output

    lost = run(*endless, "--resume", "--set", "batch.micro=4", "--accept", "recipe", cwd=folder)
    assert lost.process.returncode == 2
    assert "batch.micro: is 4, and the run began with 8" in lost.output

    accept = [word for what in ("recipe", "code", "data") for word in ("--accept", what)]
    again = run("train", "tiny.yaml", "--local", "--resume", *mirror, *accept, cwd=folder)
    assert again.process.returncode == 0, again.output
    assert "accepted: train.epochs: is 4.0, and the run began with 1000000.0" in again.output
    (accepted,) = journal(folder / "runs/tiny-001", "accepted")
    assert len(accepted["changes"]) >= 4
    assert (folder / "copies/tiny-001/model.safetensors").exists()


@pytest.mark.slow
def test_resume_of_nothing_and_of_a_finished_run_is_refused(folder):
    nothing = run("train", "tiny.yaml", "--local", "--resume", cwd=folder)
    assert nothing.process.returncode == 2
    assert "holds no run of tiny" in nothing.output
    assert run("train", "tiny.yaml", "--local", cwd=folder).process.returncode == 0
    finished = run("train", "tiny.yaml", "--local", "--resume", cwd=folder)
    assert finished.process.returncode == 2
    assert "runs/tiny-001 is finished" in finished.output


@pytest.mark.slow
def test_a_folder_that_is_being_trained_in_is_left_alone(folder):
    first = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    first.wait_for("validation at step")
    resume = ("train", "tiny.yaml", "--local", "--resume", "--set", "train.epochs=1000000")
    second = run(*resume, cwd=folder)
    synced = run("sync", "runs/tiny-001", cwd=folder)
    first.send(signal.SIGINT)
    first.wait()
    for refused in (second, synced):
        assert refused.process.returncode == 2
        assert "is being trained by another process" in refused.output


def test_what_shows_only_later_stops_the_run_with_its_reason(folder):
    command = run("train", "tiny.yaml", "--local", "--set", "task.with.spoilt_from=0.5", cwd=folder)
    assert command.process.returncode == 1
    end = journal(folder / "runs/tiny-001", "end")[-1]
    assert end["status"] == "FAILED"
    assert f"failed: {end['reason']}" in command.output
    assert "Traceback" not in command.output


@pytest.mark.slow
def test_a_killed_run_leaves_its_folder_to_whoever_resumes_it(folder):
    command = Command("train", "tiny.yaml", "--local", "--set", "train.epochs=1000000", cwd=folder)
    wait_for_checkpoint(folder / "runs/tiny-001")
    command.send(signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    resume = ("train", "tiny.yaml", "--local", "--resume", "--set", "train.epochs=1000000")
    again = Command(*resume, cwd=folder)
    again.wait_for("resuming from step")
    again.send(signal.SIGINT)
    assert again.wait() == 130


@pytest.mark.slow
def test_short_runs_under_torchrun_end_as_they_should(folder):
    for _ in range(8):
        done = run_under_torchrun(3, "train", "tiny.yaml", "--set", "batch.micro=4", cwd=folder)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_what_is_refused_under_torchrun_ends_every_process_at_once(folder):
    """Only the first process looks at the task; the others wait for it, and go when they are asked to."""
    (folder / "late.py").write_text("import time\ntime.sleep(5)  # by then the others wait")
    done = run_under_torchrun(2, "train", "tiny.yaml", "--set", "task.use=late:Nothing", cwd=folder)
    assert done.returncode == 1
    assert "task.use: is late:Nothing" in done.stderr
    assert "forcefully exiting" not in done.stderr
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_torchrun_costs_no_step(folder, number):
    command = [*torchrun(2), "train", "tiny.yaml", "--set", "train.epochs=1000000"]
    with open(folder / "screen", "w") as screen:
        process = subprocess.Popen(
            [*command, "--set", "checkpoint.every.steps=1000000"],
            cwd=folder,
            env=environment(),
            stdout=screen,
            stderr=screen,
            start_new_session=True,
        )
    until(lambda: journal(folder / "runs/tiny-001", "evaluation"), 120)
    family = descendants(process.pid)
    os.killpg(process.pid, number)
    process.wait(60)
    assert remaining(family) == []
    last = journal(folder / "runs/tiny-001", "step")[-1]["step"]
    assert [path.name for path in (folder / "runs/tiny-001/checkpoints").iterdir()] == [f"step-{last:08d}"]
    (end,) = journal(folder / "runs/tiny-001", "end")
    assert end["status"] == "KILLED"
    assert f"cluster.cli resume runs/tiny-001` goes on from step {last}" in (folder / "screen").read_text()


@pytest.mark.slow
def test_torchrun_runs_the_same_recipe(folder):
    done = run_under_torchrun(2, "train", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: runs/tiny-001") == 1
    assert journal(folder / "runs/tiny-001", "start")[-1]["workers"] == 2
    alone = run("train", "tiny.yaml", "--local", cwd=folder)
    assert alone.process.returncode == 0
    first, second = ([line["loss"] for line in journal(folder / f"runs/tiny-00{n}", "step")] for n in (1, 2))
    assert first == pytest.approx(second, rel=1e-5)
