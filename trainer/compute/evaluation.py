"""Metrics over a whole split, its examples divided among the workers, each counted exactly once."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from data_echo import Preparer, PrepareRequest, generators
from trainer.distributed.group import WorkerGroup
from trainer.task import Task

ORDERS_AHEAD = 4
KEPT_BYTES = 256 << 20  # prepared examples kept per worker from one evaluation to the next


class Evaluation:
    """One split's examples, cut in blocks that belong to the workers in turn. Blocks do not depend on how
    many workers there are, and their sums are added without rounding, so results are the same bits too.

    Args:
        moved: told of each block that is done.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        examples: int,
        block: int,
        preparer: Preparer,
        group: WorkerGroup,
        moved: Callable[[], None] = lambda: None,
    ):
        self.moved = moved
        self.task, self.split, self.preparer, self.group = task, split, preparer, group
        self.blocks = -(-examples // block)
        self.mine = [
            np.arange(i * block, min((i + 1) * block, examples))
            for i in range(group.rank, self.blocks, group.size)
        ]
        self.kept: list[dict[str, np.ndarray]] = []

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean of each of the task's metrics, and of its loss, with the model in evaluation mode."""
        was_training = model.training
        model.eval()
        sums: dict[str, list[Tensor]] = {}
        with self.group.raise_on_all(f"evaluating {self.split}"), torch.inference_mode():
            for number, block in enumerate(self._prepared()):
                generators.seed("evaluation", self.split, self.group.rank + number * self.group.size)
                batch = {key: torch.tensor(value, device=self.group.device) for key, value in block.items()}
                for name, (total, count) in self._metrics(model, batch).items():
                    sums.setdefault(name, []).append(self._pair(total, count))
                self.moved()
        model.train(was_training)
        return self._means(sums)

    def rehearse(self, model: nn.Module) -> list[str]:
        """The names of the metrics, from one block that is evaluated ahead of time. The buffers and
        generators that this may move are put back.
        """
        names: list[str] = []
        with self.group.raise_on_all(f"trying {self.split}"), _undisturbed(model):
            if self.mine:
                index = self.mine[0]
                request = PrepareRequest(self.split, np.zeros_like(index), index)
                block = self.preparer.collect(self.preparer.submit(request))
                if not self.kept and sum(value.nbytes for value in block.values()) <= KEPT_BYTES:
                    self.kept.append(block)
                batch = {key: torch.tensor(value, device=self.group.device) for key, value in block.items()}
                names = sorted(self._metrics(model, batch))
        return self.group.broadcast(names)

    def _metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        metrics = self.task.metrics(model, batch)
        return metrics if "loss" in metrics else {"loss": self.task.loss(model, batch), **metrics}

    def _pair(self, total: Tensor, count: Tensor) -> Tensor:
        return torch.stack([torch.as_tensor(x, device=self.group.device).double() for x in (total, count)])

    def _means(self, sums: dict[str, list[Tensor]]) -> dict[str, float]:
        own = {name: torch.stack(pairs).tolist() for name, pairs in sums.items()}
        of_all = self.group.all_gather(own)  # a worker with no block of its own still takes part
        means = {}
        for name in sorted(set().union(*of_all)):
            pairs = [pair for each in of_all for pair in each.get(name, [])]
            total, count = map(_sum, zip(*pairs, strict=True))
            means[name] = total / count if count else math.nan
        return means

    def _prepared(self) -> Iterator[dict[str, np.ndarray]]:
        """This worker's blocks, prepared: from memory where they fit there, otherwise ordered a few at a
        time.
        """
        yield from self.kept
        kept_bytes = sum(value.nbytes for block in self.kept for value in block.values())
        coming: deque[object] = deque()
        for number in range(len(self.kept), len(self.mine) + ORDERS_AHEAD):
            if number < len(self.mine):
                index = self.mine[number]
                coming.append(self.preparer.submit(PrepareRequest(self.split, np.zeros_like(index), index)))
            if coming and (len(coming) > ORDERS_AHEAD or number >= len(self.mine)):
                block = self.preparer.collect(coming.popleft())
                kept_bytes += sum(value.nbytes for value in block.values())
                if kept_bytes <= KEPT_BYTES:
                    self.kept.append(block)
                yield block


def _sum(values: Sequence[float]) -> float:
    """The sum, rounded once: the same in any order."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):  # beyond all floats, or infinities of both signs
        return sum(values)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; its modes, its buffers and all generators are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        with generators.untouched(), torch.inference_mode():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for owner, name, buffer, value in buffers:
            setattr(owner, name, buffer.copy_(value))
