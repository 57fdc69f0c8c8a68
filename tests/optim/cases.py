"""Parameters, gradients and rates that the tests of many optimizers share."""

import importlib

import numpy as np
import torch
from torch import nn

import optim
from optim.registry import rules

SHAPES = [(7, 5), (4,), (6, 3, 2, 2), (), (5, 5), (1, 6), (12, 20)]
OWN = tuple(rules())
ENGINES = ("tensor", "rows")


def oracle(name):
    """The oracle of an optimizer and the settings it is tested with."""
    if name in OWN:
        module = importlib.import_module(f"tests.oracles.{name}")
        return module.oracle, module.OPTIONS
    module = importlib.import_module("tests.oracles.from_torch")
    return module.ORACLES[name], module.OPTIONS[name]


def settings(names):
    """(name, options) of every setting of these optimizers."""
    return [(name, options) for name in names for options in oracle(name)[1]]


def history(shapes=SHAPES, steps=50, seed=0):
    """Parameters, changing gradients with exact zeros among them, and changing rates."""
    random = np.random.default_rng(seed)
    parameters = [np.asarray(random.normal(size=shape)) for shape in shapes]
    gradients = []
    for t in range(steps):
        scale = np.exp(random.normal()) * (0.3 if t % 7 else 3.0)
        gradients.append([np.asarray(scale * random.normal(size=shape)) for shape in shapes])
        gradients[-1][0][0, 0] = 0.0
    gradients[min(3, steps - 1)][1][:] = 0.0
    rates = [float(rate) for rate in 0.01 * (1 + 0.5 * np.sin(np.arange(steps)))]
    return parameters, gradients, rates


def train(optimizer, gradients_by_step, rates=None):
    """Step an optimizer through given gradients and rates."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for t, gradients in enumerate(gradients_by_step):
        optimizer.zero_grad()
        for p, g in zip(parameters, gradients, strict=True):
            g = torch.as_tensor(g).to(p.dtype)
            if p.grad is None:
                p.grad = g.clone()
            else:
                p.grad.copy_(g)
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[t]
        optimizer.step()
    return parameters


def tensors(arrays, dtype=torch.float64):
    """Parameters of a dtype with these values."""
    return [nn.Parameter(torch.tensor(a).to(dtype)) for a in arrays]


def built(name, parameters, engine, flatten=False, **options):
    """An optimizer with a given engine; torch's have none to choose."""
    return optim.build(
        name, parameters, flatten=flatten, **({"engine": engine} if name in OWN else {}), **options
    )
