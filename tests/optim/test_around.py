"""What other programs do around an optimizer: wrappers of torch's, hooks, states that they made."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

import optim
from optim.registry import rules
from tests.optim import cases


@pytest.fixture
def group_of_one(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "options", "option"),
    [
        ("lamb", {"max_grad_norm": 1.0}, "max_grad_norm"),
        ("funnelled_sgdm", {}, "global_scale"),
        ("lamb", {}, None),
        ("funnelled_sgdm", {"global_scale": False}, None),
        ("adafactor", {}, None),
    ],
)
def test_what_needs_all_layers_is_refused_where_a_rank_holds_some(group_of_one, name, options, option):
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = ZeroRedundancyOptimizer([p], optimizer_class=rules()[name], lr=0.1, **options)
    p.grad = torch.ones(3, 2)
    if option is None:
        optimizer.step()
        assert not torch.equal(p, torch.ones(3, 2))
    else:
        with pytest.raises(RuntimeError, match=f"{option} needs all layers, .* ZeroRedundancyOptimizer"):
            optimizer.step()
        assert torch.equal(p, torch.ones(3, 2))
