"""Averages of a model's weights along its training, over torch's `AveragedModel`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn


class Average(AveragedModel):
    """A copy of a model that holds the average of its weights; call `update_parameters(model)` after each
    step.

    `decay` β gives an exponential average, avg = β avg + (1 - β) w; None the arithmetic mean of all updates
    (SWA, Izmailov et al. 2018, arXiv:1803.05407). The first update copies. Weights in bf16 or fp16 are
    averaged in fp32: with β = 0.999 a bf16 average would never move. With `warmup` β is at most (1 + t) / (10
    + t) after t updates, so that the first weights are soon forgotten. Buffers are the model's;
    `reestimate_batch_norm` makes them the average's.
    """

    def __init__(self, model: nn.Module, decay: float | None = None, warmup: bool = False) -> None:
        if decay is not None and not 0.0 <= decay <= 1.0:
            raise ValueError(f"Invalid decay value: {decay}")

        def blend(averages: Sequence[Tensor], weights: Sequence[Tensor], updates: Any) -> None:
            t = int(updates)
            if decay is None:
                share = 1 / (t + 1)
            else:
                share = 1 - (min(decay, (1 + t) / (10 + t)) if warmup else decay)
            widened = [w.to(a.dtype) for a, w in zip(averages, weights, strict=True)]
            torch._foreach_lerp_(list(averages), widened, share)

        super().__init__(model, multi_avg_fn=blend)
        for p in self.module.parameters():
            if p.dtype in (torch.bfloat16, torch.float16):
                p.data = p.data.float()

    def reestimate_batch_norm(self, batches: Iterable[Any]) -> None:
        """Replace the running statistics by those of the averaged weights, over one pass of inputs."""
        update_bn(batches, self.module)


def ema(model: nn.Module, decay: float = 0.999, warmup: bool = False) -> Average:
    """An exponential moving average of a model's weights."""
    return Average(model, decay, warmup)


def swa(model: nn.Module) -> Average:
    """The arithmetic mean of a model's weights over all updates."""
    return Average(model)
