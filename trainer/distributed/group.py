"""The group of workers that train one recipe together: who is who, and how they talk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from data_echo import DataError
from trainer.errors import RunFailed, UserError, trace_of

CPU = torch.device("cpu")
T = TypeVar("T")


class Failure(NamedTuple):
    """What went wrong on a worker, as text that travels."""

    reason: str
    trace: str


@dataclass(frozen=True)
class WorkerGroup:
    """One worker's view of its group. Alone (size 1) it needs no process group and every collective does
    nothing.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    is_ours: bool = False  # whether `join` set torch.distributed up, and `leave` is to take it down

    @classmethod
    def join(cls, device: str = "auto") -> WorkerGroup:
        """The group this process belongs to: torch.distributed's where a Ray worker has set it up, torchrun's
        where its environment variables say so, otherwise a group of one. `device` is "auto" (a GPU where
        there is one), "cpu" or "cuda".
        """
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        chosen = _device(device, local_rank)
        told = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        is_ours = told and not dist.is_initialized() and int(os.environ["WORLD_SIZE"]) > 1
        if is_ours:
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        if not dist.is_initialized():
            return cls(device=chosen)
        return cls(dist.get_rank(), dist.get_world_size(), chosen, is_ours)

    def leave(self) -> None:
        """Undo what `join` did: the process group's threads must have ended before the process does."""
        if self.is_ours and dist.is_initialized():
            dist.destroy_process_group()

    @classmethod
    @contextmanager
    def joined(cls, device: str = "auto") -> Iterator[WorkerGroup]:
        """As `join`, for as long as the body runs."""
        group = cls.join(device)
        try:
            yield group
        finally:
            group.leave()

    def owns(self, lane: int) -> bool:
        """Whether this worker serves a lane of the data stream."""
        return lane % self.size == self.rank

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, in place, becomes its sum over all workers."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_async(self, tensor: torch.Tensor) -> dist.Work | None:
        """As `all_reduce`, in the background: wait on what is returned before reading the tensor."""
        return dist.all_reduce(tensor, async_op=True) if self.size > 1 else None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every worker. Small picklable things only; they come from the same run."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=CPU)
        return box[0]

    def all_gather(self, value: T) -> list[T]:
        """Every worker's `value`, by rank, on every worker. As `broadcast`: small picklable things of this
        run.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def raise_on_all(self, what: str) -> Iterator[None]:
        """What is done here may fail on one worker alone. If it does, all of them raise RunFailed with its
        reason, and none is left waiting for one that is gone.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        told = self.first_failure(failure)
        if told is not None:
            raise RunFailed(f"{what}: {told.reason}", told.trace) from failure

    def first_failure(self, failure: Exception | None) -> Failure | None:
        """The first worker's failure, on every worker; None if nobody has any."""
        own = None if failure is None else Failure(_text(failure), trace_of(failure))
        return next((told for told in self.all_gather(own) if told is not None), None)


def _text(failure: Exception) -> str:
    speaks_for_itself = isinstance(failure, DataError | UserError | RunFailed)
    return str(failure) if speaks_for_itself else f"{type(failure).__name__}: {failure}"


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return CPU
    index = local_rank % max(torch.cuda.device_count(), 1)  # Ray shows each worker its own GPU only
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
