"""Models under torch's `fully_shard`: every optimizer does what it does in one process."""

import numpy as np
import pytest
import torch

import optim
from tests.optim import sharded

# Rates at which the loss falls smoothly: elsewhere training itself amplifies rounding, on one worker too.
OPTIONS = {
    **{name: {"lr": 1e-4} for name in ("sgd", "momentum", "nag", "funnelled_sgdm")},
    **{name: {"lr": 1e-3} for name in ("rmsprop", "novograd")},
    "lars": {"lr": 0.05, "trust_coefficient": 0.1, "weight_decay": 1e-3},
    "amos": {"eta": 0.3},
}
ROUNDS = {"lars": 1, "lamb": 1, "novograd": 1, "amos": 1, "funnelled_sgdm": 1, "sm3": 1, "adafactor": 2}
FEW = ("lamb", "lars", "adafactor", "sm3", "novograd", "adamw")


def settings(names):
    """(name, options, several groups), with and without decay where an optimizer has one."""
    found = []
    for name in names:
        options = OPTIONS.get(name, {})
        found += [(name, options, False), (name, options, True)]
        if "weight_decay" in optim.hyperparameters(name):
            found.append((name, {**options, "weight_decay": 0.0}, False))
    return [*found, ("lamb", {"max_grad_norm": 1.0}, True)]


def train_and_compare(process_group, workers, names, dtype, tolerance):
    cases = settings(names)
    by_rank = process_group.run(workers, sharded.train_all, cases, dtype)
    for (name, options, several), (weights, collectives, _) in zip(cases, by_rank[0], strict=True):
        expected = sharded.alone(name, options, several, workers, dtype)
        error = sharded.relative_error(weights, expected)
        assert error <= tolerance, f"{name} {options}: {error:.1e}"
        rounds = ROUNDS.get(name, 0) + ("max_grad_norm" in options)
        assert collectives == ["allreduce_"] * rounds, f"{name} {options}: {collectives}"


def test_layers_that_fully_shard_cuts_move_as_whole_ones_do(process_group):
    train_and_compare(process_group, 2, FEW, torch.float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_every_optimizer_moves_what_fully_shard_cuts_as_whole_layers(process_group, workers):
    train_and_compare(process_group, workers, optim.names(), torch.float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_every_optimizer_keeps_fp32s_digits_over_parts(process_group, workers):
    cases = [(name, OPTIONS.get(name, {}), False) for name in optim.names()]
    by_rank = process_group.run(workers, sharded.train_all, cases, torch.float32)
    for (name, options, _), (weights, _, _) in zip(cases, by_rank[0], strict=True):
        expected = sharded.alone(name, options, False, workers, torch.float32)
        assert sharded.relative_error(weights, expected) <= 1e-6, name


CHECKPOINTED = [(name, OPTIONS.get(name, {})) for name in (*FEW, "amos")]


def test_a_distributed_checkpoint_goes_on_with_another_number_of_workers(process_group, tmp_path):
    saved = process_group.run(2, sharded.save, CHECKPOINTED, str(tmp_path))
    loaded = process_group.run(3, sharded.load, CHECKPOINTED, str(tmp_path))
    for (name, _), expected, weights in zip(CHECKPOINTED, saved[0], loaded[2], strict=True):
        error = sharded.relative_error(weights, expected)
        assert error <= 1e-12, f"{name}: {error:.1e}"


def test_cuts_that_cannot_be_kept_right_are_refused(process_group):
    fsdp1, elementwise, columns, copies, meshes, flat = process_group.run(2, sharded.refusals)[0]
    assert "FullyShardedDataParallel" in fsdp1
    assert "layers may be cut along their first dimension" in columns
    assert "several meshes" in meshes
    assert "flatten=False" in flat
    assert elementwise == copies == ""


def test_lookahead_averages_parts_as_it_does_whole_layers(process_group):
    parts, whole = process_group.run(2, sharded.average_slowly)[0]
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


def test_each_worker_holds_its_part_of_the_state(process_group):
    """The state of a worker: its share, rounded up to whole rows, and statistics of what is not cut."""
    by_rank = process_group.run(
        2, sharded.train_all, [("lamb", {}, False), ("adafactor", {}, False)], torch.float32
    )
    lamb, adafactor = (max(results[case][2] for results in by_rank) for case in (0, 1))
    shapes = [p.shape for p in sharded.Awkward().parameters() if p.requires_grad]

    def share(state, shape):
        return 4 * (-(-shape[0] // 2) * state[1:].numel() if state[0] == shape[0] else state.numel())

    factored = {"beta1": None, "min_dim_size_to_factor": 0}
    kept = [
        (state, shape) for shape in shapes for state in optim.Adafactor.state_shapes(factored, shape).values()
    ]
    assert lamb == 2 * sum(share(shape, shape) for shape in shapes)
    assert adafactor == sum(share(state, shape) for state, shape in kept)
