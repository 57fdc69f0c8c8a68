"""An optimizer whose state is spread over workers that each hold the whole model (ZeRO 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from optim.engine.shards import rows_of_worker
from optim.flat import FlatBuffers
from trainer.distributed.group import WorkerGroup


class ShardedOptimizer:
    """Updates this worker's rows of every parameter, and gets the others' from those that updated them.

    The rows are those that torch's `fully_shard` would leave here, as DTensors over the whole parameters'
    memory: the optimizer of the parts knows of no other way of being spread. Parameters of no dimension are
    everybody's.

    Args:
        groups: of whole parameters, which move into flat buffers with their gradients.
        make: gives an optimizer of groups.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        group: WorkerGroup,
    ):
        self.group, self.flat = group, FlatBuffers(p for each in groups for p in each["params"])
        self._mesh = init_device_mesh(group.device.type, (group.size,))
        homes = zip(self.flat.held, self.flat.homes, strict=True)
        parts = {p: (nn.Parameter(self._part(weight)), self._part(g)) for p, (weight, g) in homes}
        self._parts = list(parts.values())
        self.optimizer = make([{**each, "params": [parts[p][0] for p in each["params"]]} for each in groups])
        cut = [weight for weight, _ in self.flat.homes if weight.dim()]
        self._pieces = [
            [
                [w[rows_of_worker(len(w), rank, group.size)] for w in cut if w.dtype == dtype]
                for rank in range(group.size)
            ]
            for dtype in {w.dtype for w in cut}
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the parts."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Zero the whole gradients."""
        self.flat.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Update the parts, then send them: one message for each dtype."""
        for part, gradient in self._parts:
            part.grad = gradient
        self.optimizer.step()
        for pieces in self._pieces:
            self._exchange(pieces)

    def state_dict(self) -> dict[str, Any]:
        """That of the parts, whose tensors are DTensors."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.optimizer.load_state_dict(state)

    def _part(self, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        whole = whole.detach()
        if not whole.dim():
            return DTensor.from_local(whole, self._mesh, [Replicate()], run_check=False)
        part = whole[rows_of_worker(len(whole), self.group.rank, self.group.size)]
        return DTensor.from_local(
            part, self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    def _exchange(self, pieces: Sequence[Sequence[Tensor]]) -> None:
        """Send this worker's of the pieces of each worker, and receive all others."""
        rank, sizes = self.group.rank, [sum(x.numel() for x in each) for each in pieces]
        sent = pieces[0][0].new_zeros(max(sizes))
        sent[: sizes[rank]] = torch.cat([x.reshape(-1) for x in pieces[rank]])
        received = sent.new_empty(self.group.size * len(sent))
        dist.all_gather_into_tensor(received, sent)
        for other, (each, line) in enumerate(zip(pieces, received.view(self.group.size, -1), strict=True)):
            if other != rank:
                lines = line[: sizes[other]].split([x.numel() for x in each])
                torch._foreach_copy_(list(each), [v.view(x.shape) for v, x in zip(lines, each, strict=True)])
