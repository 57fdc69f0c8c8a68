"""Sums in fixed point, the same bits in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from optim.engine.fixed_point import joined, multiples
from trainer.distributed.group import WorkerGroup


class FixedPointSum:
    """A sum of float vectors in integers, the same for any order of the additions.

    Three int64 per element hold multiples of 2^20, the rest in multiples of 2^-20, and its rest in multiples
    of 2^-60: float32 values from about 1e-11 up keep all their digits. Of `summands` vectors each element
    may reach 2^82 / summands in magnitude, 7e22 for 64 of them.
    """

    STEPS = (2.0**20, 2.0**-20, 2.0**-60)

    def __init__(self, length: int, summands: int, device: torch.device):
        # The last column counts summands that did not fit.
        self.total = torch.zeros(len(self.STEPS), length + 1, dtype=torch.int64, device=device)
        self.limit = 2.0**62 * self.STEPS[0] / summands

    def clear(self) -> None:
        """Back to zero."""
        self.total.zero_()

    def add(self, values: Tensor) -> None:
        """One more summand: a vector [length]."""
        rest = values.double()
        fits = (rest.abs() < self.limit).all()  # False for NaN too
        rest = torch.where(fits, rest, 0.0)
        for total, multiple in zip(self.total, multiples(rest, self.STEPS), strict=True):
            total[:-1] += multiple
        self.total[0, -1] += (~fits).to(torch.int64)

    def over(self, group: WorkerGroup) -> Tensor:
        """The sum over all workers' summands, float64; NaN throughout if one did not fit."""
        return self.value(group.all_reduce(self.total))

    @classmethod
    def value(cls, total: Tensor) -> Tensor:
        """The numbers [length] of a `total` [3, length + 1]."""
        return torch.where(total[0, -1] == 0, joined(total[:, :-1], cls.STEPS), torch.nan)
