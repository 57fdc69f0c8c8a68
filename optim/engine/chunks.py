"""How the arrays of layers are cut into the chunks that one call of a stage works on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from optim.engine.shards import LayerShard
from optim.engine.stage import is_option
from optim.flat import ROW, BufferLayout, is_dense, rows_of

BLOCK_BYTES = 2**20
"""Bytes of a block without a compiler, for each thread: its core's cache holds them, calls stay few."""

SLAB_BYTES = 2**21
"""The same of a layer whose dimensions matter: its marginals are written once for each block."""

SMALL = 2**17
"""Numbers below which a layer is not worth calls of its own without a compiler."""

TABLE_ROWS = 16
"""Rows from which a call of compiled code is worth its overhead."""

EngineName = Literal["auto", "tensor", "rows", "compiled", "exact"]
Arrays = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class TensorView:
    """How a rule looks at a tensor whose dimensions matter to it.

    `views` are the shapes in which it sees arrays, "p" standing for all that are like the parameter;
    `scratch` those of what one stage leaves for another; `options` what `h` has for this tensor alone;
    `whole` says that stages need all of it at once.
    """

    views: Mapping[str, tuple[int, ...]]
    scratch: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = False

    def here(self, shard: LayerShard) -> "TensorView":
        """The view of the part of a layer that lies here, of the view of the whole layer."""
        if not shard.cuts(self.views["p"]):  # one slice, seen in another shape
            return self
        views, scratch = (
            {name: tuple(shard.here(shape)) for name, shape in shapes.items()}
            for shapes in (self.views, self.scratch)
        )
        return TensorView(views, scratch, self.options)


class Shapes(Protocol):
    """What a rule says of arrays' shapes."""

    @property
    def layer_states(self) -> tuple[str, ...]:
        """States of one number."""

    @property
    def scratch(self) -> tuple[str, ...]:
        """What stages leave for others, like the parameter."""

    def tensor_view(self, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """How the rule looks at a tensor; None where each number stands by itself."""


@dataclass(slots=True)
class LayerCohort:
    """Layers of one group at the same step: they share their numbers. `number` counts cohorts from 0."""

    number: int
    step: int
    numbers: dict[str, Any] = field(default_factory=dict)
    options: tuple[Any, ...] = ()

    def take(self, numbers: dict[str, Any]) -> None:
        """Set the numbers of a step."""
        self.numbers = numbers
        self.options = tuple(value for value in numbers.values() if is_option(value))


@dataclass(slots=True)
class Layer:
    """One parameter that takes part in a step, with its state; between steps without its gradient.

    Where the layer is spread over workers, `shard` says which part of it all these tensors are.
    """

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    cohort: LayerCohort
    shapes: Shapes
    states: tuple[str, ...]
    shard: LayerShard | None = None

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole layer."""
        return self.parameter.shape if self.shard is None else self.shard.shape

    def tensors(self) -> Arrays:
        """The states that are tensors; what others keep beside them is none of ours."""
        return {name: self.state[name] for name in self.states}

    def like_parameter(self) -> Arrays:
        """Parameter, gradient and the states that are not one number; all alike without a `TensorView`."""
        p = self.parameter.detach()
        states = {name: x for name, x in self.tensors().items() if name not in self.shapes.layer_states}
        return {"p": p, "g": self.gradient.detach(), **states}

    def tensor_view(self) -> TensorView | None:
        """How the rule looks at this layer."""
        p = self.parameter
        alike = [x for x in self.like_parameter().values() if x.shape == p.shape]
        contiguous = all(x.is_contiguous() for x in alike)
        return self.shapes.tensor_view(self.cohort.numbers, self.shape, contiguous)


def is_small(layer: Layer, engine: EngineName) -> bool:
    """Whether a layer alone is not worth its calls, so that it is better taken together with others."""
    return layer.parameter.numel() < (TABLE_ROWS * ROW if engine == "compiled" else SMALL)


@dataclass(slots=True)
class Chunk:
    """Arrays for one call of a stage.

    Without `spans`, some or all of layer number `layer`, in any shape: one sum. With them a table [rows,
    1024] of layers from there on, each with its number of rows here: a sum for each row; its `columns` are
    those `rows` of numbers that were made for all tables. `fixed` is what a rule of dimensions knows of this
    chunk. `compiled` says that a call of compiled code is worth its overhead; `goes_on` names the arrays that
    chunks before it have begun to fill.
    """

    layer: int
    arrays: Arrays
    spans: tuple[int, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    compiled: bool = False
    goes_on: frozenset[str] = frozenset()
    rows: slice | None = None
    columns: Arrays = field(default_factory=dict)
    calls: dict[Any, Any] = field(default_factory=dict)


def block_numbers(device: torch.device, arrays: int, block_bytes: int) -> int:
    """Numbers per block of so many arrays and two temporary ones: `block_bytes` per thread on a CPU."""
    return block_bytes // (4 * (arrays + 2)) * torch.get_num_threads() if device.type == "cpu" else 2**24


def whole(number: int, arrays: Arrays, block: int) -> Iterator[Chunk]:
    """A layer in one chunk, each tensor in its own shape."""
    yield Chunk(number, arrays)


def whole_compiled(number: int, arrays: Arrays, block: int) -> Iterator[Chunk]:
    """A layer in one chunk, in compiled code unless it is small."""
    yield Chunk(number, arrays, compiled=arrays["p"].numel() >= TABLE_ROWS * ROW)


def slabs(number: int, arrays: Arrays, block: int) -> Iterator[Chunk]:
    """A layer whose dimensions matter, cut along the first; what has size 1 there is in every chunk."""
    p = arrays["p"]
    length = len(p) if p.dim() else 1
    size = max(1, block * length // p.numel())
    if size >= length:
        yield Chunk(number, arrays)
        return
    shared = frozenset(name for name, x in arrays.items() if len(x) != length)
    for start in range(0, length, size):
        part = {name: x if name in shared else x[start : start + size] for name, x in arrays.items()}
        yield Chunk(number, part, goes_on=shared if start else frozenset())


def blocks(number: int, arrays: Arrays, block: int) -> Iterator[Chunk]:
    """A layer in blocks, where its arrays agree in their order of memory; else whole."""
    lines = _lines(arrays)
    if lines is None:
        yield Chunk(number, arrays)
        return
    numel = lines["p"].numel()
    size = ROW * _even(rows_of(numel), block // ROW)
    for start in range(0, numel, size):
        yield Chunk(number, {name: x[start : start + size] for name, x in lines.items()})


def _even(rows: int, block: int) -> int:
    """Rows of blocks that are all about as long as the given one."""
    return -(-rows // max(1, round(rows / block)))


def table_and_tail(number: int, arrays: Arrays, block: int) -> Iterator[Chunk]:
    """A layer as a table of its full rows and the rest behind them; in blocks where it allows no table."""
    lines = _lines(arrays)
    if lines is None:
        yield from blocks(number, arrays, block)
        return
    rows = lines["p"].numel() // ROW
    if rows:
        table = {name: x[: rows * ROW].view(rows, ROW) for name, x in lines.items()}
        yield Chunk(number, table, (rows,), compiled=True)
    if rows * ROW < lines["p"].numel():
        yield Chunk(number, {name: x[rows * ROW :] for name, x in lines.items()})


def tables(layers: Sequence[Layer], flat: BufferLayout, buffers: dict[str, list[Tensor]]) -> Iterator[Chunk]:
    """Layers that lie in buffers as few tables: one for each run of neighbours of equal options."""
    at = 0
    for _, run in groupby(_neighbours(layers, flat), key=lambda pair: pair[0]):
        members = [layer for _, layer in run]
        buffer, start, _ = flat.place(members[0].parameter)
        spans = tuple(rows_of(layer.parameter.numel()) for layer in members)
        end = start + sum(spans) * ROW
        held = [name for name in buffers if name not in layers[0].state or name in members[0].state]
        yield Chunk(at, {name: buffers[name][buffer][start:end].view(-1, ROW) for name in held}, spans)
        at += len(members)


def blocks_of(table: Chunk, layers: Sequence[Layer]) -> Iterator[Chunk]:
    """A table in blocks: small layers as smaller tables, each other one by itself without its padding."""
    number, row = table.layer, 0
    block = block_numbers(table.arrays["p"].device, len(table.arrays), BLOCK_BYTES)
    members = layers[number : number + len(table.spans)]
    for small, run in groupby(members, key=lambda layer: is_small(layer, "rows")):
        for together in [list(run)] if small else [[layer] for layer in run]:
            spans = table.spans[number - table.layer :][: len(together)]
            arrays = {name: x[row : row + sum(spans)] for name, x in table.arrays.items()}
            if len(together) == 1:
                numel = together[0].parameter.numel()
                yield from blocks(number, {name: x.view(-1)[:numel] for name, x in arrays.items()}, block)
            else:
                yield from _smaller_tables(Chunk(number, arrays, spans), block)
            number, row = number + len(together), row + sum(spans)


def _smaller_tables(table: Chunk, block: int) -> Iterator[Chunk]:
    """A table in blocks of rows, wherever layers end."""
    layer_of_row = [n for n, rows in enumerate(table.spans, start=table.layer) for _ in range(rows)]
    size = _even(len(layer_of_row), block // ROW)
    for start in range(0, len(layer_of_row), size):
        held = layer_of_row[start : start + size]
        spans = tuple(len(list(rows)) for _, rows in groupby(held))
        yield Chunk(held[0], {name: x[start : start + size] for name, x in table.arrays.items()}, spans)


def _neighbours(layers: Sequence[Layer], flat: BufferLayout) -> Iterator[tuple[tuple[Any, ...], Layer]]:
    """Each layer with what it shares with those that can stand in one table with it."""
    run, expected = 0, 0
    for layer in layers:
        buffer, start, numel = flat.place(layer.parameter)
        run += start != expected
        expected = start + rows_of(numel) * ROW
        yield (buffer, run, layer.cohort.options, layer.states), layer


def _lines(arrays: Arrays) -> Arrays | None:
    """Arrays as 1-D views in their common order of memory, if they have one."""
    p = arrays["p"]
    if not is_dense(p) or any(x.stride() != p.stride() for x in arrays.values()):
        return None
    return {name: x.as_strided((x.numel(),), (1,)) for name, x in arrays.items()}


Cut = Callable[[int, Arrays, int], Iterator[Chunk]]

CUTS: dict[str, Cut] = {"tensor": whole, "rows": blocks, "compiled": table_and_tail}
"""How each engine cuts a layer of which each number stands by itself."""

CUTS_BY_DIMENSIONS: dict[str, Cut] = {"tensor": whole, "rows": slabs, "compiled": whole_compiled}
"""How each engine cuts a layer whose dimensions matter."""
