"""The engines: one rule's stages run over whole tensors, over blocks of rows, or over compiled tables of rows."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from optim.compiler import CompiledStage, expect_any_rows, has_compiler, in_blocks
from optim.flat import Flat, view_like
from optim.numbers import LayerNumbers, RowNumbers
from optim.pieces import Arrays, Layer, Piece, blocks, table_and_tail, tables, whole
from optim.stage import Function, Stage, arguments, compute_dtype, is_option

EngineName = Literal["auto", "tensor", "rows", "compiled"]
Reduce = Callable[[Tensor, str], None]
Rounds = Sequence[tuple[Stage, Function | None]]

COMPILED_FROM = 2**24
"""Numbers in all parameters from which "auto" compiles: below, a run would wait longer than it could gain."""


def chosen(name: EngineName, parameters: Sequence[Tensor]) -> EngineName:
    """What "auto" means for these parameters, and "compiled" where there is no compiler."""
    if name in ("tensor", "rows"):
        return name
    if name == "auto" and sum(p.numel() for p in parameters) < COMPILED_FROM:
        return "rows"
    return "compiled" if all(has_compiler(device) for device in {p.device for p in parameters}) else "rows"


class Engine:
    """Runs a rule: its rounds one after the other, each over all layers, each round's sums in one matrix.

    The engine holds no truth. States are the optimizer's; whatever was moved, replaced or converted since the last step
    is noticed by its address, on the host alone, and taken in.
    """

    def __init__(
        self, rounds: Rounds, scratch: Sequence[str], kind: EngineName, flat: Flat | None, shaped: bool
    ) -> None:
        self.rounds = rounds
        self.kind = kind
        self._cutter = whole if shaped or kind == "tensor" else blocks if kind == "rows" else table_and_tail
        self._flat = None if self._cutter is whole else flat
        self._compiled = {stage: CompiledStage(stage) for stage, _ in rounds} if kind == "compiled" else {}
        self._scratch_names = scratch
        self._scratch: dict[Tensor, Arrays] = {}
        self._buffers: dict[str, list[Tensor]] = {}
        self._pieces: list[Piece] = []
        self._tables: dict[tuple[torch.dtype, torch.device], list[Piece]] = {}
        self._columns: dict[tuple[torch.dtype, torch.device], RowNumbers] = {}
        self._counts: Tensor | None = None
        self._seen: list[Any] = []

    def step(self, layers: Sequence[Layer], reduce: Reduce | None) -> None:
        """Move all layers once."""
        if _addresses(layers) != self._seen:
            self._cut(layers)
            self._seen = _addresses(layers)
        h = LayerNumbers(layers)
        for stage, judge in self.rounds:
            sums = self._sweep(stage, layers)
            if judge is not None:
                if reduce is not None:
                    reduce(sums, "sum")
                _judge(judge, dict(zip(stage.sums, sums, strict=True)), h, layers)

    # Running a stage

    def _sweep(self, stage: Stage, layers: Sequence[Layer]) -> Tensor:
        """Run one stage everywhere; its sums as a float64 matrix [sums, layers]."""
        self._fill_columns(stage, layers)
        found = [self._run(stage, piece, layers) for piece in self._pieces]
        if not stage.sums:
            return torch.empty(0)
        device = layers[0].parameter.device
        rows = [torch.cat([part[k].view(-1).to(device) for part in found]) for k in range(len(stage.sums))]
        sums = torch.stack(rows).double()
        if self._counts is None:
            return sums
        return (
            torch.segment_reduce(sums.t().contiguous(), "sum", lengths=self._counts, axis=0).t().contiguous()
        )

    def _run(self, stage: Stage, piece: Piece, layers: Sequence[Layer]) -> list[Tensor]:
        if not piece.spans:
            return stage.run(stage.pick(layers[piece.layer].numbers), piece.arrays)
        if self._compiled:
            return self._compiled[stage].run(piece.h[stage], piece.arrays)
        return in_blocks(stage, piece.h[stage], piece.arrays)

    def _fill_columns(self, stage: Stage, layers: Sequence[Layer]) -> None:
        """Bring the tables' columns of numbers up to date; hand them out where a table runs this stage first."""
        for kind, pieces in self._tables.items():
            first = layers[pieces[0].layer].numbers
            names = [n for n in first if n in stage.mentions and not is_option(first[n])]
            columns = {name: self._columns[kind].column(name, layers) for name in names}
            start = 0
            for piece in pieces:
                end = start + sum(piece.spans)
                if stage not in piece.h:
                    mine = {name: column[start:end] for name, column in columns.items()}
                    piece.h[stage] = stage.pick(layers[piece.layer].numbers | mine)
                    if self._compiled:
                        expect_any_rows(piece, piece.h[stage])
                start = end

    # Cutting layers into pieces

    def _cut(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            self._settle(layer)
        if self._flat is not None:
            self._fill_buffers(self._flat, layers)
            self._pieces = list(tables(layers, self._flat, self._buffers))
        else:
            self._pieces = [
                piece
                for number, layer in enumerate(layers)
                for piece in self._cutter(number, self._arrays(layer))
            ]
        self._count(layers)

    def _settle(self, layer: Layer) -> None:
        """Keep state in the dtype that is computed in, beside its parameter, whatever became of that."""
        p = layer.parameter
        for name, value in layer.state.items():
            if isinstance(value, Tensor):
                layer.state[name] = value.to(p.device, compute_dtype(p))

    def _arrays(self, layer: Layer) -> Arrays:
        p = layer.parameter
        scratch = self._scratch.setdefault(p, {})
        for name in self._scratch_names:
            if name not in scratch or scratch[name].shape != p.shape or scratch[name].stride() != p.stride():
                scratch[name] = torch.empty_like(p, dtype=compute_dtype(p))
        states = {name: value for name, value in layer.state.items() if isinstance(value, Tensor)}
        return {"p": p.detach(), "g": layer.gradient.detach(), **states, **scratch}

    def _fill_buffers(self, flat: Flat, layers: Sequence[Layer]) -> None:
        """Move the states into buffers beside the flat parameters; the optimizer's state becomes views of them."""
        self._buffers |= {"p": flat.parameters, "g": flat.gradients}
        for layer in layers:
            p = layer.parameter
            buffer, start, _ = flat.place(p)
            for name in (*layer.state, *self._scratch_names):
                value = layer.state.get(name, p)
                if not isinstance(value, Tensor) or value.shape != p.shape:
                    continue
                if name not in self._buffers:
                    self._buffers[name] = [
                        torch.zeros_like(b, dtype=compute_dtype(b)) for b in flat.parameters
                    ]
                if name in layer.state:
                    home = view_like(self._buffers[name][buffer], start, p)
                    if home.data_ptr() != value.data_ptr():
                        layer.state[name] = home.copy_(value)

    def _count(self, layers: Sequence[Layer]) -> None:
        """Note how many sums each layer's pieces give, and which layer each row of a table belongs to."""
        counts = [0] * len(layers)
        self._tables, self._columns = {}, {}
        for piece in self._pieces:
            if not piece.spans:
                counts[piece.layer] += 1
                continue
            for number, rows in enumerate(piece.spans, start=piece.layer):
                counts[number] += rows
            p = piece.arrays["p"]
            self._tables.setdefault((compute_dtype(p), p.device), []).append(piece)
        for (dtype, device), pieces in self._tables.items():
            of_rows = [
                torch.arange(piece.layer, piece.layer + len(piece.spans)).repeat_interleave(
                    torch.tensor(piece.spans)
                )
                for piece in pieces
            ]
            self._columns[dtype, device] = RowNumbers(of_rows, dtype, device)
        alone = all(count == 1 for count in counts)
        self._counts = None if alone else torch.tensor(counts, device=layers[0].parameter.device)


def _judge(judge: Function, sums: dict[str, Tensor], h: LayerNumbers, layers: Sequence[Layer]) -> None:
    """Run a function of layers: write its layer states, keep its other results as numbers."""
    states = [name for name in arguments(judge) if name not in sums]
    device = layers[0].parameter.device
    held = {n: torch.stack([layer.state[n].to(device, torch.float64) for layer in layers]) for n in states}
    for name, vector in judge(h, **sums, **held).items():
        if name in held:
            torch._foreach_copy_([layer.state[name] for layer in layers], list(vector.unbind()))
        else:
            h.add(name, vector)


def _addresses(layers: Sequence[Layer]) -> list[Any]:
    """Where everything lies and how it is treated: equal as long as the pieces that were cut are right."""
    return [
        (
            layer.parameter.data_ptr(),
            layer.gradient.data_ptr(),
            layer.options,
            layer.parameter.dtype,
            *(value.data_ptr() for value in layer.state.values() if isinstance(value, Tensor)),
        )
        for layer in layers
    ]
