"""Keyed hashing in 64-bit integer arithmetic, from which every shuffle and every draw is computed.

The bits are the same everywhere: NumPy and torch, on CPU and CUDA, compute wrapping int64 products, sums,
xors and shifts alike, and nothing else is used. Source: SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable
pseudorandom number generators", OOPSLA).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # 2^64 divided by the golden ratio, made odd, as a signed number
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def mix(z: Any) -> Any:
    """SplitMix64's finaliser, a bijection of int64 arrays or tensors: one flipped bit flips about half."""
    # Right shifts of signed numbers copy the sign bit; the masks make them logical.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


def key(*parts: int | Ints) -> Ints:
    """Keys, one int64 for each element of the broadcast parts (1-D at least): a hash of all, in order."""
    hashed: Ints = np.zeros(1, np.int64)
    for part in parts:
        hashed = mix((hashed + GAMMA) ^ np.asarray(part, np.int64))
    return hashed


def shuffled(keys: Ints, n: int) -> Ints:
    """Permutations of 0..n-1, one for each key: int64 [..., n] from keys [...]."""
    return np.argsort(mix(keys[..., None] + GAMMA * np.arange(1, n + 1)), axis=-1, kind="stable")


def permuted(place: Ints, n: int | Ints, keys: Ints, rounds: int = 10) -> Ints:
    """Values of a keyed bijection of [0, n) at some places: int64 [...], without building a permutation.

    A Feistel network over the grid a x b, a = ceil(sqrt n), b = ceil(n / a), whose halves are added modulo a
    and b, with cycle walking for the places of the grid beyond n, fewer than a (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains").

    Args:
        place: int64 [...], each in [0, n).
        n: the domain's size, below 2^60; one number or one for each place.
        keys: one for all or one for each place.
    """
    n = np.asarray(n, np.int64)
    a = np.ceil(np.sqrt(n)).astype(np.int64)
    b = -(-n // a)
    result = _walk(place, a, b, keys, rounds)
    while (outside := result >= n).any():
        some_a, some_b, some_keys = (np.broadcast_to(part, result.shape)[outside] for part in (a, b, keys))
        result[outside] = _walk(result[outside], some_a, some_b, some_keys, rounds)
    return result


def _walk(place: Ints, a: Ints, b: Ints, keys: Ints, rounds: int) -> Ints:
    left, right = np.divmod(place, b)
    for number in range(rounds):
        keys = keys + GAMMA
        if number % 2:
            right = _added(right, left, b, keys)
        else:
            left = _added(left, right, a, keys)
    return left * b + right


def _added(half: Ints, other: Ints, size: Ints, round_key: Ints) -> Ints:
    """half + hash(other) modulo size."""
    # The factor differs from the one between round keys: otherwise one round's hash would be another's,
    # shifted.
    hashed = (other * _SECOND + round_key) * _FIRST
    hashed = (hashed ^ ((hashed >> 32) & 0xFFFFFFFF)) * _SECOND
    half = half + ((((hashed >> 33) & 0x7FFFFFFF) * size) >> 31)
    return half - size * (half >= size)
