"""Activation checkpointing: blocks of the model that keep their inputs only, and compute the rest again in
the backward pass (Chen et al. 2016, arXiv:1604.06174).

Random draws are repeated as they were, and batch-norm statistics count once, so nothing that is computed
changes.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from trainer.compute.batch_norm import GroupBatchNorm


class _CheckpointedBlock(nn.Module):
    """Comes before a block's own class. A class, and no new `forward` on the block, so that copies of the
    model are copies in this too.
    """

    def forward(self, *arguments: Any, **named: Any) -> Any:
        forward = super().forward
        if not is_grad_enabled():
            return forward(*arguments, **named)
        contexts = partial(_contexts, self)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **named)


def blocks(model: nn.Module, wanted: bool | Sequence[str]) -> list[str]:
    """Names of the blocks that `run.recompute` asks for: those that match its patterns; with true, the
    members of lists and sequences of the model that have siblings of their class, and parts.
    Blocks within blocks are left out.
    """
    names = [name for name, _ in model.named_modules() if name]
    repeated = set(_repeated(model)) if wanted is True else set()
    patterns = () if isinstance(wanted, bool) else wanted
    found = [name for name in names if name in repeated or any(fnmatch.fnmatch(name, p) for p in patterns)]
    return [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]


def checkpoint_activations(model: nn.Module, names: Sequence[str]) -> None:
    """Let these blocks of a model compute their activations again."""
    for name in names:
        block = model.get_submodule(name)
        kind = type(block)
        block.__class__ = type(kind.__name__, (_CheckpointedBlock, kind), {})


def _repeated(model: nn.Module) -> Iterator[str]:
    for name, parent in model.named_modules():
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            count = Counter(map(type, parent))
            for key, member in parent.named_children():
                if count[type(member)] > 1 and next(member.children(), None) is not None:
                    yield f"{name}.{key}" if name else key


def _contexts(block: nn.Module) -> tuple[Any, Any]:
    return nullcontext(), _uncounted(block)


@contextmanager
def _uncounted(block: nn.Module) -> Iterator[None]:
    """Batch norms in `block` leave no statistics: the first time, they did."""
    norms = [module for module in block.modules() if isinstance(module, GroupBatchNorm)]
    statistics = [norm.statistics for norm in norms]
    for norm in norms:
        norm.statistics = None
    try:
        yield
    finally:
        for norm, kept in zip(norms, statistics, strict=True):
            norm.statistics = kept
