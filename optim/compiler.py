"""Stages compiled by inductor, and what runs where there is no compiler."""

import warnings
from typing import Any

import torch
from torch import Tensor

from optim.pieces import BLOCK_ROWS, Arrays, Piece
from optim.stage import Stage


def has_compiler(device: torch.device) -> bool:
    """Whether inductor can compile for this device: a C++ compiler for CPUs, Triton for GPUs."""
    import torch._dynamo  # dear to import: only for those who compile

    if torch._dynamo.config.disable:
        return False
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True


class CompiledStage:
    """A stage compiled once for tables with any number of rows; in blocks of rows where compiling fails."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._run: Any = torch.compile(stage.run)

    def run(self, h: Any, arrays: Arrays) -> list[Tensor]:
        """The sums of each row."""
        if self._run is not None:
            try:
                return self._run(h, arrays, by_row=True)
            except Exception as error:  # the compiler's own failures have no common type
                warnings.warn(f"optim: compiling failed, going on in blocks of rows: {error}", stacklevel=2)
                self._run = None
        return in_blocks(self._stage, h, arrays)


def expect_any_rows(piece: Piece, h: Any) -> None:
    """Tell the compiler that the number of rows varies, so that it compiles once for all."""
    import torch._dynamo

    for x in (*piece.arrays.values(), *h):
        if isinstance(x, Tensor):
            torch._dynamo.mark_dynamic(x, 0)


def in_blocks(stage: Stage, h: Any, arrays: Arrays) -> list[Tensor]:
    """A table's sums of each row, worked out in blocks of rows that fit into a core's cache."""
    found = []
    for start in range(0, len(arrays["g"]), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        h_part = h._make(x[part] if isinstance(x, Tensor) else x for x in h)
        found.append(stage.run(h_part, {name: x[part] for name, x in arrays.items()}, by_row=True))
    return [torch.cat(sums) for sums in zip(*found, strict=True)]
