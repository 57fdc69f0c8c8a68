"""Batch norm whose statistics belong to the recipe: over micro-batches (or smaller groups), never over "what
a worker got".

Running statistics move once per step, from the mean over all groups of the step on all workers, so they are
the same on any number of workers (Goyal et al. 2017, arXiv:1706.02677, keep them per worker; Hoffer et al.
2017, arXiv:1705.08741, name the normalisation over small groups "ghost batch norm").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class GroupBatchNorm(nn.Module):
    """Stands for a `torch.nn.BatchNorm*d`: same parameters, buffers and names, so state dictionaries stay
    what they were.

    In training, `groups` equal runs of examples are each normalised by their own statistics, which are also
    summed in `statistics` ([mean, unbiased variance, number of groups], float64) until `BatchNorms.move`
    spends them.
    """

    def __init__(self, norm: _BatchNorm, device: torch.device):
        super().__init__()
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean: Tensor | None
        self.running_var: Tensor | None
        self.num_batches_tracked: Tensor | None
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))
        self.groups = 1
        self.statistics: Tensor | None = None  # a view into BatchNorms.statistics
        self._latest = torch.zeros(2, norm.num_features, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [examples, features, ...]."""
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.groups == 1 or not self.training:  # evaluation knows nothing of how passes are stacked
            return self._normalise(x)
        return torch.cat([self._normalise(group) for group in x.chunk(self.groups)])

    def _normalise(self, x: Tensor) -> Tensor:
        # With momentum 1 torch leaves exactly this group's mean and unbiased variance in the "running"
        # buffers.
        mean, variance = self._latest
        out = F.batch_norm(
            x, mean, variance, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps
        )
        if self.statistics is not None and self.training:
            self.statistics[:-1] += self._latest.flatten()
            self.statistics[-1] += 1
        return out

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class BatchNorms:
    """All batch norms of a model, with one vector of statistics that travels in the step's single small
    reduction.
    """

    def __init__(self, model: nn.Module, device: torch.device, groups_per_micro_batch: int = 1):
        """Replace every batch norm in `model` (which lives on `device`), in place. With
        `groups_per_micro_batch` > 1 each micro-batch is cut in that many equal groups (the recipe's
        `batch.bn_group`).
        """
        self.groups_per_micro_batch = groups_per_micro_batch
        self.norms = _replace_all(model, device)
        self.widths = [2 * norm.num_features + 1 for norm in self.norms]
        self.statistics = torch.zeros(sum(self.widths), dtype=torch.float64, device=device)
        for norm, view in zip(self.norms, self.statistics.split(self.widths), strict=True):
            norm.statistics = view

    def stack(self, micro_batches: int) -> None:
        """The next forward pass holds this many micro-batches, one after the other."""
        for norm in self.norms:
            norm.groups = micro_batches * self.groups_per_micro_batch

    def clear(self) -> None:
        """Forget the statistics of the forward passes so far."""
        self.statistics.zero_()

    @torch.no_grad()
    def move(self, sums: Tensor, pace: float) -> None:
        """Move the running statistics once, towards the mean over all of a step's groups.

        `sums` is the vector of statistics summed over the step and all workers; `pace` is the step's batch in
        units of the batch at the start (a batch grown twofold moves them as two steps would: 1 - (1 -
        momentum)^2).
        """
        for norm, total in zip(self.norms, sums.split(self.widths), strict=True):
            if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
                continue
            seen = (total[-1] > 0).to(torch.int64)  # a tensor: a GPU is not waited for
            mean, variance = (total[:-1] / total[-1].clamp(min=1)).view(2, -1).to(norm.running_mean.dtype)
            norm.num_batches_tracked += seen
            if norm.momentum is None:
                move = seen / norm.num_batches_tracked.clamp(min=1)
            else:
                move = seen * (1 - (1 - norm.momentum) ** pace)
            norm.running_mean += move * (mean - norm.running_mean)
            norm.running_var += move * (variance - norm.running_var)


def _replace_all(model: nn.Module, device: torch.device) -> list[GroupBatchNorm]:
    """The model's norms, in order; those that were replaced before (in a copy of a model) are taken as they
    are.
    """
    replacement: dict[_BatchNorm, GroupBatchNorm] = {}  # a norm that stands in two places stays one norm
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm):
                replacement.setdefault(child, GroupBatchNorm(child, device))
                setattr(parent, name, replacement[child])
    return [module for module in model.modules() if isinstance(module, GroupBatchNorm)]
