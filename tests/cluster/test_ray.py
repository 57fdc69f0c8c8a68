"""Training on Ray clusters of our own: what comes out, what is left, who can reach it."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.cluster.commands import WAIT_S, Command, journal, run, user_folder, wait_for_checkpoint
from tests.cluster.processes import Process, ports, remaining, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ENDLESS = ("--set", "train.epochs=1000000")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


def folders_of_cluster(family: list[Process]) -> list[Path]:
    """Where the cluster of these processes keeps its files: it is named in their commands."""
    return [
        Path(name)
        for name in set(re.findall(r"/tmp/lockstep-[\w-]+", " ".join(each.command for each in family)))
    ]


def worker_of(family: list[Process]) -> Process:
    return next(process for process in family if process.command.startswith("ray::Worker"))


def test_two_workers_train_as_one_process_does_and_leave_nothing(folder):
    command = Command("train", "tiny.yaml", cwd=folder)
    command.wait_for("2 workers (")
    family = command.family()
    assert command.wait() == 0, command.output
    assert len(folders_of_cluster(family)) == 1
    assert [path for path in folders_of_cluster(family) if path.exists()] == []
    assert remaining(family) == []
    assert re.search(r"^ *[\d.]+ s  Ray \(", command.output, re.MULTILINE)
    assert "WARNING" not in command.output
    assert "pid=" not in command.output
    kept = {path.name for path in (folder / "runs/tiny-001").iterdir()}
    files = {"recipe.yaml", "plan.txt", "journal.jsonl", "lockstep.log", "checkpoints", "model.safetensors"}
    assert kept == files
    alone = run("train", "tiny.yaml", "--local", cwd=folder)
    assert alone.process.returncode == 0, alone.output
    first, second = ([line["loss"] for line in journal(folder / f"runs/tiny-00{n}", "step")] for n in (1, 2))
    assert first == pytest.approx(second, rel=1e-5)


def press_ctrl_c(command: Command, folder: Path, family: list[Process]) -> None:
    """End a run; it is marked, and none of its processes and of its cluster's files is left."""
    command.send(signal.SIGINT)
    assert command.wait() == 130, command.output
    assert "Traceback" not in command.output
    assert journal(folder / "runs/tiny-001", "end")[-1]["status"] == "KILLED"
    assert remaining(family) == []
    assert [path for path in folders_of_cluster(family) if path.exists()] == []


def test_ctrl_c_marks_the_run_and_leaves_no_process_port_or_file(folder):
    command = Command("train", "tiny.yaml", *ENDLESS, "--set", "track.uri=null", cwd=folder)
    command.wait_for("validation at step")
    family = command.family()
    assert len([process for process in family if process.command.startswith("ray::Worker")]) == 2
    press_ctrl_c(command, folder, family)
    assert status_in_mlflow(folder) == "KILLED"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_costs_no_step(folder, number):
    command = Command("train", "tiny.yaml", *ENDLESS, "--set", "checkpoint.every.steps=100000", cwd=folder)
    command.wait_for("validation at step")
    family = command.family()
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in folders_of_cluster(family))
    command.send(number)
    time.sleep(0.3)
    command.send(number)
    assert command.wait() == 128 + number, command.output
    last = journal(folder / "runs/tiny-001", "step")[-1]["step"]
    assert f"`lockstep resume runs/tiny-001` goes on from step {last}" in command.output
    assert [path.name for path in (folder / "runs/tiny-001/checkpoints").iterdir()] == [f"step-{last:08d}"]
    (end,) = journal(folder / "runs/tiny-001", "end")
    assert end["status"] == "KILLED"
    assert remaining(family) == []
    assert [path for path in folders_of_cluster(family) if path.exists()] == []


@pytest.mark.parametrize("name", ["raylet/raylet", "gcs_server"])
def test_where_ray_itself_dies_the_command_says_so_and_leaves_nothing(folder, name):
    command = Command("train", "tiny.yaml", *ENDLESS, cwd=folder)
    command.wait_for("validation at step")
    family = command.family()
    (victim,) = [each for each in family if each.command.split()[0].endswith(name)]
    os.kill(victim.pid, signal.SIGKILL)
    assert command.wait() == 1, command.output
    assert (
        f"Ray's {name.rpartition('/')[2].replace('_', ' ')} (process {victim.pid}) was killed by SIGKILL"
        in command.output
    )
    assert "`lockstep resume runs/tiny-001` goes on from step" in command.output
    assert journal(folder / "runs/tiny-001", "end")[-1]["status"] == "FAILED"
    assert remaining(family) == []
    assert [path for path in folders_of_cluster(family) if path.exists()] == []


def test_ctrl_c_while_ray_starts_leaves_nothing_either(folder):
    command = Command("train", "tiny.yaml", cwd=folder)
    until(lambda: any("gcs_server" in each.command for each in command.family()), WAIT_S)
    family = command.family()
    press_ctrl_c(command, folder, family)


@pytest.mark.parametrize("delay_s", [0.3, 1.0, 1.6, 2.2, 2.8, 3.4])
def test_ctrl_c_at_any_moment_of_the_start_leaves_nothing(folder, delay_s):
    command = Command("train", "tiny.yaml", *ENDLESS, cwd=folder)
    time.sleep(delay_s)
    family = command.family()
    command.send(signal.SIGINT)
    assert command.wait() in (130, -signal.SIGINT), command.output  # the latter before Python listens
    assert "Traceback" not in command.output or "import" in command.output
    assert [path for path in folders_of_cluster(family) if path.exists()] == []
    assert remaining(family) == []
    for run_folder in (folder / "runs").glob("*"):
        assert journal(run_folder, "end"), "a run that has a folder is marked"


@pytest.mark.parametrize("delay_s", [1.0, 2.0, 3.0, 4.0])
def test_a_command_that_is_killed_while_it_starts_leaves_no_process(folder, delay_s):
    command = Command("train", "tiny.yaml", *ENDLESS, cwd=folder)
    time.sleep(delay_s)
    family = command.family()
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait() == -signal.SIGKILL
    assert remaining(family, patience_s=180.0) == []  # Ray's agents look for a lost raylet for two minutes


@pytest.mark.parametrize("delay_s", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_a_worker_that_dies_while_it_starts_is_replaced(folder, delay_s):
    command = Command("train", "tiny.yaml", cwd=folder)
    until(lambda: any(each.command.startswith("ray::Worker") for each in command.family()), WAIT_S)
    time.sleep(delay_s)
    workers = [each for each in command.family() if each.command.startswith("ray::Worker")]
    for victim in workers[:1]:
        with contextlib.suppress(ProcessLookupError):  # on a quick machine the run may be over
            os.kill(victim.pid, signal.SIGKILL)
    assert command.wait() == 0, command.output
    assert journal(folder / "runs/tiny-001", "end")[-1]["status"] == "FINISHED"


def status_in_mlflow(folder: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (tracked,) = client.search_runs([client.get_experiment_by_name("default").experiment_id])
    return tracked.info.status


def test_what_we_start_listens_on_loopback_only(folder):
    command = Command("train", "tiny.yaml", *ENDLESS, "--set", "track.uri=null", cwd=folder)
    command.wait_for("validation at step")
    listening = ports(command.family())
    command.send(signal.SIGINT)
    command.wait()
    assert any("gcs_server" in port.command for port in listening)
    assert any("raylet" in port.command for port in listening)
    assert [port for port in listening if not port.is_loopback] == []


def test_a_killed_worker_is_replaced_and_the_run_ends_as_it_would_have(folder):
    exact = (
        "--set",
        "run.reduction=exact",
        "--set",
        "train.epochs=400",
        "--set",
        "checkpoint.every.steps=40",
    )
    command = Command("train", "tiny.yaml", *exact, cwd=folder)
    wait_for_checkpoint(folder / "runs/tiny-001")
    workers = [each for each in command.family() if each.command.startswith("ray::Worker")]
    os.kill(workers[0].pid, signal.SIGKILL)
    command.wait_for("resuming from step")
    after = {each.pid for each in command.family() if each.command.startswith("ray::Worker")}
    assert command.wait() == 0, command.output
    assert workers[1].pid in after, "a process that lived is used again"
    assert workers[0].pid not in after
    assert "resuming from step" in command.output
    assert len(journal(folder / "runs/tiny-001", "start")) == 2
    alone = run("train", "tiny.yaml", "--local", *exact, cwd=folder)
    assert alone.process.returncode == 0, alone.output
    weights = [(folder / f"runs/tiny-00{n}/model.safetensors").read_bytes() for n in (1, 2)]
    assert weights[0] == weights[1]


def test_a_loss_that_is_nan_stops_the_run_at_once_with_its_reason(folder):
    command = run("train", "tiny.yaml", "--set", "task.with.spoilt_from=0.5", cwd=folder)
    assert command.process.returncode == 1, command.output
    (end,) = journal(folder / "runs/tiny-001", "end")
    assert end["status"] == "FAILED"
    assert f"failed: {end['reason']}" in command.output
    starts = [line for line in journal(folder / "runs/tiny-001", "stage") if line["name"] == "2 workers"]
    assert len(starts) == 1
