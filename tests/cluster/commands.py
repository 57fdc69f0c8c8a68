"""`lockstep` as a user runs it: a process of its own, in a folder of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from tests.cluster.processes import Process, descendants

RECIPE = """
name: tiny
task: {use: my_task:Line, with: {slope: 2.0}}
batch: {size: 32, micro: 8, lanes: 4}
optimizer: {name: sgd, lr: 0.1}
train: {epochs: 4}
checkpoint: {every: {steps: 4}}
run: {workers: 2, pool: {min: 1, max: 1}, device: cpu}
track: {uri: none}
"""
TASK = """
import numpy as np
import torch
from torch import nn


class Line:
    \"\"\"y = slope x: the smallest thing that a user can bring.\"\"\"

    def __init__(self, slope, spoilt_from=None):
        self.slope, self.spoilt_from = slope, spoilt_from

    def model(self):
        return nn.Linear(1, 1)

    def source(self, split):
        return [(i - 32) / 32 for i in range(64)]

    def prepare(self, example, draw):
        y = self.slope * example
        if self.spoilt_from is not None and example >= self.spoilt_from:
            y = float("nan")
        return {"x": np.float32([example]), "y": np.float32([y])}

    def augment(self, batch, draw):
        return batch

    def loss(self, model, batch):
        error = model(batch["x"]) - batch["y"]
        return (error**2).sum(), torch.tensor(float(len(error)))

    def metrics(self, model, batch):
        return {"loss": self.loss(model, batch)}
"""
WAIT_S = 120.0


def user_folder(folder: Path) -> Path:
    """A folder with a recipe and the user's own task, and nothing of Lockstep's."""
    (folder / "tiny.yaml").write_text(RECIPE)
    (folder / "my_task.py").write_text(TASK)
    return folder


def environment(**more: str) -> dict[str, str]:
    """The environment of a user's shell, with one thread per process."""
    hidden = ("RAY_", "MLFLOW_", "PYTEST_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


class Command:
    """A running `lockstep`, whose output is gathered as it comes."""

    started: ClassVar[list["Command"]] = []  # what a test that fails in between leaves to its clean-up

    def __init__(self, *arguments: str, cwd: Path, python: str = sys.executable, **more: str) -> None:
        self.process = subprocess.Popen(
            [python, "-m", "cluster.cli", *arguments],
            cwd=cwd,
            env=environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C goes to the group: this is its group
        )
        self.output = ""
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.started.append(self)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.output += line
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, text: str) -> None:
        """Until the output has `text`."""
        with self._news:
            found = self._news.wait_for(lambda: text in self.output or not self._reader.is_alive(), WAIT_S)
        assert found, f"no {text!r} in {WAIT_S} s:\n{self.output}"
        assert text in self.output, f"it ended without {text!r}:\n{self.output}"

    def send(self, number: signal.Signals) -> None:
        """A signal to its whole group, as a terminal sends Ctrl-C."""
        os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code, once it has ended and all its output is here."""
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return code

    def family(self) -> list[Process]:
        """The processes that it has started, and theirs."""
        return descendants(self.process.pid)


def run(*arguments: str, cwd: Path, **more: str) -> Command:
    """A `lockstep` that has ended."""
    command = Command(*arguments, cwd=cwd, **more)
    command.wait()
    return command


def torchrun(processes: int) -> list[str]:
    """The command line of `lockstep` as `processes` processes of torchrun; its arguments follow."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launch, "-m", "cluster.cli"]


def run_under_torchrun(
    processes: int, *arguments: str, cwd: Path, **more: str
) -> subprocess.CompletedProcess[str]:
    """A `lockstep` under torchrun that has ended, its two streams apart."""
    command = [*torchrun(processes), *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=200
    )


def journal(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The journal's lines of one kind; one that is being written is none yet."""
    whole, _, _ = (folder / "journal.jsonl").read_text().rpartition("\n")
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if line["kind"] == kind]


def wait_for_checkpoint(folder: Path) -> None:
    """Until a run has a whole checkpoint."""
    deadline = time.monotonic() + WAIT_S
    while not list(folder.glob("checkpoints/step-*")):
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.05)
