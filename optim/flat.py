"""Parameters and gradients in flat buffers, one per (dtype, device), in rows of 1024 numbers."""

import contextlib
import inspect
import itertools
import mmap
from collections.abc import Callable, Iterable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

ROW = 1024
"""Numbers per row; a row never crosses a parameter, so what is known per row is known per layer."""


HUGE_FROM_BYTES = 2**23
"""Size from which memory is asked for in huge pages, of 2 MiB each."""


def rows_of(numel: int) -> int:
    """Rows that `numel` numbers take."""
    return -(-numel // ROW)


def zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 1-D buffer of zeros; a large one on a CPU lies in huge pages, through which it streams faster."""
    size = numel * dtype.itemsize
    if device.type != "cpu" or size < HUGE_FROM_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them: the memory is as good as any other
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def is_dtensor(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, found without importing those."""
    return type(x) not in (Tensor, nn.Parameter) and hasattr(x, "placements")


def is_dense(tensor: Tensor) -> bool:
    """Whether the tensor fills its stretch of memory exactly, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def plain(method: Callable[..., Any]) -> Callable[..., Any]:
    """A bound method of torch's optimizers without its decorators, for `plain(method)(…)`.

    They only keep torch's compiler out, and import it for that at the first call, which takes a second.
    """
    return MethodType(inspect.unwrap(method), method.__self__)  # type: ignore[attr-defined]


@torch._disable_dynamo
def untraced(function: Callable[..., Any], *args: Any) -> Any:
    """Call what a compiled training step must not look into: how a step is run is decided on the host."""
    return function(*args)


def view_like(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """The tensor shaped like `like` at element `start` of a 1-D buffer, in its order of memory if dense."""
    if is_dense(like):
        return buffer.as_strided(like.size(), like.stride(), buffer.storage_offset() + start)
    return buffer[start : start + like.numel()].view(like.size())


class BufferLayout:
    """Buffers for a list of parameters and their gradients, and each one's place in them.

    Parameters lie in the order given, each beginning at a row; the padding behind each is zero.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.held = list(parameters)
        rows: dict[tuple[torch.dtype, torch.device], int] = {}
        self._places: dict[Tensor, tuple[int, int, int]] = {}
        for p in self.held:
            kind = (p.dtype, p.device)
            first_row = rows.setdefault(kind, 0)
            self._places[p] = (list(rows).index(kind), first_row * ROW, p.numel())
            rows[kind] += rows_of(p.numel())

        def buffers() -> list[Tensor]:
            return [zeros(n * ROW, dtype, device) for (dtype, device), n in rows.items()]

        self.parameters, self.gradients = buffers(), buffers()
        self.homes = [self._home(p) for p in self.held]

    def place(self, parameter: Tensor) -> tuple[int, int, int]:
        """(number of the buffer, first element, number of elements) of a parameter."""
        return self._places[parameter]

    def _home(self, p: Tensor) -> tuple[Tensor, Tensor]:
        buffer, start, _ = self._places[p]
        return view_like(self.parameters[buffer], start, p), view_like(self.gradients[buffer], start, p)


class FlatBuffers(BufferLayout):
    """The flat buffers of a list of parameters.

    Building one moves the parameters: each `p.data` becomes a view of `parameters`, each `p.grad` a
    persistent view of `gradients`.

    Raises `ValueError` for parameters that share memory, which no buffer of disjoint places can hold.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = list(parameters)
        trained = [p for p in parameters if p.requires_grad]
        _refuse_overlap(trained)
        super().__init__(trained)
        self._left_out = [p for p in parameters if not p.requires_grad]
        self._zeroed_at: list[int | None] = [None] * len(self.gradients)
        self._where = [(weight.data_ptr(), weight.stride()) for weight, _ in self.homes]
        self.adopt()

    def adopt(self) -> bool:
        """Copy back into the buffers what was moved out of them (`.data = …`, `assign=True`).

        A gradient that is None stays None: its parameter takes no part in the step. Neither do frozen
        parameters, nor those of a buffer of gradients into which nothing has come since `zero_grad`. False
        where the buffers fit no more: a parameter has got another dtype or device, or is trained after all.
        """
        if any(p.requires_grad for p in self._left_out):
            return False
        strays = [
            (p, weight)
            for p, (weight, _), where in zip(self.held, self.homes, self._where, strict=True)
            if (p.data_ptr(), p.stride()) != where
        ]
        if any(p.dtype != weight.dtype or p.device != weight.device for p, weight in strays):
            return False
        for p, weight in strays:
            weight.copy_(p.detach())
            p.data = weight
        idle = {
            number
            for number, buffer in enumerate(self.gradients)
            if buffer._version == self._zeroed_at[number] and not buffer.any()
        }
        for p, (_, gradient) in zip(self.held, self.homes, strict=True):
            g = p.grad
            if not p.requires_grad or (g is gradient and self._places[p][0] in idle):
                p.grad = None
            elif g is not gradient and g is not None and not g.is_sparse:
                if g.data_ptr() != gradient.data_ptr():
                    gradient.copy_(g)
                p.grad = gradient
        return True

    def zero_grad(self) -> None:
        """Zero the gradient buffers and give every parameter that is not frozen its view of them again."""
        for buffer in self.gradients:
            buffer.zero_()
        self._zeroed_at = [buffer._version for buffer in self.gradients]
        for p, (_, gradient) in zip(self.held, self.homes, strict=True):
            p.grad = gradient if p.requires_grad else None


class FlatOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose parameters and gradients may lie in flat buffers: what `build` returns.

    The buffers are no state: a copy or an unpickled optimizer builds its own when they are first asked for.
    What was moved out of them (`p.data = …`, `assign=True`, a fresh gradient) is copied back in before the
    next step.
    """

    _flatten = False
    _flat: FlatBuffers | None = None

    def flatten(self) -> None:
        """Move parameters and gradients into flat buffers.

        Raises:
            ValueError: parameters share memory, or are DTensors.
        """
        if any(is_dtensor(p) for group in self.param_groups for p in group["params"]):
            raise ValueError(
                "flatten: parameters are DTensors, which lie where their mesh has them; use flatten=False"
            )
        self._flatten = True
        self.adopt()

    def unflatten(self) -> None:
        """Move parameters and gradients into memory of their own again, so that each can be saved alone."""
        if (flat := self.flat_or_none) is not None:
            for p in flat.held:
                p.data = p.data.clone()
                p.grad = None if p.grad is None else p.grad.clone()
        self._flatten, self._flat = False, None

    @property
    def flat(self) -> FlatBuffers:
        """The flat buffers; other ones after parameters got another dtype or device.

        Raises:
            AttributeError: the parameters are not flat.
        """
        if (flat := self.flat_or_none) is None:
            raise AttributeError("no flat buffers: build the optimizer with flatten=True, or call flatten()")
        return flat

    @property
    def flat_or_none(self) -> FlatBuffers | None:
        """The flat buffers, or None where parameters lie where they were."""
        if self._flatten and self._flat is None:
            self._flat = FlatBuffers(p for group in self.param_groups for p in group["params"])
        return self._flat

    def adopt(self) -> None:
        """Copy into the flat buffers, if there are any, what was moved out of them."""
        flat = self.flat_or_none
        if flat is not None and not flat.adopt():
            self._flat = None  # the next one is made for what the parameters are now
            self.adopt()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients; flat ones in place, also with `set_to_none`."""
        plain(super().zero_grad)(set_to_none)
        if (flat := self.flat_or_none) is not None:
            flat.zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once; returns what the closure does, which is called with gradients enabled."""
        return untraced(self._step, closure) if torch.compiler.is_compiling() else self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.adopt()
        self.move()
        return loss

    def move(self) -> None:
        """What a step does with the gradients that are there."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; flat buffers are built anew to hold it."""
        plain(super().add_param_group)(param_group)
        self._flat = None

    def state_dict(self) -> dict[str, Any]:
        """As torch has it."""
        return plain(super().state_dict)()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch has it."""
        plain(super().load_state_dict)(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_flatten": self._flatten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flat = None


def _refuse_overlap(parameters: Sequence[Tensor]) -> None:
    spans = sorted(
        (p.untyped_storage().data_ptr() + p.storage_offset() * p.element_size(), p.numel() * p.element_size())
        for p in parameters
        if p.numel() and p.device.type != "meta"
    )
    for (start, size), (following, _) in itertools.pairwise(spans):
        if following < start + size:
            raise ValueError(
                "flatten: parameters share memory; make them one Parameter, or use flatten=False"
            )
