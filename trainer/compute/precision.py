"""The precision of forward and backward passes: autocast, and the scale that fp16 gradients need.

Weights, their gradients and the update stay float32; autocast computes in the smaller type where torch holds
that to be safe.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch

# torch.amp.GradScaler's defaults, whose factors are 2 and 1/2
START, GROWTH_STEPS = 2.0**16, 2000
LARGEST = 2.0**32  # far above what any gradient that is not zero leaves room for

SAME_GRADIENT = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
"""How far, relative to its size, a gradient moves at most when the same sums are taken in another order.
Examples that interact move it by far more."""


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where forward passes run."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


@dataclass
class LossScale:
    """What losses are multiplied by before the backward pass, so that small gradients do not vanish in fp16.

    Micikevicius et al. 2018 (arXiv:1710.03740), with the rule of torch.amp.GradScaler: a gradient that is not
    finite costs the update and halves the scale, 2000 updates in a row double it. Deviations: the loss of a
    task is a sum, so the scale of a mean is divided by the examples of a micro-batch, rounded up to a power
    of two (a scale that is one changes no digit); and it does not fall below that of an unscaled mean, where
    no scale would help.

    Without arguments it is the scale of the other precisions, 1, and stays there.
    """

    value: float = 1.0
    least: float = 1.0
    most: float = 1.0
    steady: int = 0  # updates since it last changed
    skipped: int = 0  # updates that it has cost

    @classmethod
    def of(cls, precision: str, micro: int) -> LossScale:
        """The scale at the start of a run with micro-batches of `micro` examples."""
        if precision != "fp16":
            return cls()
        unscaled = 2.0 ** -math.ceil(math.log2(micro))
        return cls(START * unscaled, unscaled, LARGEST * unscaled)

    def rise(self) -> None:
        """An update was made."""
        self.steady += 1
        if self.steady >= GROWTH_STEPS:
            self.value, self.steady = min(2 * self.value, self.most), 0

    def fall(self) -> bool:
        """The gradient was not finite, so there is no update. False if the scale cannot be what is wrong."""
        if self.value <= self.least:
            return False
        self.value, self.steady, self.skipped = self.value / 2, 0, self.skipped + 1
        return True
