"""What models bring: shapes, dtypes, missing gradients, hooks, scalers, saved states."""

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optim
from tests.optim import cases

WAYS = [("tensor", False), ("tensor", True), ("rows", False), ("rows", True)]
each_way = pytest.mark.parametrize(("engine", "flatten"), WAYS)
each_rule = pytest.mark.parametrize("name", cases.OWN)
each_name = pytest.mark.parametrize("name", optim.names())


def weights(parameters):
    return [p.detach().clone() for p in parameters]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_rule
@each_way
def test_empty_frozen_and_gradientless_parameters_are_left_alone(name, engine, flatten):
    empty, idle, active = (
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.ones(4)),
        nn.Parameter(torch.ones(3, 3)),
    )
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = cases.built(name, [empty, idle, active, frozen], engine, flatten, lr=0.1)
    optimizer.zero_grad()
    for _ in range(3):
        empty.grad, idle.grad = torch.empty(0, 3), None
        active.grad = torch.full((3, 3), 0.5)
        optimizer.step()
    assert torch.equal(idle, torch.ones(4))
    assert idle not in optimizer.state
    assert frozen not in optimizer.state
    assert not torch.equal(active, torch.ones(3, 3))
    assert optimizer.state[active]["step"] == 3
    idle.grad = torch.full((4,), 0.5)
    optimizer.step()
    assert optimizer.state[idle]["step"] == 1
    assert not torch.equal(idle, torch.ones(4))


@each_name
@pytest.mark.parametrize("flatten", [False, True])
def test_layers_may_be_frozen_and_released_in_the_middle(name, flatten):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    optimizer = optim.build(name, model.parameters(), flatten=flatten, lr=0.001)
    inputs = torch.linspace(-1, 1, 15).view(5, 3)

    def moved():
        optimizer.zero_grad()
        before = weights(model.parameters())
        model(inputs).square().sum().backward()
        optimizer.step()
        return [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]

    assert moved() == [False] * 2 + [True] * 4
    model[1].requires_grad_(False)
    assert moved() == [False] * 4 + [True] * 2
    model[0].requires_grad_(True)
    assert moved() == [True] * 2 + [False] * 2 + [True] * 2
    optimizer.zero_grad()
    model[2].requires_grad_(False)
    model(inputs).square().sum().backward()
    before = weights(model.parameters())
    optimizer.step()
    moves = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moves == [True] * 2 + [False] * 4


@each_name
@pytest.mark.parametrize("flatten", [False, True])
def test_a_step_without_a_backward_pass_moves_nothing(name, flatten):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = optim.build(name, [p], flatten=flatten, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (p * p).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    before, steps = p.detach().clone(), optimizer.state[p].get("step")
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p].get("step") == steps
    (p * p).sum().backward()
    optimizer.step()
    assert not torch.equal(p, before)


def test_gradients_that_come_into_the_buffer_unseen_count():
    """A collective or `.data` may fill a gradient without torch's noticing."""
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.build("sgd", [p], flatten=True, lr=0.1)
    optimizer.zero_grad()
    p.grad.data.fill_(1.0)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.9))


@each_rule
@each_way
def test_layouts_of_memory_do_not_matter(name, engine, flatten):
    def made(change):
        start, gradients, rates = cases.history([(6, 4, 3, 3), (8, 5)], steps=6)
        parameters = [nn.Parameter(change(torch.tensor(a))) for a in start]
        optimizer = cases.built(name, parameters, engine, flatten)
        return cases.train(optimizer, gradients, rates)

    def strided(x):
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x.t().contiguous().t()

    def sparse_in_memory(x):
        wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        return wide[..., ::2].copy_(x)

    plain = made(lambda x: x)
    for change in (strided, sparse_in_memory):
        for p, reference in zip(made(change), plain, strict=True):
            torch.testing.assert_close(p, reference, rtol=1e-12, atol=1e-13)


@each_rule
@each_way
def test_steps_change_no_gradient(name, engine, flatten):
    start, gradients, _ = cases.history(steps=1)
    parameters = cases.tensors(start, torch.float32)
    optimizer = cases.built(name, parameters, engine, flatten, maximize=True)
    optimizer.zero_grad()
    for p, g in zip(parameters, gradients[0], strict=True):
        p.grad = torch.tensor(g, dtype=torch.float32)
    held = [p.grad for p in parameters]
    before = weights(held)
    optimizer.step()
    assert same(held, before)


@each_rule
@each_way
def test_zero_weights_and_zero_gradients_stay_finite(name, engine, flatten):
    p = nn.Parameter(torch.zeros(5, 4))
    optimizer = cases.built(name, [p], engine, flatten, lr=0.1)
    for gradient in (torch.zeros(5, 4), torch.ones(5, 4), torch.zeros(5, 4)):
        optimizer.zero_grad()
        p.grad = gradient
        optimizer.step()
        assert torch.isfinite(p).all()
    assert p.abs().sum() > 0


@each_rule
@each_way
def test_bf16_weights_keep_fp32_state_also_through_saving(name, engine, flatten):
    start, gradients, rates = cases.history(steps=12)
    parameters = cases.tensors(start, torch.bfloat16)
    optimizer = cases.built(name, parameters, engine, flatten)
    cases.train(optimizer, gradients[:6], rates)
    assert all(p.dtype == torch.bfloat16 for p in parameters)
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = cases.built(name, copies, engine, flatten)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for state in other.state.values():
        assert all(v.dtype == torch.float32 for v in state.values() if isinstance(v, torch.Tensor))
    cases.train(optimizer, gradients[6:], rates[6:])
    cases.train(other, gradients[6:], rates[6:])
    assert same(weights(parameters), weights(copies))


@each_rule
@each_way
def test_a_saved_state_goes_on_bitwise_and_holds_no_more_than_itself(name, engine, flatten):
    start, gradients, rates = cases.history([(70, 50), (4,)], steps=10)
    parameters = cases.tensors(start, torch.float32)
    optimizer = cases.built(name, parameters, engine, flatten)
    cases.train(optimizer, gradients[:5], rates)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    assert saved.tell() < optim.state_bytes(name, parameters) + 8192
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    other = cases.built(name, copies, engine, not flatten)
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    cases.train(optimizer, gradients[5:], rates[5:])
    cases.train(other, gradients[5:], rates[5:])
    for p, q in zip(parameters, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-7)


@each_rule
@each_way
def test_maximize_climbs_where_minimising_descends(name, engine, flatten):
    start, gradients, rates = cases.history(steps=5)
    up = cases.built(name, cases.tensors(start), engine, flatten, maximize=True)
    down = cases.built(name, cases.tensors(start), engine, flatten)
    climbed = cases.train(up, gradients, rates)
    descended = cases.train(down, [[-g for g in step] for step in gradients], rates)
    assert same(weights(climbed), weights(descended))


@each_rule
@each_way
def test_the_rate_may_be_a_tensor(name, engine, flatten):
    start, gradients, rates = cases.history(steps=5)
    plain = cases.train(cases.built(name, cases.tensors(start), engine, flatten), gradients, rates)
    tensor_rates = [torch.tensor(rate, dtype=torch.float64) for rate in rates]
    other = cases.train(cases.built(name, cases.tensors(start), engine, flatten), gradients, tensor_rates)
    for p, q in zip(plain, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value is fetched to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert "_local_scalar_dense" not in name, "a step read a tensor on the host"
        assert "nonzero" not in name, "a step made a shape of values"
        return function(*args, **(kwargs or {}))


@each_rule
@each_way
def test_a_step_reads_nothing_on_the_host(name, engine, flatten):
    start, gradients, _ = cases.history(steps=2)
    options = {"max_grad_norm": 1.0} if name == "lamb" else {}
    optimizer = cases.built(
        name, cases.tensors(start, torch.float32), engine, flatten, lr=torch.tensor(0.01), **options
    )
    cases.train(optimizer, gradients[:1])
    with NoHostReads():
        cases.train(optimizer, gradients[1:])


@each_rule
def test_closures_run_with_gradients_and_hooks_are_called(name):
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.build(name, [p], lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert calls == ["before", "after"]
    assert not torch.equal(p, torch.ones(3))


@each_rule
@each_way
def test_grad_scaler_skips_what_is_not_finite(name, engine, flatten):
    p = nn.Parameter(torch.ones(3, 3))
    optimizer = cases.built(name, [p], engine, flatten, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf")):
        before = p.detach().clone()
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) == (factor != 1.0)


@each_rule
def test_errors_speak_torchs_words(name):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optim.build(name, [p], lr=-1.0)
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        optim.build(name, [p], lr=torch.ones(2))
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.build(name, [])
    with pytest.raises(ValueError, match="does not support complex"):
        optim.build(name, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match="unknown hyperparameter learning_rate"):
        optim.build(name, [p], learning_rate=1.0)
    optimizer = optim.build(name, [p])
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (2,))
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    if "betas" in optim.hyperparameters(name):
        with pytest.raises(ValueError, match=r"Invalid beta parameter at index 1: 1\.5"):
            optim.build(name, [p], betas=(0.9, 1.5))
    if "weight_decay" in optim.hyperparameters(name):
        with pytest.raises(ValueError, match=r"Invalid weight_decay value: -0\.1"):
            optim.build(name, [p], weight_decay=-0.1)


@each_rule
def test_words_that_a_rule_does_not_know_are_refused(name):
    p = nn.Parameter(torch.ones(2))
    rule = optim.registry.rules()[name]
    with pytest.raises(ValueError, match="Invalid engine value: 'compild'; it is one of 'auto', 'tensor'"):
        rule([p], engine="compild")
    assert set(rule.words) == {"maximize"} | {
        key for key, value in rule.hyper.items() if isinstance(value, (bool, str))
    }
    for key, words in rule.words.items():
        for word in words:
            rule([p], **{key: word})
        for wrong in ("Torch", "i", 1, None):
            with pytest.raises(
                ValueError, match=f"Invalid {key} value: {wrong!r}; it is one of {words[0]!r}"
            ):
                rule([{"params": [p], key: wrong}])


@each_rule
@each_way
def test_tied_weights_move_once(name, engine, flatten):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = cases.built(name, model.parameters(), engine, flatten, lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert model[0].weight is model[1].weight
    assert optimizer.state[model[0].weight]["step"] == 1


def test_parameters_that_share_memory_are_refused_where_they_cannot_be_moved():
    base = torch.ones(10)
    shared = [nn.Parameter(base[:6]), nn.Parameter(base[4:])]
    with pytest.raises(ValueError, match="share memory"):
        optim.build("lamb", shared, flatten=True)
    optim.build("lamb", shared)
