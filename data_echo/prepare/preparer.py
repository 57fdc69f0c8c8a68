"""Preparing examples before the echo: pure functions from requests, lists of indices, to arrays."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from data_echo import generators
from data_echo.draws import Draw
from data_echo.errors import DataError, ExampleError, users_line
from data_echo.order.hashing import Ints
from data_echo.prepare.example_form import ExampleForm, PreparedArrays
from data_echo.sources.source import Source


class PreparingTask(Protocol):
    """The part of a task that is used before the echo."""

    def source(self, split: str) -> Source: ...

    def prepare(self, example: Any, draw: Draw) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PrepareRequest:
    """Examples to prepare. A request always gives the same arrays, so it can be repeated by any process.

    Attributes:
        split: "train", "validation" or "test".
        pass_number: int64 [n]: the pass over the data in which each example is read; its draws depend on it.
        index: int64 [n]: the examples.
    """

    split: str
    pass_number: Ints
    index: Ints


@dataclass(frozen=True)
class PreparedResult:
    """A request's arrays, the seconds of work, the errors of examples that were replaced by others, and
    whether any random number was drawn.
    """

    arrays: PreparedArrays
    seconds: float
    skipped: list[ExampleError]
    drew: bool


@dataclass
class PrepareStats:
    """Totals of a preparer: examples, seconds of work, whether random numbers were drawn, and the bad
    examples, by split and index.
    """

    examples: int = 0
    work_s: float = 0.0
    drew: bool = False
    skipped: dict[tuple[str, int], ExampleError] = field(default_factory=dict)

    def count(self, result: PreparedResult) -> PreparedArrays:
        """Add a request's result; returns its arrays."""
        self.examples += len(next(iter(result.arrays.values())))
        self.work_s += result.seconds
        self.drew |= result.drew
        self.skipped |= {(error.split, error.index): error for error in result.skipped}
        return result.arrays


class Preparer(Protocol):
    """Prepares examples: `submit` returns a pending request at once, `collect` waits for its arrays.

    Pending requests may be collected in any order.

    Attributes:
        stats: totals of the requests that were collected.
    """

    stats: PrepareStats

    @property
    def processes(self) -> int:
        """Processes that prepare at the same time."""
        ...

    def submit(self, request: PrepareRequest) -> Any: ...

    def collect(self, pending: Any) -> PreparedArrays: ...

    def close(self) -> None: ...


class PrepareWorker:
    """Prepares the examples of requests in its own process; every preparer uses it.

    Args:
        make_task: makes the task; called with the first request.
        seed: the draws' seed.
        skip_bad: replace an example that fails by the next good one of the source and report its error in the
            result, instead of raising it.
    """

    def __init__(self, make_task: Callable[[], PreparingTask], seed: int, skip_bad: bool = False) -> None:
        self._make_task = make_task
        self._task: PreparingTask | None = None
        self._seed = seed
        self._skip_bad = skip_bad
        self._sources: dict[str, Source] = {}
        self._forms: dict[str, ExampleForm] = {}
        self._seeds_generators = False  # once the task was seen to draw from them

    def prepare(self, request: PrepareRequest) -> PreparedResult:
        """Prepare a request's examples.

        Raises:
            ExampleError: an example could not be read or prepared.
            DataError: the task cannot be built, or an example's keys, dtypes or shapes differ from those of
                the split's first example.
        """
        started = time.perf_counter()
        source = self._opened(request.split)[1]
        before = None if self._seeds_generators else generators.state()
        form = self._form(request.split)
        prepared = [self._prepared(request.split, *place) for place in _places(request)]
        if before is not None and before != generators.state():
            self._seeds_generators = True
            prepared = [self._prepared(request.split, *place) for place in _places(request)]
        arrays = form.stacked(
            [each.example for each in prepared], lambda place: _named(source, prepared[place].number)
        )
        skipped = [error for each in prepared for error in each.skipped]
        drew = self._seeds_generators or any(each.drew for each in prepared)
        return PreparedResult(arrays, time.perf_counter() - started, skipped, drew)

    def _prepared(self, split: str, pass_number: int, index: int) -> _Prepared:
        """An example, or the next good one that replaces it."""
        task, source = self._opened(split)
        skipped: list[ExampleError] = []
        for candidate in self._candidates(index, len(source)):
            if self._seeds_generators:
                generators.seed(self._seed, "prepare", pass_number, candidate)
            try:
                draw = Draw(self._seed, "prepare", pass_number, candidate)
                example = task.prepare(source[candidate], draw)
                return _Prepared(candidate, example, skipped, draw.was_used)
            except Exception as error:
                skipped.append(_example_error(split, source, candidate, error))
        raise skipped[-1]

    def _form(self, split: str) -> ExampleForm:
        """The form of a split's examples: that of its first good one."""
        if split not in self._forms:
            first = self._prepared(split, 0, 0)
            named = _named(self._sources[split], first.number)
            self._forms[split] = ExampleForm.of(first.example, f"{split}: prepare", named)
        return self._forms[split]

    def _candidates(self, index: int, examples: int) -> Iterator[int]:
        """The example itself, then those that may replace it."""
        yield index
        if self._skip_bad:
            yield from (number % examples for number in range(index + 1, index + examples))

    def _opened(self, split: str) -> tuple[PreparingTask, Source]:
        try:
            if self._task is None:
                self._task = self._make_task()
            if split not in self._sources:
                self._sources[split] = self._task.source(split)
        except DataError:
            raise
        except Exception as error:
            failed = DataError(f"{split}: task: {_cause(error)}", "a task that can be built")
            failed.trace = _trace(error)
            raise failed from error
        return self._task, self._sources[split]


class _Prepared(NamedTuple):
    """What an example became, its number in the source, the errors of those that it replaces, and whether it
    drew.
    """

    number: int
    example: Any
    skipped: list[ExampleError]
    drew: bool


def _places(request: PrepareRequest) -> Iterator[tuple[int, int]]:
    """Pass and index of each example of a request."""
    return zip(request.pass_number.tolist(), request.index.tolist(), strict=True)


def _named(source: Source, index: int) -> str:
    origin = getattr(source, "origin", None)
    return f"example {index} ({origin(index)})" if origin else f"example {index}"


def _example_error(split: str, source: Source, index: int, error: Exception) -> ExampleError:
    origin = ""
    if hasattr(source, "origin"):
        with suppress(Exception):  # it may fail for the same reason
            origin = str(source.origin(index))
    failed = ExampleError(split, index, origin, _cause(error))
    failed.trace = _trace(error)
    return failed


def _cause(error: Exception) -> str:
    """An error with the user's line; one that knows it says so itself."""
    if hasattr(error, "trace") and not isinstance(error, DataError):
        return str(getattr(error, "wrong", error))
    place = users_line(error)
    return f"{type(error).__name__}: {error}" + (f" ({place})" if place else "")


def _trace(error: Exception) -> str:
    return getattr(error, "trace", "") or "".join(traceback.format_exception(error))


class InlinePreparer:
    """Prepares examples in this process, when they are collected.

    Args:
        task: gives the sources and prepares examples.
        seed, skip_bad: see `PrepareWorker`.
    """

    processes = 1

    def __init__(self, task: PreparingTask, seed: int, *, skip_bad: bool = False) -> None:
        self._worker = PrepareWorker(lambda: task, seed, skip_bad)
        self.stats = PrepareStats()

    def submit(self, request: PrepareRequest) -> PrepareRequest:
        """Return the request, which is prepared when it is collected."""
        return request

    def collect(self, pending: PrepareRequest) -> PreparedArrays:
        """Prepare a request's examples: see `PrepareWorker.prepare`."""
        return self.stats.count(self._worker.prepare(pending))

    def close(self) -> None:
        """Do nothing: no process or file is held."""
