"""How the arrays of layers are cut into the pieces that one call of a stage works on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from optim.flat import ROW, Places, is_dense, rows_of
from optim.stage import is_option

BLOCK_ROWS = 64
"""Rows per block of the engine without a compiler: all temporaries of a rule fit into a core's cache."""

TABLE_ROWS = 16
"""Rows from which a call of compiled code is worth its overhead."""

Arrays = dict[str, Tensor]


class Shapes(Protocol):
    """What a rule says of arrays' shapes."""

    @property
    def elements(self) -> tuple[str, ...]:
        """States shaped like the parameter."""

    def scratch_shapes(self, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        """Names and shapes of what stages leave for later ones."""

    def geometry(self, h: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
        """What the stages must know of a tensor's dimensions."""


@dataclass(slots=True)
class Cohort:
    """Layers of one group at the same step: they share their numbers. `number` counts cohorts from 0."""

    number: int
    numbers: dict[str, Any]
    options: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.options = tuple(value for value in self.numbers.values() if is_option(value))


@dataclass(slots=True)
class Layer:
    """One parameter that takes part in a step, with its state."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    cohort: Cohort
    shapes: Shapes

    def tensors(self) -> Arrays:
        """The states that are tensors."""
        return {name: value for name, value in self.state.items() if isinstance(value, Tensor)}


def is_small(layer: Layer) -> bool:
    """Whether a layer alone is not worth a call of compiled code."""
    return layer.parameter.numel() < TABLE_ROWS * ROW


@dataclass(slots=True)
class Piece:
    """Arrays for one call of a stage.

    Without `spans`, some or all of layer number `layer`, in any shape: one sum. With them a table [rows,
    1024] of layers from there on, each with its number of rows: a sum for each row. `h` holds a table's
    numbers by stage; `fixed` what a rule of shapes knows of this one. `compiled` says that a call of compiled
    code is worth its overhead.
    """

    layer: int
    arrays: Arrays
    spans: tuple[int, ...] = ()
    h: dict[Any, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False


def whole(number: int, arrays: Arrays) -> Iterator[Piece]:
    """A layer in one piece, each tensor in its own shape."""
    yield Piece(number, arrays)


def whole_compiled(number: int, arrays: Arrays) -> Iterator[Piece]:
    """A layer in one piece, in compiled code unless it is small."""
    yield Piece(number, arrays, compiled=arrays["p"].numel() >= TABLE_ROWS * ROW)


def blocks(number: int, arrays: Arrays) -> Iterator[Piece]:
    """A layer in blocks of 64 rows of 1024, where its arrays agree in their order of memory; else whole."""
    lines = _lines(arrays)
    size = BLOCK_ROWS * ROW
    if lines is None or lines["p"].numel() <= size:
        yield Piece(number, arrays)
        return
    for start in range(0, lines["p"].numel(), size):
        yield Piece(number, {name: line[start : start + size] for name, line in lines.items()})


def table_and_tail(number: int, arrays: Arrays) -> Iterator[Piece]:
    """A layer as a table of its full rows and the rest behind them; in blocks where it allows no table."""
    lines = _lines(arrays)
    if lines is None:
        yield from blocks(number, arrays)
        return
    rows = lines["p"].numel() // ROW
    yield Piece(number, {name: x[: rows * ROW].view(rows, ROW) for name, x in lines.items()}, (rows,))
    if rows * ROW < lines["p"].numel():
        yield Piece(number, {name: x[rows * ROW :] for name, x in lines.items()})


def tables(layers: Sequence[Layer], flat: Places, buffers: dict[str, list[Tensor]]) -> Iterator[Piece]:
    """Layers that lie in buffers as few tables: one for each run of neighbours of equal options."""
    at = 0
    for _, run in groupby(_neighbours(layers, flat), key=lambda pair: pair[0]):
        members = [layer for _, layer in run]
        buffer, start, _ = flat.place(members[0].parameter)
        spans = tuple(rows_of(layer.parameter.numel()) for layer in members)
        end = start + sum(spans) * ROW
        held = [name for name in buffers if name not in layers[0].state or name in members[0].state]
        yield Piece(at, {name: buffers[name][buffer][start:end].view(-1, ROW) for name in held}, spans)
        at += len(members)


def _neighbours(layers: Sequence[Layer], flat: Places) -> Iterator[tuple[tuple[Any, ...], Layer]]:
    """Each layer with what it shares with those that can stand in one table with it."""
    run, expected = 0, 0
    for layer in layers:
        buffer, start, numel = flat.place(layer.parameter)
        run += start != expected
        expected = start + rows_of(numel) * ROW
        yield (buffer, run, layer.cohort.options, tuple(layer.state)), layer


def _lines(arrays: Arrays) -> Arrays | None:
    """Arrays shaped like the parameter as 1-D views in their common order of memory, if any."""
    p = arrays["p"]
    alike = {name: x for name, x in arrays.items() if x.shape == p.shape}
    if not is_dense(p) or any(x.stride() != p.stride() for x in alike.values()):
        return None
    return {name: x.as_strided((x.numel(),), (1,)) for name, x in alike.items()}


Cut = Callable[[int, Arrays], Iterator[Piece]]
