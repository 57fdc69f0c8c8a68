"""Activations that are computed again change nothing, and are computed again."""

import copy

import pytest
import torch
from torch import nn

from tests.trainer.reproducibility import CLASSES, FEATURES, NoisyTask, Trace, follow, ready, recipe
from trainer.compute.activation_checkpointing import blocks, checkpoint_activations
from trainer.compute.batch_norm import BatchNorms


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.3)
        self.forwards = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        return x + self.dropout(torch.relu(self.norm(self.linear(x))))


class Deep(NoisyTask):
    """Blocks with batch norm and dropout."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 16), *(Block(16) for _ in range(3)), nn.Linear(16, CLASSES))


def run(recomputed: bool | list[str], precision: str = "fp32") -> tuple[Trace, nn.Module]:
    train = {"epochs": 2, "precision": precision, "average": {"kind": "ema", "decay": 0.9}}
    training = ready(recipe(run={"recompute": recomputed, "reduction": "exact"}, train=train), task=Deep())
    kept = Trace([], [], {}, {}, [])
    follow(training, kept, None)
    return kept, training.model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wanted", [True, ["1", "3.dropout", "2.n*"]])
def test_a_run_is_bitwise_the_one_that_keeps_its_activations(wanted: bool | list[str], precision: str):
    """Weights, gradients, the average's copy, and batch-norm statistics, which dropout and counting twice
    would move."""
    (kept, as_it_is), (again, recomputed) = run(False, precision), run(wanted, precision)
    assert again.losses == kept.losses
    assert again.bits() == kept.bits()
    assert recomputed[1].forwards == 2 * as_it_is[1].forwards


def test_true_finds_the_repeated_blocks_and_patterns_what_they_name():
    residual = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Sequential(nn.Conv2d(3, 3, 1)))
    model = nn.ModuleDict({"stem": nn.Linear(2, 2), "stages": nn.ModuleList([residual, nn.Linear(1, 1)])})
    model["layers"] = nn.ModuleList([nn.TransformerEncoderLayer(8, 2), nn.TransformerEncoderLayer(8, 2)])
    assert blocks(model, True) == ["stages.0.0", "stages.0.1", "layers.0", "layers.1"]
    assert blocks(model, False) == []
    assert blocks(model, ("layers.*", "stem")) == ["stem", "layers.0", "layers.1"]
    assert blocks(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)), True) == [], "nothing is saved by a leaf"


def test_a_copy_of_the_model_computes_with_its_own_weights():
    model = nn.Sequential(Block(4), Block(4)).eval()
    checkpoint_activations(model, blocks(model, True))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = torch.ones(2, 4)
    assert torch.equal(twin(x), x)
    assert not torch.equal(model(x), x)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in twin.named_parameters()]


def test_a_shared_statistic_is_counted_once_per_forward_pass():
    model = nn.Sequential(Block(4), Block(4))
    norms = BatchNorms(model, torch.device("cpu"))
    checkpoint_activations(model, ["0"])
    for _ in range(3):
        model(torch.randn(8, 4)).sum().backward()
    assert [int(norm.statistics[-1]) for norm in norms.norms] == [3, 3]
