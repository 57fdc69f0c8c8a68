"""A rule's function as a program for where there is no compiler: operations that write into memory at hand.

Run as it stands, each operation of a function makes an array of its own, and `b * m + (1 - b) * g` is three
of them. So the function is run once with `Term`s in place of arrays and numbers, which note what is done to
them; the notes become Python source whose operations multiply and add in one, write over what is no longer
needed, and leave out numbers that are 0 or 1.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optim.engine.stage import SHORT, Marginal, Stage, joined

NUMBER, SMALL, LINE, ARRAY = range(4)
"""What a term stands for: a number of the host; one or a column of them in a tensor; an array that is as long
as others in some dimensions and has size 1 in the rest; an array as large as the parameter."""

_WRITABLE = {"add", "sub", "mul", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "square", "exp", "log"}
_WRITABLE |= {"tanh", "abs", "sign", "lerp", "minimum", "maximum", "clamp"}
"""Operations on each number by itself, whose results torch writes into a given array."""

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}


class UntraceableError(Exception):
    """The function does what programs cannot: it is run as it stands."""


class Term:
    """A value in a traced function: a name, or an operation on other terms and plain numbers."""

    serial = itertools.count()

    def __init__(self, kind: int, name: str, operands: Sequence[Any] = (), options: Any = None) -> None:
        self.kind, self.name, self.operands, self.options = kind, name, operands, options or {}
        self.number = next(self.serial)

    def leaves(self) -> list["Term"]:
        """The terms that it is made of."""
        return [x for x in (*self.operands, *self.options.values()) if isinstance(x, Term)]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *operands, **options: _made(name, self, *operands, **options)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _made(function.__name__, *args, **(kwargs or {}))

    def __add__(self, other: Any) -> Any:
        return _made("add", self, other)

    def __sub__(self, other: Any) -> Any:
        return _made("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _made("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _made("mul", self, other)

    def __truediv__(self, other: Any) -> Any:
        return _made("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _made("div", other, self)

    def __pow__(self, other: Any) -> Any:
        return _made("pow", self, other)

    def __neg__(self) -> Any:
        return _made("mul", self, -1.0)

    def __bool__(self) -> bool:
        raise UntraceableError("it decides by a value")

    __radd__, __rmul__ = __add__, __mul__


def _kind(operand: Any) -> int:
    return operand.kind if isinstance(operand, Term) else NUMBER


def _made(name: str, *operands: Any, **options: Any) -> Any:
    """The term of an operation; none where a 0 or a 1 makes it superfluous."""
    swappable = name in ("add", "mul")
    if swappable and (_kind(operands[0]) < _kind(operands[1]) or not isinstance(operands[0], Term)):
        operands = operands[::-1]
    if name in ("sub", "div") and _kind(operands[0]) == NUMBER and _kind(operands[1]) == ARRAY:
        number, array = operands
        return _made("add", -array, number) if name == "sub" else _made("reciprocal", array) * number
    last = operands[-1]
    if isinstance(last, (int, float)):
        if (name in ("mul", "div") and last == 1) or (name in ("add", "sub") and last == 0):
            return operands[0]
        if name == "mul" and last == 0:
            return 0.0
    kind = max(map(_kind, (*operands, *options.values())))
    if kind == LINE and len({x for x in operands if _kind(x) == LINE}) > 1:
        kind = ARRAY
    if kind == ARRAY and (name not in _WRITABLE or _kind(operands[0]) == NUMBER):
        raise UntraceableError(name)
    return Term(kind, name, operands, options)


class Program:
    """A traced function: `run(*arrays, *numbers, *tensors, *temporaries, goes_on)` returns its sums.

    Args:
        function: a rule's function of arrays.
        takes: the names of the function's arrays, in its order.
        kinds: ARRAY or LINE for each array that there is.
        h: the function's numbers: terms where they vary, values where they are 0 or 1 or steer the rule.
        sums: the results whose inner products are summed.
        shape: "table" where that is for each row, "line" of arrays of one dimension, else "whole".

    Raises:
        UntraceableError: no program can be made of this function.
    """

    def __init__(
        self,
        function: Callable[..., Mapping[str, Any]],
        takes: Sequence[str],
        kinds: Mapping[str, int],
        h: Any,
        sums: Sequence[str],
        shape: str,
    ) -> None:
        given = {name: Term(kinds[name], name) if name in kinds else None for name in takes}
        inputs = {term: name for name, term in given.items() if term is not None}
        if h.maximize and "g" in given:
            given["g"] = _made("neg", given["g"])  # not -g, which might become part of a sum
        values = function(h, *given.values())
        pairs = {name: values[name] for name in sums}
        results = {name: value for name, value in values.items() if name in kinds and name not in pairs}
        writer = _Writer(inputs, results, pairs)
        found = writer.write(shape)
        self.arrays = tuple(dict.fromkeys([*inputs.values(), *results]))
        body = "\n    ".join([*writer.lines, f"return [{', '.join(found)}]"])
        self.numbers = tuple(name for name in vars(h) if f"h_{name}" in body)
        self.tensors = tuple(writer.tensors)
        self.temporaries = len(writer.temporaries)
        numbers = [f"h_{name}" for name in self.numbers] + [f"tensor_{name}" for name in self.tensors]
        names = (*self.arrays, *numbers, *writer.temporaries, "goes_on")
        self.source = f"def run({', '.join(names)}):\n    {body}"
        scope: dict[str, Any] = {"torch": torch, "join": join, "inner": inner}
        exec(self.source, scope)  # nothing but the operations noted above
        self.run: Callable[..., list[Tensor]] = scope["run"]


@cache
def program_of(
    stage: Stage,
    kinds: tuple[tuple[str, int], ...] | None,
    values: tuple[tuple[str, Any], ...],
    numbers: tuple[tuple[str, int], ...],
    shape: str,
) -> Program | None:
    """The program of a stage; None where none can be made of it.

    Args:
        stage: the stage.
        kinds: name and kind of each array; None for arrays that are not computed with in their own dtype.
        values: the numbers that are known, by name.
        numbers: name and kind of each number that varies.
        shape: "table" where a sum is wanted for each row, "line" of arrays of one dimension, else "whole".
    """
    if kinds is None:
        return None
    h = SimpleNamespace(**dict(values), **{name: Term(kind, name) for name, kind in numbers})
    try:
        return Program(stage.function, stage.asks_for(dict(kinds)), dict(kinds), h, stage.sums, shape)
    except Exception:  # a rule is Python, and may do with a number what no term can do: then it runs as it is
        return None


def join(target: Tensor, x: Tensor, how: str, goes_on: bool) -> None:
    """Write what a block gives to a marginal, or join it with what the blocks before it gave."""
    part = joined(x, how, target.shape)
    if not goes_on:
        target.copy_(part)
    elif how == "sum":
        target.add_(part)
    else:
        torch.maximum(target, part, out=target)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of two lines, in stretches over which a plain one loses no digits."""
    if len(a) <= SHORT:
        return torch.dot(a, b)
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(SHORT), b.split(SHORT), strict=True)]).sum()


class _Sum(NamedTuple):
    """`base + factors * x * y`, or `x / y`, in one operation of torch's."""

    name: str
    operands: tuple[Term, ...]
    factors: list[Any]
    within: list[Term]
    """The terms that are not worked out by themselves."""


class _Writer:
    """Writes the source of a traced function: which operations are one, and where each result goes."""

    def __init__(
        self, inputs: Mapping[Term, str], results: Mapping[str, Any], pairs: Mapping[str, Any]
    ) -> None:
        self.lines: list[str] = []
        self.temporaries: list[str] = []
        self._inputs = {name: term for term, name in inputs.items()}
        self._home = dict(inputs)
        self._free: list[str] = []
        self._results, self._pairs = results, pairs
        kept: list[Any] = [value.of if isinstance(value, Marginal) else value for value in results.values()]
        kept += itertools.chain.from_iterable(pairs.values())
        if not all(isinstance(term, Term) for term in kept):
            raise UntraceableError("a result is a plain number")
        self.tensors: list[str] = []
        self._order = sorted(_reached(kept), key=lambda term: term.number)
        self._uses = Counter(kept)
        self._uses.update(x for term in self._order for x in term.leaves())

    def write(self, shape: str) -> list[str]:
        """Write all lines; returns an expression for each sum."""
        sums = {term: found for term in self._order if (found := self._as_sum(term)) is not None}
        within = {x for found in sums.values() for x in found.within}
        targets = {term: name for name, term in self._results.items() if isinstance(term, Term)}
        for term in self._order:
            if not term.operands or term in within or term.kind == NUMBER:
                continue
            if term.kind < ARRAY:
                self._home[term] = f"small{len(self.lines)}"
                self.lines.append(f"{self._home[term]} = {self._expression(term)}")
            else:
                self._operate(term, sums.get(term), targets.get(term))
        inner = [self._inner(self._home[a], self._home[b], shape) for a, b in self._pairs.values()]
        for name, value in sorted(
            self._results.items(), key=lambda item: item[1] not in self._inputs.values()
        ):
            if isinstance(value, Marginal):
                self.lines.append(f"join({name}, {self._text(value.of)}, {value.how!r}, {name!r} in goes_on)")
            elif self._home[value] != name:
                self.lines.append(f"{name}.copy_({self._home[value]})")
        return inner

    def _operate(self, term: Term, found: _Sum | None, target: str | None) -> None:
        """One operation on arrays: its result goes where it belongs, or into memory that has become free."""
        name, operands = (found.name, found.operands) if found else (term.name, term.operands)
        arguments = [self._as_tensor(x) if name in _SIGNS else self._text(x) for x in operands]
        if found:
            product = " * ".join(map(self._text, found.factors)) or "1"
            arguments.append(f"{'alpha' if name == 'add' else 'value'}={product}")
        arguments += [f"{key}={self._text(value)}" for key, value in term.options.items()]
        for x in operands:
            if isinstance(x, Term):
                self._uses[x] -= 1
                if self._uses[x] == 0 and self._home.get(x) in self.temporaries:
                    self._free.append(self._home[x])
        if target in self._inputs and self._uses[self._inputs[target]]:
            target = None  # its old values are needed still
        home = self._home[term] = target or self._temporary()
        self.lines.append(f"torch.{name}({', '.join(arguments)}, out={home})")

    def _as_tensor(self, x: Any) -> str:
        """A number as a tensor of no dimension: torch multiplies by it and adds it faster than a float."""
        if _kind(x) != NUMBER or not isinstance(x, Term) or x.operands:
            return self._text(x)
        if x.name not in self.tensors:
            self.tensors.append(x.name)
        return f"tensor_{x.name}"

    def _temporary(self) -> str:
        if not self._free:
            self.temporaries.append(f"t{len(self.temporaries)}")
            return self.temporaries[-1]
        return self._free.pop()

    def _inner(self, a: str, b: str, shape: str) -> str:
        """The inner product of two arrays."""
        found = f"sum{len(self.lines)}"
        if shape == "table":
            scratch = self._temporary()
            self._free.append(scratch)
            self.lines.append(f"{found} = torch.mul({a}, {b}, out={scratch}).sum(-1)")
            return found
        if shape == "whole":
            self.lines.append(f"{found}a = {a}.reshape(-1)")
            a, b = f"{found}a", f"{found}a" if a == b else f"{b}.reshape(-1)"
        self.lines.append(f"{found} = inner({a}, {b})")
        return found

    def _as_sum(self, term: Term) -> _Sum | None:
        """A sum or difference as one operation with the product or quotient that is added, if it can be."""
        if term.kind != ARRAY or term.name not in ("add", "sub"):
            return None
        a, b = term.operands
        ways = [self._as_base_and_part(a, b, [-1.0] if term.name == "sub" else [])]
        if term.name == "add":
            ways.append(self._as_base_and_part(b, a, []))
        found = [way for way in ways if way is not None]
        return max(found, key=lambda way: len(way.within), default=None)

    def _as_base_and_part(self, base: Any, part: Any, factors: list[Any]) -> _Sum | None:
        if _kind(base) != ARRAY or not self._is_passing(part):
            return None
        more, core, within = self._peeled(part)
        if self._is_passing(core) and core.name in ("mul", "div") and _kind(core.operands[1]) != NUMBER:
            name = "addcmul" if core.name == "mul" else "addcdiv"
            also, x, inside = self._peeled(core.operands[0])
            return _Sum(name, (base, x, core.operands[1]), [*factors, *more, *also], [*within, core, *inside])
        return _Sum("add", (base, core), [*factors, *more], within) if within else None

    def _peeled(self, x: Term) -> tuple[list[Any], Term, list[Term]]:
        """x as numbers times a term, and the products that are then not worked out."""
        factors, within = [], []
        while self._is_passing(x) and x.name == "mul" and _kind(x.operands[1]) == NUMBER:
            factors.append(x.operands[1])
            within.append(x)
            x = x.operands[0]
        return factors, x, within

    def _is_passing(self, x: Any) -> bool:
        """Whether x is an array that is worked out for one use alone."""
        return _kind(x) == ARRAY and x not in self._home and self._uses[x] == 1

    def _text(self, x: Any) -> str:
        if not isinstance(x, Term):
            return repr(x)
        if x in self._home:
            return self._home[x]
        return self._expression(x) if x.operands else f"h_{x.name}"

    def _expression(self, term: Term) -> str:
        """An operation on numbers or on small tensors."""
        texts = [self._text(x) for x in term.operands]
        if term.name in _SIGNS and not term.options:
            return f"({f' {_SIGNS[term.name]} '.join(texts)})"
        if term.kind == NUMBER:
            raise UntraceableError(term.name)
        texts += [f"{key}={self._text(value)}" for key, value in term.options.items()]
        return f"torch.{term.name}({', '.join(texts)})"


def _reached(terms: Iterable[Term]) -> set[Term]:
    """The terms and all that they are made of."""
    found: set[Term] = set()
    waiting = list(terms)
    while waiting:
        term = waiting.pop()
        if term not in found:
            found.add(term)
            waiting += term.leaves()
    return found
