"""The engine whose sums are the same bits on any number of workers, however layers are cut."""

from __future__ import annotations

import torch
from torch import Tensor

from optim.engine.engine import Engine, Rounds
from optim.engine.fixed_point import integers, numbers
from optim.engine.scalars import ChunkScalars, LayerScalars
from optim.engine.shards import complete
from optim.engine.stage import Stage


class ExactEngine(Engine):
    """Runs a rule over whole tensors, its sums and marginals in integers, for which order cannot matter.

    Five integers of 64 bits travel for each sum; everything else is worked out number by number.
    """

    def __init__(self, rounds: Rounds) -> None:
        super().__init__(rounds, "tensor")
        self._found: dict[int, dict[str, Tensor]] = {}

    def _sweep(self, stage: Stage, h: LayerScalars) -> Tensor:
        """Run one stage everywhere; its sums as integers [sums, layers, 5]."""
        self._found = {}
        if stage.is_of_lines:
            return super()._sweep(stage, h)
        own = ChunkScalars(stage, h, self.layout.layers, [])
        sums = h.numel.new_zeros(len(stage.sums), len(h.numel), len(integers(h.numel)), dtype=torch.int64)
        for chunk in self.layout.chunks:
            found = self._found[chunk.layer] = {}
            of_chunk = stage.run(stage.pick(own.of(chunk)), chunk.arrays, integers_of=found)
            if of_chunk:
                sums[:, chunk.layer] = torch.stack(of_chunk)
        return sums

    def _complete(self, number: int, sums: Tensor) -> Tensor:
        """Complete a round as `Engine` does, in integers; then all of them become numbers."""
        stage, _ = self._rounds[number]
        if stage.is_of_lines or stage.joins == "max":
            return super()._complete(number, sums)
        crossing = {
            (layer, name): self._found.setdefault(layer, {}).setdefault(name, integers(array.zero_()))
            for layer, name, array in self._marginals(number)
        }
        if self._reduce is not None:
            own = [sums[:, self.layout.cut]] if stage.sums else []
            complete(self._reduce, "sum", [*own, *crossing.values()])
            if own:
                sums[:, self.layout.cut] = own[0]
        for chunk in self.layout.wholes:
            for name, found in self._found.get(chunk.layer, {}).items():
                chunk.arrays[name].copy_(numbers(found))
        return numbers(sums.movedim(-1, 0)) if stage.sums else sums
