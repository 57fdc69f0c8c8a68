"""Where the arrays of a step lie: the pieces, their buffers, and which layer each row belongs to."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.flat import Flat, Places, view_like
from optim.numbers import LayerNumbers, RowNumbers
from optim.pieces import Arrays, Cut, Layer, Piece, is_small, tables
from optim.stage import compute_dtype


class Layout:
    """The pieces of the layers that take part in a step.

    A layout holds no truth. States are the optimizer's; whatever was moved, replaced or converted since the
    last step is noticed by its address, on the host alone, and taken in.

    Args:
        cut: how a layer is cut where there are no flat buffers.
        flat: the buffers of parameters and gradients, beside which states then lie too.
        gather: whether small layers, where not flat, are copied side by side into one table for the step.
    """

    def __init__(self, cut: Cut, flat: Flat | None, gather: bool = False) -> None:
        self.pieces: list[Piece] = []
        self.tables: list[tuple[list[Piece], RowNumbers]] = []
        self.has_parts = False
        self._cut = cut
        self._flat = flat
        self._gather = gather and flat is None
        self._gathered: Places | None = None
        self._scratch: dict[Tensor, Arrays] = {}
        self._buffers: dict[str, list[Tensor]] = {}
        self._seen: list[Any] = []
        self._gradients: list[int] = []

    def ordered(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        """The layers in the order of the pieces: those that are gathered first."""
        return sorted(layers, key=lambda layer: not is_small(layer)) if self._gather else layers

    def follow(self, layers: Sequence[Layer]) -> None:
        """Take in whatever lies elsewhere than at the last step."""
        gradients = [layer.gradient.data_ptr() for layer in layers]
        if _fingerprint(layers) != self._seen:
            self._arrange(layers)
            self._seen = _fingerprint(layers)
        elif gradients != self._gradients and self._flat is None:
            fresh = self._cut_all(layers)
            for piece, new in zip(self.pieces[-len(fresh) :], fresh, strict=True):
                piece.arrays = new.arrays
        self._gradients = gradients
        if self._gathered is not None:
            self._copy(layers, back=False)

    def release(self, layers: Sequence[Layer]) -> None:
        """After the step: give the gathered layers their new weights."""
        if self._gathered is not None:
            self._copy(layers, back=True)

    def _arrange(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            _settle(layer)
        self.pieces, self._gathered = [], None
        if self._flat is not None:
            self._fill_buffers(self._flat, layers)
            self.pieces = list(tables(layers, self._flat, self._buffers))
        elif self._gather and (small := [layer for layer in layers if is_small(layer)]):
            self._gathered, self._buffers = Places(layer.parameter for layer in small), {}
            self._fill_buffers(self._gathered, small)
            self.pieces = list(tables(small, self._gathered, self._buffers))
        if self._flat is None:
            self.pieces += self._cut_all(layers)
        self._index(layers)

    def _cut_all(self, layers: Sequence[Layer]) -> list[Piece]:
        """The pieces of the layers that lie on their own."""
        first = 0 if self._gathered is None else len(self._gathered.held)
        return [piece for n, layer in enumerate(layers[first:], first) for piece in self._pieces_of(n, layer)]

    def _copy(self, layers: Sequence[Layer], back: bool) -> None:
        assert self._gathered is not None
        weights, gradients = zip(*self._gathered.homes, strict=True)
        small = layers[: len(weights)]
        own = [layer.parameter.detach() for layer in small]
        if back:
            torch._foreach_copy_(own, list(weights))
        else:
            torch._foreach_copy_(list(weights), own)
            torch._foreach_copy_(list(gradients), [layer.gradient for layer in small])

    def numbers(self, layers: Sequence[Layer]) -> LayerNumbers:
        """The layers' numbers of this step."""
        cohorts = {layer.cohort.number: layer.cohort for layer in layers}
        return LayerNumbers(list(cohorts.values()), self._cohort_of_layer, self._numel)

    def by_layer(self, sums: Tensor) -> Tensor:
        """Sums of pieces and rows [places, sums] added up for each layer [layers, sums], in fixed order."""
        if self._counts is None:
            return sums
        return torch.segment_reduce(sums, "sum", lengths=self._counts, axis=0)

    def _pieces_of(self, number: int, layer: Layer) -> list[Piece]:
        p = layer.parameter
        arrays = {"p": p.detach(), "g": layer.gradient.detach(), **layer.tensors(), **self._scratch_of(layer)}
        pieces = list(self._cut(number, arrays))
        for piece in pieces:
            piece.fixed = layer.shapes.geometry(layer.cohort.numbers, p.shape)
        return pieces

    def _scratch_of(self, layer: Layer) -> Arrays:
        """Arrays that stages leave for later ones: kept, since fresh memory is dear."""
        p = layer.parameter
        scratch = self._scratch.setdefault(p, {})
        for name, shape in layer.shapes.scratch_shapes(layer.cohort.numbers, p.shape).items():
            if name not in scratch or not _suits(scratch[name], p, shape):
                dtype = compute_dtype(p)
                alike = shape == p.shape
                scratch[name] = torch.empty_like(p, dtype=dtype) if alike else p.new_empty(shape, dtype=dtype)
        return scratch

    def _fill_buffers(self, flat: Places, layers: Sequence[Layer]) -> None:
        """Move states into buffers beside the flat parameters; the optimizer then holds views."""
        self._buffers |= {"p": flat.parameters, "g": flat.gradients}
        for layer in layers:
            p = layer.parameter
            buffer, start, _ = flat.place(p)
            states = {name: value for name, value in layer.tensors().items() if name in layer.shapes.elements}
            for name in (*states, *layer.shapes.scratch_shapes(layer.cohort.numbers, p.shape)):
                if name not in self._buffers:
                    self._buffers[name] = [
                        torch.zeros_like(b, dtype=compute_dtype(b)) for b in flat.parameters
                    ]
                home = view_like(self._buffers[name][buffer], start, p)
                if name in states and states[name].data_ptr() != home.data_ptr():
                    layer.state[name] = home.copy_(states[name])

    def _index(self, layers: Sequence[Layer]) -> None:
        """Note how many sums each layer gives, and which layer each row of a table belongs to."""
        device = layers[0].parameter.device
        counts = [0] * len(layers)
        of_kind: dict[tuple[torch.dtype, torch.device], list[Piece]] = {}
        for piece in self.pieces:
            for number, rows in enumerate(piece.spans or (1,), start=piece.layer):
                counts[number] += rows
            if piece.spans:
                p = piece.arrays["p"]
                of_kind.setdefault((compute_dtype(p), p.device), []).append(piece)
        self.has_parts = any(not piece.spans for piece in self.pieces)
        self._counts = None if set(counts) == {1} else torch.tensor(counts, device=device)
        self._numel = torch.tensor(
            [float(x.parameter.numel()) for x in layers], dtype=torch.float64, device=device
        )
        self._cohort_of_layer = torch.tensor([layer.cohort.number for layer in layers], device=device)
        self.tables = [
            (pieces, RowNumbers(_layer_of_row(pieces).to(device), self._cohort_of_layer, dtype))
            for (dtype, device), pieces in of_kind.items()
        ]


def _layer_of_row(pieces: Sequence[Piece]) -> Tensor:
    numbers = [torch.arange(piece.layer, piece.layer + len(piece.spans)) for piece in pieces]
    return torch.cat(numbers).repeat_interleave(
        torch.tensor([rows for piece in pieces for rows in piece.spans])
    )


def _settle(layer: Layer) -> None:
    """Keep states in the dtype that is computed in, beside their parameter, whatever became of that."""
    p = layer.parameter
    for name, value in layer.tensors().items():
        layer.state[name] = value.to(p.device, compute_dtype(p))


def _suits(scratch: Tensor, p: Tensor, shape: torch.Size) -> bool:
    """Whether an array of an earlier step serves this parameter still."""
    as_before = scratch.shape == shape and scratch.dtype == compute_dtype(p) and scratch.device == p.device
    return as_before and (shape != p.shape or scratch.stride() == p.stride())


def _fingerprint(layers: Sequence[Layer]) -> list[Any]:
    """Where everything lies and how it is treated: equal as long as the pieces that were cut are right."""
    return [
        (
            layer.parameter.data_ptr(),
            layer.parameter.dtype,
            layer.gradient.dtype,
            layer.gradient.stride(),
            layer.cohort.number,
            layer.cohort.options,
            *[value.data_ptr() for value in layer.state.values() if isinstance(value, Tensor)],
        )
        for layer in layers
    ]
