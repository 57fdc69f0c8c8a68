"""Jobs on a real Ray head, which the tests start and stop; nobody gets in without the token."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.ray_cluster import LOOPBACK_ONLY
from tests.cluster.commands import WAIT_S, Command, journal, run, user_folder
from tests.cluster.processes import until
from tests.cluster.ray_nodes import free_ports, node, token

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Head:
    """A token-protected head on the loopback interface."""

    url: str
    gcs: str
    token: Path

    def lockstep(self, *arguments: str, cwd: Path) -> Command:
        """A `lockstep` command that has the token and has ended."""
        return run(*arguments, "--address", self.url, cwd=cwd, RAY_AUTH_TOKEN_PATH=str(self.token))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    gcs, dashboard, client = map(str, free_ports(3))
    options = ["--head", "--num-cpus", "4", "--port", gcs, "--ray-client-server-port", client]
    options += ["--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard]
    url = f"http://127.0.0.1:{dashboard}"
    with token() as file, node(file, *options):
        until(lambda: answer(f"{url}/api/version") == 401, WAIT_S)
        yield Head(url, f"127.0.0.1:{gcs}", file)


def answer(url: str) -> int | None:
    """The status that a request without a token gets; None when nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def settings(folder: Path) -> list[str]:
    return ["--set", f"checkpoint.dir={folder / 'shared'}"]


def submitted(command: Command) -> str:
    assert command.process.returncode == 0, command.output
    return re.search(r"^raysubmit_\w+", command.output, re.MULTILINE)[0]


def test_a_job_trains_the_users_code_and_its_log_is_the_screen(head, tmp_path):
    folder = user_folder(tmp_path)
    job = submitted(head.lockstep("submit", "tiny.yaml", *settings(folder), cwd=folder))
    logs = head.lockstep("logs", job, "-f", cwd=folder)
    assert "run folder: " in logs.output
    assert "test at step 8: loss" in logs.output
    assert journal(folder / "shared/tiny-001", "start")[-1]["workers"] == 2
    assert journal(folder / "shared/tiny-001", "end")[-1]["status"] == "FINISHED"
    told = head.lockstep("status", job, cwd=folder)
    assert f"{job}  SUCCEEDED" in told.output
    assert head.lockstep("status", cwd=folder).output.split()[:2] == [job, "SUCCEEDED"]
    assert head.lockstep("logs", job, cwd=folder).output == logs.output
    secret = head.token.read_text()
    assert secret not in told.output + logs.output


def test_what_is_taken_along_is_the_users_choice_and_a_default_database_outlives_the_job(head, tmp_path):
    folder = user_folder(tmp_path)
    (folder / ".gitignore").write_text("slopes.py\n")
    (folder / ".env").write_text("A_KEY=planted")
    (folder / "slopes.py").write_text(
        "import pathlib\nif pathlib.Path('.env').exists(): raise SystemExit('a secret came along')\n"
    )
    (folder / "my_task.py").write_text("import slopes\n" + (folder / "my_task.py").read_text())
    tracked = ("--set", "track.uri=null")
    command = head.lockstep("submit", "tiny.yaml", *settings(folder), *tracked, cwd=folder)
    assert "left here: .env (may hold secrets)" in command.output
    job = submitted(command)
    logs = head.lockstep("logs", job, "-f", cwd=folder)
    assert f"{job}  SUCCEEDED" in head.lockstep("status", job, cwd=folder).output, logs.output
    database = folder / "shared/mlflow.db"
    assert f"open it with `lockstep ui --uri sqlite:///{database}`" in logs.output
    synced = run("sync", "shared/tiny-001", cwd=folder)
    assert synced.process.returncode == 0, synced.output
    assert not (folder / "mlflow.db").exists()
    assert list(folder.glob("shared/mlruns/*/artifacts/recipe.yaml"))


def test_a_job_that_fails_says_so(head, tmp_path):
    folder = user_folder(tmp_path)
    spoilt = ("--set", "task.with.spoilt_from=0.5")
    job = submitted(head.lockstep("submit", "tiny.yaml", *settings(folder), *spoilt, cwd=folder))
    assert "failed: " in head.lockstep("logs", job, "-f", cwd=folder).output
    assert f"{job}  FAILED" in head.lockstep("status", job, cwd=folder).output


def test_a_stopped_job_is_marked(head, tmp_path):
    folder = user_folder(tmp_path)
    endless = ("--set", "train.epochs=1000000", "--set", f"track.uri=sqlite:///{folder}/mlflow.db")
    job = submitted(head.lockstep("submit", "tiny.yaml", *settings(folder), *endless, cwd=folder))
    until(lambda: journal(folder / "shared/tiny-001", "evaluation"), WAIT_S)
    stopped = head.lockstep("stop", job, cwd=folder)
    assert f"{job}  STOPPED" in stopped.output
    end = journal(folder / "shared/tiny-001", "end")[-1]
    assert (end["status"], end["reason"]) == ("KILLED", "interrupted by SIGTERM")
    last = journal(folder / "shared/tiny-001", "step")[-1]["step"]
    assert (folder / f"shared/tiny-001/checkpoints/step-{last:08d}/manifest.json").exists()


def test_a_command_on_this_machine_uses_the_cluster_that_is_named(head, tmp_path):
    folder = user_folder(tmp_path)
    known = {"RAY_AUTH_TOKEN_PATH": str(head.token), **LOOPBACK_ONLY}
    command = Command("train", "tiny.yaml", "--address", head.gcs, cwd=folder, **known)
    assert command.wait() == 0, command.output
    assert f"Ray at {head.gcs}" in command.output
    assert "test at step 8: loss" in command.output


def test_nobody_without_the_token_gets_in(head, tmp_path):
    folder = user_folder(tmp_path)
    for path in ("/api/version", "/api/jobs/", "/api/cluster_status"):
        assert answer(head.url + path) == 401
    for wrong in ({"RAY_AUTH_TOKEN": "guessed"}, {"HOME": str(tmp_path)}):
        refused = run("status", "--address", head.url, cwd=folder, **wrong)
        assert refused.process.returncode == 2
        assert "wants a token" in refused.output


def test_where_no_head_answers_the_message_says_so(head, tmp_path):
    (free,) = free_ports(1)
    address = f"http://127.0.0.1:{free}"
    refused = run("status", "--address", address, cwd=tmp_path, RAY_AUTH_TOKEN_PATH=str(head.token))
    assert refused.process.returncode == 2
    assert f"{address}: no Ray head answers there" in refused.output
