"""Preparing examples before the echo: from orders, lists of indices, to blocks of arrays, by pure work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from data_echo.draws import Draw
from data_echo.errors import DataError, ExampleError
from data_echo.mixing import Ints
from data_echo.source import Source

Block = dict[str, np.ndarray]


class Prepares(Protocol):
    """The part of a task that is done before the echo."""

    def source(self, split: str) -> Source: ...

    def prepare(self, example: Any, draw: Draw) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Order:
    """Examples to prepare. The same order always gives the same block, so it can be done again anywhere.

    Attributes:
        split: "train", "validation" or "test".
        pass_number: int64 [n]: the pass over the data in which each example is met; its draws depend on it.
        index: int64 [n]: the examples.
    """

    split: str
    pass_number: Ints
    index: Ints


class Preparer(Protocol):
    """Does orders: `order` returns at once with a ticket, `collect` waits for its block, in any order."""

    def order(self, order: Order) -> Any: ...

    def collect(self, ticket: Any) -> Block: ...

    def close(self) -> None: ...


class Workbench:
    """Does orders where it stands, for whichever process it lives in.

    Args:
        make_task: gives the task; called with the first order.
        seed: of the draws.
    """

    def __init__(self, make_task: Callable[[], Prepares], seed: int) -> None:
        self._make_task = make_task
        self._task: Prepares | None = None
        self._seed = seed
        self._sources: dict[str, Source] = {}

    def block(self, order: Order) -> Block:
        """The prepared examples of an order, example first.

        Raises:
            ExampleError: an example could not be read or prepared.
            DataError: prepared examples do not fit together.
        """
        task, source = self._opened(order.split)
        passes, indices = order.pass_number.tolist(), order.index.tolist()
        prepared = []
        for pass_number, index, example in zip(passes, indices, self._examples(order, source), strict=True):
            draw = Draw(self._seed, "prepare", pass_number, index)
            try:
                prepared.append(task.prepare(example, draw))
            except Exception as error:
                raise _example_error(order.split, source, index, error) from error
        return stacked(prepared, f"{order.split}: prepare")

    def _opened(self, split: str) -> tuple[Prepares, Source]:
        try:
            if self._task is None:
                self._task = self._make_task()
            if split not in self._sources:
                self._sources[split] = self._task.source(split)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{split}: task: {type(error).__name__}: {error}; a task that can be built"
            ) from error
        return self._task, self._sources[split]

    def _examples(self, order: Order, source: Source) -> list[Any]:
        indices = order.index.tolist()
        several = getattr(source, "__getitems__", None)
        if several is not None:
            try:
                return several(indices)
            except Exception:
                pass  # one by one then, to learn which one it is
        examples = []
        for index in indices:
            try:
                examples.append(source[index])
            except Exception as error:
                raise _example_error(order.split, source, index, error) from error
        return examples


def stacked(examples: list[dict[str, Any]], where: str) -> Block:
    """One array per key, example first.

    Raises:
        DataError: keys or shapes differ from one example to another.
    """
    block = {}
    for name in examples[0]:
        try:
            block[name] = np.stack([example[name] for example in examples])
        except KeyError:
            raise DataError(
                f"{where}: {name}: missing in some examples; every example has the same keys"
            ) from None
        except ValueError:
            shapes = sorted({np.shape(example[name]) for example in examples})
            raise DataError(
                f"{where}: {name}: shapes {shapes}; one shape for all (pad ragged ones)"
            ) from None
    return block


def _example_error(split: str, source: Source, index: int, error: Exception) -> ExampleError:
    origin = getattr(source, "origin", None)
    return ExampleError(split, index, origin(index) if origin else "", f"{type(error).__name__}: {error}")


class InlinePreparer:
    """Does the work when it is collected, in this process.

    Args:
        task: gives the sources and prepares examples.
        seed: of the draws.
    """

    def __init__(self, task: Prepares, seed: int) -> None:
        self._workbench = Workbench(lambda: task, seed)

    def order(self, order: Order) -> Order:
        return order

    def collect(self, ticket: Order) -> Block:
        return self._workbench.block(ticket)

    def close(self) -> None:
        """Nothing is held."""
