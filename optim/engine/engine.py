"""The engines: stages run over whole tensors, over blocks of rows, or over compiled tables of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.engine.chunks import Chunk, EngineName, Layer
from optim.engine.compiler import compiled, expect_any_size, has_compiler
from optim.engine.layout import Layout
from optim.engine.scalars import ChunkScalars, LayerScalars
from optim.engine.shards import Reduce, complete, completion
from optim.engine.stage import Function, Stage, arguments
from optim.flat import FlatBuffers

Rounds = Sequence[tuple[Stage, Function | None]]

COMPILED_FROM = 2**24
"""Numbers in all parameters from which "auto" compiles: fewer would wait longer than they could gain."""


def chosen(name: EngineName, parameters: Sequence[Tensor]) -> EngineName:
    """What "auto" means for these parameters, and "compiled" where there is no compiler."""
    if name in ("tensor", "rows", "exact"):
        return name
    if name == "auto" and sum(p.numel() for p in parameters) < COMPILED_FROM:
        return "rows"
    return "compiled" if all(has_compiler(device) for device in {p.device for p in parameters}) else "rows"


class Engine:
    """Runs a rule: its rounds one after the other, each over all layers, each round's sums in one matrix.

    Where layers are spread over workers, one vector completes a round: the sums of the layers that are cut,
    in the order in which parameters were given, and then the marginals that the next stage of lines takes.
    """

    def __init__(self, rounds: Rounds, kind: EngineName) -> None:
        self.layout = Layout(kind)
        self._rounds = rounds
        self._reduce: Reduce | None = None
        self._completed: tuple[Sequence[Layer], Reduce | None] = (), None

    def step(self, layers: Sequence[Layer], flat: FlatBuffers | None, reduce: Reduce | None) -> None:
        """Move all layers once."""
        if self._completed[0] is not layers or self._completed[1] is not reduce:
            self._reduce = completion((layer.shard for layer in layers), reduce)
            self._completed = layers, reduce
        self.layout.follow(layers, flat)
        h = self.layout.numbers
        h.found.clear()
        for number, (stage, layerwise) in enumerate(self._rounds):
            sums = self._complete(number, self._sweep(stage, h))
            if layerwise is not None:
                _run_layerwise(layerwise, dict(zip(stage.sums, sums, strict=True)), h)
        self.layout.release()

    def _marginals(self, number: int) -> list[tuple[int, str, Tensor]]:
        """What a round has found here of rows or columns that are spread over workers: layer, name, array."""
        if self._rounds[number][0].joins is None:
            return []
        later = (after.takes for after, _ in self._rounds[number + 1 :] if after.is_of_lines)
        return self.layout.marginals(next(later, ()))

    def _complete(self, number: int, sums: Tensor) -> Tensor:
        """Complete what a round has found here of layers that are spread over workers; its sums."""
        stage, _ = self._rounds[number]
        if self._reduce is None:
            return sums
        marginals = [array for _, _, array in self._marginals(number)]
        if stage.joins == "max":
            complete(self._reduce, "max", marginals)
            marginals = []
        own = [sums[:, self.layout.cut]] if stage.sums else []
        complete(self._reduce, "sum", [*own, *marginals])
        if own:
            sums[:, self.layout.cut] = own[0]
        return sums

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
        if not found:  # all that takes part lies on other workers
            return h.numel.new_zeros(len(stage.sums), len(h.numel))
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
