"""One stage of a rule: a function in the paper's letters, together with what an engine must know to run it."""

import inspect
from collections import namedtuple
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, float32, float64

Values = dict[str, Tensor]
Function = Callable[..., Values]


def compute_dtype(tensor: Tensor) -> Any:
    """The dtype in which a parameter's mathematics and state are kept: float32, or float64 for float64 parameters."""
    return float64 if tensor.dtype == float64 else float32


class Stage:
    """A function of parameters' numbers `f(h, p, g, …) -> {name: values}`.

    `takes` names its arrays, `sums` those of its results that are summed over each layer; all other results are written
    into the arrays of their names. `mentions` are the attributes that its source reads: which numbers of `h` it needs.
    """

    def __init__(self, function: Function, sums: tuple[str, ...]) -> None:
        self.function = function
        self.takes = _arguments(function)
        self.sums = sums
        self.mentions = frozenset(function.__code__.co_names)

    def run(
        self, arrays: Mapping[str, Tensor | None], numbers: Mapping[str, Any], over_rows: bool
    ) -> list[Tensor]:
        """Work on one piece and return its sums: one per row, or one for the whole piece.

        Arrays are read as float32 (float64 for float64 parameters) and written in their own dtype. The gradient is only
        read.
        """
        inputs = {name: _widened(arrays[name]) for name in self.takes}
        if numbers["maximize"] and "g" in inputs:
            inputs["g"] = -inputs["g"]
        h = _numbers_type(tuple(numbers))(**numbers)
        values = self.function(h, *inputs.values())
        for name, value in values.items():
            if name not in self.sums:
                arrays[name].copy_(value)
        return [values[name].sum(-1) if over_rows else values[name].sum() for name in self.sums]


def stages_of(
    functions: tuple[Function, ...], layer_states: tuple[str, ...]
) -> list[tuple[Stage, Function | None]]:
    """Pair each function of numbers with the function of layers that follows it."""
    pairs = []
    for at in range(0, len(functions), 2):
        judge = functions[at + 1] if at + 1 < len(functions) else None
        asked = _arguments(judge) if judge else ()
        pairs.append((Stage(functions[at], tuple(name for name in asked if name not in layer_states)), judge))
    return pairs


@cache
def _numbers_type(names: tuple[str, ...]) -> Any:
    return namedtuple("h", names)  # noqa: PYI024 (the names are known only here)


def _arguments(function: Function) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)[1:]


def _widened(array: Tensor | None) -> Tensor | None:
    return None if array is None else array.to(compute_dtype(array))
