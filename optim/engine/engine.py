"""The engines: stages run over whole tensors, over blocks of rows, or over compiled tables of rows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optim.engine.chunks import Chunk, EngineName, Layer
from optim.engine.compiler import compiled, expect_any_size, has_compiler
from optim.engine.layout import Layout
from optim.engine.scalars import ChunkScalars, LayerScalars
from optim.engine.stage import Function, Stage, arguments
from optim.flat import FlatBuffers

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

    def __init__(self, rounds: Rounds, kind: EngineName) -> None:
        self.layout = Layout(kind)
        self._rounds = rounds

    def step(self, layers: Sequence[Layer], flat: FlatBuffers | None, reduce: Reduce | None) -> None:
        """Move all layers once."""
        self.layout.follow(layers, flat)
        h = self.layout.numbers
        h.found.clear()
        for stage, layerwise in self._rounds:
            sums = self._sweep(stage, h)
            if layerwise is not None:
                if reduce is not None:
                    reduce(sums, "sum")
                _run_layerwise(layerwise, dict(zip(stage.sums, sums, strict=True)), h)
        self.layout.release()

    def _sweep(self, stage: Stage, h: LayerScalars) -> Tensor:
        """Run one stage everywhere; its sums as a float64 matrix [sums, layers]."""
        numbers = ChunkScalars(stage, h, self.layout.layers, self.layout.tables)
        if stage.is_of_lines:
            for chunk in self.layout.wholes:
                stage.run(stage.pick(numbers.of(chunk)), chunk.arrays)
            return torch.empty(0)
        found = [self._run(stage, chunk, numbers) for chunk in self.layout.chunks]
        if not stage.sums:
            return torch.empty(0)
        device = h.numel.device
        columns = [torch.cat([sums[k].view(-1).to(device) for sums in found]) for k in range(len(stage.sums))]
        return self.layout.by_layer(torch.stack(columns, 1).double()).t().contiguous()

    def _run(self, stage: Stage, chunk: Chunk, numbers: ChunkScalars) -> list[Tensor]:
        """One call: of the stage itself, or of its compiled code."""
        by_row = bool(chunk.spans)
        if chunk.compiled:
            h = numbers.of(chunk) if by_row else numbers.as_tensors(chunk)
            if stage not in chunk.calls:
                expect_any_size(chunk.arrays, h.values(), by_row)
            elif (call := chunk.calls[stage]) is not None:
                return call(h, chunk.arrays)
            found, chunk.calls[stage] = compiled(stage).run(stage.pick(h), chunk.arrays, by_row)
            return found
        return stage.run(stage.pick(numbers.of(chunk)), chunk.arrays, by_row, chunk.goes_on)


def _run_layerwise(layerwise: Function, sums: dict[str, Tensor], h: LayerScalars) -> None:
    """Run a function of layers: write its layer states, keep its other results as numbers."""
    held = {name: h.states[name].read(h.numel) for name in arguments(layerwise) if name not in sums}
    for name, vector in layerwise(h, **sums, **held).items():
        if name in held:
            h.states[name].write(vector)
        else:
            h.add(name, vector)
