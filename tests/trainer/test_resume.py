"""A run that is interrupted anywhere, and resumed on any number of workers, is the run that was not."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import Trace, leg, recipe, trace

EPOCHS = 4
RECIPES = {
    "lamb, echo 2, averaged": recipe(train={"epochs": EPOCHS, "average": {"kind": "ema", "decay": 0.9}}),
    "lamb, echo 1.5, K=7": recipe(batch={"size": 70}, echo={"factor": 1.5}, train={"epochs": EPOCHS}),
    "lamb, echo 2, shuffled in blocks": recipe(
        batch={"shuffle": {"block": 9, "window": 4}}, train={"epochs": EPOCHS}
    ),
    "lamb, fp16, losses that overflow at first": recipe(
        task={"use": "tests.trainer.reproducibility:NoisyTask", "with": {"gain": 500.0}},
        train={"epochs": EPOCHS, "precision": "fp16"},
    ),
    "adamw, no echo": recipe(
        echo={"factor": 1}, optimizer={"name": "adamw", "lr": 0.01}, train={"epochs": EPOCHS}
    ),
}
STEPS = {name: -(-EPOCHS * 203 // chosen.batch.size) for name, chosen in RECIPES.items()}


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Trace]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    traces = {name: trace(chosen) for name, chosen in RECIPES.items()}
    torch.set_num_threads(threads)
    return traces


def assert_same_run(legs: list[Trace], whole: Trace) -> None:
    assert [loss for one in legs for loss in one.losses] == whole.losses
    assert {j: ids for one in legs for j, ids in one.served.items()} == whole.served
    assert legs[-1].bits() == whole.bits()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", RECIPES)
def test_interrupted_anywhere(uninterrupted: dict[str, Trace], name: str, data: st.DataObject):
    stops = data.draw(st.lists(st.integers(0, STEPS[name]), max_size=3).map(sorted))
    with TemporaryDirectory() as folder:
        legs = [leg(RECIPES[name], folder, until) for until in (*stops, STEPS[name])]
    assert_same_run(legs, uninterrupted[name])


@pytest.mark.parametrize("name", RECIPES)
def test_on_another_number_of_workers(
    process_group: ProcessGroup, tmp_path: Path, uninterrupted: dict[str, Trace], name: str
):
    legs = []
    for workers, until in ((2, 2), (3, 5), (1, 7), (2, STEPS[name])):
        members = process_group.run(workers, leg, RECIPES[name], str(tmp_path), until)
        members[0].served = {j: ids for one in members for j, ids in one.served.items()}
        legs.append(members[0])
    assert_same_run(legs, uninterrupted[name])
