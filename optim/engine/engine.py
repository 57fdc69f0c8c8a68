"""The engines: stages run over whole tensors, over blocks of rows, or over compiled tables of rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optim.engine.chunks import EngineName, Layer, Piece
from optim.engine.compiler import compiled, expect_any_rows, expect_any_shape, has_compiler
from optim.engine.layout import Layout
from optim.engine.scalars import LayerNumbers, PieceNumbers
from optim.engine.stage import Function, Stage, arguments
from optim.flat import Flat

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

    def __init__(self, rounds: Rounds, kind: EngineName, flat: Flat | None) -> None:
        self.layout = Layout(kind, flat)
        self._rounds = rounds

    def step(self, layers: Sequence[Layer], reduce: Reduce | None) -> None:
        """Move all layers once."""
        self.layout.follow(layers)
        h = self.layout.numbers
        h.found.clear()
        for stage, judge in self._rounds:
            sums = self._sweep(stage, h)
            if judge is not None:
                if reduce is not None:
                    reduce(sums, "sum")
                _judge(judge, dict(zip(stage.sums, sums, strict=True)), h)
        self.layout.release()

    def _sweep(self, stage: Stage, h: LayerNumbers) -> Tensor:
        """Run one stage everywhere; its sums as a float64 matrix [sums, layers]."""
        numbers = PieceNumbers(stage, h, self.layout.layers, self.layout.tables)
        if stage.is_of_lines:
            for piece in self.layout.wholes:
                stage.run(stage.pick(numbers.of(piece)), piece.arrays)
            return torch.empty(0)
        found = [self._run(stage, piece, numbers) for piece in self.layout.pieces]
        if not stage.sums:
            return torch.empty(0)
        device = h.numel.device
        columns = [torch.cat([sums[k].view(-1).to(device) for sums in found]) for k in range(len(stage.sums))]
        return self.layout.by_layer(torch.stack(columns, 1).double()).t().contiguous()

    def _run(self, stage: Stage, piece: Piece, numbers: PieceNumbers) -> list[Tensor]:
        """One call: of the stage itself, or of its compiled code."""
        by_row = bool(piece.spans)
        if piece.compiled:
            h = numbers.of(piece) if by_row else numbers.as_tensors(piece)
            if stage not in piece.calls:
                (expect_any_rows if by_row else expect_any_shape)(piece.arrays, h.values())
            elif (call := piece.calls[stage]) is not None:
                return call(h, piece.arrays)
            found, piece.calls[stage] = compiled(stage).run(stage.pick(h), piece.arrays, by_row)
            return found
        return stage.run(stage.pick(numbers.of(piece)), piece.arrays, by_row, piece.goes_on)


def _judge(judge: Function, sums: dict[str, Tensor], h: LayerNumbers) -> None:
    """Run a function of layers: write its layer states, keep its other results as numbers."""
    held = {name: h.states[name].read(h.numel) for name in arguments(judge) if name not in sums}
    for name, vector in judge(h, **sums, **held).items():
        if name in held:
            h.states[name].write(vector)
        else:
            h.add(name, vector)
