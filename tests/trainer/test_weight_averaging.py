"""Averages of the weights: closed forms, intervals, batch norm, and what a run leaves of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.plans import spec
from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import NoisyTask, leg, ready, recipe
from trainer.loop import steps
from trainer.worker import run_worker


def weights(model: torch.nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double().numpy().copy()


def test_an_exponential_average_is_its_closed_form():
    training = ready(recipe(train={"epochs": 4, "average": {"kind": "ema", "decay": 0.8, "warmup": True}}))
    expected = None
    for t, _ in enumerate(steps(training)):
        decay = min(0.8, (1 + t) / (10 + t))
        now = weights(training.model)
        expected = now if expected is None else decay * expected + (1 - decay) * now
        np.testing.assert_allclose(weights(training.average.model), expected, rtol=1e-5, atol=1e-7)


def test_a_stochastic_average_is_the_mean_at_its_intervals():
    average = {"kind": "swa", "start": {"steps": 4}, "every": {"steps": 3}}
    training = ready(recipe(train={"epochs": 6, "average": average}))
    joined = [weights(training.model) for step in steps(training) if step.step in (4, 7, 10, 13, 16)]
    assert len(joined) == 5
    np.testing.assert_allclose(weights(training.average.model), np.mean(joined, axis=0), rtol=1e-5, atol=1e-7)


AVERAGED = recipe(
    train={"epochs": 4, "average": {"kind": "swa", "start": {"share": 0.3}, "every": {"steps": 1}}}
)


def test_a_run_evaluates_and_exports_the_average_with_batch_norm_of_its_own(
    process_group: ProcessGroup, tmp_path: Path
):
    exported = []
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        folder.mkdir()
        outcome, *_ = process_group.run(workers, run_worker, spec(AVERAGED, folder, NoisyTask))
        assert set(outcome.metrics) == {"loss", "accuracy", "average_loss", "average_accuracy"}
        exported.append((folder / "average.safetensors").read_bytes())
    assert exported[0] == exported[1], "the same bits on any number of workers"
    average, model = (load_file(tmp_path / "1" / f"{name}.safetensors") for name in ("average", "model"))
    assert average.keys() == model.keys()
    assert not torch.allclose(average["1.running_mean"], model["1.running_mean"], atol=1e-4)


@pytest.mark.parametrize("until", [3, 9])
def test_an_average_goes_on_where_it_was(tmp_path: Path, until: int):
    chosen = recipe(train={"epochs": 4, "average": {"kind": "ema", "decay": 0.8}})
    torch.set_num_threads(1)
    leg(chosen, str(tmp_path / "cut"), until)
    cut = leg(chosen, str(tmp_path / "cut"), 11)
    whole = leg(chosen, str(tmp_path / "whole"), 11)
    assert cut.bits() == whole.bits()
    assert any("average" in name for name in whole.tensors)
