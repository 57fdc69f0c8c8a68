"""Where the arrays of a step lie: the pieces, their buffers, and which layer each row belongs to."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from optim.engine.chunks import (
    BLOCK_BYTES,
    CUTS,
    CUTS_BY_DIMENSIONS,
    SLAB_BYTES,
    Arrays,
    Cohort,
    EngineName,
    Form,
    Layer,
    Piece,
    block_numbers,
    blocks_of,
    is_small,
    tables,
)
from optim.engine.scalars import LayerNumbers, LayerState, RowNumbers
from optim.engine.stage import compute_dtype
from optim.flat import Flat, Places, view_like, zeros


class Layout:
    """The pieces of the layers that take part in a step.

    A layout holds no truth. States are the optimizer's; a list of layers that it has not seen is arranged
    anew, whatever was moved, replaced or converted.

    Args:
        engine: the engine that works on the pieces. All but "tensor", where nothing is flat, copy small
            layers side by side into one table for the step.
        flat: the buffers of parameters and gradients, beside which states then lie too.
    """

    def __init__(self, engine: EngineName, flat: Flat | None) -> None:
        self.layers: list[Layer] = []
        self.pieces: list[Piece] = []
        self.wholes: list[Piece] = []
        self.tables: list[tuple[list[Piece], RowNumbers]] = []
        self._engine = self._engine_of_numbers = engine
        self._flat = flat if engine != "tensor" else None
        self._gathered: Places | None = None
        self._scratch: dict[Tensor, Arrays] = {}
        self._buffers: dict[str, list[Tensor]] = {}
        self._arranged: Sequence[Layer] = ()
        self._cohorts: list[Cohort] = []
        self._options: list[tuple[Any, ...]] = []
        self._threads = 0
        self._views: list[tuple[Piece, torch.Size, tuple[int, ...], int]] = []

    def follow(self, layers: Sequence[Layer]) -> None:
        """See to it that the pieces are those of these layers, with their gradients of this step."""
        options = [cohort.options for cohort in self._cohorts]
        threads = torch.get_num_threads()
        if layers is not self._arranged or options != self._options or threads != self._threads:
            self._arrange(layers)
            self._arranged, self._threads = layers, threads
        for piece, size, stride, place in self._views:
            g = self.layers[piece.layer].gradient.detach()
            piece.arrays["g"] = g.as_strided(size, stride, g.storage_offset() + place)
        if self._gathered is not None:
            self._copy(back=False)

    def release(self) -> None:
        """After the step: give the gathered layers their new weights, and hold on to no gradient."""
        if self._gathered is not None:
            self._copy(back=True)
        for piece, *_ in self._views:
            del piece.arrays["g"]

    def _arrange(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            _settle(layer)
        forms = [layer.form() for layer in layers]
        flat = self._flat if not any(forms) else None
        # What a rule of dimensions leaves to be taken number by number is not worth compiling.
        self._engine_of_numbers = "rows" if any(forms) and self._engine == "compiled" else self._engine
        gathers = self._engine != "tensor" and flat is None
        small = [
            gathers and form is None and is_small(x, self._engine_of_numbers)
            for x, form in zip(layers, forms, strict=True)
        ]
        order = sorted(range(len(layers)), key=lambda place: not small[place])
        self.layers = layers = [layers[place] for place in order]
        self.pieces, self.wholes, self._gathered = [], [], None
        if any(small):
            self._gathered, self._buffers = Places(layer.parameter for layer in layers[: sum(small)]), {}
        if (places := flat or self._gathered) is not None:
            self._cut_buffers(places, layers[: len(layers) if flat else sum(small)])
        if flat is None:
            for number in range(sum(small), len(layers)):
                self._cut_layer(number, layers[number], forms[order[number]])
        alone = sum(small) if flat is None else len(layers)
        self._views = [self._view_of(piece) for piece in self.pieces if piece.layer >= alone]
        self._index(layers)

    def _cut_buffers(self, places: Places, layers: Sequence[Layer]) -> None:
        self._fill_buffers(places, layers)
        for table in tables(layers, places, self._buffers):
            if self._engine_of_numbers == "compiled":
                table.compiled = True
                self.pieces.append(table)
            else:
                self.pieces += blocks_of(table, layers)

    def _cut_layer(self, number: int, layer: Layer, form: Form | None) -> None:
        """The pieces of a layer that lies on its own."""
        p, arrays = layer.parameter, layer.like_parameter()
        alike = sum(x.shape == p.shape for x in arrays.values()) + len(self._kept(layer))
        if form is not None:
            arrays = {name: _viewed(x, name, form, arrays["p"].shape) for name, x in arrays.items()}
        arrays |= self._scratch_of(layer, form)
        options = {} if form is None else form.options
        cut = CUTS[self._engine_of_numbers] if form is None else CUTS_BY_DIMENSIONS[self._engine]
        block = block_numbers(p.device, alike, BLOCK_BYTES if form is None else SLAB_BYTES)
        for piece in cut(number, arrays, block):
            piece.fixed = options
            self.pieces.append(piece)
        if form is not None:
            lines = {name: x for name, x in arrays.items() if name != "g"}
            self.wholes.append(Piece(number, lines, fixed=options))

    def _view_of(self, piece: Piece) -> tuple[Piece, torch.Size, tuple[int, ...], int]:
        """Which part of its layer's gradient a piece has: size, strides, and how far behind the beginning."""
        g = piece.arrays["g"]
        place = int(g.storage_offset() - self.layers[piece.layer].gradient.storage_offset())
        return piece, g.size(), g.stride(), place

    def _copy(self, back: bool) -> None:
        assert self._gathered is not None
        weights, gradients = zip(*self._gathered.homes, strict=True)
        small = self.layers[: len(weights)]
        own = [layer.parameter.detach() for layer in small]
        if back:
            torch._foreach_copy_(own, list(weights))
        else:
            torch._foreach_copy_(list(weights), own)
            torch._foreach_copy_(list(gradients), [layer.gradient for layer in small])

    def by_layer(self, sums: Tensor) -> Tensor:
        """Sums of pieces and rows [places, sums] added up for each layer [layers, sums], in fixed order."""
        if self._counts is None:
            return sums
        return torch.segment_reduce(sums, "sum", lengths=self._counts, axis=0)

    def _scratch_of(self, layer: Layer, form: Form | None) -> Arrays:
        """Arrays that stages leave for later ones: kept, since fresh memory is dear."""
        p = layer.parameter
        scratch = self._scratch.setdefault(p, {})
        shapes = dict.fromkeys(self._kept(layer), p.shape) if form is None else form.scratch
        for name, shape in shapes.items():
            if name not in scratch or not _suits(scratch[name], p, torch.Size(shape), form is None):
                dtype = compute_dtype(p)
                alike = form is None
                scratch[name] = torch.empty_like(p, dtype=dtype) if alike else p.new_empty(shape, dtype=dtype)
        return scratch

    def _kept(self, layer: Layer) -> tuple[str, ...]:
        """The scratch of a layer that is kept rather than worked out again."""
        return () if self._engine_of_numbers == "compiled" else layer.shapes.scratch

    def _fill_buffers(self, flat: Places, layers: Sequence[Layer]) -> None:
        """Move states into buffers beside the flat parameters; the optimizer then holds views."""
        self._buffers |= {"p": flat.parameters, "g": flat.gradients}
        for layer in layers:
            p = layer.parameter
            buffer, start, _ = flat.place(p)
            states = {name: x for name, x in layer.like_parameter().items() if name not in ("p", "g")}
            for name in (*states, *self._kept(layer)):
                if name not in self._buffers:
                    self._buffers[name] = [zeros(len(b), compute_dtype(b), b.device) for b in flat.parameters]
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
        self._counts = None if set(counts) == {1} else torch.tensor(counts, device=device)
        numel = [float(layer.parameter.numel()) for layer in layers]
        cohorts = {layer.cohort.number: layer.cohort for layer in layers}
        self._cohorts, places = (
            list(cohorts.values()),
            {number: place for place, number in enumerate(cohorts)},
        )
        self._options = [cohort.options for cohort in self._cohorts]
        cohort_of_layer = torch.tensor([places[layer.cohort.number] for layer in layers], device=device)
        self.numbers = LayerNumbers(
            self._cohorts,
            cohort_of_layer,
            torch.tensor(numel, dtype=torch.float64, device=device),
            {name: LayerState(name, layers) for name in layers[0].shapes.layer_states},
        )
        for pieces in of_kind.values():
            ends = list(accumulate(sum(piece.spans) for piece in pieces))
            for piece, end in zip(pieces, ends, strict=True):
                piece.rows = slice(end - sum(piece.spans), end)
        self.tables = [
            (pieces, RowNumbers(_layer_of_row(pieces).to(device), cohort_of_layer, dtype))
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


def _viewed(x: Tensor, name: str, form: Form, shape: torch.Size) -> Tensor:
    """An array in the shape in which the rule sees it."""
    if name in form.views:
        return x.view(form.views[name])
    return x.view(form.views["p"]) if x.shape == shape else x


def _suits(scratch: Tensor, p: Tensor, shape: torch.Size, alike: bool) -> bool:
    """Whether an array of an earlier step serves this parameter still."""
    as_before = scratch.shape == shape and scratch.dtype == compute_dtype(p) and scratch.device == p.device
    return as_before and (not alike or scratch.stride() == p.stride())
