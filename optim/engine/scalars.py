"""The numbers `h` of many layers: as vectors for functions of layers, as columns for tables of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.engine.chunks import Chunk, Layer, LayerCohort
from optim.engine.stage import Stage, compute_dtype, is_option


class LayerState:
    """A state of one number per layer, in one vector for each dtype and device: the layers hold views."""

    def __init__(self, name: str, layers: Sequence[Layer]) -> None:
        of_kind: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for number, layer in enumerate(layers):
            x = layer.state[name]
            of_kind.setdefault((x.dtype, x.device), []).append(number)
        self._parts = []
        for (_, device), numbers in of_kind.items():
            vector = torch.stack([layers[number].state[name] for number in numbers])
            for number, x in zip(numbers, vector.unbind(), strict=True):
                layers[number].state[name] = x
            self._parts.append((torch.tensor(numbers, device=device), vector))

    def read(self, like: Tensor) -> Tensor:
        """All layers' numbers, in dtype and place like a vector of as many."""
        out = torch.empty_like(like)
        for numbers, vector in self._parts:
            out[numbers.to(out.device)] = vector.to(out)
        return out

    def write(self, values: Tensor) -> None:
        """Set all layers' numbers."""
        for numbers, vector in self._parts:
            vector.copy_(values[numbers.to(values.device)])


class LayerScalars:
    """Numbers of a step as vectors [layers], made when a rule asks for them: float64, or bool for flags.

    A hyperparameter is the same for a cohort of layers; what a function of layers found is each layer's own,
    and of one step.
    """

    def __init__(
        self,
        cohorts: Sequence[LayerCohort],
        cohort_of_layer: Tensor,
        numel: Tensor,
        states: Mapping[str, LayerState],
    ) -> None:
        self.numel, self.states = numel, states
        self.found: dict[str, Tensor] = {}
        self._cohorts = cohorts
        self._cohort_of_layer = cohort_of_layer
        self._made: dict[str, tuple[list[Any], Tensor]] = {}

    def __getattr__(self, name: str) -> Tensor:
        if name in self.found:
            return self.found[name]
        values = self.of_cohorts(name)
        if isinstance(values[0], Tensor) or name not in self._made or self._made[name][0] != values:
            vector = _vector(values, self._cohort_of_layer.device)[self._cohort_of_layer]
            self._made[name] = values, vector
        return self._made[name][1]

    def of_cohorts(self, name: str) -> list[Any]:
        """A hyperparameter of each cohort."""
        return [cohort.numbers[name] for cohort in self._cohorts]

    def add(self, name: str, vector: Tensor) -> None:
        """Keep what a function of layers found."""
        self.found[name] = vector.expand(len(self.numel))


class RowScalars:
    """Numbers as columns [rows, 1], each layer's repeated for its rows; refilled where values change."""

    def __init__(self, layer_of_row: Tensor, cohort_of_layer: Tensor, dtype: torch.dtype) -> None:
        self._layer_of_row = layer_of_row
        self._cohort_of_row = cohort_of_layer.to(layer_of_row.device)[layer_of_row]
        self._dtype = dtype
        self._columns: dict[str, Tensor] = {}
        self._filled: dict[str, list[Any]] = {}

    def column(self, name: str, h: LayerScalars) -> Tensor:
        """The column of one number: always the same storage."""
        if name in h.found:
            return self._fill(name, h.found[name], self._layer_of_row)
        values = h.of_cohorts(name)
        if isinstance(values[0], Tensor) or self._filled.get(name) != values:
            self._filled[name] = values
            if name in self._columns and _all_equal(values):
                return self._columns[name].fill_(values[0])
            return self._fill(name, _vector(values, self._layer_of_row.device), self._cohort_of_row)
        return self._columns[name]

    def _fill(self, name: str, source: Tensor, index: Tensor) -> Tensor:
        source = source.to(index.device, self._dtype)
        if name not in self._columns:
            self._columns[name] = source.new_empty(len(index), 1)
        torch.index_select(source, 0, index, out=self._columns[name].view(-1))
        return self._columns[name]


class ChunkScalars:
    """The numbers `h` of one stage at one step, for each chunk.

    Hyperparameters are numbers of the host, what was found is a tensor of no dimension. In a table of several
    layers what differs between them is a column; everything is where the table is compiled.
    """

    def __init__(
        self,
        stage: Stage,
        h: LayerScalars,
        layers: Sequence[Layer],
        tables: Sequence[tuple[Sequence[Chunk], RowScalars]],
    ) -> None:
        self._stage, self._layers = stage, layers
        self._found = {name: vector for name, vector in h.found.items() if name in stage.mentions}
        self._of_cohort: dict[int, dict[str, Any]] = {}
        self._own: dict[tuple[torch.dtype, torch.device], dict[str, Sequence[Tensor]]] = {}
        self._as_tensors: dict[Any, dict[str, Any]] = {}
        hyper = self._mentioned(layers[0].cohort) if tables else {}
        all_columns = any(chunk.compiled for chunks, _ in tables for chunk in chunks)
        self._columns = [
            name
            for name, value in hyper.items()
            if not is_option(value) and (all_columns or not _all_equal(h.of_cohorts(name)))
        ] + list(self._found)
        for chunks, rows in tables:
            for name in self._columns:
                column = rows.column(name, h)
                for chunk in chunks:
                    if name not in chunk.columns:
                        chunk.columns[name] = column[chunk.rows]

    def of(self, chunk: Chunk) -> dict[str, Any]:
        """A chunk's numbers by name."""
        numbers = self._mentioned(self._layers[chunk.layer].cohort)
        if chunk.spans:
            return numbers | {name: chunk.columns[name] for name in self._columns}
        return numbers | self._own_of(chunk)

    def as_tensors(self, chunk: Chunk) -> dict[str, Any]:
        """Numbers all as tensors of no dimension: a compiler would take a float for a constant."""
        p, cohort = chunk.arrays["p"], self._layers[chunk.layer].cohort
        key = cohort.number, compute_dtype(p), p.device
        if key not in self._as_tensors:
            self._as_tensors[key] = {
                name: value if is_option(value) else torch.as_tensor(value, dtype=key[1]).to(p.device)
                for name, value in self._mentioned(cohort).items()
            }
        return self._as_tensors[key] | self._own_of(chunk)

    def _mentioned(self, cohort: LayerCohort) -> dict[str, Any]:
        if cohort.number not in self._of_cohort:
            mentions = self._stage.mentions
            self._of_cohort[cohort.number] = {n: v for n, v in cohort.numbers.items() if n in mentions}
        return self._of_cohort[cohort.number]

    def _own_of(self, chunk: Chunk) -> dict[str, Any]:
        """What was found of a layer, and what a rule of dimensions knows of it."""
        fixed = {name: value for name, value in chunk.fixed.items() if name in self._stage.mentions}
        if not self._found:
            return fixed
        p = chunk.arrays["p"]
        key = (compute_dtype(p), p.device)
        if key not in self._own:
            self._own[key] = {n: v.to(p.device, key[0]).unbind() for n, v in self._found.items()}
        return {name: each[chunk.layer] for name, each in self._own[key].items()} | fixed


def _all_equal(values: Sequence[Any]) -> bool:
    return not isinstance(values[0], Tensor) and all(value == values[0] for value in values)


def _vector(values: list[Any], device: torch.device) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dtype = torch.bool if isinstance(values[0], bool) else torch.float64
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
