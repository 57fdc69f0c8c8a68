"""What other programs do around an optimizer: wrappers of torch's, hooks, states that they made."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

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


def test_muon_refuses_matrices_that_are_spread_over_workers(group_of_one):
    spread = DTensor.from_local(torch.ones(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(ValueError, match="Muon needs whole matrices, and DTensors are spread"):
        optim.build("muon", [nn.Parameter(spread)])


each_name = pytest.mark.parametrize("name", optim.names())
each_rule = pytest.mark.parametrize("name", cases.OWN)


@each_name
def test_what_is_no_parameter_is_refused_in_torchs_words(name):
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        optim.build(name, [1, 2])
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        optim.build(name, torch.ones(2))


def pair(name, **options):
    """An optimizer after three steps, another one over copies of its weights, and gradients to go on with."""
    start, gradients, _ = cases.history(steps=6)
    optimizer = optim.build(name, cases.tensors(start), **options)
    parameters = cases.train(optimizer, gradients[:3])
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    return optimizer, optim.build(name, copies, **options), gradients[3:]


def go_on_alike(one, other, gradients):
    for p, q in zip(cases.train(one, gradients), cases.train(other, gradients), strict=True):
        assert torch.equal(p, q)


@each_rule
def test_a_saved_state_may_lack_newer_hyperparameters(name):
    optimizer, other, gradients = pair(name)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in set(group) - {"params"}:
            del group[key]
    other.load_state_dict(saved)
    go_on_alike(optimizer, other, gradients)


@each_rule
def test_a_saved_count_of_steps_may_be_a_tensor(name):
    optimizer, other, gradients = pair(name)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = torch.tensor(float(state["step"]))
    other.load_state_dict(saved)
    go_on_alike(optimizer, other, gradients)


@each_rule
def test_another_optimizers_state_is_refused_whole(name):
    _, other, gradients = pair(name)
    stranger = optim.build("rprop", cases.tensors(cases.history()[0]))
    cases.train(stranger, gradients)
    before = other.state_dict()
    with pytest.raises(ValueError, match=r"the saved state of parameter 0 lacks .*; it has prev, step"):
        other.load_state_dict(stranger.state_dict())
    assert other.state_dict()["param_groups"] == before["param_groups"]
    assert not other.state


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", cases.ENGINES)
@each_rule
def test_states_that_hooks_add_stand_beside_ours(name, engine, flatten):
    start, gradients, _ = cases.history(steps=4)

    def trained(hook):
        optimizer = cases.built(name, cases.tensors(start), engine, flatten)
        optimizer.register_step_pre_hook(hook)
        return cases.train(optimizer, gradients)

    def add(optimizer, args, kwargs):
        for p in optimizer.param_groups[0]["params"]:
            optimizer.state[p].setdefault("theirs", torch.ones(3))
            optimizer.state[p]["like_it"] = torch.ones_like(p)

    for p, q in zip(trained(add), trained(lambda *_: None), strict=True):
        assert torch.equal(p, q)
