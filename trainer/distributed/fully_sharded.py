"""A model spread over the workers by torch's `fully_shard` (FSDP2): each holds its rows of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.engine.fixed_point import numbers, square_sum
from trainer.distributed.fixed_point import FixedPointSum
from trainer.distributed.group import WorkerGroup


class FullySharded:
    """Weights, gradients and the optimizer's state in parts. A unit's layers are gathered for its forward
    and for its backward pass; then the sum of its gradients over the workers is scattered.

    So a pass is done by all workers together: one that has nothing left to compute joins in with a
    micro-batch of weight 0.

    Args:
        model: not spread yet.
        statistics: the length of the vector that is summed with the gradients.
    """

    is_spread = saves_together = True

    def __init__(self, group: WorkerGroup, model: nn.Module, statistics: int):
        self.group, self.model = group, model
        self.statistics = torch.zeros(statistics, dtype=torch.float64, device=group.device)

    def wrap(self, units: Sequence[str], averages: Sequence[nn.Module]) -> None:
        """Spread the model, and averages of it in the same way. From here on its parameters are DTensors.

        Args:
            units: names of the modules that are gathered each by itself; the rest is one unit more.
        """
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(self.group.device.type, (self.group.size,))
        for model in (self.model, *averages):
            _spread(model, units, mesh)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def gradients(self) -> list[Tensor]:
        """What lies here of each gradient: 0 of those that no pass has made, which take part as they do where
        the model is not spread.
        """
        trained = self.trained
        for p in trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [_here(p.grad) for p in trained]

    def begin(self) -> None:
        """A step starts: nothing is summed yet."""
        self.statistics.zero_()

    def begin_pass(self, is_last: bool) -> None:
        """Each pass sends its gradients, whether it is the last or not."""

    def add(self, statistics: Tensor) -> None:
        """A backward pass is done; its statistics (1-D, float64) join the sum."""
        self.statistics += statistics

    def finish(self) -> tuple[Tensor, Tensor]:
        """Sum over the workers: the statistics, and the squares of all gradients."""
        squares = torch.stack([g.double().square().sum() for g in self.gradients()]).sum()
        both = self.group.all_reduce(torch.cat([self.statistics, squares.view(1)]))
        return both[:-1], both[-1:]

    def is_finite(self) -> bool:
        """Whether every parameter is, on every worker."""
        ours = all(bool(_here(p).isfinite().all()) for p in self.trained)
        return not self.group.all_reduce(torch.tensor(float(not ours), device=self.group.device)).item()

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """The whole weights on every worker, so that each can run `model` by itself."""
        modules = _units(model)
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(module is not model, recurse=False)
                module.reshard()

    def gathered(self, value: Any) -> Any:
        """A state with its tensors whole, on rank 0; all workers take part."""
        return gathered(value, self.group)


class ExactlySharded(FullySharded):
    """As `FullySharded`, with gradients, statistics and norms summed in integers: the bits of one worker.

    Args:
        micro_batches: the most of a step.
    """

    def __init__(self, group: WorkerGroup, model: nn.Module, statistics: int, micro_batches: int):
        super().__init__(group, model, statistics)
        self.sums = FixedPointSum(statistics, micro_batches, group.device)
        self.micro_batches, self.scatters = micro_batches, list[_IntegerScatter]()

    def wrap(self, units: Sequence[str], averages: Sequence[nn.Module]) -> None:
        super().wrap(units, averages)
        for module in _units(self.model):
            self.scatters.append(_IntegerScatter(self.micro_batches))
            module.set_custom_reduce_scatter(self.scatters[-1])

    def begin(self) -> None:
        self.sums.clear()
        for scatter in self.scatters:
            scatter.total = None

    def begin_pass(self, is_last: bool) -> None:
        for p in self.trained:
            p.grad = None  # each pass leaves the sum of all so far

    def add(self, statistics: Tensor) -> None:
        self.sums.add(statistics)

    def finish(self) -> tuple[Tensor, Tensor]:
        squares = self.group.all_reduce(square_sum(self.gradients()))
        return self.sums.over(self.group), numbers(squares).view(1)


class _IntegerScatter:
    """Sums a unit's gradients over workers and passes in fixed point, in place of FSDP2's own way."""

    def __init__(self, summands: int):
        self.summands = summands
        self.total: Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what is scattered, and for what comes back."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Put into the output what lies here of the sum of all inputs so far."""
        workers = input_tensor.numel() // output_tensor.numel()
        whole = FixedPointSum(input_tensor.numel(), self.summands, input_tensor.device)
        whole.add(input_tensor)
        parts = whole.total[:, :-1].view(len(whole.STEPS), workers, -1).transpose(0, 1)
        misfits = whole.total[:, -1:].expand(workers, -1, -1)
        sent = torch.cat([parts, misfits], 2)
        mine = torch.empty_like(sent[0])
        dist.reduce_scatter_tensor(mine.view(-1), sent.view(-1), group=group)
        self.total = mine if self.total is None else self.total + mine
        output_tensor.copy_(FixedPointSum.value(self.total))


def gathered(value: Any, group: WorkerGroup) -> Any:
    """A state with its tensors whole, on rank 0; all workers take part."""
    if isinstance(value, dict):
        return {key: gathered(item, group) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, group) for item in value)
    if not hasattr(value, "full_tensor"):
        return value
    whole = value.full_tensor().detach()
    return whole.cpu() if group.rank == 0 else None


def scattered(value: Any, p: Any) -> Any:
    """What a whole tensor like a parameter becomes where the parameter is spread: spread as it is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(p, DTensor) and isinstance(value, Tensor) and value.shape == p.shape:
        value = value.to(p.device)
        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
    return value


def _here(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x


def _units(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _spread(model: nn.Module, units: Sequence[str], mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    for name in units:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in _units(
        model
    ):  # on every one: set on the root alone, sums would silently be means elsewhere
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        module.set_reduce_scatter_unused_params(True)
