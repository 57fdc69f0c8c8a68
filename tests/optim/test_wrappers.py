"""What stands around a step: Lookahead, averages, estimated gradients, descriptions."""

import copy
import io
import itertools
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optim
from tests.optim import cases
from tests.oracles.schedule_free import schedule_free

# Lookahead


def lookahead_by_hand(start, gradients, lr, k, alpha):
    fast, slow = [p.copy() for p in start], [p.copy() for p in start]
    for t, step in enumerate(gradients, start=1):
        fast = [p - lr * g for p, g in zip(fast, step, strict=True)]
        if t % k == 0:
            slow = [s + alpha * (p - s) for s, p in zip(slow, fast, strict=True)]
            fast = [s.copy() for s in slow]
    return fast


@pytest.mark.parametrize("flatten", [False, True])
def test_lookahead_starts_its_slow_weights_at_the_beginning(flatten):
    start, gradients, _ = cases.history(steps=11)
    optimizer = optim.Lookahead(
        optim.build("sgd", cases.tensors(start), flatten=flatten, lr=0.1), k=3, alpha=0.4
    )
    expected = lookahead_by_hand(start, gradients, 0.1, 3, 0.4)
    for p, reference in zip(cases.train(optimizer, gradients), expected, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), reference, rtol=1e-12, atol=1e-14)


# Schedule-free


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.8, "weight_decay": 0.1}, {"momentum": 1.0}])
def test_schedule_free_is_its_paper(options, flatten):
    start, gradients, rates = cases.history()
    rates[:10] = [0.001 * t for t in range(10)]  # a warm-up from 0
    optimizer = optim.ScheduleFree(optim.build("sgd", cases.tensors(start), flatten=flatten), **options)
    y, x, z = schedule_free(start, gradients, rates, **options)
    parameters = cases.train(optimizer, gradients, rates)

    def hold(expected):
        for p, reference in zip(parameters, expected, strict=True):
            assert np.abs(p.detach().numpy() - reference).max() <= 1e-12 * np.abs(reference).max()

    hold(y)
    optimizer.eval()
    hold(x)
    with pytest.raises(RuntimeError, match="call train"):
        optimizer.step()
    optimizer.train()
    hold(y)
    for mine, reference in zip(optimizer.kept, z, strict=True):
        np.testing.assert_allclose(mine.numpy(), reference, rtol=1e-12, atol=1e-14)


# Both


WRAPPERS = {"lookahead": lambda optimizer: optim.Lookahead(optimizer, k=3), "z": optim.ScheduleFree}
each_wrapper = pytest.mark.parametrize("array", WRAPPERS)


@each_wrapper
@pytest.mark.parametrize("name", optim.names())
def test_wrapped_optimizers_go_on_where_they_were_saved(name, array):
    start, gradients, _ = cases.history(steps=8)
    optimizer = WRAPPERS[array](optim.build(name, cases.tensors(start), lr=0.01))
    cases.train(optimizer, gradients[:4])
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    copies = [nn.Parameter(p.detach().clone()) for p in optimizer.parameters()]
    other = WRAPPERS[array](optim.build(name, copies, lr=0.01))
    other.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    for p, q in zip(cases.train(optimizer, gradients[4:]), cases.train(other, gradients[4:]), strict=True):
        # Torch's load casts NAdam's fp32 product of momenta to the parameter's dtype.
        assert torch.equal(p, q) or (name == "nadam" and torch.allclose(p, q, rtol=1e-7))


@each_wrapper
def test_wrapped_states_have_torchs_form(array):
    optimizer = WRAPPERS[array](optim.build("lamb", cases.tensors([np.ones((2, 2)), np.ones(3)])))
    saved = optimizer.state_dict()
    assert list(saved) == ["state", "param_groups"]
    assert all(torch.equal(saved["state"][n][array], p) for n, p in enumerate(optimizer.parameters()))
    with pytest.raises(ValueError, match=f"has no '{array}' of some parameters"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())


@each_wrapper
def test_hooks_of_wrapped_optimizers_are_called(array):
    p = nn.Parameter(torch.ones(3))
    optimizer, calls = WRAPPERS[array](optim.build("lamb", [p])), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("step"))
    optimizer.register_step_post_hook(lambda *_: calls.append("stepped"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "calls": calls.append("saved")})
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["step", "stepped", "save", "saved", "load", "loaded"]


@each_wrapper
def test_wrapped_optimizers_share_groups_with_schedulers_and_copies(array):
    start, gradients, _ = cases.history(steps=6)
    optimizer = WRAPPERS[array](optim.build("lamb", cases.tensors(start), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    cases.train(optimizer, gradients[:4])
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.05
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        moved = cases.train(other, gradients[4:])
        reference = cases.train(copy.deepcopy(optimizer), gradients[4:])
        assert all(torch.equal(p, q) for p, q in zip(moved, reference, strict=True))


# Averages


def test_averages_are_what_they_say():
    model = nn.Linear(3, 2)
    exponential, arithmetic, weights, expected = optim.ema(model, 0.8), optim.swa(model), [], None
    for t in range(6):
        with torch.no_grad():
            model.weight.normal_(generator=torch.Generator().manual_seed(t))
        weights.append(model.weight.detach().clone())
        expected = weights[-1] if expected is None else 0.8 * expected + 0.2 * weights[-1]
        exponential.update_parameters(model)
        arithmetic.update_parameters(model)
    torch.testing.assert_close(exponential.module.weight.detach(), expected)
    torch.testing.assert_close(arithmetic.module.weight.detach(), torch.stack(weights).mean(0))


def test_bf16_weights_are_averaged_in_fp32():
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    average = optim.ema(model, 0.999)
    average.update_parameters(model)
    start = average.module.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(10):
        average.update_parameters(model)
    assert average.module.weight.dtype == torch.float32
    torch.testing.assert_close(average.module.weight.detach(), start + (1 - 0.999**10), rtol=1e-2, atol=1e-3)


def test_batch_norm_is_estimated_again_for_the_average():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = optim.swa(model)
    average.update_parameters(model)
    with torch.no_grad():
        average.module[0].bias.add_(5.0)
    batches = [torch.randn(64, 3) for _ in range(3)]
    average.reestimate_batch_norm(batches)
    expected = torch.stack([average.module[0](batch).mean(0) for batch in batches]).mean(0)
    torch.testing.assert_close(average.module[1].running_mean, expected.detach())


# Gradients without backward passes


class Quadratic(nn.Module):
    def __init__(self, size=6):
        super().__init__()
        self.x = nn.Parameter(torch.linspace(1.0, 2.0, size, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self):
        return (self.x**2).sum() * (1 + self.scale**2)


def loss(call):
    return call()


def exact_gradient(model):
    model.zero_grad()
    model().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("antithetic", [True, False])
def test_finite_differences_are_the_slope_along_their_direction(antithetic):
    model = Quadratic()
    exact = exact_gradient(model)
    before = [p.detach().clone() for p in model.parameters()]
    value = optim.finite_difference(model, loss, seed=3, epsilon=1e-5, antithetic=antithetic)
    generator = torch.Generator().manual_seed(3)
    u = [torch.randn(p.shape, generator=generator).double() for p in model.parameters()]
    slope = sum((g * v).sum() for g, v in zip(exact, u, strict=True))
    for p, v, old in zip(model.parameters(), u, before, strict=True):
        torch.testing.assert_close(p.grad, slope * v, rtol=1e-7 if antithetic else 1e-3, atol=1e-8)
        assert torch.equal(p, old)
    torch.testing.assert_close(value, model().detach(), rtol=1e-8, atol=1e-8)


def test_forward_gradients_are_exact_along_their_direction_and_unbiased():
    model = Quadratic(3)
    exact = exact_gradient(model)
    total = [torch.zeros_like(p) for p in model.parameters()]
    for seed in range(3000):
        value = optim.forward_gradient(model, loss, seed=seed)
        if seed == 0:
            generator = torch.Generator().manual_seed(0)
            v = [torch.randn(p.shape, generator=generator).double() for p in model.parameters()]
            slope = sum((g * each).sum() for g, each in zip(exact, v, strict=True))
            torch.testing.assert_close(model.x.grad, slope * v[0], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(value, model().detach())
        for sum_, p in zip(total, model.parameters(), strict=True):
            sum_ += p.grad / 3000
    norm = math.sqrt(sum(float((g**2).sum()) for g in exact))
    assert (
        math.sqrt(sum(float(((a - b) ** 2).sum()) for a, b in zip(total, exact, strict=True))) < 0.15 * norm
    )


@pytest.mark.parametrize("options", [{"smallest": 1e-3}, {"condition": 4.0}])
def test_gradientless_descent_never_climbs_and_sees_only_comparisons(options):
    def path(transform):
        model = Quadratic()
        search = optim.GradientlessDescent(model, largest=2.0, seed=1, **options)
        optimizer = optim.build("sgd", model.parameters(), lr=1.0)
        losses = []
        for _ in range(60):
            search.estimate(lambda call: transform(call()))
            optimizer.step()
            losses.append(model().item())
        return losses

    plain = path(lambda f: f)
    assert all(later <= earlier for earlier, later in itertools.pairwise(plain))
    assert plain[-1] < 0.1 * plain[0]
    assert path(torch.log) == plain


def test_gradientless_descent_halves_its_radius_in_time():
    model = Quadratic(2)
    search = optim.GradientlessDescent(model, largest=8.0, condition=2.0)
    every = math.ceil(3 * 2 * math.log(math.e))
    first = search.radii()
    assert first[len(first) // 2] == 8.0
    search.estimates = every
    assert search.radii() == [radius / 2 for radius in first]


@pytest.mark.parametrize("name", optim.names())
def test_every_optimizer_steps_on_estimated_gradients(name):
    model = Quadratic()
    optimizer = optim.build(name, model.parameters(), flatten=True, lr=0.01)
    optimizer.zero_grad()
    before = model.x.detach().clone()
    optim.forward_gradient(model, loss, seed=0)
    optimizer.step()
    assert not torch.equal(model.x, before)


# The registry and its words


def test_every_file_of_rules_has_a_name_and_torchs_are_there_too():
    files = [path.stem for folder in optim.rules.__path__ for path in Path(folder).glob("[!_]*.py")]
    from_torch = "sgd momentum nag rprop adagrad rmsprop adadelta adam adamw adamax nadam amsgrad radam"
    assert sorted(optim.names()) == sorted([*from_torch.split(), *files])


@pytest.mark.parametrize("name", cases.OWN)
def test_every_rule_is_found_by_its_class_name(name):
    kind = optim.registry.rules()[name]
    assert getattr(optim, kind.__name__) is kind
    assert kind.__name__ in dir(optim)
    assert kind.__name__.lower() == name.replace("_", "")


@pytest.mark.parametrize("name", optim.names())
def test_hyperparameters_are_what_the_constructor_takes(name):
    known = optim.hyperparameters(name)
    optimizer = optim.build(name, [nn.Parameter(torch.ones(2))], **known)
    for key, value in known.items():
        assert optimizer.param_groups[0][key] == value
    with pytest.raises(TypeError, match="unknown hyperparameter foo"):
        optim.build(name, [nn.Parameter(torch.ones(2))], foo=1)


@pytest.mark.parametrize("name", optim.names())
def test_state_bytes_are_those_of_training(name):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((64, 32), (8, 4, 3, 3), (5,))]
    foretold = optim.state_bytes(name, parameters)
    assert foretold == optim.state_bytes(name, [p.shape for p in parameters])
    optimizer = optim.build(name, parameters)
    cases.train(optimizer, [[np.ones(p.shape) for p in parameters]])
    held = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    assert foretold == sum(value.nbytes for value in held)


@pytest.mark.parametrize("name", optim.names())
def test_descriptions_name_paper_update_state_and_defaults(name):
    text = optim.describe(name)
    for word in ("Update", "State", "Hyperparameters", "lr = "):
        assert word in text
    assert f"| `{name}` |" in optim.table()


@pytest.mark.parametrize("name", cases.OWN)
def test_own_descriptions_name_their_sources_and_what_others_do(name):
    text = optim.describe(name)
    assert "arXiv:" in text.partition("\n")[0]
    for word in ("Defaults:", "Deviations", "Use:", "bytes per"):
        assert word in text
    for option in optim.hyperparameters(name):
        assert f"    {option} = " in text


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"unknown optimizer 'lamp'; there are sgd, .*lamb"):
        optim.build("lamp", [nn.Parameter(torch.ones(2))])
