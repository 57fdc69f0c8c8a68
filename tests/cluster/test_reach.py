"""What comes from outside is answered within seconds, and named."""

import http.server
import os
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import jobs, reach
from tests.cluster.commands import Command, journal, run, run_under_torchrun, user_folder
from tests.cluster.processes import descendants, remaining
from trainer import task
from trainer.errors import UserError
from trainer.recipe.schema import TaskSection
from trainer.run_folder.journal import Journal


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(user_folder(tmp_path))
    return tmp_path


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web() -> Iterator[int]:
    """A port of some web server."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_):
            pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def dripping() -> Iterator[int]:
    """A port that answers for ever, a byte at a time."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            try:
                connection, _ = server.accept()
                connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while True:
                    connection.sendall(b"X: y\r\n")
                    time.sleep(0.2)
            except OSError:
                pass

        threading.Thread(target=drip, daemon=True).start()
        yield server.getsockname()[1]


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def within(began_at: float) -> bool:
    return time.monotonic() - began_at < reach.ANSWER_S + 1


@pytest.mark.parametrize("kind", ["silent", "dripping", "closed"])
def test_a_dashboard_that_does_not_answer_is_named_in_seconds(request, kind):
    port = closed_port() if kind == "closed" else request.getfixturevalue(kind)
    began_at = time.monotonic()
    with pytest.raises(UserError, match=rf"http://127.0.0.1:{port}: no Ray head answers there \("):
        jobs.statuses(f"http://127.0.0.1:{port}")
    assert within(began_at)


@pytest.mark.parametrize("kind", ["silent", "web", "closed"])
def test_a_ray_address_that_does_not_answer_is_named_in_seconds(request, folder, kind):
    port = closed_port() if kind == "closed" else request.getfixturevalue(kind)
    with pytest.raises(UserError, match=rf"^RAY_ADDRESS: no Ray head answers at 127.0.0.1:{port} \("):
        reach.refuse_silent_cluster(f"127.0.0.1:{port}", "RAY_ADDRESS")


@pytest.mark.parametrize("address", ["nonsense", "host:port", "host:99999", ":6379"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="HOST:PORT"):
        reach.refuse_silent_cluster(address, "--address")


def test_a_dead_ray_address_ends_the_command(folder):
    command = run("train", "tiny.yaml", cwd=folder, RAY_ADDRESS=f"127.0.0.1:{closed_port()}")
    assert command.process.returncode == 2, command.output
    assert "RAY_ADDRESS: no Ray head answers at" in command.output


def test_a_proxy_hides_no_head_of_this_machine(web, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "intranet")
    monkeypatch.setenv("NO_PROXY", "")
    reach.reach_loopback_directly()
    assert os.environ["no_proxy"] == "intranet,localhost,127.0.0.1,::1"
    reach.refuse_silent_head(f"http://127.0.0.1:{web}")
    import requests

    assert requests.head(f"http://127.0.0.1:{web}/", timeout=5).status_code == 401


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "4"},
        {"WORLD_SIZE": "four", "RANK": "0"},
        {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"},
    ],
)
def test_what_another_launcher_has_left_is_named_and_left_out(folder, left):
    command = run("train", "tiny.yaml", "--local", cwd=folder, **left)
    assert command.process.returncode == 0, command.output
    assert f"WORLD_SIZE={left['WORLD_SIZE']}" in command.output
    assert journal(folder / "runs/tiny-001", "start")[-1]["workers"] == 1


def test_torchrun_with_one_process_trains_in_it(folder):
    done = run_under_torchrun(1, "train", "tiny.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "1 processes of torchrun" in done.stdout
    assert " Ray (" not in done.stdout
    assert journal(folder / "runs/tiny-001", "start")[-1]["workers"] == 1


# Raw errors


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "Request failed with status code 404: Job raysubmit_x does not exist.",
            "raysubmit_x: there is no such job",
        ),
        (
            "Request failed with status code 413: 413: Request Entity Too Large",
            r"name what stays here in \.lockstepi",
        ),
        ("", "refused without a word"),
    ],
)
def test_what_a_head_refuses_is_said_with_its_cure(monkeypatch, web, text, said):
    def refuse(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", refuse)
    with pytest.raises(Exception, match=said):
        jobs.logs("raysubmit_x", f"http://127.0.0.1:{web}")


def test_a_module_that_is_not_found_and_not_named_is_said_in_its_own_words(folder):
    (folder / "mine.py").write_text("raise ModuleNotFoundError('the toolkit is away')")
    with pytest.raises(UserError) as refusal:
        task.load(TaskSection(use="mine:Task"))
    assert "the toolkit is away" in str(refusal.value)
    assert "None" not in str(refusal.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_a_full_disk_is_named_with_its_path(tmp_path):
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/journal.jsonl'"):
        journal.write("stage", name="a", seconds=1.0)
    journal._pending.clear()


@pytest.mark.slow
def test_the_ui_ends_with_its_command_however_that_ends(folder):
    from mlflow import MlflowClient

    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    command = Command("ui", cwd=folder, MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db")
    command.wait_for("(Ctrl-C ends it)")
    family = descendants(command.process.pid)
    assert not [each for each in family if "sqlite" in each.command]  # an address may hold a password
    command.process.kill()
    command.wait()
    assert remaining(family, 30) == []
