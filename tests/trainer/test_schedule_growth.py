"""A batch that grows during the run keeps law 1: the same run on any number of workers, stage by stage."""

import pytest

from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import recipe, trace
from tests.trainer.test_reproducibility import assert_same_bits, together

GROWTHS = {
    "multiply": {"shape": "multiply", "at": [{"epochs": 1}, {"epochs": 3}], "factor": 2, "max": 120},
    "ramp": {"shape": "ramp", "start": 30, "increment": 10, "over": {"share": 0.5}},
    "steps": {"shape": "steps", "at": [{"examples": 200}, {"examples": 500}], "sizes": [50, 110]},
}


@pytest.mark.parametrize("shape", GROWTHS)
def test_exact_runs_with_a_growing_batch_are_bitwise_equal(process_group: ProcessGroup, shape: str):
    growing = recipe(batch={"growth": GROWTHS[shape]}, echo={"factor": 1.5}, train={"epochs": 4})
    alone = together(process_group.run(1, trace, growing))
    assert len(alone.losses) != -(-4 * 203 // 80), "the batch did not grow"
    for workers in (2, 3):
        assert_same_bits(alone, together(process_group.run(workers, trace, growing)))
