"""Sums in fixed point, the same bits in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.distributed.group import WorkerGroup


class FixedPointSum:
    """A sum of float vectors in integers, the same for any order of the additions.

    Two int64 per element hold multiples of 2^-20 and the rest in multiples of 2^-60: float32 gradients keep
    all their digits from about 1e-11 up. Of `summands` vectors each element may reach 2^42 / summands in
    magnitude.
    """

    COARSE, FINE = 2.0**20, 2.0**60  # steps per unit

    def __init__(self, length: int, summands: int, device: torch.device):
        self.total = torch.zeros(
            2, length + 1, dtype=torch.int64, device=device
        )  # last column: summands that did not fit
        self.limit = 2.0**42 / summands

    def clear(self) -> None:
        """Back to zero."""
        self.total.zero_()

    def add(self, values: Tensor) -> None:
        """One more summand: a vector [length]."""
        values = values.double()
        fits = (values.abs() < self.limit).all()  # False for NaN too
        values = torch.where(fits, values, 0.0)
        coarse = (values * self.COARSE).round_()
        fine = ((values - coarse / self.COARSE) * self.FINE).round_()
        self.total[0, :-1] += coarse.to(torch.int64)
        self.total[1, :-1] += fine.to(torch.int64)
        self.total[0, -1] += (~fits).to(torch.int64)

    def over(self, group: WorkerGroup) -> Tensor:
        """The sum over all workers' summands, float64; NaN throughout if one did not fit."""
        coarse, fine = group.all_reduce(self.total).double()
        value = coarse[:-1] / self.COARSE + fine[:-1] / self.FINE
        return torch.where(coarse[-1] == 0, value, torch.nan)
