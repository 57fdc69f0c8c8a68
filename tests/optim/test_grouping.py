"""Grouping: three independent flags, by what a parameter is or is called."""

import pytest
import torch
from torch import nn

import optim


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4))
        self.attention = nn.MultiheadAttention(4, 1)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def flags(grouping):
    return {
        name: (group.get("weight_decay", "kept"), group.get("adapt", True), group.get("lr_multiplier", 1.0))
        for group in grouping.groups
        for name in group["names"]
    }


def test_biases_and_normalisations_neither_decay_nor_adapt_by_default():
    found = flags(optim.group_parameters(Model()))
    free = {name for name, flag in found.items() if flag == (0.0, False, 1.0)}
    assert free == {
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "body.2.weight",
        "body.2.bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
    }
    assert {found[name] for name in found.keys() - free} == {("kept", True, 1.0)}


def test_each_trainable_parameter_is_in_one_group_once():
    model = Model()
    held = [p for group in optim.group_parameters(model).groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_flags_are_independent():
    grouping = optim.group_parameters(
        Model(), no_decay=["embedding.*"], no_adapt=None, lr_multipliers={"body.*": 0.1, "*.bias": 2.0}
    )
    found = flags(grouping)
    assert found["embedding.weight"] == (0.0, True, 1.0)
    assert found["body.0.bias"] == ("kept", True, 0.1)
    assert found["attention.out_proj.bias"] == ("kept", True, 2.0)


def test_normalisations_are_known_by_their_class_and_its_bases():
    class RMSNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    class Mine(nn.BatchNorm2d):
        pass

    class NormFreeBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))

    found = flags(optim.group_parameters(nn.ModuleList([RMSNorm2d(), Mine(3), NormFreeBlock()])))
    assert found["0.scale"][0] == found["1.weight"][0] == 0.0
    assert found["2.gain"][0] == "kept"


def test_the_report_says_what_was_done():
    report = optim.group_parameters(Model(), lr_multipliers={"embedding.*": 0.5}).report
    assert "no decay, not adapted" in report
    assert "lr x 0.5" in report
    assert "embedding.weight" in report


@pytest.mark.parametrize("key", ["no_decay", "no_adapt"])
def test_a_pattern_that_matches_nothing_is_refused(key):
    with pytest.raises(ValueError, match=f"{key}: 'heads"):
        optim.group_parameters(Model(), **{key: ["heads.*"]})


@pytest.mark.parametrize("name", optim.names())
def test_every_optimizer_takes_the_groups(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = optim.build(name, optim.group_parameters(model).groups, lr=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(4, 4) for _ in range(3))})
        self.extra = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


def test_rates_decay_from_the_head_to_the_input():
    model = Encoder()
    rates = optim.layer_decay(model, 0.5)
    assert rates["embedding.weight"] == 0.0625
    assert [rates[f"encoder.layer.{n}.bias"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert rates["extra.0.weight"] == rates["head.bias"] == 1.0
    assert rates == optim.layer_decay(model, 0.5, blocks="encoder.layer")
    found = flags(optim.group_parameters(model, lr_multipliers=rates))
    assert {name: flag[2] for name, flag in found.items()} == rates


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"no list of blocks 'blocks'; there are encoder\.layer, extra"):
        optim.layer_decay(Encoder(), 0.5, blocks="blocks")
    with pytest.raises(ValueError, match="no list of blocks None; there are none"):
        optim.layer_decay(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match=r"Invalid decay value: 1\.5"):
        optim.layer_decay(Encoder(), 1.5)
