"""Sweeps whose processes are killed end as one that was left alone, on any number of groups and workers."""

import os
import random
import signal
import time

import pytest

from cluster.experiments.trials import Study
from tests.cluster.commands import WAIT_S, Command, run
from tests.cluster.experiments import tiny_sweep
from tests.cluster.processes import until

pytestmark = pytest.mark.slow

SWEEP = tiny_sweep.SWEEP.replace("[32, 64, 256]", "[16, 64, 256]").replace(
    "run: {device: cpu}", "run: {device: cpu, reduction: exact}\n  track: {uri: none}"
)
KILLS = 10


def test_a_sweep_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path):
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    whole = undisturbed(tmp_path)
    moments = random.Random(0)
    folder = tmp_path / "runs" / "tiny-002"
    arguments = ["sweep", "sweep.yaml", "--local"]
    for _ in range(KILLS):
        command = Command(*arguments, cwd=tmp_path)
        command.wait_for("sweep folder")
        time.sleep(moments.uniform(0.0, 1.5))
        command.send(signal.SIGKILL)
        command.wait()
        arguments = ["resume", "tiny-002", "--local"]
    interrupted = Command(*arguments, cwd=tmp_path)
    interrupted.wait_for("trials are there already")
    interrupted.send(signal.SIGINT)
    assert interrupted.wait() in (0, 130), interrupted.output
    if interrupted.process.returncode == 130:
        assert "`lockstep resume runs/tiny-002` goes on" in interrupted.output
        last = run(*arguments, cwd=tmp_path)
        assert last.process.returncode == 0, last.output
    assert tiny_sweep.facts(Study.read(folder)) == whole


def test_two_groups_of_two_workers_that_are_killed_find_the_same(tmp_path):
    smaller = SWEEP.replace("[16, 64, 256]", "[64, 256]").replace("micro: 64", "micro: 32")
    (tmp_path / "sweep.yaml").write_text(smaller)
    whole = undisturbed(tmp_path)
    wide = smaller.replace("device: cpu", "device: cpu, workers: 2") + "run: {groups: 2}"
    (tmp_path / "wide.yaml").write_text(wide)
    command = Command("sweep", "wide.yaml", cwd=tmp_path)
    seen = set()
    for _ in range(2):
        until(lambda: len(fresh_workers(command, seen)) > 2, WAIT_S)
        time.sleep(0.5)  # they join, and train
        victim = random.Random(len(seen)).choice(fresh_workers(command, seen))
        os.kill(victim.pid, signal.SIGKILL)
        seen.add(victim.pid)
    assert command.wait() == 0, command.output
    assert tiny_sweep.facts(Study.read(tmp_path / "runs" / "tiny-002")) == whole


def fresh_workers(command, seen):
    """The workers of its groups that live and were not killed."""
    return [each for each in command.family() if "TrialWorker" in each.command and each.pid not in seen]


def undisturbed(folder):
    """What a sweep in one process finds."""
    whole = run("sweep", "sweep.yaml", "--local", cwd=folder)
    assert whole.process.returncode == 0, whole.output
    return tiny_sweep.facts(Study.read(folder / "runs" / "tiny-001"))
