"""What torch demands of its own optimizers holds for every name, in every way of building one."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.common_optimizers import OptimizerErrorEnum

import optim
from tests.optim import cases, generic
from tests.optim.generic import Problem, each_case, made

each_name_and_way = pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in optim.names() for way in generic.ways(name)]
)


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


@pytest.mark.filterwarnings("error")
@each_name_and_way
def test_wrong_arguments_are_refused_in_torchs_words(name, way):
    for error in generic.errors(name):
        given, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
        p = nn.Parameter(torch.randn(1, 1))
        given = [p] if given is None else given
        p.grad = torch.rand_like(p) if error.error_on is OptimizerErrorEnum.STEP_ERROR else None
        with pytest.raises(error.error_type, match=error.error_regex):
            made(name, way, given, **kwargs).step()


@each_case
@pytest.mark.parametrize("contiguous", [True, False])
def test_it_goes_in_the_right_direction(name, way, kwargs, contiguous):
    kwargs = generic.with_rate(name, kwargs)
    for schedulers in generic.info(name).scheduler_inputs:
        problem = Problem(contiguous=contiguous)
        optimizer = made(name, way, problem.parameters, **kwargs)
        begun = [make(optimizer) for make in schedulers]
        assert type(optimizer).__name__ in repr(optimizer)
        first = float(problem.loss())
        for _ in range(20):
            [loss] = problem.train(optimizer, 1)
            for scheduler in begun:
                scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))
        last = float(problem.loss())
        assert last > first if kwargs.get("maximize") else last < first


@each_case
def test_groups_with_schedules_go_in_the_right_direction(name, way, kwargs):
    problem = Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.005}]
    optimizer = made(name, way, groups, **generic.with_rate(name, kwargs))
    for make in generic.info(name).scheduler_inputs[0]:
        make(optimizer)
    first = problem.train(optimizer, 20)[0]
    last = float(problem.loss())
    assert last > first if kwargs.get("maximize") else last < first


@each_case
def test_groups_are_trained_as_by_optimizers_of_their_own(name, way, kwargs):
    if name in cases.OWN and optim.registry.rules()[name].sums_all_layers(
        [optim.hyperparameters(name) | kwargs]
    ):
        pytest.skip("it sums over all layers")
    together, apart = Problem(), Problem()
    groups = [{"params": [together.weight], "lr": 0.01}, {"params": [together.bias], "lr": 0.002}]
    optimizer = made(name, way, groups, **kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "lr"}
    own = [
        made(name, way, [p], **kwargs, lr=lr) for p, lr in zip(apart.parameters, (0.01, 0.002), strict=True)
    ]
    together.train(optimizer, 4)
    for _ in range(4):
        for each in own:
            each.zero_grad()
        apart.loss().backward()
        for each in own:
            each.step()
    for p, q in zip(together.parameters, apart.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_name_and_way
def test_decay_belongs_to_its_group(name, way):
    if "weight_decay" not in optim.hyperparameters(name):
        pytest.skip("it has no decay")
    problem = Problem()
    start = [p.detach().clone() for p in problem.parameters]
    groups = [
        {"params": [problem.weight], "weight_decay": 0.9},
        {"params": [problem.bias], "weight_decay": 0.0},
    ]
    optimizer = made(name, way, groups, lr=0.01)
    for _ in range(4):
        for p in problem.parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert problem.weight.norm() < start[0].norm()
    assert torch.equal(problem.bias, start[1])


@each_case
def test_a_rate_may_be_a_tensor(name, way, kwargs):
    one, other = Problem(), Problem()
    kwargs = {key: value for key, value in kwargs.items() if key != "lr"}
    one.train(made(name, way, one.parameters, **kwargs, lr=0.001))
    other.train(made(name, way, other.parameters, **kwargs, lr=torch.tensor(0.001)))
    for p, q in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@each_case
def test_nothing_moves_without_gradients(name, way, kwargs):
    problem = Problem()
    start = [p.detach().clone() for p in problem.parameters]
    optimizer = made(name, way, problem.parameters, **kwargs)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    optimizer.step()
    assert same(problem.parameters, start)
    if "lookahead" not in way:
        assert str(optimizer.state_dict()["state"]) == str(before)


@each_case
def test_zero_gradients_move_nothing_that_does_not_decay(name, way, kwargs):
    if kwargs.get("weight_decay", optim.hyperparameters(name).get("weight_decay")) or kwargs.get("extra_l2"):
        pytest.skip("it decays")
    problem = Problem()
    start = [p.detach().clone() for p in problem.parameters]
    optimizer = made(name, way, problem.parameters, **kwargs)
    for p in problem.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert same(problem.parameters, start)


@each_case
def test_a_saved_state_goes_on_and_is_left_alone(name, way, kwargs):
    problem = Problem()
    optimizer = made(name, way, problem.parameters, **kwargs)
    problem.train(optimizer)
    other = problem.copy()
    loaded = made(name, way, other.parameters, **kwargs)
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    loaded.load_state_dict(given)
    assert str(given) == str(saved)
    problem.train(optimizer)
    other.train(loaded)
    assert same(problem.parameters, other.parameters)
    assert str(optimizer.state_dict()) == str(loaded.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    assert str(torch.load(io.BytesIO(file.getvalue()), weights_only=True)) == str(optimizer.state_dict())


@each_case
def test_states_of_older_versions_load(name, way, kwargs):
    problem = Problem()
    optimizer = made(name, way, problem.parameters, **kwargs)
    problem.train(optimizer)
    saved = optimizer.state_dict()
    newer = {"maximize", *generic.info(name).not_og_supported_flags} - {"nesterov"}
    for group in saved["param_groups"]:
        for key in newer & set(group):
            del group[key]
    optimizer.load_state_dict(saved)
    before = [p.detach().clone() for p in problem.parameters]
    problem.train(optimizer)
    assert not same(problem.parameters, before)


@each_case
def test_a_count_of_steps_may_be_a_number_or_a_tensor(name, way, kwargs):
    problem = Problem()
    optimizer = made(name, way, problem.parameters, **kwargs)
    problem.train(optimizer)
    saved, other = copy.deepcopy(optimizer.state_dict()), problem.copy()
    for state in saved["state"].values():
        if "step" in state:
            as_tensor = isinstance(state["step"], torch.Tensor)
            state["step"] = state["step"].item() if as_tensor else torch.tensor(float(state["step"]))
    loaded = made(name, way, other.parameters, **kwargs)
    loaded.load_state_dict(saved)
    problem.train(optimizer)
    other.train(loaded)
    assert same(problem.parameters, other.parameters)


@each_name_and_way
@pytest.mark.parametrize("named", [(False, True), (True, False), (True, True)])
def test_names_of_parameters_are_kept_and_states_load_with_and_without(name, way, named):
    def begun(problem, with_names):
        pairs = zip(("weight", "bias"), problem.parameters, strict=True)
        return made(name, way, list(pairs) if with_names else problem.parameters)

    problem, (first, second) = Problem(), named
    optimizer = begun(problem, first)
    problem.train(optimizer)
    saved, other = copy.deepcopy(optimizer.state_dict()), problem.copy()
    assert saved["param_groups"][0].get("param_names") == (["weight", "bias"] if first else None)
    loaded = begun(other, second)
    loaded.load_state_dict(saved)
    problem.train(optimizer)
    other.train(loaded)
    assert same(problem.parameters, other.parameters)
    assert loaded.param_groups[0]["param_names"] == ["weight", "bias"]


@each_name_and_way
def test_hooks_are_called_once_and_in_torchs_order(name, way):
    problem, calls = Problem(), []
    optimizer = made(name, way, problem.parameters)

    def note(word):
        return lambda *_: calls.append(word)

    if "lookahead" in way:  # the inner optimizer's steps are steps too
        optimizer.optimizer.step = inspect.unwrap(type(optimizer.optimizer).step).__get__(optimizer.optimizer)
    everywhere = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
    ]
    optimizer.register_step_pre_hook(note("before"))
    optimizer.register_step_post_hook(note("after"))
    optimizer.register_state_dict_pre_hook(note("save"))
    optimizer.register_state_dict_post_hook(note("saved"))
    optimizer.register_load_state_dict_pre_hook(note("load"))
    optimizer.register_load_state_dict_pre_hook(note("load first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(note("loaded"))
    try:
        problem.train(optimizer, 1)
    finally:
        [hook.remove() for hook in everywhere]
    optimizer.load_state_dict(optimizer.state_dict())
    words = "all before,before,after,all after,save,saved,load first,load,loaded"
    assert calls == words.split(",")


@each_case
@pytest.mark.parametrize("remake", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_all_that_is_public_and_train_on(name, way, kwargs, remake):
    problem = Problem()
    optimizer = made(name, way, problem.parameters, **kwargs)
    problem.train(optimizer)
    other = remake(optimizer)
    assert public(other) == public(optimizer)
    copies = [p for group in other.param_groups for p in group["params"]]
    assert same(copies, problem.parameters)
    for _ in range(2):
        for p, q in zip(problem.parameters, copies, strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        other.step()
    assert same(copies, problem.parameters)


def public(thing):
    return {name for name in vars(thing) if not name.startswith("_")}


@each_case
def test_dtypes_may_differ_in_one_group(name, way, kwargs):
    problems = [Problem(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    start = [p.detach().clone() for problem in problems for p in problem.parameters]
    optimizer = made(name, way, [p for problem in problems for p in problem.parameters], **kwargs)
    for _ in range(3):
        optimizer.zero_grad()
        sum(problem.loss().double() for problem in problems).backward()
        optimizer.step()
    for problem in problems:
        assert all(torch.isfinite(p).all() for p in problem.parameters)
    # A bf16 weight stays where the step is smaller than half its last digit.
    wide = [p for problem in problems[:2] for p in problem.parameters]
    assert not any(torch.equal(p, q) for p, q in zip(wide, start[:4], strict=True))
    assert [p.dtype for problem in problems for p in problem.parameters] == [p.dtype for p in start]


@each_case
def test_parameters_without_numbers_are_taken(name, way, kwargs):
    problem, empty = Problem(), nn.Parameter(torch.empty(0, 3))
    optimizer = made(name, way, [empty, *problem.parameters], **kwargs)
    for _ in range(2):
        optimizer.zero_grad()
        problem.loss().backward()
        empty.grad = torch.empty(0, 3)
        optimizer.step()
    assert empty.shape == (0, 3)


@each_name_and_way
def test_complex_numbers_are_two_real_ones_or_refused(name, way):
    if not generic.info(name).supports_complex:
        with pytest.raises(ValueError, match="does not support complex parameters"):
            made(name, way, [nn.Parameter(torch.ones(3, dtype=torch.complex64))])
        return
    start = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    one, other = nn.Parameter(torch.view_as_complex(start.clone())), nn.Parameter(start.clone())
    optimizers = made(name, way, [one], lr=0.01), made(name, way, [other], lr=0.01)
    for seed in range(3):
        g = torch.randn(4, 2, generator=torch.Generator().manual_seed(seed))
        one.grad, other.grad = torch.view_as_complex(g.clone()), g
        [optimizer.step() for optimizer in optimizers]
    torch.testing.assert_close(torch.view_as_real(one.detach()), other.detach())


@each_name_and_way
def test_groups_may_be_added_later(name, way):
    problem, late = Problem(), nn.Parameter(torch.ones(3, 3))
    optimizer = made(name, way, problem.parameters)
    problem.train(optimizer)
    optimizer.add_param_group({"params": [late], "lr": 0.1})
    for _ in range(3):
        optimizer.zero_grad()
        (problem.loss() + late.square().sum()).backward()
        optimizer.step()
    assert not torch.equal(late, torch.ones(3, 3))
    assert len(optimizer.state_dict()["param_groups"]) == 2
