"""A run that is spread over processes of torchrun, killed, and resumed in another way."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cluster.commands import environment, journal, run_under_torchrun, torchrun, wait_for_checkpoint
from tests.cluster.processes import descendants

RECIPE = """
name: spread
task: {use: trainer.tasks.digits:Digits, with: {hidden: 24}}
batch: {size: 96, micro: 16, lanes: 6}
optimizer: {name: lamb, lr: 0.02}
train: {epochs: 20, average: {kind: ema, decay: 0.9}}
checkpoint: {every: {steps: 5}, keep: 2}
run: {workers: 3, reduction: exact, pool: {min: 1, max: 1}, device: cpu}
track: {uri: none}
"""


@pytest.mark.slow
def test_a_run_killed_under_fsdp_goes_on_in_another_mode_to_the_same_bits(tmp_path: Path):
    (tmp_path / "spread.yaml").write_text(RECIPE)
    whole = run_under_torchrun(2, "train", "spread.yaml", "--set", "name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    with open(tmp_path / "screen", "w") as screen:
        process = subprocess.Popen(
            [*torchrun(3), "train", "spread.yaml", "--set", "run.parallel=fsdp"],
            cwd=tmp_path,
            env=environment(),
            stdout=screen,
            stderr=screen,
            start_new_session=True,
        )
    run = tmp_path / "runs/spread-001"
    wait_for_checkpoint(run)
    for number in [process.pid, *(each.pid for each in descendants(process.pid))]:
        os.kill(number, signal.SIGKILL)
    process.wait()
    assert not journal(run, "end")
    units = "run.parallel={fsdp: {units: ['*']}}"
    resumed = run_under_torchrun(2, "train", "spread.yaml", "--resume", "--set", units, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    for file in ("model.safetensors", "average.safetensors"):
        assert (run / file).read_bytes() == (tmp_path / "runs/whole-001" / file).read_bytes()
