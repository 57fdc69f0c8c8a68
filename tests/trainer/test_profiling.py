"""The profile of some steps."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

from tests.trainer.plans import spec
from tests.trainer.reproducibility import NoisyTask, recipe
from trainer.run_folder import journal
from trainer.worker import run_worker

RECIPE = recipe(train={"epochs": 4})


def test_the_profile_of_some_steps_lies_in_the_folder_and_changes_nothing(tmp_path: Path):
    folders = [tmp_path / name for name in ("plain", "profiled")]
    for folder, count in zip(folders, (0, 3), strict=True):
        folder.mkdir()
        order = spec(RECIPE, folder, NoisyTask)
        assert run_worker(replace(order, profile=count)).status == "FINISHED"
    plain, profiled = ([line["loss"] for line in journal.read(f) if line["kind"] == "step"] for f in folders)
    assert profiled == plain
    assert not (folders[0] / "profile").exists()
    with gzip.open(folders[1] / "profile/trace.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"]}
    assert "aten::addmm" in names
    assert "aten::addmm" in (folders[1] / "profile/operators.txt").read_text()
    table = (folders[1] / "profile/steps.txt").read_text().splitlines()
    assert table[0] == "mean of 3 steps"
    assert {line.split()[0] for line in table[1:]} >= {"wait", "compute", "optimizer", "step"}


def test_a_run_shorter_than_its_profile_keeps_what_there_is(tmp_path: Path):
    order = spec(RECIPE, tmp_path, NoisyTask, profile=1000)
    assert run_worker(order).status == "FINISHED"
    steps = sum(line["kind"] == "step" for line in journal.read(tmp_path))
    assert (tmp_path / "profile/steps.txt").read_text().startswith(f"mean of {steps - 5} steps")
