"""Every optimizer in every way that it can be used, with torch's own data about its optimizers."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerInfo,
    OptimizerInput,
    get_error_inputs_for_all_optims,
    optim_db,
    optim_error_inputs_func_adam,
)

import optim
from optim.torch_optimizers import FROM_TORCH
from tests.optim import cases

DEVICE = "cpu"
vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True  # torch's module of tests sets it False


@functools.cache
def info(name):
    """Torch's `OptimizerInfo` of its own classes; of our rules one with the same kinds of inputs."""
    if name in FROM_TORCH:
        return next(each for each in optim_db if each.optim_cls is FROM_TORCH[name].kind)
    return OptimizerInfo(
        optim.registry.rules()[name],
        optim_inputs_func=functools.partial(_own_inputs, name),
        optim_error_inputs_func=functools.partial(_own_errors, name),
        supported_impls=(),
        supports_complex=False,
    )


def _own_inputs(name, device, dtype=None):
    """What torch's functions of inputs have for each class, and the settings that the oracle knows."""
    inputs = [{}, {"lr": 0.01}, {"lr": torch.tensor(0.001)}, {"maximize": True}]
    if "weight_decay" in optim.hyperparameters(name):
        inputs += [{"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
    inputs += [options for options in cases.oracle(name)[1] if options]
    inputs = [i | {"lr": 0.01} if i.get("always_adapt") is False else i for i in inputs]  # without ratio
    return [OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)) for kwargs in inputs]


def _own_errors(name, device, dtype):
    """Torch's errors for all optimizers, and those of Adam's for arguments that this one has."""
    known = set(optim.hyperparameters(name))
    of_adam = optim_error_inputs_func_adam(device, dtype)
    own = [e for e in of_adam if {*e.optimizer_error_input.kwargs} <= known and _is_of_values(e)]
    return [*get_error_inputs_for_all_optims(device, dtype), *own]


def _is_of_values(error: ErrorOptimizerInput):
    kwargs = error.optimizer_error_input.kwargs
    return kwargs and not any(isinstance(b, torch.Tensor) for b in kwargs.get("betas", ()))


def inputs(name):
    """The keyword arguments that torch's data have for a name, but for those that the name itself fixes."""
    fixed = set(FROM_TORCH[name].fixed) if name in FROM_TORCH else set()
    found = [each.kwargs for each in info(name).optim_inputs_func(device=DEVICE)]
    found = [kwargs for kwargs in found if not fixed & set(kwargs)]
    return [k for k in found if name != "nag" or (k.get("momentum", 0.9) and not k.get("dampening"))]


def with_rate(name, kwargs):
    """The input as a scheduler needs it, which has nothing to multiply where Adafactor's rate is None."""
    relative = name == "adafactor" and kwargs.get("lr") is None
    return {**kwargs, "lr": 1.0, "relative_step": True} if relative else kwargs


def errors(name):
    """Torch's inputs that must fail."""
    fixed = set(FROM_TORCH[name].fixed) if name in FROM_TORCH else set()
    found = info(name).optim_error_inputs_func(device=DEVICE, dtype=torch.float32)
    return [each for each in found if not fixed & set(each.optimizer_error_input.kwargs)]


WAYS = {
    "alone": {},
    "flat": {"flatten": True},
    "tensor": {"engine": "tensor"},
    "flat tensor": {"engine": "tensor", "flatten": True},
    "lookahead": {},
    "flat lookahead": {"flatten": True},
}
"""How an optimizer is built; without an engine our rules go in rows."""


def ways(name):
    """The ways of a name: torch's have no engines."""
    return [way for way, options in WAYS.items() if name in cases.OWN or "engine" not in options]


def made(name, way, parameters, **kwargs):
    """An optimizer in one of the ways. Schedulers change rates that are tensors in place."""
    optimizer = optim.build(name, parameters, **WAYS[way], **copy.deepcopy(kwargs))
    return optim.Lookahead(optimizer, k=2) if "lookahead" in way else optimizer


def each_case(test):
    """Run a test for every name, way and input; beyond the first input where slow tests are asked for."""
    found = [
        pytest.param(
            name, way, kwargs, marks=[pytest.mark.slow] if number else [], id=f"{name}-{way}-{number}"
        )
        for name in optim.names()
        for way, (number, kwargs) in itertools.product(ways(name), enumerate(inputs(name)))
    ]
    return pytest.mark.parametrize(("name", "way", "kwargs"), found)(test)


class Problem:
    """Torch's test problem: a matrix and a vector whose image of a fixed input is to become small."""

    def __init__(self, dtype=torch.float32, contiguous=True):
        draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=dtype)
        weight, bias = draw(10, 5, 2), draw(10, 2)
        self.weight, self.bias = (
            nn.Parameter(x[..., 0].clone() if contiguous else x[..., 0]) for x in (weight, bias)
        )
        self.input = draw(5)

    @property
    def parameters(self):
        return [self.weight, self.bias]

    def loss(self):
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def train(self, optimizer, steps=3):
        """Steps with closures; returns the loss before each of them."""

        def closure():
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return [float(optimizer.step(closure)) for _ in range(steps)]

    def copy(self):
        other = Problem(self.weight.dtype)
        for mine, theirs in zip(self.parameters, other.parameters, strict=True):
            theirs.data.copy_(mine.data)
        return other
