"""Where the arrays of a step lie: the chunks, their buffers, and which layer each row belongs to."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from optim.engine.chunks import (
    BLOCK_BYTES,
    CUTS,
    CUTS_BY_DIMENSIONS,
    SLAB_BYTES,
    Arrays,
    Chunk,
    EngineName,
    Layer,
    TensorView,
    block_numbers,
    blocks_of,
    is_small,
    tables,
    whole,
)
from optim.engine.scalars import LayerScalars, LayerState, RowScalars
from optim.engine.stage import compute_dtype
from optim.flat import BufferLayout, FlatBuffers, view_like, zeros


class Layout:
    """The chunks of the layers that take part in a step.

    Args:
        engine: the engine that works on the chunks. All but "tensor", where nothing is flat, copy small
            layers side by side into one table for the step.
    """

    def __init__(self, engine: EngineName) -> None:
        self.layers: list[Layer] = []
        self.chunks: list[Chunk] = []
        self.wholes: list[Chunk] = []
        self.tables: list[tuple[list[Chunk], RowScalars]] = []
        self._engine = self._engine_of_numbers = engine
        self._gathered: BufferLayout | None = None
        self._scratch: list[Arrays] = []
        self._buffers: dict[str, list[Tensor]] = {}
        self._arranged: Sequence[Layer] = ()
        self._views: list[tuple[Chunk, torch.Size, tuple[int, ...], int]] = []
        self._crossing: dict[int, Arrays] = {}
        self.cut = torch.empty(0, dtype=torch.int64)
        """The layers that are spread over workers, in the order in which parameters were given."""

    def follow(self, layers: Sequence[Layer], flat: FlatBuffers | None) -> None:
        """Make the chunks those of these layers, with their gradients of this step.

        Args:
            layers: of `StepLayers.begin`: the same list as before where nothing has moved.
            flat: the buffers in which parameters and gradients lie; states then lie in buffers like them.
        """
        if layers is not self._arranged:
            self._arrange(layers, flat if self._engine != "tensor" else None)
            self._arranged = layers
        for chunk, size, stride, place in self._views:
            g = self.layers[chunk.layer].gradient.detach()
            chunk.arrays["g"] = g.as_strided(size, stride, g.storage_offset() + place)
        if self._gathered is not None:
            self._copy(back=False)

    def release(self) -> None:
        """After the step: give the gathered layers their new weights, and hold on to no gradient."""
        if self._gathered is not None:
            self._copy(back=True)
        for chunk, *_ in self._views:
            del chunk.arrays["g"]

    def _arrange(self, layers: Sequence[Layer], flat: FlatBuffers | None) -> None:
        views = [layer.tensor_view() for layer in layers]
        flat = flat if not any(views) else None
        # What a rule of dimensions leaves to be taken number by number is not worth compiling.
        self._engine_of_numbers = "rows" if any(views) and self._engine == "compiled" else self._engine
        gathers = self._engine != "tensor" and flat is None

        def alone(place: int) -> bool:  # after those that lie side by side in buffers
            layer = layers[place]
            small = gathers and views[place] is None and is_small(layer, self._engine_of_numbers)
            return not ((small or flat) and layer.parameter.numel())

        order = sorted(range(len(layers)), key=alone)
        together = sum(not alone(place) for place in order)
        self.cut = torch.tensor(
            [order.index(place) for place, layer in enumerate(layers) if layer.shard is not None],
            dtype=torch.int64,
            device=layers[0].parameter.device,
        )
        self.layers = layers = [layers[place] for place in order]
        self.chunks, self.wholes, self._scratch, self._gathered = [], [], [], None
        self._crossing = {}
        if flat is None and together:
            self._gathered = BufferLayout(layer.parameter for layer in layers[:together])
        if (places := flat or self._gathered) is not None:
            self._cut_buffers(places, layers[:together])
        for number in range(together, len(layers)):
            self._cut_layer(number, layers[number], views[order[number]])
        self._views = [self._view_of(chunk) for chunk in self.chunks if chunk.layer >= together]
        self._index(layers)

    def _cut_buffers(self, places: BufferLayout, layers: Sequence[Layer]) -> None:
        self._fill_buffers(places, layers)
        for table in tables(layers, places, self._buffers):
            if self._engine_of_numbers == "compiled":
                table.compiled = True
                self.chunks.append(table)
            else:
                self.chunks += blocks_of(table, layers)

    def _cut_layer(self, number: int, layer: Layer, view: TensorView | None) -> None:
        """The chunks of a layer that lies on its own."""
        p, arrays, shard = layer.parameter, layer.like_parameter(), layer.shard
        if not p.numel() and (view is None or shard is None or shard.is_elsewhere):
            return
        alike = sum(x.shape == p.shape for x in arrays.values()) + len(self._kept(layer))
        logical = view
        if view is not None:
            view = view if shard is None else view.here(shard)
            arrays = {name: _viewed(x, name, view, arrays["p"].shape) for name, x in arrays.items()}
        arrays |= self._scratch_of(layer, view)
        options = {} if view is None else view.options
        cut = CUTS[self._engine_of_numbers] if view is None else CUTS_BY_DIMENSIONS[self._engine]
        cut = whole if view is not None and view.whole else cut
        block = block_numbers(p.device, alike, BLOCK_BYTES if view is None else SLAB_BYTES)
        for chunk in cut(number, arrays, block) if p.numel() else ():
            chunk.fixed = options
            self.chunks.append(chunk)
        if logical is not None:
            lines = {name: x for name, x in arrays.items() if name != "g"}
            self.wholes.append(Chunk(number, lines, fixed=options))
            if shard is not None:
                crossing = {name for name, shape in logical.scratch.items() if shard.crosses(shape)}
                self._crossing[number] = {name: lines[name] for name in crossing}

    def marginals(self, names: Sequence[str]) -> list[tuple[int, str, Tensor]]:
        """Of these arrays those that join numbers of several workers, each with the number of its layer and
        its name, in the order of the parameters: 0 where nothing of the layer lies here.
        """
        found = [
            (number, name, held[name])
            for number in self.cut.tolist()
            if (held := self._crossing.get(number)) is not None
            for name in names
            if name in held
        ]
        for number, _, array in found:
            if not self.layers[number].parameter.numel():
                array.zero_()
        return found

    def _view_of(self, chunk: Chunk) -> tuple[Chunk, torch.Size, tuple[int, ...], int]:
        """Which part of its layer's gradient a chunk has: size, strides, and how far behind the beginning."""
        g = chunk.arrays["g"]
        place = int(g.storage_offset() - self.layers[chunk.layer].gradient.storage_offset())
        return chunk, g.size(), g.stride(), place

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
        """Sums of chunks and rows [places, sums] added up for each layer [layers, sums], in fixed order."""
        if self._counts is None:
            return sums
        return torch.segment_reduce(sums, "sum", lengths=self._counts, axis=0)

    def _scratch_of(self, layer: Layer, view: TensorView | None) -> Arrays:
        """Arrays that stages leave for later ones: kept between steps, since fresh memory takes time."""
        p, dtype = layer.parameter, compute_dtype(layer.parameter)
        if view is None:
            scratch = {name: torch.empty_like(p, dtype=dtype) for name in self._kept(layer)}
        else:
            scratch = {name: p.new_empty(shape, dtype=dtype) for name, shape in view.scratch.items()}
        self._scratch.append(scratch)
        return scratch

    def _kept(self, layer: Layer) -> tuple[str, ...]:
        """The scratch of a layer that is kept rather than worked out again."""
        return () if self._engine_of_numbers == "compiled" else layer.shapes.scratch

    def _fill_buffers(self, flat: BufferLayout, layers: Sequence[Layer]) -> None:
        """Move states into buffers laid out like the flat parameters; the optimizer then holds views."""
        if self._buffers.get("p") is not flat.parameters:
            self._buffers = {"p": flat.parameters, "g": flat.gradients}
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
        of_kind: dict[tuple[torch.dtype, torch.device], list[Chunk]] = {}
        for chunk in self.chunks:
            for number, rows in enumerate(chunk.spans or (1,), start=chunk.layer):
                counts[number] += rows
            if chunk.spans:
                p = chunk.arrays["p"]
                of_kind.setdefault((compute_dtype(p), p.device), []).append(chunk)
        self._counts = None if set(counts) == {1} else torch.tensor(counts, device=device)
        numel = [float(layer.shape.numel()) for layer in layers]
        cohorts = {layer.cohort.number: layer.cohort for layer in layers}
        places = {number: place for place, number in enumerate(cohorts)}
        cohort_of_layer = torch.tensor([places[layer.cohort.number] for layer in layers], device=device)
        self.numbers = LayerScalars(
            list(cohorts.values()),
            cohort_of_layer,
            torch.tensor(numel, dtype=torch.float64, device=device),
            {name: LayerState(name, layers) for name in layers[0].shapes.layer_states},
        )
        for chunks in of_kind.values():
            ends = list(accumulate(sum(chunk.spans) for chunk in chunks))
            for chunk, end in zip(chunks, ends, strict=True):
                chunk.rows = slice(end - sum(chunk.spans), end)
        self.tables = [
            (chunks, RowScalars(_layer_of_row(chunks).to(device), cohort_of_layer, dtype))
            for (dtype, device), chunks in of_kind.items()
        ]


def _layer_of_row(chunks: Sequence[Chunk]) -> Tensor:
    numbers = [torch.arange(chunk.layer, chunk.layer + len(chunk.spans)) for chunk in chunks]
    return torch.cat(numbers).repeat_interleave(
        torch.tensor([rows for chunk in chunks for rows in chunk.spans])
    )


def _viewed(x: Tensor, name: str, view: TensorView, shape: torch.Size) -> Tensor:
    """An array in the shape in which the rule sees it."""
    if name in view.views:
        return x.view(view.views[name])
    return x.view(view.views["p"]) if x.shape == shape else x
