"""Sums that are the same bits however layers are cut: of integers, for which order cannot matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

STEPS = (2.0**20, 2.0**-20, 2.0**-60, 2.0**-100)
"""What the integers of a sum are multiples of, each holding what the one before it leaves of a number."""

LIMIT = 2.0**62
"""Numbers from which on a sum is not finite: so many of them that integers of 64 bits could overflow."""


def integers(x: Tensor) -> Tensor:
    """Numbers [...] as integers [5, ...]: a multiple of each step, and whether the number does not fit."""
    rest = x.double()
    fits = rest.abs() < LIMIT  # False for NaN too
    return torch.stack([*multiples(torch.where(fits, rest, 0.0), STEPS), (~fits).to(torch.int64)])


def multiples(x: Tensor, steps: Sequence[float]) -> Iterator[Tensor]:
    """Float64 numbers as int64 multiples of each step in turn, of what the one before leaves of them."""
    for step in steps:
        multiple = (x / step).round_()
        yield multiple.to(torch.int64)
        x = x - multiple * step


def joined(sums: Iterable[Tensor], steps: Sequence[float]) -> Tensor:
    """The float64 numbers of sums of `multiples`."""
    return sum((part.double() * step for part, step in zip(sums, steps, strict=True)), torch.zeros(()))


def numbers(sums: Tensor) -> Tensor:
    """The float64 numbers [...] of sums of `integers` [5, ...]; NaN where something did not fit."""
    return torch.where(sums[-1] == 0, joined(sums[:-1], STEPS), torch.nan)


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares of some tensors, as integers [5]."""
    return torch.stack([inner_product(x, x) for x in tensors]).sum(0)


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b over everything, as integers [5]; the product of two float32 is rounded nowhere else."""
    return integers(a.double().reshape(-1) * b.double().reshape(-1)).sum(-1)
