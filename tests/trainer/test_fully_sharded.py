"""`run.parallel: fsdp` is the run that every other way of spreading is: same curve, same checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, Trace, leg, recipe, trace
from trainer.recipe.schema import Recipe


class Scaled(NoisyTask):
    """With a parameter of no dimension, and one of a single row."""

    def model(self) -> nn.Module:
        return ScaledModel(super().model())


class ScaledModel(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.gain, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.inner(x) + self.shift


BLOCKS = {"fsdp": {"units": ["0", "4"]}}
STATE = {"ddp": {"shard_state": True}}
CASES = {
    "lamb": {},
    "adafactor, K=7": {"optimizer": {"name": "adafactor", "lr": 0.01}, "batch": {"size": 70}},
    "adamw, clipped, averaged": {
        "optimizer": {"name": "adamw", "lr": 0.01},
        "train": {"clip_norm": 0.5, "average": {"kind": "ema", "decay": 0.9}},
    },
    "sm3, K=4, echo 1.5": {
        "optimizer": {"name": "sm3", "lr": 0.05},
        "batch": {"size": 40},
        "echo": {"factor": 1.5},
    },
}
STEPS = 40


def fast(parallel: object, **changes: dict) -> Recipe:
    run = {"reduction": "fast", "device": "cpu", "parallel": parallel}
    return recipe(**{**changes, "run": run, "train": {"epochs": 20, **changes.get("train", {})}})


def assert_same_run(group: list[Trace], alone: Trace) -> None:
    """Served examples exactly, losses to 1e-5, the first gradients too, and the weights nearly so."""
    assert {j: ids for one in group for j, ids in one.served.items()} == alone.served
    assert sum(len(one.served) for one in group) == len(alone.served), "two workers served the same"
    for one in group:
        np.testing.assert_allclose(one.losses, alone.losses, rtol=1e-5)
        np.testing.assert_allclose(one.norms, alone.norms, rtol=1e-4)
    for ours, theirs in zip(group[0].gradients, alone.gradients, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    assert group[0].tensors.keys() == alone.tensors.keys()
    for name, value in alone.tensors.items():
        if name.startswith("/model"):
            np.testing.assert_allclose(group[0].tensors[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_the_first_40_steps_are_those_of_one_worker(process_group: ProcessGroup, name: str):
    alone = process_group.run(1, trace, fast("ddp", **CASES[name]), None, STEPS)[0]
    for workers, parallel in ((2, "fsdp"), (3, BLOCKS), (2, STATE), (3, STATE)):
        group = process_group.run(workers, trace, fast(parallel, **CASES[name]), None, STEPS)
        assert_same_run(group, alone)


EXACT = {
    **{f"{name}": {"optimizer": {"name": name, "lr": 0.01}} for name in ("lars", "novograd", "amos", "lion")},
    "lamb, K=7, clipped": {"batch": {"size": 70}, "train": {"clip_norm": 0.5}},
    "adafactor": {"optimizer": {"name": "adafactor", "lr": 0.01}},
    "sm3, K=4": {"optimizer": {"name": "sm3", "lr": 0.05, "momentum": 0.9}, "batch": {"size": 40}},
    "adamw, averaged": CASES["adamw, clipped, averaged"],
    "lamb, fp16, losses that overflow at first": {
        "task": {"use": "tests.trainer.reproducibility:NoisyTask", "with": {"gain": 500.0}},
        "train": {"precision": "fp16", "clip_norm": 200.0},
    },
}


def exact(parallel: object, **changes: dict) -> Recipe:
    return recipe(**changes, run={"reduction": "exact", "device": "cpu", "parallel": parallel})


@pytest.mark.parametrize("name", EXACT)
def test_exact_runs_are_bitwise_those_of_one_worker(process_group: ProcessGroup, name: str):
    alone = process_group.run(1, trace, exact("ddp", **EXACT[name]))[0]
    for workers, parallel in ((2, "fsdp"), (3, BLOCKS), (2, STATE), (3, STATE)):
        group = process_group.run(workers, trace, exact(parallel, **EXACT[name]))
        assert {j: ids for one in group for j, ids in one.served.items()} == alone.served
        for one in group:
            assert one.losses == alone.losses
            np.testing.assert_array_equal(one.norms, alone.norms)  # one that overflowed is not a number
        assert group[0].bits() == alone.bits()


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_parameters_without_rows_are_everybodys_where_state_is_spread(
    process_group: ProcessGroup, tmp_path: Path, name: str
):
    changes = {
        "task": {"use": "tests.trainer.test_fully_sharded:Scaled"},
        "optimizer": {"name": name, "lr": 0.01},
    }
    alone = process_group.run(1, trace, exact("ddp", **changes))[0]
    for until in (4, 16):
        members = process_group.run(2, leg, exact(STATE, **changes), str(tmp_path), until)
    assert members[0].bits() == alone.bits()


def test_a_run_goes_on_under_another_mode_and_number_of_workers(process_group: ProcessGroup, tmp_path: Path):
    changes = CASES["adamw, clipped, averaged"]
    alone = process_group.run(1, trace, fast("ddp", **changes), None, STEPS)[0]
    losses, served = [], {}
    for workers, parallel, until in (
        (2, "fsdp", 8),
        (3, BLOCKS, 16),
        (1, "fsdp", 24),
        (2, STATE, 28),
        (2, "ddp", 32),
        (3, "fsdp", 40),
    ):
        members = process_group.run(workers, leg, fast(parallel, **changes), str(tmp_path), until)
        losses += members[0].losses
        served |= {j: ids for one in members for j, ids in one.served.items()}
    assert served == alone.served
    np.testing.assert_allclose(losses, alone.losses, rtol=1e-5)
