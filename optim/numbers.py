"""The numbers `h` of all layers side by side: as vectors for functions of layers, as columns for tables of rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.pieces import Layer


class LayerNumbers:
    """Vectors [layers], made when a rule asks for them: float64, or bool for flags."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._device = layers[0].parameter.device

    def __getattr__(self, name: str) -> Tensor:
        vector = _vector([layer.numbers[name] for layer in self._layers], self._device)
        setattr(self, name, vector)
        return vector

    def add(self, name: str, vector: Tensor) -> None:
        """Keep what a function of layers found, here and with each layer."""
        vector = vector.expand(len(self._layers))
        setattr(self, name, vector)
        for layer, value in zip(self._layers, vector.unbind(), strict=True):
            layer.numbers[name] = value.to(layer.parameter.device)


class RowNumbers:
    """Columns [rows, 1] that repeat each layer's numbers for every row of it. Kept, and refilled where values change."""

    def __init__(self, layer_of_row: list[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self._layer_of_row = torch.cat(layer_of_row).to(device)
        self._dtype = dtype
        self._columns: dict[str, Tensor] = {}
        self._filled: dict[str, list[Any]] = {}

    def column(self, name: str, layers: Sequence[Layer]) -> Tensor:
        """The column of one number: always the same storage."""
        values = [layer.numbers[name] for layer in layers]
        if name not in self._columns:
            self._columns[name] = torch.empty(
                len(self._layer_of_row), 1, dtype=self._dtype, device=self._layer_of_row.device
            )
        if isinstance(values[0], Tensor) or self._filled.get(name) != values:
            self._filled[name] = values
            vector = _vector(values, self._layer_of_row.device).to(self._dtype)
            torch.index_select(vector, 0, self._layer_of_row, out=self._columns[name].view(-1))
        return self._columns[name]


def _vector(values: list[Any], device: torch.device) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dtype = torch.bool if isinstance(values[0], bool) else torch.float64
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
