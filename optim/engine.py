"""The engines: stages run over whole tensors, over blocks of rows, or over compiled tables of rows."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from optim.compiler import compiled, expect_any_rows, expect_any_shape, has_compiler, in_blocks
from optim.layout import Layout
from optim.numbers import LayerNumbers
from optim.pieces import Layer, Piece
from optim.stage import Function, Stage, arguments, compute_dtype, is_option

EngineName = Literal["auto", "tensor", "rows", "compiled"]
Reduce = Callable[[Tensor, str], None]
Rounds = Sequence[tuple[Stage, Function | None]]

COMPILED_FROM = 2**24
"""Numbers in all parameters from which "auto" compiles: fewer would wait longer than they could gain."""


def chosen(name: EngineName, parameters: Sequence[Tensor]) -> EngineName:
    """What "auto" means for these parameters, and "compiled" where there is no compiler."""
    if name in ("tensor", "rows"):
        return name
    if name == "auto" and sum(p.numel() for p in parameters) < COMPILED_FROM:
        return "rows"
    return "compiled" if all(has_compiler(device) for device in {p.device for p in parameters}) else "rows"


class Engine:
    """Runs a rule: its rounds one after the other, each over all layers, each round's sums in one matrix."""

    def __init__(self, rounds: Rounds, layout: Layout, compile_tables: bool) -> None:
        self.layout = layout
        self._rounds = rounds
        self._compile_tables = compile_tables

    def step(self, layers: Sequence[Layer], reduce: Reduce | None) -> None:
        """Move all layers once."""
        layers = self.layout.ordered(layers)
        self.layout.follow(layers)
        h = self.layout.numbers(layers)
        for stage, judge in self._rounds:
            sums = self._sweep(stage, h, layers)
            if judge is not None:
                if reduce is not None:
                    reduce(sums, "sum")
                _judge(judge, dict(zip(stage.sums, sums, strict=True)), h, layers)
        self.layout.release(layers)

    def _sweep(self, stage: Stage, h: LayerNumbers, layers: Sequence[Layer]) -> Tensor:
        """Run one stage everywhere; its sums as a float64 matrix [sums, layers]."""
        self._fill_columns(stage, h, layers)
        numbers_of = _Picker(stage, h, layers, self.layout.has_parts)
        found = []
        for piece in self.layout.pieces:
            if piece.spans and self._compile_tables:
                found.append(compiled(stage).run(piece.h[stage], piece.arrays, by_row=True))
            elif piece.spans:
                found.append(in_blocks(stage, piece.h[stage], piece.arrays))
            elif piece.compiled:
                found.append(compiled(stage).run(numbers_of.tensors(piece), piece.arrays, by_row=False))
            else:
                found.append(stage.run(numbers_of(piece), piece.arrays))
        if not stage.sums:
            return torch.empty(0)
        device = h.numel.device
        columns = [torch.cat([sums[k].view(-1).to(device) for sums in found]) for k in range(len(stage.sums))]
        return self.layout.by_layer(torch.stack(columns, 1).double()).t().contiguous()

    def _fill_columns(self, stage: Stage, h: LayerNumbers, layers: Sequence[Layer]) -> None:
        """Bring the tables' columns up to date; hand them out where a table runs this stage first."""
        for pieces, rows in self.layout.tables:
            options = layers[pieces[0].layer].cohort.numbers
            names = [
                n for n in (*options, *h.found) if n in stage.mentions and not is_option(options.get(n, 0))
            ]
            columns = {name: rows.column(name, h) for name in names}
            end = 0
            for piece in pieces:
                start, end = end, end + sum(piece.spans)
                if stage not in piece.h:
                    mine = {name: column[start:end] for name, column in columns.items()}
                    piece.h[stage] = stage.pick(layers[piece.layer].cohort.numbers | mine)
                    if self._compile_tables:
                        expect_any_rows(piece.arrays, piece.h[stage])


class _Picker:
    """The numbers `h` of a stage for parts of single layers, picked once for a cohort if possible."""

    def __init__(self, stage: Stage, h: LayerNumbers, layers: Sequence[Layer], wanted: bool) -> None:
        names = [name for name in h.found if name in stage.mentions] if wanted else []
        self._found = {name: h.found[name].unbind() for name in names}
        self._picked: dict[Any, Any] = {}
        self._as_tensors: dict[Any, dict[str, Any]] = {}
        self._stage = stage
        self._layers = layers

    def __call__(self, piece: Piece) -> Any:
        """Numbers as numbers, and those that were found as tensors of no dimension."""
        layer = self._layers[piece.layer]
        key = piece.layer if self._found or piece.fixed else layer.cohort.number
        if key not in self._picked:
            self._picked[key] = self._stage.pick(layer.cohort.numbers | self._own(piece) | piece.fixed)
        return self._picked[key]

    def tensors(self, piece: Piece) -> Any:
        """Numbers all as tensors of no dimension: a compiler would take a float for a constant."""
        p = piece.arrays["p"]
        if self._stage not in piece.h:
            expect_any_shape(piece.arrays)
            piece.h[self._stage] = None
        numbers = self._layers[piece.layer].cohort.numbers
        key = self._layers[piece.layer].cohort.number, compute_dtype(p), p.device
        if key not in self._as_tensors:
            mentioned = {name: value for name, value in numbers.items() if name in self._stage.mentions}
            self._as_tensors[key] = {
                name: value if is_option(value) else torch.as_tensor(value, dtype=key[1]).to(p.device)
                for name, value in mentioned.items()
            }
        return self._stage.pick(self._as_tensors[key] | self._own(piece) | piece.fixed)

    def _own(self, piece: Piece) -> dict[str, Tensor]:
        p = piece.arrays["p"]
        return {name: v[piece.layer].to(p.device, compute_dtype(p)) for name, v in self._found.items()}


def _judge(judge: Function, sums: dict[str, Tensor], h: LayerNumbers, layers: Sequence[Layer]) -> None:
    """Run a function of layers: write its layer states, keep its other results as numbers."""
    states = [name for name in arguments(judge) if name not in sums]
    device = h.numel.device
    held = {n: torch.stack([layer.state[n].to(device) for layer in layers]).double() for n in states}
    for name, vector in judge(h, **sums, **held).items():
        if name in held:
            torch._foreach_copy_([layer.state[name] for layer in layers], list(vector.unbind()))
        else:
            h.add(name, vector)
