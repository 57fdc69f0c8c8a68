"""Whole runs under `run.parallel: fsdp`: evaluation, averages, checkpoints, export, and what goes wrong."""

import functools
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import recipe
from tests.trainer.test_worker import BrokenTask, kinds, order
from trainer.recipe.schema import Recipe
from trainer.worker import run_worker

STATE = {"ddp": {"shard_state": True}}


def chosen(parallel: object, workers: int, **train: object) -> Recipe:
    run = {"parallel": parallel, "workers": workers, "reduction": "fast", "device": "cpu"}
    return recipe(
        batch={"size": 70},
        run=run,
        train={
            "epochs": 3,
            "average": {"kind": "swa", "start": {"share": 0.5}, "every": {"steps": 1}},
            **train,
        },
        checkpoint={"keep": 2, "every": {"steps": 2}},
        eval={"every": {"steps": 3}},
    )


def test_a_run_evaluates_averages_saves_and_exports_as_one_worker_does(
    process_group: ProcessGroup, tmp_path: Path
):
    for name in ("alone", "0", "1", "2"):
        (tmp_path / name).mkdir()
    [alone] = process_group.run(1, run_worker, order(tmp_path / "alone", chosen("ddp", 1)))
    for number, (workers, parallel) in enumerate(((2, "fsdp"), (3, "fsdp"), (2, STATE))):
        folder = tmp_path / str(number)
        outcomes = process_group.run(workers, run_worker, order(folder, chosen(parallel, workers)))
        assert {outcome.status for outcome in outcomes} == {"FINISHED"}
        assert outcomes[0].metrics.keys() == alone.metrics.keys()
        for name, value in alone.metrics.items():
            assert outcomes[0].metrics[name] == pytest.approx(value, rel=1e-3), name
        for file in ("model.safetensors", "average.safetensors"):
            ours, theirs = load_file(folder / file), load_file(tmp_path / "alone" / file)
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
        assert len(list((folder / "checkpoints").iterdir())) == 2


def test_an_example_that_one_worker_cannot_read_ends_the_run_on_all(
    process_group: ProcessGroup, tmp_path: Path
):
    spec = order(tmp_path, chosen("fsdp", 3), functools.partial(BrokenTask, "unreadable"))
    for outcome in process_group.run(3, run_worker, spec):
        assert outcome.status == "FAILED"
        assert "a corrupted image" in outcome.reason


def test_values_that_are_not_finite_end_the_run_on_all(process_group: ProcessGroup, tmp_path: Path):
    spec = order(tmp_path, chosen("fsdp", 2), functools.partial(BrokenTask, "NaN in the data"))
    for outcome in process_group.run(2, run_worker, spec):
        assert outcome.status == "FAILED"
        assert "the weights are those before this step" in outcome.reason
    assert not any(np.isnan(line["loss"]) for line in kinds(tmp_path, "step"))
