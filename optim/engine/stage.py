"""One stage of a rule: a function in the paper's letters, and what an engine must know to run it."""

import inspect
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Marginal, largest, total
from optim.engine.fixed_point import inner_product, integers

Function = Callable[..., Mapping[str, Any]]


SHORT = 2**16
"""Numbers up to which a plain inner product loses no digits that a pairwise sum would keep."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of a parameter's mathematics and state: float32, or float64 for float64 parameters."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def is_option(value: Any) -> bool:
    """Whether a hyperparameter steers the rule (a flag, a word, dimensions, None) and is no number in it."""
    return value is None or isinstance(value, (bool, str, tuple))


class Stage:
    """A function of parameters' numbers, `f(h, p, g, …) -> {name: values}`.

    `takes` names its arrays (a last argument `*mu` takes mu0, mu1, …), `sums` those of its results that are
    pairs of arrays, whose inner product is summed over each layer; all others are written into the arrays of
    their names. `mentions` are the attributes that its source reads: the numbers of `h`
    that it can need; `joins` says whether its marginals are sums ("sum") or maxima ("max"), if it has any.
    """

    def __init__(self, function: Function, sums: tuple[str, ...]) -> None:
        self.function = function
        self.takes = arguments(function)
        self.family = inspect.getfullargspec(function).varargs
        self.sums = sums
        self.is_of_lines = not {"p", "g"} & set(self.takes)
        """Whether it runs on what is known of rows and columns alone, once for each layer."""
        self.mentions = frozenset(_names_in(function, function.__code__)) | {"maximize"}
        marginals = {total.__name__: "sum", largest.__name__: "max"}
        self.joins = next((how for name, how in marginals.items() if name in self.mentions), None)

    def pick(self, numbers: Mapping[str, Any]) -> Any:
        """The `h` of this stage: of all numbers, those that it can need."""
        names = tuple(name for name in numbers if name in self.mentions)
        return _numbers_type(names)(*(numbers[name] for name in names))

    def run(
        self,
        h: Any,
        arrays: Mapping[str, Tensor],
        by_row: bool = False,
        goes_on: frozenset[str] = frozenset(),
        integers_of: dict[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """Work on one chunk and return its sums: of each row, or of the whole chunk.

        Arrays are read as float32 (float64 for float64 parameters) and written in their own dtype. The
        gradient is only read. Marginals of arrays in `goes_on` are joined with what stands there. With
        `integers_of` sums are integers (see `optim.engine.fixed_point`), and so are marginals that are sums,
        which are put there instead of into their arrays.
        """
        inputs = {name: self._read(arrays.get(name)) for name in self.asks_for(arrays)}
        if h.maximize and "g" in inputs:
            inputs["g"] = -inputs["g"]  # type: ignore[operator]
        values: Mapping[str, Any] = self.function(h, *inputs.values())
        if integers_of is None:
            sums = [_inner(values[name], by_row) for name in self.sums]
        else:
            sums = [inner_product(*values[name]) for name in self.sums]
        for name, value in values.items():
            if name in arrays and name not in self.sums:
                target = arrays[name]
                if isinstance(value, Marginal) and integers_of is not None and value.how == "sum":
                    integers_of[name] = _integers(value.of, target)
                elif isinstance(value, Marginal):
                    _join(target, value, name in goes_on)
                elif value is not target:
                    target.copy_(value)
        return sums

    def asks_for(self, arrays: Iterable[str]) -> list[str]:
        """The names of the function's arrays, in its order."""
        more = [] if self.family is None else [name for name in arrays if name.startswith(self.family)]
        return [*self.takes, *more]

    @staticmethod
    def _read(array: Tensor | None) -> Tensor | None:
        if array is None or array.dtype == compute_dtype(array):
            return array
        return array.to(compute_dtype(array))


def _integers(x: Tensor, target: Tensor) -> Tensor:
    """The sums of x over the dimensions in which the target has size 1, as integers."""
    sizes = zip(x.shape, target.shape, strict=True)
    dimensions = [d for d, (size, left) in enumerate(sizes, start=1) if left == 1 != size]
    found = integers(x)
    return found.sum(dimensions, keepdim=True) if dimensions else found


def _names_in(function: Function, code: CodeType) -> Iterator[str]:
    """The names that a function's source reads, with its comprehensions' and its module's functions'."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(function, constant)
    for name in code.co_names:
        other: Any = function.__globals__.get(name)
        follows = isinstance(other, FunctionType) and other is not function
        if follows and other.__module__ == function.__module__:
            yield from _names_in(other, other.__code__)


def _inner(pair: tuple[Tensor, Tensor], by_row: bool) -> Tensor:
    """The inner product, of each row or of everything."""
    a, b = pair
    if by_row:
        return (a * b).sum(-1)
    if torch.compiler.is_compiling():
        return (a * b).sum()
    a, b = a.reshape(-1), b.reshape(-1)
    if len(a) <= SHORT:
        return torch.dot(a, b)
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(SHORT), b.split(SHORT), strict=True)]).sum()


@cache
def stages_of(
    functions: tuple[Function | None, ...], layer_states: tuple[str, ...]
) -> list[tuple[Stage, Function | None]]:
    """Pair each function of numbers with the function of layers that follows it."""
    pairs = []
    for function, layerwise in zip(functions[::2], (*functions[1::2], None), strict=False):
        assert function is not None
        asked = arguments(layerwise) if layerwise else ()
        pairs.append((Stage(function, tuple(name for name in asked if name not in layer_states)), layerwise))
    return pairs


@cache
def arguments(function: Function) -> tuple[str, ...]:
    """The names that a rule's function takes after `h`."""
    return tuple(inspect.getfullargspec(function).args[1:])


@cache
def _numbers_type(names: tuple[str, ...]) -> Any:
    return namedtuple("h", names)


def _join(target: Tensor, marginal: Marginal, goes_on: bool) -> None:
    """Write a marginal over the dimensions in which the target has size 1, or join it with what is there."""
    x, how = marginal
    reduce = getattr(torch, how)
    sizes = zip(x.shape, target.shape, strict=True)
    dimensions = [d for d, (size, left) in enumerate(sizes) if left == 1 != size]
    if 0 in dimensions and torch.compiler.is_compiling() and x.shape[0] >= 16:
        # Compiled code that runs down columns is slow: there eight neighbours are joined first.
        eights = x.shape[0] // 8
        rest = x[eights * 8 :] if how == "sum" else x[-8:]
        x = reduce(x[: eights * 8].unflatten(0, (eights, 8)), 1)
        x = torch.cat([reduce(x, 0, keepdim=True), reduce(rest, 0, keepdim=True)])
    part = reduce(x, dimensions, keepdim=True) if dimensions else x
    if goes_on:
        part = target + part if how == "sum" else torch.maximum(target, part)
    target.copy_(part)
