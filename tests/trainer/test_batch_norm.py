"""Batch norm over the recipe's groups."""

import pytest
import torch
from torch import nn

from trainer.compute.batch_norm import BatchNorms, GroupBatchNorm

CPU = torch.device("cpu")


def twins(make) -> tuple[nn.Module, nn.Module]:
    """Two models with the same weights; the second keeps torch's batch norm."""
    torch.manual_seed(0)
    ours, theirs = make(), make()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))


def test_one_group_is_torchs_own_batch_norm_and_one_step_its_update():
    ours, theirs = twins(conv)
    norms = BatchNorms(ours, CPU)
    x = torch.randn(8, 3, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    norms.move(norms.statistics, pace=1.0)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_state_dictionaries_and_evaluation_stay_torchs():
    ours, theirs = twins(conv)
    BatchNorms(ours, CPU)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(8, 3, 5, 5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_stacked_pass_is_that_many_passes(pieces: int):
    ours, theirs = twins(conv)
    norms, alone = BatchNorms(ours, CPU), BatchNorms(theirs, CPU)
    x = torch.randn(8, 3, 5, 5)
    norms.stack(pieces)
    torch.testing.assert_close(ours(x), torch.cat([theirs(piece) for piece in x.chunk(pieces)]))
    torch.testing.assert_close(norms.statistics, alone.statistics)


def test_groups_smaller_than_the_micro_batch():
    ours, theirs = twins(conv)
    norms = BatchNorms(ours, CPU, groups_per_micro_batch=2)
    norms.stack(2)
    x = torch.randn(8, 3, 5, 5)
    BatchNorms(theirs, CPU)
    torch.testing.assert_close(ours(x), torch.cat([theirs(piece) for piece in x.split(2)]))


def test_running_statistics_move_towards_the_mean_over_all_groups():
    model = nn.Sequential(nn.BatchNorm1d(3))
    norms = BatchNorms(model, CPU)
    pieces = torch.randn(5, 16, 3)
    for piece in pieces:
        model(piece)
    norms.move(norms.statistics, pace=2.0)
    share = 1 - 0.9**2
    norm = model[0]
    assert isinstance(norm, GroupBatchNorm)
    torch.testing.assert_close(norm.running_mean, share * pieces.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, (1 - share) + share * pieces.var(1).mean(0))
    assert norm.num_batches_tracked == 1


def test_a_step_without_a_forward_pass_leaves_them():
    model = nn.Sequential(nn.BatchNorm1d(3))
    norms = BatchNorms(model, CPU)
    norms.move(norms.statistics, pace=1.0)
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_var, torch.ones(3))


def test_a_norm_that_stands_in_two_places_stays_one():
    shared = nn.BatchNorm1d(3)
    model = nn.Sequential(shared, nn.Linear(3, 3), shared)
    norms = BatchNorms(model, CPU)
    assert model[0] is model[2]
    assert len(norms.norms) == 1
