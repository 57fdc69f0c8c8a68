"""Preparing examples before the echo: from orders, lists of indices, to blocks of arrays, by pure work."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from data_echo.draws import Draw
from data_echo.errors import DataError, ExampleError, users_line
from data_echo.order.hashing import Ints
from data_echo.sources.source import Source

PreparedArrays = dict[str, np.ndarray]


class Prepares(Protocol):
    """The part of a task that is done before the echo."""

    def source(self, split: str) -> Source: ...

    def prepare(self, example: Any, draw: Draw) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PrepareRequest:
    """Examples to prepare. The same order always gives the same block, so it can be done again anywhere.

    Attributes:
        split: "train", "validation" or "test".
        pass_number: int64 [n]: the pass over the data in which each example is met; its draws depend on it.
        index: int64 [n]: the examples.
    """

    split: str
    pass_number: Ints
    index: Ints


@dataclass(frozen=True)
class Prepared:
    """An order's block, the seconds it took, and the errors of examples that others stand in for."""

    block: PreparedArrays
    seconds: float
    skipped: list[ExampleError]


@dataclass
class PrepareStats:
    """What a preparer's orders came to: examples, seconds of work, and the bad examples that were skipped."""

    examples: int = 0
    work_s: float = 0.0
    skipped: dict[tuple[str, int], ExampleError] = field(default_factory=dict)

    def count(self, prepared: Prepared) -> PreparedArrays:
        """Add what came back for an order; returns its block."""
        self.examples += len(next(iter(prepared.block.values())))
        self.work_s += prepared.seconds
        self.skipped |= {(error.split, error.index): error for error in prepared.skipped}
        return prepared.block


class Preparer(Protocol):
    """Does orders: `order` returns at once with a ticket, `collect` waits for its block, in any order.

    Attributes:
        stats: of what was collected.
    """

    stats: PrepareStats

    @property
    def processes(self) -> int:
        """How many prepare at the same time."""
        ...

    def submit(self, order: PrepareRequest) -> Any: ...

    def collect(self, ticket: Any) -> PreparedArrays: ...

    def close(self) -> None: ...


class PrepareWorker:
    """Does orders where it stands, for whichever process it lives in.

    Args:
        make_task: gives the task; called with the first order.
        seed: of the draws.
        skip_bad: let the next good example of the source stand in for one that fails, and say so, instead of
            raising its error.
    """

    def __init__(self, make_task: Callable[[], Prepares], seed: int, skip_bad: bool = False) -> None:
        self._make_task = make_task
        self._task: Prepares | None = None
        self._seed = seed
        self._skip_bad = skip_bad
        self._sources: dict[str, Source] = {}

    def prepare(self, order: PrepareRequest) -> Prepared:
        """Do an order.

        Raises:
            ExampleError: an example could not be read or prepared.
            DataError: the task cannot be built, or prepared examples do not fit together.
        """
        started = time.perf_counter()
        task, source = self._opened(order.split)
        prepared: list[dict[str, Any]] = []
        skipped: list[ExampleError] = []
        passes, indices = order.pass_number.tolist(), order.index.tolist()
        for pass_number, index in zip(passes, indices, strict=True):
            for candidate in self._candidates(index, len(source)):
                try:
                    draw = Draw(self._seed, "prepare", pass_number, candidate)
                    prepared.append(task.prepare(source[candidate], draw))
                    break
                except Exception as error:
                    skipped.append(_example_error(order.split, source, candidate, error))
            else:
                raise skipped[-1]
        block = stacked(prepared, f"{order.split}: prepare")
        return Prepared(block, time.perf_counter() - started, skipped)

    def _candidates(self, index: int, examples: int) -> Iterator[int]:
        """The example itself, then those that may stand in for it."""
        yield index
        if self._skip_bad:
            yield from (number % examples for number in range(index + 1, index + examples))

    def _opened(self, split: str) -> tuple[Prepares, Source]:
        try:
            if self._task is None:
                self._task = self._make_task()
            if split not in self._sources:
                self._sources[split] = self._task.source(split)
        except DataError:
            raise
        except Exception as error:
            failed = DataError(f"{split}: task: {_cause(error)}; a task that can be built")
            failed.trace = _trace(error)
            raise failed from error
        return self._task, self._sources[split]


def stacked(examples: list[dict[str, Any]], where: str) -> PreparedArrays:
    """One array per key, example first.

    Raises:
        DataError: keys or shapes differ from one example to another.
    """
    block = {}
    for name in examples[0]:
        try:
            block[name] = np.stack([example[name] for example in examples])
        except KeyError:
            raise DataError(f"{where}: {name}: missing in some examples; the same keys in all") from None
        except ValueError:
            shapes = sorted({np.shape(example[name]) for example in examples})
            raise DataError(
                f"{where}: {name}: shapes {shapes}; one shape for all (pad ragged ones)"
            ) from None
    return block


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
    """Does the work when it is collected, in this process.

    Args:
        task: gives the sources and prepares examples.
        seed, skip_bad: see `PrepareWorker`.
    """

    processes = 1

    def __init__(self, task: Prepares, seed: int, *, skip_bad: bool = False) -> None:
        self._workbench = PrepareWorker(lambda: task, seed, skip_bad)
        self.stats = PrepareStats()

    def submit(self, order: PrepareRequest) -> PrepareRequest:
        """Keep an order for later."""
        return order

    def collect(self, ticket: PrepareRequest) -> PreparedArrays:
        """Do an order."""
        return self.stats.count(self._workbench.prepare(ticket))

    def close(self) -> None:
        """Nothing is held."""
