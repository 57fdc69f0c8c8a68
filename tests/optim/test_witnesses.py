"""Our rules against the libraries that are exact in the settings named here."""

import pytest
import torch

import optim
from tests.optim import cases
from tests.optim.witnesses import pytorch_optimizer, timm_optimizer

SHAPES = [(5, 4), (4,), (6, 3, 2, 2)]
MATRICES = [(5, 4), (7, 3)]


def timm_lamb():
    return timm_optimizer("lamb", "Lamb")


def timm_lars():
    return timm_optimizer("lars", "Lars")


CASES = {
    "lamb, timm": (
        timm_lamb,
        "lamb",
        {},
        {"always_adapt": True, "weight_decay": 0.01, "max_grad_norm": None},
        SHAPES,
    ),
    "lamb with clipping and bounded ratio, timm": (
        timm_lamb,
        "lamb",
        {"max_grad_norm": 0.5, "trust_clip": True},
        {"always_adapt": True, "weight_decay": 0.01, "max_grad_norm": 0.5, "trust_clip": True},
        SHAPES,
    ),
    "lars, timm": (
        timm_lars,
        "lars",
        {"weight_decay": 0.1, "momentum_mode": "torch"},
        {"weight_decay": 0.1, "always_adapt": True, "eps": 0.0, "momentum": 0.9},
        SHAPES,
    ),
    "lars with nesterov, timm": (
        timm_lars,
        "lars",
        {"weight_decay": 0.1, "momentum_mode": "torch", "nesterov": True},
        {"weight_decay": 0.1, "always_adapt": True, "eps": 0.0, "momentum": 0.9, "nesterov": True},
        SHAPES,
    ),
    "lion, timm": (
        lambda: timm_optimizer("lion", "Lion"),
        "lion",
        {"weight_decay": 0.1},
        {"weight_decay": 0.1},
        SHAPES,
    ),
    "adafactor, timm": (
        lambda: timm_optimizer("adafactor", "Adafactor"),
        "adafactor",
        {"lr": None},
        {"lr": None, "min_dim_size_to_factor": 1},
        MATRICES,
    ),
    "novograd, pytorch_optimizer": (
        lambda: pytorch_optimizer("NovoGrad"),
        "novograd",
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "betas": (0.95, 0.98), "grad_averaging": False},
        SHAPES,
    ),
    "sm3, pytorch_optimizer": (
        lambda: pytorch_optimizer("SM3"),
        "sm3",
        {},
        {"momentum": 0.0, "eps": 1e-30},
        MATRICES,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_library_that_is_exact_here_agrees(case):
    theirs, name, options, their_options, shapes = CASES[case]
    witness = theirs()
    if witness is None:
        pytest.skip(f"the library of {case!r} is not installed")
    start, gradients, _ = cases.history(shapes, steps=20)
    gradients[3] = gradients[4]
    for step in gradients:
        step[0][0, 0] = 0.3
    rate = options.get("lr", 0.01)
    mine = optim.build(name, cases.tensors(start), **({"lr": rate} | options))
    other = witness(cases.tensors(start), **({"lr": rate} | their_options))
    for p, q in zip(cases.train(mine, gradients), cases.train(other, gradients), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-12)
