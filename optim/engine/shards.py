"""Layers that are spread over workers: which part of each lies here, and what completes their sums."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optim.flat import is_dtensor

Reduce = Callable[[Tensor, str], None]
"""Completes a vector in place: `reduce(vector, "sum")` or `reduce(vector, "max")`, over all workers."""


@dataclass(frozen=True, slots=True)
class LayerShard:
    """The numbers [start, stop) of the row-major layer of this shape lie here: whole slices of its first
    dimension, perhaps none. `group` is the process group that holds the rest, where torch knows it.

    What a rule keeps of a layer is cut with it where it has the layer's length, and otherwise is the whole
    layer's on every worker.
    """

    shape: torch.Size
    start: int
    stop: int
    group: Any = None

    @property
    def rows(self) -> slice:
        """The slices of the first dimension that lie here."""
        inner = max(1, math.prod(self.shape[1:]))
        return slice(self.start // inner, self.stop // inner)

    def cuts(self, shape: Sequence[int]) -> bool:
        """Whether an array of the layer, of this shape, is cut as the layer is."""
        return len(shape) > 0 and shape[0] == self.shape[0]

    def here(self, shape: Sequence[int]) -> torch.Size:
        """The shape of what lies here of an array of the layer."""
        rows = self.rows
        return torch.Size((rows.stop - rows.start, *shape[1:]) if self.cuts(shape) else shape)

    def part(self, whole: Tensor) -> Tensor:
        """What lies here of an array of the layer."""
        return whole[self.rows] if self.cuts(whole.shape) else whole

    @property
    def is_elsewhere(self) -> bool:
        """Whether the layer is one slice that lies whole on another worker."""
        return self.shape[0] == 1 and self.start == self.stop

    def crosses(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape joins numbers of several workers."""
        return self.shape[0] != 1 and shape[0] == 1


def local(x: Any) -> Tensor:
    """What lies here of a tensor: all of it, unless it is a DTensor."""
    return x.to_local() if is_dtensor(x) else x


def local_gradient(p: Any) -> Tensor:
    """What lies here of a parameter's gradient, cut as the parameter is."""
    g = p.grad
    if is_dtensor(g) and g.placements != p.placements:
        g = g.redistribute(p.device_mesh, p.placements)
    return local(g)


def shard_of(p: Any) -> LayerShard | None:
    """The part of a layer that a DTensor holds here; None for whole layers.

    Raises:
        ValueError: it is cut in another way than along its first dimension, over one dimension of its mesh.
    """
    if not is_dtensor(p):
        return None
    cut = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not cut:
        return None
    if len(cut) > 1 or not _is_plain_shard(p.placements[cut[0]]):
        raise ValueError(
            f"a parameter of shape {tuple(p.shape)} is placed as {p.placements}; layers may be cut along "
            "their first dimension, over one dimension of the mesh (fully_shard does so)"
        )
    workers, rank = p.device_mesh.size(cut[0]), p.device_mesh.get_local_rank(cut[0])
    rows, inner = rows_of_worker(p.shape[0], rank, workers), math.prod(p.shape[1:])
    return LayerShard(p.shape, rows.start * inner, rows.stop * inner, p.device_mesh.get_group(cut[0]))


def rows_of_worker(length: int, rank: int, workers: int) -> slice:
    """The slices of a dimension that torch leaves a worker: equally many as far as they go."""
    size = -(-length // workers)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


def _is_plain_shard(placement: Any) -> bool:
    from torch.distributed.tensor import Shard

    return type(placement) is Shard and placement.dim == 0


def as_dtensor(part: Tensor, p: Any, shard: LayerShard, shape: torch.Size) -> Tensor:
    """What lies here of a state of `shape`, as the DTensor that it is with the other workers' parts."""
    if shard.group is None or not shard.cuts(shape):
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def whole_or_part(value: Tensor, p: Any, shard: LayerShard, shape: torch.Size) -> Tensor:
    """What lies here of a loaded state that is to have `shape` in the whole layer.

    Raises:
        ValueError: it has another shape.
    """
    given: Any = value
    if is_dtensor(given) and given.shape == shape:
        if shard.cuts(shape) and given.placements != p.placements:
            given = given.redistribute(p.device_mesh, p.placements)
        return local(given)
    if given.shape == shape:
        return shard.part(given)
    if shard.group is None and given.shape == shard.here(shape):
        return given  # of a state_dict() of parts that are no DTensors
    raise ValueError(
        f"a loaded state has shape {tuple(given.shape)}, where the whole layer's has {tuple(shape)}; load "
        "what state_dict() gave, or whole tensors"
    )


def completion(shards: Iterable[LayerShard | None], reduce: Reduce | None) -> Reduce | None:
    """What completes the sums of these layers: `reduce` where it is given, else their process group.

    Raises:
        ValueError: there is none or more than one, or nothing to complete.
    """
    cut = [shard for shard in shards if shard is not None]
    if reduce is not None:
        if not cut:
            raise ValueError(
                "`reduce` is set, but no layer is known to be cut; set `shards` too: {parameter: LayerShard}"
            )
        return reduce
    groups = {id(shard.group): shard.group for shard in cut}
    if len(groups) > 1:
        raise ValueError("layers are spread over several meshes; give each an optimizer of its own")
    if None in groups.values():
        raise ValueError(
            "`shards` says that layers are cut, but nothing completes their sums; set "
            "`reduce(vector, 'sum' | 'max')`, which completes a vector over the workers in place"
        )
    return _over(next(iter(groups.values()))) if groups else None


def _over(group: Any) -> Reduce:
    import torch.distributed as dist

    def reduce(vector: Tensor, how: str) -> None:
        dist.all_reduce(vector, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM, group)

    return reduce


def complete(reduce: Reduce, how: str, vectors: Sequence[Tensor]) -> None:
    """Complete arrays in place, as one vector of float64 or of integers, if there are any."""
    if not vectors:
        return
    joined = torch.cat([(x.double() if x.is_floating_point() else x).reshape(-1) for x in vectors])
    reduce(joined, how)
    for x, whole in zip(vectors, joined.split([x.numel() for x in vectors]), strict=True):
        x.copy_(whole.view(x.shape))


@contextmanager
def local_parts(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let an optimizer of torch's see, instead of DTensors, what lies here of them: parameters, gradients and
    states. Its rule must take each number by itself, as all of torch's that we build do.

    DTensors of small layers cost more than their arithmetic, lack kernels (fused ones, those of Rprop), and
    hold nothing that such a rule asks for.
    """
    groups = optimizer.param_groups
    wholes = [p for group in groups for p in group["params"]]
    if not any(is_dtensor(p) for p in wholes):
        yield
        return
    parts = {p: _part(p) for p in wholes}
    states, members = optimizer.state, [group["params"] for group in groups]
    held = {p: {name: local(x) for name, x in states[p].items()} for p in wholes if p in states}
    optimizer.state = defaultdict(dict, {parts[p]: state for p, state in held.items()})
    for group in groups:
        group["params"] = [parts[p] for p in group["params"]]
    try:
        yield
    finally:
        for group, params in zip(groups, members, strict=True):
            group["params"] = params
        moved, optimizer.state = optimizer.state, states
        for p, part in parts.items():
            if part in moved:
                states[p] = {name: _whole(x, part, p, states[p].get(name)) for name, x in moved[part].items()}


def _part(p: Any) -> nn.Parameter:
    part = nn.Parameter(local(p).detach(), requires_grad=p.requires_grad)
    part.grad = None if p.grad is None else local_gradient(p)
    return part


def _whole(value: Any, part: Tensor, p: Any, before: Any) -> Any:
    """A state of a part as one of the whole parameter: what it was before, where nothing has replaced it."""
    shard = shard_of(p)
    if shard is None or not isinstance(value, Tensor) or value.shape != part.shape:
        return value
    is_same = isinstance(before, Tensor) and local(before) is value
    return before if is_same else as_dtensor(value, p, shard, p.shape)
