"""After anything that moves, copies or converts a model and its optimizer, the next step still learns."""

import copy
import io
import pickle
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import optim
from tests.optim import cases


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 3)).to(
        dtype
    )


def one_step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(8, 2, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def deepcopied(model, optimizer):
    return copy.deepcopy((model, optimizer))


def pickled(model, optimizer):
    return pickle.loads(pickle.dumps((model, optimizer)))


def saved_by_torch(model, optimizer):
    saved = io.BytesIO()
    torch.save((model, optimizer), saved)
    return torch.load(io.BytesIO(saved.getvalue()), weights_only=False)


def replaced_data(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()
    return model, optimizer


def assigned(model, optimizer):
    """`assign=True` makes new parameters, which no optimizer can know: its state is loaded into a new one."""
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    known = {"engine": optimizer._choice} if isinstance(optimizer, optim.Rule) else {}
    other = type(optimizer)(model.parameters(), **known)
    if optimizer.flat_or_none is not None:
        other.flatten()
    other.load_state_dict(optimizer.state_dict())
    return model, other


def foreign_gradients(model, optimizer):
    for p in model.parameters():
        p.grad = None
    return model, optimizer


def reloaded(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return model, optimizer


def replaced_state(model, optimizer):
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                state[key] = value.clone()
    return model, optimizer


def unflattened(model, optimizer):
    optimizer.unflatten()
    return model, optimizer


def flattened(model, optimizer):
    optimizer.flatten()
    return model, optimizer


MOVES = [
    unflattened,
    flattened,
    deepcopied,
    pickled,
    saved_by_torch,
    replaced_data,
    assigned,
    foreign_gradients,
    reloaded,
    replaced_state,
]


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("name", [*cases.OWN, "adamw", "momentum"])
def test_training_goes_on_as_if_nothing_had_happened(name, engine, flatten, move):
    def trained(moved):
        model = model_of()
        optimizer = cases.built(name, model.parameters(), engine, flatten, lr=0.01)
        for t in range(2):
            one_step(model, optimizer, t)
        if moved:
            model, optimizer = move(model, optimizer)
        for t in range(2, 4):
            before = [p.detach().clone() for p in model.parameters()]
            one_step(model, optimizer, t)
            assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        return list(model.parameters())

    for moved, still in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(moved, still, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("name", cases.OWN)
def test_a_converted_model_learns_with_its_state(name, engine, flatten):
    model = model_of(torch.float32)
    optimizer = cases.built(name, model.parameters(), engine, flatten, lr=0.01)
    one_step(model, optimizer, 0)
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        model.to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        one_step(model, optimizer, 1)
        assert all(p.dtype == dtype for p in model.parameters())
        moved = sum(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert moved >= (1 if dtype == torch.bfloat16 else len(before))
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        for state in optimizer.state.values():
            assert all(value.dtype == kept for value in state.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_flat_gradients_are_persistent_views(name):
    model = model_of(torch.float32)
    optimizer = optim.build(name, model.parameters(), flatten=True, lr=0.01)
    [gradients] = optimizer.flat.gradients
    optimizer.zero_grad()
    addresses = [p.grad.data_ptr() for p in model.parameters()]
    for t in range(3):
        one_step(model, optimizer, t)
        assert [p.grad.data_ptr() for p in model.parameters()] == addresses
    covered = torch.zeros_like(gradients, dtype=torch.bool)
    for p in model.parameters():
        buffer, first, numel = optimizer.flat.place(p)
        assert buffer == 0
        assert torch.equal(gradients[first : first + numel], p.grad.flatten())
        assert torch.equal(optimizer.flat.parameters[0][first : first + numel], p.detach().flatten())
        covered[first : first + numel] = True
    assert not gradients[~covered].any()
    optimizer.zero_grad(set_to_none=True)
    assert not gradients.any()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("name", cases.OWN)
def test_no_gradient_is_held_after_the_step(name, engine, monkeypatch):
    """Or what `zero_grad` lets go would still be there in the next backward pass."""
    monkeypatch.setattr("optim.engine.chunks.SMALL", 2048)
    parameters = cases.tensors([np.ones((70, 60)), np.ones((8, 8, 3, 3)), np.ones(5)])
    optimizer = cases.built(name, parameters, engine)
    for _ in range(2):
        gradients = [np.ones(p.shape) for p in parameters]
        held = [weakref.ref(gradient) for gradient in gradients]
        for p in parameters:
            p.grad = torch.from_numpy(gradients.pop(0))
        optimizer.step()
        optimizer.zero_grad()
        assert [gradient() for gradient in held] == [None] * 3


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_each_dtype_has_its_buffer(name):
    parameters = [
        nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float32)
    ]
    optimizer = optim.build(name, parameters, flatten=True, lr=0.1)
    assert [buffer.dtype for buffer in optimizer.flat.gradients] == [torch.float32, torch.bfloat16]
    assert [optimizer.flat.place(p)[:2] for p in parameters] == [(0, 0), (1, 0), (0, 1024)]
    optimizer.zero_grad()
    for p in parameters:
        p.grad.fill_(0.5)
    optimizer.step()
    assert all((p < 1).all() for p in parameters)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", ["lamb", "novograd", "adamw"])
def test_groups_may_be_added_later(name, flatten):
    first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(4))
    optimizer = optim.build(name, [first], flatten=flatten, lr=0.1)
    first.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.5, "weight_decay": 0.0})
    optimizer.zero_grad()
    first.grad, second.grad = torch.ones(3, 3), torch.ones(4)
    before = first.detach().clone()
    optimizer.step()
    assert not torch.equal(first, before)
    assert not torch.equal(second, torch.ones(4))


def test_flat_layers_are_saved_alone_as_copies_or_unflattened(tmp_path):
    model = model_of(torch.float32)
    optimizer = optim.build("lamb", model.parameters(), flatten=True)
    one_step(model, optimizer, 0)

    def bytes_of(state):
        torch.save(state, tmp_path / "layer.pt")
        return (tmp_path / "layer.pt").stat().st_size

    copies = {name: x.clone() for name, x in model[0].state_dict().items()}
    assert bytes_of(model[0].state_dict()) > 2 * bytes_of(copies)
    before = copies["weight"]
    optimizer.unflatten()
    assert torch.equal(model[0].weight, before)
    assert bytes_of(model[0].state_dict()) < bytes_of(copies) + 512
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(AttributeError, match="no flat buffers"):
        _ = optimizer.flat
