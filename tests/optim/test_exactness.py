"""Every optimizer equals its paper: float64 against independent transcriptions, 50 steps, every setting."""

import numpy as np
import pytest
import torch

import optim
from tests.optim import cases

TORCH = tuple(name for name in optim.names() if name not in cases.OWN)
TOLERANCE = {"nadam": 1e-9}  # torch keeps NAdam's product of momenta in fp32


def compare(name, optimizer, parameters, expected, expected_states):
    tolerance = TOLERANCE.get(name, 1e-12)
    for p, reference, states in zip(parameters, expected, expected_states, strict=True):
        pairs = [("parameter", p.detach(), reference)]
        for key, value in optimizer.state[p].items():
            if key in states:
                pairs.append((key, value, states[key]))
            else:
                assert key in ("step", "mu_product"), f"the oracle has no state {key}"
        for what, mine, reference in pairs:
            error = np.abs(mine.numpy() - reference).max()
            assert error <= tolerance * max(np.abs(reference).max(), 1e-300), (what, tuple(p.shape), error)


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(("name", "options"), cases.settings(cases.OWN))
def test_own_rules_equal_their_papers(name, options, engine, flatten):
    start, gradients, rates = cases.history()
    rates = [None] * len(rates) if "lr" in options else rates
    options = {key: value for key, value in options.items() if key != "lr"}
    oracle, _ = cases.oracle(name)
    expected = oracle(start, gradients, rates, **options)
    optimizer = cases.built(name, cases.tensors(start), engine, flatten, **options)
    parameters = cases.train(optimizer, gradients, rates)
    compare(name, optimizer, parameters, *expected)


@pytest.mark.parametrize(("name", "options"), cases.settings(TORCH))
def test_torchs_equal_their_papers(name, options):
    start, gradients, rates = cases.history()
    if name == "rprop":  # its rate is a first step size, not a schedule
        rates = [0.01] * len(rates)
    oracle, _ = cases.oracle(name)
    expected = oracle(start, gradients, rates, **options)
    optimizer = optim.build(name, cases.tensors(start), flatten=True, **options)
    parameters = cases.train(optimizer, gradients, rates)
    compare(name, optimizer, parameters, *expected)


@pytest.mark.parametrize(
    "name", [name for name in optim.names() if name not in cases.OWN or name in ("lars", "lamb")]
)
def test_a_group_without_decay_or_adaptation_is_treated_so(name):
    start, gradients, rates = cases.history(steps=5)
    rates = [0.01] * 5
    oracle, _ = cases.oracle(name)
    takes_decay = "weight_decay" in optim.hyperparameters(name)
    decay = {"weight_decay": 0.1} if takes_decay else {}
    adapt = {"adapt": False} if name in ("lars", "lamb") else {}
    first, second = cases.tensors(start[:3]), cases.tensors(start[3:])
    groups = [
        {"params": first, **decay},
        {"params": second, "adapt": False, **({"weight_decay": 0.0} if decay else {})},
    ]
    optimizer = optim.build(name, groups, lr=0.01)
    cases.train(optimizer, gradients, rates)
    for parameters, part, options in (
        (first, slice(0, 3), decay),
        (second, slice(3, None), {**adapt, **dict.fromkeys(decay, 0.0)}),
    ):
        expected, _ = oracle(start[part], [g[part] for g in gradients], rates, **options)
        for p, reference in zip(parameters, expected, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), reference, rtol=1e-8, atol=1e-9)


def test_lamb_without_ratio_is_adamw():
    start, gradients, rates = cases.history(steps=20)
    lamb = optim.build("lamb", [{"params": cases.tensors(start), "adapt": False}], eps=1e-8, weight_decay=0.1)
    adamw = optim.build("adamw", cases.tensors(start), eps=1e-8, weight_decay=0.1)
    for mine, theirs in zip(
        cases.train(lamb, gradients, rates), cases.train(adamw, gradients, rates), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_lars_without_ratio_is_momentum():
    start, gradients, rates = cases.history(steps=20)
    options = {"weight_decay": 0.1, "momentum_mode": "torch"}
    lars = optim.build("lars", [{"params": cases.tensors(start), "adapt": False}], **options)
    sgd = optim.build("momentum", cases.tensors(start), weight_decay=0.1)
    for mine, theirs in zip(
        cases.train(lars, gradients, rates), cases.train(sgd, gradients, rates), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_funnelled_sgdm_without_gains_is_momentum():
    start, gradients, _ = cases.history(steps=20)
    rates = [0.01] * 20
    funnelled = optim.build("funnelled_sgdm", cases.tensors(start), gain_rate=0.0, scale_rate=0.0)
    sgd = optim.build("momentum", cases.tensors(start))
    for mine, theirs in zip(
        cases.train(funnelled, gradients, rates), cases.train(sgd, gradients, rates), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_sm3_of_vectors_is_adagrad():
    start, gradients, rates = _vectors()
    sm3 = optim.build("sm3", cases.tensors(start))
    adagrad = optim.build("adagrad", cases.tensors(start), eps=0.0)
    for mine, theirs in zip(
        cases.train(sm3, gradients, rates), cases.train(adagrad, gradients, rates), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 4}]
)
def test_muon_is_torchs_on_matrices_to_rounding(options, engine):
    """In fp32, with the iterations in bf16 as torch has them. Weights are about 3, so 1e-5 is 40 ulp."""
    start, gradients, _ = cases.history([(7, 5), (5, 7), (12, 20), (1, 6)], steps=20)
    mine = optim.build("muon", cases.tensors(start, torch.float32), engine=engine, lr=0.02, **options)
    other = torch.optim.Muon(cases.tensors(start, torch.float32), lr=0.02, **options)
    for p, q in zip(cases.train(mine, gradients), cases.train(other, gradients), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_muon_without_adaptation_is_adamw():
    start, gradients, rates = cases.history(steps=20)
    groups = [{"params": cases.tensors(start), "adapt": False}]
    muon = optim.build("muon", groups, adam_betas=(0.9, 0.99), adam_eps=1e-8)
    adamw = optim.build("adamw", cases.tensors(start), betas=(0.9, 0.99), weight_decay=0.1)
    for mine, theirs in zip(
        cases.train(muon, gradients, rates), cases.train(adamw, gradients, rates), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def _vectors():
    random = np.random.default_rng(1)
    return [random.normal(size=9)], [[random.normal(size=9)] for _ in range(20)], [0.1] * 20
