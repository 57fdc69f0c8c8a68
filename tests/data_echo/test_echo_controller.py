"""The automatic factor: follows R, ignores noise, and never echoes where echoing cannot gain time."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_echo import FactorController


def settled(ratios: list[float], **settings: float) -> tuple[float, int]:
    """The factor in force after measurements of R, and how often it changed."""
    controller, factor, changes = FactorController(**settings), 1.0, 0
    for ratio in ratios:
        proposal = controller.propose(ratio * 0.01, 0.01, factor)
        if proposal is not None:
            assert proposal != factor
            factor, changes = proposal, changes + 1
    return factor, changes


@pytest.mark.parametrize(
    ("ratio", "factor"), [(0.2, 1), (1.09, 1), (1.3, 1.25), (2.0, 2), (2.9, 2.75), (4, 4), (50, 4)]
)
def test_it_settles_at_the_ratio(ratio: float, factor: float) -> None:
    assert settled([ratio] * 20) == (factor, 0 if factor == 1 else 1)


@given(st.floats(0.01, 100))
@example(1.25)  # where echoing begins: it went on and off 30 times
def test_noise_moves_it_rarely(ratio: float) -> None:
    """In 200 measurements that spread by 5 %, thrice at most in the mean of 20 runs."""
    changes = []
    for seed in range(20):
        noise = np.exp(np.random.default_rng(seed).normal(0, 0.05, 200))
        factor, changed = settled((ratio * noise).tolist())
        assert 1 <= factor <= 4
        assert factor <= max(1, ratio * 1.3)
        changes.append(changed)
    assert np.mean(changes) <= 3


@given(st.floats(0.01, 100), st.lists(st.floats(0.95, 1.05), min_size=20, max_size=60))
def test_small_noise_moves_it_twice_at_most(ratio: float, noise: list[float]) -> None:
    assert settled([ratio * each for each in noise])[1] <= 2


def test_echo_that_pays_no_more_ends_though_the_ratio_is_near_the_factor() -> None:
    assert settled([1.3] * 10 + [1.08] * 10) == (1, 2)


def test_it_comes_back_when_the_pool_catches_up() -> None:
    assert settled([4.0] * 10 + [0.8] * 20) == (1, 2)


def test_below_the_least_ratio_there_is_no_echo_at_all() -> None:
    assert settled([2.0] * 10 + [1.08] * 10) == (1, 2)


def test_a_moment_is_no_reason() -> None:
    assert settled([1.0] * 10 + [6.0] + [1.0] * 10) == (1, 0)


def test_changes_keep_their_distance() -> None:
    """Between two proposals lie at least half a window of measurements, however much they vary."""
    controller, factor, proposals = FactorController(window=5), 1.0, []
    for number in range(40):
        ratio = 4.0 if number % 8 < 4 else 1.0
        proposal = controller.propose(ratio * 0.01, 0.01, factor)
        if proposal is not None:
            factor = proposal
            proposals.append(number)
    assert len(proposals) > 4
    assert np.diff([-1, *proposals]).min() >= 3


def test_the_cap_is_kept() -> None:
    assert settled([30.0] * 10, cap=2.5) == (2.5, 1)


def test_the_ratio_is_shown() -> None:
    controller = FactorController()
    assert controller.ratio is None
    controller.propose(0.03, 0.01, 1)
    assert controller.ratio == pytest.approx(3)
