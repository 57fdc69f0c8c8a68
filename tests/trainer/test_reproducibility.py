"""Law 1: a recipe means the same thing on any number of workers."""

import numpy as np
import pytest

from tests.trainer.process_group import ProcessGroup
from tests.trainer.reproducibility import Trace, recipe, trace
from trainer.recipe.schema import Recipe

CASES = {
    # K micro-batches over 1, 2 and 3 workers, where K is and is not divisible by them, and is and is not the
    # number of lanes L
    "K=8 L=8 echo 2": recipe(),
    "K=8 L=8 echo 1": recipe(echo={"factor": 1}),
    "K=8 L=8 echo 1.5": recipe(echo={"factor": 1.5}),
    "K=7 L=8 echo 2": recipe(batch={"size": 70}),
    "K=6 L=8 echo 1.5": recipe(batch={"size": 60}),
    "K=5 L=12 echo 1.5": recipe(batch={"size": 50, "lanes": 12}),
    "K=3 L=4 echo 2": recipe(batch={"size": 30, "lanes": 4}),
    "K=6 L=8 echo 1, momentum": recipe(
        batch={"size": 60}, echo={"factor": 1}, optimizer={"name": "momentum", "lr": 0.1}
    ),
    "K=8 L=8 shuffled in blocks": recipe(batch={"shuffle": {"block": 9, "window": 4}}),
    "K=6 L=8 fp16, losses that overflow at first": recipe(
        task={"use": "tests.trainer.reproducibility:NoisyTask", "with": {"gain": 500.0}},
        batch={"size": 60},
        train={"precision": "fp16", "clip_norm": 200.0},
    ),
    "K=6 L=8 clipped, averaged": recipe(
        batch={"size": 60}, train={"clip_norm": 0.5, "average": {"kind": "ema", "decay": 0.9}}
    ),
}


def together(traces: list[Trace]) -> Trace:
    """One trace of a whole group, after checking that its workers agree with one another."""
    first = traces[0]
    for other in traces[1:]:
        assert other.losses == first.losses
        assert other.bits() == first.bits()
    served = {j: ids for one in traces for j, ids in one.served.items()}
    assert len(served) == sum(len(one.served) for one in traces), "two workers served the same micro-batch"
    return Trace(first.losses, first.norms, first.tensors, served, first.gradients)


def assert_same_bits(left: Trace, right: Trace) -> None:
    assert left.served == right.served
    assert left.losses == right.losses
    np.testing.assert_array_equal(left.norms, right.norms)  # one that overflowed is not a number
    assert left.bits() == right.bits()


@pytest.mark.parametrize("name", CASES)
def test_exact_runs_are_bitwise_equal_on_any_number_of_workers(process_group: ProcessGroup, name: str):
    alone = together(process_group.run(1, trace, CASES[name]))
    assert len(alone.losses) == -(-6 * 203 // CASES[name].batch.size)
    assert len(alone.tensors) > 12, "weights, batch-norm buffers and optimizer state take part"
    for workers in (2, 3):
        assert_same_bits(alone, together(process_group.run(workers, trace, CASES[name])))


@pytest.mark.parametrize("how", ["one wrong example", "dropout keyed by rank"])
def test_the_comparison_notices_what_breaks_the_law(process_group: ProcessGroup, how: str):
    alone = together(process_group.run(1, trace, CASES["K=8 L=8 echo 2"]))
    broken = together(process_group.run(2, trace, CASES["K=8 L=8 echo 2"], how))
    with pytest.raises(AssertionError):
        assert_same_bits(alone, broken)
    relative = np.abs(np.array(broken.losses) / np.array(alone.losses) - 1)
    assert relative.max() > 1e-3, "far beyond what the fast comparison allows"


def fast(**changes: dict) -> Recipe:
    return recipe(**{**changes, "run": {"reduction": "fast", "device": "cpu"}}, train={"epochs": 20})


@pytest.mark.parametrize("changes", [{}, {"batch": {"size": 70}}, {"echo": {"factor": 1.5}}])
def test_fast_runs_agree_over_the_first_40_steps(process_group: ProcessGroup, changes: dict):
    alone = together(process_group.run(1, trace, fast(**changes), None, 40))
    for workers in (2, 3):
        group = together(process_group.run(workers, trace, fast(**changes), None, 40))
        assert group.served == alone.served
        np.testing.assert_allclose(group.losses, alone.losses, rtol=1e-5)
        for ours, theirs in zip(group.gradients, alone.gradients, strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
