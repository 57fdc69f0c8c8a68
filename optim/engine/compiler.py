"""Stages compiled by inductor, and what runs where there is no compiler."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from optim.engine.chunks import Arrays
from optim.engine.stage import Stage

Code = Callable[..., Any]

FRESH_ROWS = 32
"""Rows at once where every operation takes fresh memory, which costs more from some size on."""

ANY_SIZE_FROM = 4
"""From this size on a dimension is compiled for any size; taps of convolutions are compiled each."""


def has_compiler(device: torch.device) -> bool:
    """Whether inductor can compile for this device: a C++ compiler for CPUs, Triton for GPUs."""
    import torch._dynamo  # takes seconds to import: only for those who compile

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


@cache
def compiled(stage: Stage) -> "CompiledStage":
    """The compiled stage: one for all optimizers of a process."""
    return CompiledStage(stage)


class Call:
    """A call of compiled code that can be made again, with new gradients and numbers.

    The compiler's own way to its code asks each time whether the code fits, which takes as long as a layer of
    100,000 numbers. For the same arrays it is enough to have asked once.
    """

    def __init__(self, code: Code, inputs: Sequence[int | str], places: Sequence[int]) -> None:
        self._code, self._inputs, self._places = code, inputs, places

    def __call__(self, h: Mapping[str, Any], arrays: Arrays) -> list[Tensor]:
        values = {**arrays, **h}
        outputs = self._code(*[values[x] if isinstance(x, str) else x for x in self._inputs])
        return [outputs[place] for place in self._places]


class CompiledStage:
    """A stage compiled once for any number of rows; without compiler where compiling fails."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._made: list[tuple[Code, Sequence[Any], Sequence[Any]]] = []
        # The compiler counts its versions of a function by its code: each stage gets its own.
        code = Stage.run.__code__.replace(co_name=f"stage_{stage.function.__name__}")
        run = FunctionType(code, Stage.run.__globals__, closure=Stage.run.__closure__)
        run.__defaults__ = Stage.run.__defaults__
        self._run: Any = torch.compile(run, backend=self._noting)

    def run(self, h: Any, arrays: Arrays, by_row: bool) -> tuple[list[Tensor], Call | None]:
        """As `Stage.run`, with the call that does the same again, if there is one. A table (`by_row`) goes in
        blocks of rows where there is no compiler.
        """
        if self._run is not None:
            try:
                found = self._run(self._stage, h, arrays, by_row)
                return found, self._call(found, arrays | h._asdict())
            except Exception as error:  # the compiler's own failures have no common type
                warnings.warn(f"optim: compiling failed, going on without: {error}", stacklevel=2)
                self._run = None
            finally:
                self._made.clear()
        return in_blocks(self._stage, h, arrays) if by_row else self._stage.run(h, arrays), None

    def _noting(self, graph: Any, example: list[Any]) -> Code:
        """What torch calls to compile: inductor, whose code notes the calls that are made of it."""
        from torch._inductor.compile_fx import compile_fx

        code: Any = compile_fx(graph, example)

        def run(*inputs: Any) -> Any:
            outputs = code(*inputs)
            self._made.append((code, inputs, outputs))
            return outputs

        return run

    def _call(self, found: Sequence[Tensor], values: Mapping[str, Any]) -> Call | None:
        """The call that was just made; None where what it took cannot be told by its names."""
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        names = {id(x): name for name, x in tensors.items()}
        if len(self._made) != 1 or len(names) < len(tensors):
            return None
        code, inputs, outputs = self._made[0]
        places = {id(x): place for place, x in enumerate(outputs)}
        try:
            known = [x if isinstance(x, int) else names[id(x)] for x in inputs]
            return Call(code, known, [places[id(x)] for x in found])
        except KeyError:
            return None


def expect_any_size(arrays: Arrays, numbers: Iterable[Any], by_row: bool) -> None:
    """Tell the compiler what varies, so that it compiles once for all: the number of rows of tables, else all
    dimensions of whole tensors but small ones.
    """
    import torch._dynamo

    for x in (*arrays.values(), *(numbers if by_row else ())):
        for d, size in enumerate(x.shape if isinstance(x, Tensor) else ()):
            if d == 0 if by_row else size >= ANY_SIZE_FROM:
                torch._dynamo.mark_dynamic(x, d)


def in_blocks(stage: Stage, h: Any, arrays: Arrays) -> list[Tensor]:
    """A table's sums of each row, worked out in blocks of rows that fit into a core's cache."""
    found = []
    for start in range(0, len(arrays["g"]), FRESH_ROWS):
        part = slice(start, start + FRESH_ROWS)
        h_part = h._make(x[part] if isinstance(x, Tensor) else x for x in h)
        found.append(stage.run(h_part, {name: x[part] for name, x in arrays.items()}, by_row=True))
    return [torch.cat(sums) for sums in zip(*found, strict=True)]
