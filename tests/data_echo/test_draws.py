"""Draws: the same bits everywhere, rightly distributed, independent of the other examples drawn together."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_echo import Draw, Draws


def draws(
    n: int = 50, stage: str = "augment", seed: int = 3, echo: int = 1, device: str | None = None
) -> Draws:
    return Draws(seed, stage, np.full(n, 2), np.arange(n), np.full(n, echo), device)


def all_kinds(draw: Draws | Draw) -> list:
    return [
        draw.uniform(),
        draw.bernoulli(0.3, 4),
        draw.integers(-5, 9, 2, 3),
        draw.uniform(7),
        draw.normal(5),
    ]


def test_numpy_and_torch_agree_bit_for_bit() -> None:
    for ours, theirs in zip(all_kinds(draws()), all_kinds(draws(device="cpu")), strict=True):
        assert np.array_equal(ours, theirs.numpy())
        assert ours.dtype == theirs.numpy().dtype


@pytest.mark.gpu
def test_cuda_agrees_bit_for_bit() -> None:
    *ours, our_normal = all_kinds(draws(5000))
    *theirs, their_normal = all_kinds(draws(5000, device="cuda"))
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine, other.cpu().numpy())
    assert np.mean(our_normal != their_normal.cpu().numpy()) < 1e-3
    assert np.allclose(our_normal, their_normal.cpu().numpy(), rtol=1e-6)


def test_one_example_draws_its_row() -> None:
    alone = all_kinds(Draw(3, "augment", 2, 17, 1))
    for ours, together in zip(alone, all_kinds(draws()), strict=True):
        assert np.array_equal(ours, together[17])


@given(st.permutations(range(8)))
def test_other_examples_do_not_matter(order: list[int]) -> None:
    index = np.array(order)
    shuffled = Draws(0, "a", np.zeros(8, int), index, np.zeros(8, int)).uniform(3)
    straight = Draws(0, "a", np.zeros(8, int), np.arange(8), np.zeros(8, int)).uniform(3)
    assert np.array_equal(shuffled, straight[index])


def test_what_differs_draws_differently() -> None:
    base = draws().uniform(4)
    others = [draws(stage="prepare"), draws(seed=4), draws(echo=0)]
    others.append(Draws(3, "augment", np.full(50, 1), np.arange(50), np.full(50, 1)))
    for other in others:
        assert np.mean(base == other.uniform(4)) < 0.01
    again = draws()
    again.uniform(4)
    assert np.mean(base == again.uniform(4)) < 0.01


def test_ranges() -> None:
    uniform = draws(20_000).uniform(5)
    assert uniform.dtype == np.float32
    assert 0 <= uniform.min() < uniform.max() < 1
    assert not draws().bernoulli(0.0, 100).any()
    assert draws().bernoulli(1.0, 100).all()
    whole = draws(20_000).integers(-2, 3)
    assert sorted(set(whole.tolist())) == [-2, -1, 0, 1, 2]


def test_distributions() -> None:
    n = 200_000
    error = 5 / np.sqrt(n)
    uniform = draws(n).uniform()
    counts = np.bincount((uniform * 100).astype(int), minlength=100)
    assert abs(((counts - n / 100) ** 2 / (n / 100)).sum() - 99) < 5 * np.sqrt(2 * 99)
    assert abs(draws(n).bernoulli(0.3).mean() - 0.3) < error
    normal = draws(n).normal().astype(np.float64)
    assert abs(normal.mean()) < error
    assert abs(normal.var() - 1) < 2 * error
    assert abs((normal**3).mean()) < 5 * error
    assert abs((normal**4).mean() - 3) < 12 * error


def test_examples_passes_and_calls_are_uncorrelated() -> None:
    n = 100_000
    stream = draws(n)
    first, second = stream.uniform() - 0.5, stream.uniform() - 0.5
    next_pass = Draws(3, "augment", np.full(n, 3), np.arange(n), np.full(n, 1)).uniform() - 0.5
    for a, b in [(first, second), (first, next_pass), (first[1:], first[:-1])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(n)


def test_torch_results_live_on_the_device() -> None:
    assert isinstance(draws(device="cpu").uniform(2), torch.Tensor)
    assert draws(device="cpu").integers(0, 2).dtype == torch.int64
