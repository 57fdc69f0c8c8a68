"""Optimizers whose parameters and gradients may live in flat buffers: ours and torch's."""

from typing import Any

import torch

from optim.flat import Flat


class Flattening(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` with `flat`: None, or after `flatten()` the flat buffers of its parameters.

    The buffers are no state: a copy or an unpickled optimizer builds its own when they are first asked for,
    and what was moved out of them (`p.data = …`, `assign=True`, a fresh gradient) is taken in again before
    the next step.
    """

    _flatten = False
    _flat: Flat | None = None

    def flatten(self, flatten: bool = True) -> None:
        """Move parameters and gradients into flat buffers."""
        self._flatten = flatten
        self.settle()

    @property
    def flat(self) -> Flat | None:
        """The flat buffers, or None."""
        if self._flatten and self._flat is None:
            self._flat = Flat(p for group in self.param_groups for p in group["params"])
        return self._flat

    @property
    def buffers(self) -> Flat:
        """The flat buffers; RuntimeError before `flatten()`."""
        if self.flat is None:
            raise RuntimeError("the optimizer is not flat; build it with flatten=True")
        return self.flat

    def settle(self) -> None:
        """See to it that flat parameters lie in their buffers."""
        flat = self.flat
        if flat is not None and not flat.adopt():
            self._flat = None  # the next one is made for what the parameters are now
            self.settle()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients; flat ones in place, whatever `set_to_none` says."""
        super().zero_grad(set_to_none)
        if self.flat is not None:
            self.flat.zero_grad()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; flat buffers are built anew to hold it."""
        super().add_param_group(param_group)
        self._flat = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_flatten": self._flatten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._flat = None


FlatOptimizer = Flattening
