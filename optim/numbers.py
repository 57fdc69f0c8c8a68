"""The numbers `h` of many layers: as vectors for functions of layers, as columns for tables of rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.pieces import Cohort


class LayerNumbers:
    """Numbers of one step as vectors [layers], made when a rule asks for them: float64, or bool for flags.

    A hyperparameter is the same for a cohort of layers; what a function of layers found is each layer's own.
    """

    def __init__(self, cohorts: Sequence[Cohort], cohort_of_layer: Tensor, numel: Tensor) -> None:
        self.numel = numel
        self.found: dict[str, Tensor] = {}
        self._cohorts = cohorts
        self._cohort_of_layer = cohort_of_layer

    def __getattr__(self, name: str) -> Tensor:
        vector = _vector(self.of_cohorts(name), self._cohort_of_layer.device)[self._cohort_of_layer]
        setattr(self, name, vector)
        return vector

    def of_cohorts(self, name: str) -> list[Any]:
        """A hyperparameter of each cohort."""
        return [cohort.numbers[name] for cohort in self._cohorts]

    def add(self, name: str, vector: Tensor) -> None:
        """Keep what a function of layers found."""
        self.found[name] = vector.expand(len(self.numel))
        setattr(self, name, self.found[name])


class RowNumbers:
    """Numbers as columns [rows, 1], each layer's repeated for its rows; refilled where values change."""

    def __init__(self, layer_of_row: Tensor, cohort_of_layer: Tensor, dtype: torch.dtype) -> None:
        self._layer_of_row = layer_of_row
        self._cohort_of_row = cohort_of_layer.to(layer_of_row.device)[layer_of_row]
        self._dtype = dtype
        self._columns: dict[str, Tensor] = {}
        self._filled: dict[str, list[Any]] = {}

    def column(self, name: str, h: LayerNumbers) -> Tensor:
        """The column of one number: always the same storage."""
        if name in h.found:
            return self._fill(name, h.found[name], self._layer_of_row)
        values = h.of_cohorts(name)
        if isinstance(values[0], Tensor) or self._filled.get(name) != values:
            self._filled[name] = values
            return self._fill(name, _vector(values, self._layer_of_row.device), self._cohort_of_row)
        return self._columns[name]

    def _fill(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        source = source.to(index.device, self._dtype)
        if name not in self._columns:
            self._columns[name] = source.new_empty(len(index), 1)
        torch.index_select(source, 0, index, out=self._columns[name].view(-1))
        return self._columns[name]


def _vector(values: list[Any], device: torch.device) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dtype = torch.bool if isinstance(values[0], bool) else torch.float64
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
