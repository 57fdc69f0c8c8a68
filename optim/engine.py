"""The engine: runs a rule's stages over its layers, each round's sums gathered in one vector."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim.stage import Function, Stage, compute_dtype

Reduce = Callable[[Tensor, str], None]


@dataclass(slots=True)
class Layer:
    """One parameter that takes part in a step, with its state and its numbers `h` of this step."""

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    numbers: dict[str, Any]


@dataclass(slots=True)
class Piece:
    """Arrays that one call of a stage works on: a whole tensor of one layer, in its own shape."""

    layer: int
    arrays: dict[str, Tensor | None]


class LayerNumbers:
    """The numbers `h` of all layers as vectors [layers], made when a rule asks for them; float64, or bool for flags."""

    def __init__(self, layers: Sequence[Layer], device: torch.device) -> None:
        self._layers = layers
        self._device = device

    def __getattr__(self, name: str) -> Tensor:
        values = [layer.numbers[name] for layer in self._layers]
        if any(isinstance(value, Tensor) for value in values):
            vector = torch.stack(
                [torch.as_tensor(v, dtype=torch.float64, device=self._device) for v in values]
            )
        else:
            dtype = torch.bool if isinstance(values[0], bool) else torch.float64
            vector = torch.tensor(values, dtype=dtype).to(self._device, non_blocking=True)
        setattr(self, name, vector)
        return vector


class Engine:
    """Runs a rule layer by layer, each tensor whole and in its own shape."""

    def __init__(self, rounds: Sequence[tuple[Stage, Function | None]], scratch: Sequence[str]) -> None:
        self.rounds = rounds
        self._scratch = scratch

    def step(self, layers: Sequence[Layer], reduce: Reduce | None) -> None:
        """One step of all layers: as many rounds of sums as the rule has layer functions."""
        pieces = [Piece(number, self._arrays(layer)) for number, layer in enumerate(layers)]
        h = LayerNumbers(layers, layers[0].parameter.device)
        for stage, judge in self.rounds:
            sums = self._sweep(stage, pieces, layers)
            if judge is not None:
                if reduce is not None:
                    reduce(sums, "sum")
                self._judge(judge, stage.sums, sums, h, layers)

    def _arrays(self, layer: Layer) -> dict[str, Tensor | None]:
        arrays = {"p": layer.parameter, "g": layer.gradient, **layer.state}
        for name in self._scratch:
            arrays[name] = torch.empty_like(layer.parameter, dtype=compute_dtype(layer.parameter))
        return arrays

    def _sweep(self, stage: Stage, pieces: Sequence[Piece], layers: Sequence[Layer]) -> Tensor:
        """Run one stage everywhere; its sums as a float64 matrix [sums, layers]."""
        found: list[Tensor] = []
        for piece in pieces:
            numbers = layers[piece.layer].numbers
            needed = {name: numbers[name] for name in numbers if name in stage.mentions or name == "maximize"}
            found += stage.run(piece.arrays, needed, over_rows=False)
        if not stage.sums:
            return torch.empty(0)
        device = layers[0].parameter.device
        return (
            torch.stack([s.to(device, torch.float64) for s in found]).view(len(layers), -1).t().contiguous()
        )

    def _judge(
        self, judge: Function, names: Sequence[str], sums: Tensor, h: LayerNumbers, layers: Sequence[Layer]
    ) -> None:
        """Run a function of layers: write its layer states, keep its other results as numbers of each layer."""
        states = [
            name
            for name in layers[0].state
            if name in judge.__code__.co_varnames[: judge.__code__.co_argcount]
        ]
        held = {name: torch.stack([layer.state[name] for layer in layers]).double() for name in states}
        for name, vector in judge(h, **dict(zip(names, sums, strict=True)), **held).items():
            if name in states:
                torch._foreach_copy_([layer.state[name] for layer in layers], list(vector.unbind()))
                continue
            vector = vector.expand(len(layers))
            setattr(h, name, vector)
            for layer, value in zip(layers, vector.unbind(), strict=True):
                layer.numbers[name] = value
