"""Torch's fused kernels, which walk through memory in one order, are used only where that is right."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

import optim
from optim.torch_optimizers import FROM_TORCH
from tests.optim import cases

TORCH = tuple(FROM_TORCH)
FUSED = tuple(name for name in TORCH if FROM_TORCH[name].fused)


def torchs(name, parameters, **options):
    """Torch's own class, without its fused kernels."""
    entry = FROM_TORCH[name]
    return entry.kind(parameters, **(entry.fixed | entry.defaults | options), foreach=False)


def stepped(optimizer, gradients):
    [p] = optimizer.param_groups[0]["params"]
    for g in gradients:
        p.grad = g.clone(memory_format=torch.preserve_format)
        optimizer.step()
    return p.detach()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PLACES = {
    "a part of a wider matrix": (lambda: normal(6, 8)[:, :4], lambda g: g),
    "a transposed gradient": (lambda: normal(6, 4), lambda g: g.t().contiguous().t()),
    "a transposed parameter": (lambda: normal(4, 6).t(), lambda g: g),
    "channels last": (lambda: normal(6, 4, 3, 3).to(memory_format=torch.channels_last), lambda g: g),
}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TORCH)
def test_strides_do_not_matter(name, place, flatten):
    parameter, change = PLACES[place]
    gradients = [change(normal(*parameter().shape, seed=seed)) for seed in range(1, 6)]
    mine = stepped(optim.build(name, [nn.Parameter(parameter())], flatten=flatten, lr=0.1), gradients)
    theirs = stepped(torchs(name, [nn.Parameter(parameter())], lr=0.1), gradients)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TORCH)
def test_strides_may_change_between_steps(name):
    """A model converted to channels last in the middle has states in the old order."""
    gradients = [normal(6, 4, 3, 3, seed=seed) for seed in range(1, 5)]

    def trained(optimizer):
        stepped(optimizer, gradients[:2])
        [p] = optimizer.param_groups[0]["params"]
        p.data = p.data.to(memory_format=torch.channels_last)
        return stepped(optimizer, [g.to(memory_format=torch.channels_last) for g in gradients[2:]])

    mine = trained(optim.build(name, [nn.Parameter(normal(6, 4, 3, 3))], lr=0.1))
    theirs = trained(torchs(name, [nn.Parameter(normal(6, 4, 3, 3))], lr=0.1))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nag", "adagrad"])
def test_sparse_gradients_are_taken_where_torch_takes_them(name):
    def trained(make):
        torch.manual_seed(0)
        model = nn.Embedding(10, 3, sparse=True)
        optimizer = make(model)
        for rows in ([1, 2], [2, 9], [0, 1]):
            optimizer.zero_grad()
            model(torch.tensor(rows)).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    mine = trained(lambda model: optim.build(name, model.parameters(), lr=0.1))
    assert torch.equal(mine, trained(lambda model: torchs(name, model.parameters(), lr=0.1)))


@pytest.mark.parametrize("name", TORCH)
def test_distributed_tensors_are_taken(name, tmp_path):
    gradients = [normal(4, 3, seed=seed) for seed in range(1, 4)]
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def spread(x):
            return DTensor.from_local(x, mesh, [Replicate()])

        optimizer = optim.build(name, [nn.Parameter(spread(normal(4, 3)))], lr=0.1)
        mine = stepped(optimizer, [spread(g) for g in gradients]).to_local()
    finally:
        dist.destroy_process_group()
    theirs = stepped(torchs(name, [nn.Parameter(normal(4, 3))], lr=0.1), gradients)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_fused_kernels_are_used_where_they_are_right_and_unless_asked_otherwise(name):
    def fuses(p, gradient, change=lambda optimizer: optimizer, **options):
        optimizer = change(optim.build(name, [p], **options))
        stepped(optimizer, [gradient])
        return bool(optimizer.param_groups[0]["fused"])

    p = nn.Parameter(normal(4, 4))
    assert fuses(p, normal(4, 4))
    assert fuses(p, normal(4, 4), change=copy.deepcopy)
    assert fuses(p, normal(4, 4), change=lambda optimizer: pickle.loads(pickle.dumps(optimizer)))
    assert not fuses(p, normal(4, 4).t())
    assert not fuses(p, normal(4, 4), fused=False)
    assert not fuses(p, normal(4, 4), foreach=True)
    assert fuses(p, normal(4, 4), fused=True)


@pytest.mark.parametrize("name", TORCH)
def test_torchs_own_switches_are_let_through(name):
    start, gradients, rates = cases.history(steps=4)
    plain = cases.train(torchs(name, cases.tensors(start)), gradients, rates)
    foreach = cases.train(optim.build(name, cases.tensors(start), foreach=True), gradients, rates)
    for p, q in zip(plain, foreach, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adadelta", "adam", "adamw"])
def test_differentiable_steps_can_be_differentiated(name):
    def slope(make):
        gradient = normal(4, seed=1).requires_grad_()
        moved = normal(4).requires_grad_().clone()
        moved.grad = gradient
        make(name, [moved], lr=0.1).step()
        return torch.autograd.grad(moved.sum(), gradient)[0]

    mine = slope(lambda *args, **options: optim.build(*args, **options, differentiable=True))
    entry = FROM_TORCH[name]
    theirs = slope(lambda _, params, lr: entry.kind(params, lr=lr, **entry.fixed, differentiable=True))
    assert torch.isfinite(theirs).all()
    assert torch.equal(mine, theirs)
