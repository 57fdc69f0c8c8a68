"""A run with a minimum and a maximum of workers follows what the cluster has, and gives the same bits."""

import contextlib
import socket
import subprocess
from pathlib import Path

import pytest

from cluster.ray_cluster import LOOPBACK_ONLY
from tests.cluster.commands import WAIT_S, Command, journal, run
from tests.cluster.processes import until
from tests.cluster.ray_nodes import free_ports, node, pull_the_plug, token
from tests.cluster.test_reproducibility_ray import RECIPE, SUBJECT, traces

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

NOTICED_S = 180.0  # GCS gives a silent node up after some time
LONG = ("--set", "train.epochs=420", "--set", "eval.every.epochs=100", "--set", "checkpoint.every.steps=50")
IMPORTS = "import dataclasses\nimport os\nimport time"
SLOW = """

class SlowTask(NoisyTask):
    # As long as nodes take to come and go, but for the run in one process, which waits for nobody.
    def augment(self, batch, draw):
        if "LOCAL_RANK" in os.environ:
            time.sleep(0.01)
        return super().augment(batch, draw)
"""
SEVERAL_NODES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}  # which Ray refuses where all is on loopback


def sizes(run_folder: Path) -> list[int]:
    """Workers of the group, each time that it started."""
    with contextlib.suppress(FileNotFoundError):
        return [line["workers"] for line in journal(run_folder, "start")]
    return []


def is_open(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def steps(run_folder: Path) -> int:
    return max((line["step"] for line in journal(run_folder, "step")), default=0)


def test_a_run_shrinks_with_a_lost_node_and_grows_with_a_new_one(tmp_path: Path):
    (tmp_path / "noisy.yaml").write_text(RECIPE.replace("NoisyTask", "SlowTask"))
    (tmp_path / "noisy.py").write_text(SUBJECT.read_text().replace("import dataclasses", IMPORTS) + SLOW)
    elastic = tmp_path / "runs/noisy-001"
    (gcs,) = map(str, free_ports(1))
    address = f"127.0.0.1:{gcs}"

    def another(stack: contextlib.ExitStack, file: Path) -> subprocess.Popen:
        options = ("--address", address, "--node-ip-address", "127.0.0.1", "--num-cpus", "1")
        return stack.enter_context(node(file, *options, **SEVERAL_NODES))

    with token() as file, contextlib.ExitStack() as stack:
        options = ("--head", "--port", gcs, "--node-ip-address", "127.0.0.1", "--num-cpus", "2")
        stack.enter_context(node(file, *options, "--include-dashboard", "false", **SEVERAL_NODES))
        until(lambda: is_open(int(gcs)), WAIT_S)
        known = {"RAY_AUTH_TOKEN_PATH": str(file), "RAY_AUTH_MODE": "token", **LOOPBACK_ONLY, **SEVERAL_NODES}
        start = ("train", "noisy.yaml", "--address", address, "--set", "run.workers={min: 1, max: 2}")
        command = Command(*start, *LONG, cwd=tmp_path, **known)
        until(lambda: sizes(elastic) == [1] and steps(elastic) > 10, WAIT_S)
        more = another(stack, file)
        until(lambda: sizes(elastic) == [1, 2] and steps(elastic) > 10, WAIT_S)
        pull_the_plug(more)
        until(lambda: sizes(elastic) == [1, 2, 1], NOTICED_S)
        another(stack, file)
        until(lambda: sizes(elastic) == [1, 2, 1, 2], WAIT_S)
        assert command.wait() == 0, command.output
    told = [(line["workers"], line["reason"]) for line in journal(elastic, "resized")]
    assert told == [
        (2, "there is room for 1 more"),
        (1, "there is no more room for 1"),
        (2, "there is room for 1 more"),
    ]
    alone = run("train", "noisy.yaml", "--local", *LONG, cwd=tmp_path)
    assert alone.process.returncode == 0, alone.output
    assert traces(tmp_path, "noisy-001") == traces(tmp_path, "noisy-002")
