"""The order of fresh examples: keyed bijections and the subsequences of the lanes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_echo import DataError, ShuffledOrder
from data_echo.order.hashing import key, mix, permuted, shuffled


def split_mix_64(z: int) -> int:
    """The finaliser in exact Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@given(st.integers(0, 2**64 - 1))
def test_mix_is_split_mix_64(z: int) -> None:
    signed = np.array([z], np.uint64).view(np.int64)
    assert int(mix(signed).view(np.uint64)[0]) == split_mix_64(z)


def test_published_stream() -> None:
    # The first numbers of SplitMix64 seeded with 1234567, as the reference implementation prints them.
    states = [(1234567 + (n + 1) * 0x9E3779B97F4A7C15) % 2**64 for n in range(3)]
    mixed = mix(np.array(states, np.uint64).view(np.int64)).view(np.uint64)
    assert mixed.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(1, 5000), st.integers(0, 2**63 - 1))
def test_permuted_is_a_bijection(n: int, seed: int) -> None:
    assert sorted(permuted(np.arange(n), n, key(seed)).tolist()) == list(range(n))


@given(st.integers(2**40, 2**50), st.integers(0, 2**20))
def test_permuted_stays_inside_huge_domains(n: int, seed: int) -> None:
    places = n - 1 - np.arange(100)
    moved = permuted(places, n, key(seed))
    assert moved.min() >= 0
    assert moved.max() < n
    assert len(set(moved.tolist())) == 100


@pytest.mark.parametrize("n", [5, 100, 101])
def test_every_place_is_as_likely_as_another(n: int) -> None:
    passes = 4000
    moved = permuted(np.arange(n)[None], n, key(7, np.arange(passes))[:, None])
    counts = np.stack([np.bincount(moved[:, place], minlength=n) for place in range(n)])
    expected = passes / n
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)


def test_neighbours_are_independent() -> None:
    n, passes = 97, 4000
    moved = permuted(np.arange(n)[None], n, key(3, np.arange(passes))[:, None])
    step = (moved[:, 1:] - moved[:, :-1]) % n  # uniform over 1 .. n-1 in a random permutation
    counts = np.bincount(step.ravel(), minlength=n)[1:]
    expected = step.size / (n - 1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - (n - 2)) < 5 * np.sqrt(2 * (n - 2))


def test_shuffled_rows_are_permutations() -> None:
    rows = shuffled(key(1, np.arange(20)), 50)
    assert (np.sort(rows, axis=1) == np.arange(50)).all()
    assert len({tuple(row) for row in rows.tolist()}) == 20


@given(
    examples=st.integers(1, 400),
    lanes=st.integers(1, 9),
    block=st.integers(1, 40),
    window=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_each_pass_has_every_example_once(
    examples: int, lanes: int, block: int, window: int, seed: int
) -> None:
    order = ShuffledOrder(examples, lanes, seed, block=block, window=window)
    rounds = 3 * examples // lanes + 1
    passes, index = order.example_of(np.arange(lanes), np.arange(rounds)[:, None])
    for number in range(2):
        assert sorted(index[passes == number].tolist()) == list(range(examples))
    assert (passes.ravel() == np.arange(passes.size) // examples).all()


def test_passes_differ_and_seeds_differ() -> None:
    orders = [
        ShuffledOrder(100, 1, seed).example_of(0, number * 100 + np.arange(100))[1]
        for seed in (0, 1)
        for number in (0, 1)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_large_datasets_agree_with_small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = np.arange(0, 5000, 7)
    small = ShuffledOrder(1000, 3, 5).example_of(2, fresh)
    monkeypatch.setattr("data_echo.order.permutation._TABLE_EXAMPLES", 0)
    large = ShuffledOrder(1000, 3, 5).example_of(2, fresh)
    assert (small[0] == large[0]).all()
    assert (small[1] == large[1]).all()


def test_blocks_keep_reading_local() -> None:
    order = ShuffledOrder(10_000, 1, 0, block=100, window=4)
    _, index = order.example_of(0, np.arange(10_000))
    windows = index.reshape(25, 400) // 100
    assert all(len(set(window.tolist())) == 4 for window in windows)  # a window reads four blocks
    assert len(set(windows[0].tolist()) & {0, 1, 2, 3}) < 4  # not the first four
    assert np.abs(np.diff(index[:400])).mean() > 50  # and not row by row


def test_zero_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="shuffled order: lanes: 0 is too few; at least 1"):
        ShuffledOrder(10, 0, 0)
