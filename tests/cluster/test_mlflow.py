"""Runs and MLflow, as the user meets them: there, away, and looked at."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.commands import WAIT_S, Command, environment, journal, run, user_folder
from tests.cluster.processes import ports, remaining
from trainer.tracking.progress import TrackingProgress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TRACKED = ("train", "tiny.yaml", "--local", "--set", "track.uri=null")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


def the_run(folder: Path):
    """The one run in the folder's database, and the client that sees it."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("default").experiment_id])
    return client, found


def test_a_run_is_in_mlflow_when_the_command_ends(folder):
    command = run(*TRACKED, cwd=folder)
    assert command.process.returncode == 0, command.output
    assert "tiny-001 is in mlflow.db; open it with `lockstep ui`" in command.output
    client, found = the_run(folder)
    assert found.info.status == "FINISHED"
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    written = journal(folder / "runs/tiny-001", "step")
    assert [(each.step, each.value) for each in losses] == [
        (line["examples"], line["loss"]) for line in written
    ]
    assert found.data.tags["lockstep.model"] == "logged"


def test_mlflow_down_is_said_and_made_good_later(folder):
    nowhere = "http://127.0.0.1:9"  # nothing listens on the discard port
    command = run(*TRACKED, cwd=folder, MLFLOW_TRACKING_URI=nowhere)
    assert command.process.returncode == 0, command.output
    assert "MLflow is behind" in command.output
    assert "`lockstep sync runs/tiny-001` brings the rest" in command.output
    failed = run("sync", "runs/tiny-001", cwd=folder, MLFLOW_TRACKING_URI=nowhere)
    assert failed.process.returncode == 1
    assert "failed: MLflow did not take it" in failed.output
    synced = run("sync", "runs/tiny-001", cwd=folder)
    assert synced.process.returncode == 0, synced.output
    _, found = the_run(folder)
    assert found.info.status == "FINISHED"
    assert found.data.metrics["train/step"] == 8


SWEEP = """
name: tiny-sweep
recipe: tiny.yaml
target: {metric: loss, at_most: 0.05}
batches: [8, 16, 32]
seeds: {search: [101, 102], report: 2}
"""


def the_trials(folder: Path):
    """The one sweep in the folder's database, and its trials' runs by what they are."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    found = client.search_runs([client.get_experiment_by_name("default").experiment_id])
    (sweep,) = [run for run in found if run.data.tags["lockstep.kind"] == "sweep"]
    trials = [run for run in found if run.data.tags["lockstep.kind"] == "trial"]
    assert {run.data.tags["mlflow.parentRunId"] for run in trials} == {sweep.info.run_id}
    named = {run.data.tags["lockstep.trial"]: run for run in trials}
    assert len(named) == len(trials)
    return sweep, named


def test_a_sweep_is_in_mlflow_when_its_command_ends_and_nowhere_when_it_is_not_tracked(folder):
    (folder / "sweep.yaml").write_text(SWEEP)
    command = run("sweep", "sweep.yaml", "--local", "--set", "recipe.track.uri=null", cwd=folder)
    assert command.process.returncode == 0, command.output
    assert "in mlflow.db; open it with `lockstep ui runs/tiny-sweep-001`" in command.output
    sweep, trials = the_trials(folder)
    written = {(line["key"], line["stage"]) for line in journal(folder / "runs/tiny-sweep-001", "trial")}
    assert (sweep.info.status, len(trials)) == ("FINISHED", len(written))
    assert {"16", "32"} < {each.data.params["batch"] for each in trials.values()}
    silent = run("sweep", "sweep.yaml", "--local", cwd=folder)
    assert silent.process.returncode == 0, silent.output
    assert "MLflow" not in silent.output
    assert not (folder / "runs/tiny-sweep-002/tracking.json").exists()

    refused = run("ui", "tiny-sweep-002", cwd=folder)
    assert refused.process.returncode == 2
    assert "MLflow has nothing of tiny-sweep-002 yet" in refused.output
    (folder / "elsewhere").mkdir()
    server = Command("ui", "../runs/tiny-sweep-001", cwd=folder / "elsewhere")
    server.wait_for("(Ctrl-C ends it)")
    assert f"/runs?searchFilter=tags.mlflow.parentRunId%20%3D%20%27{sweep.info.run_id}%27" in server.output
    server.send(signal.SIGINT)
    assert server.wait() == 130


def test_a_server_that_is_away_for_a_while_has_each_trial_once_in_the_end(folder):
    (folder / "sweep.yaml").write_text(SWEEP)
    command = run("sweep", "sweep.yaml", "--local", cwd=folder)
    assert command.process.returncode == 0, command.output
    whole = (folder / "runs/tiny-sweep-001/journal.jsonl").read_bytes().replace(b'"none"', b"null")
    lines = whole.splitlines(keepends=True)
    following = folder / "runs/tiny-sweep-002"
    following.mkdir()
    (following / "sweep.yaml").touch()
    assert run(*TRACKED, cwd=folder).process.returncode == 0  # so that there is a database to serve

    def server(*port: str) -> Command:
        started = Command("ui", *port, cwd=folder)
        started.wait_for("(Ctrl-C ends it)")
        return started

    def away(server: Command) -> None:
        server.send(signal.SIGINT)
        server.wait()

    def feed(part: list[bytes]) -> None:
        with open(following / "journal.jsonl", "ab") as file:
            file.writelines(part)

    def wait_until(holds: Callable[[TrackingProgress], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while (state := TrackingProgress.load(following)) is None or not holds(state):
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    first = server()
    address = first.output.split()[1]
    feed(lines[:6])
    writer = subprocess.Popen(
        [sys.executable, "-m", "trainer.tracking.writer", str(following), str(os.getpid())],
        env=environment(MLFLOW_TRACKING_URI=address),
    )
    try:
        wait_until(lambda state: state.offset)
        away(first)
        feed(lines[6:12])
        wait_until(lambda state: state.error)
        feed(lines[12:])
        second = server("--port", address.rpartition(":")[2])
        assert writer.wait(WAIT_S) == 0
        away(second)
    finally:
        writer.kill()
        writer.wait()
    sweep, trials = the_trials(folder)
    assert sweep.info.status == "FINISHED"
    assert {each.info.status for each in trials.values()} <= {"FINISHED", "KILLED", "FAILED"}
    assert len(trials) == len({(line["key"], line["stage"]) for line in journal(following, "trial")})


def test_no_secret_is_in_any_file_of_a_run_on_the_screen_in_ps_or_in_mlflow(folder):
    """With a server that is down, which is when errors tell of addresses, and then with one that is there."""
    planted = {
        "MLFLOW_TRACKING_URI": "http://me:planted%2Fone@127.0.0.1:9/?token=planted-two",
        "MLFLOW_TRACKING_PASSWORD": "planted-three",
        "A_SERVICE_TOKEN": "planted-four",
        "SOME_DATABASE": "postgresql://me:planted-five@host/db",
    }
    code = (folder / "my_task.py").read_text()
    says = "def source(self, split):\n        import os, sys\n"
    says += "        print(os.environ['A_SERVICE_TOKEN'], file=sys.stderr)"
    (folder / "my_task.py").write_text(code.replace("def source(self, split):", says))
    settings = ("--set", "checkpoint.mirror=copies", "--set", "track.uri=null")
    command = Command("train", "tiny.yaml", *settings, cwd=folder, **planted)
    command.wait_for("Ray (")
    commands = " ".join(each.command for each in command.family())
    assert command.wait() == 0, command.output
    assert "MLflow is behind" in command.output
    failed = run("sync", "runs/tiny-001", "--debug", cwd=folder, **planted)
    assert failed.process.returncode == 1
    synced = run("sync", "runs/tiny-001", cwd=folder, **(planted | {"MLFLOW_TRACKING_URI": ""}))
    assert synced.process.returncode == 0, synced.output
    told = [commands, command.output, failed.output, synced.output]
    told = [text.replace("planted-four\n", "") for text in told]  # what the task prints on a terminal
    assert [text for text in told if "planted" in text] == []
    files = [path for path in folder.rglob("*") if path.is_file() and "my_task" not in path.name]
    assert {"lockstep.log", "tracking.json", "mlflow.db", "environment.json"} <= {path.name for path in files}
    assert [path for path in files if b"planted" in path.read_bytes()] == []
    private = [path for path in files if path.name in ("lockstep.log", "tracking.json")]
    assert {path.stat().st_mode & 0o777 for path in private if "copies" not in path.parts} == {0o600}


def test_an_experiment_that_is_deleted_is_said_while_the_run_goes_on(folder):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    client.delete_experiment(client.create_experiment("default"))
    command = Command(*TRACKED, "--set", "train.epochs=1000000", cwd=folder)
    command.wait_for("restore it with `mlflow experiments restore --experiment-id 1`")
    assert command.process.poll() is None
    command.send(signal.SIGINT)
    assert command.wait() == 130


def test_a_run_that_is_killed_outright_is_marked_by_its_writer(folder):
    command = Command(*TRACKED, "--set", "train.epochs=1000000", cwd=folder)
    command.wait_for("validation at step")
    family = command.family()
    assert [each for each in family if "trainer.tracking.writer" in each.command]
    command.process.kill()
    command.wait()
    assert remaining(family, patience_s=120) == []
    assert the_run(folder)[1].info.status == "KILLED"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_ui_answers_on_loopback_and_leaves_nothing(folder, number, code):
    refused = run("ui", cwd=folder)
    assert refused.process.returncode == 2
    assert "mlflow.db: there is no such database" in refused.output
    assert run(*TRACKED, cwd=folder).process.returncode == 0
    command = Command("ui", cwd=folder)
    command.wait_for("(Ctrl-C ends it)")
    address = command.output.split()[1]
    with urllib.request.urlopen(address, timeout=20) as page:
        assert b"MLflow" in page.read()
    family = command.family()
    assert address.rpartition(":")[2] in {str(port.port) for port in ports(family)}
    assert [port for port in ports(family) if not port.is_loopback] == []
    command.send(number)
    assert command.wait() == code, command.output
    assert remaining(family) == []
