"""What optimizers around an optimizer have in common."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from optim.flat import FlatBuffers, FlatOptimizer


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another one, whose groups, state and defaults are its own: schedulers, `zero_grad`
    and `flat` see the same things.

    It keeps an array like each parameter, at first a copy of it, and counts something in each group. Its
    `state_dict` has torch's form: arrays stand as state `array` among the inner optimizer's, counts in the
    groups, under names that begin with it.
    """

    array: ClassVar[str]
    counts: ClassVar[Mapping[str, float]]
    """What is counted in each group, as it begins."""

    options: ClassVar[tuple[str, ...]]
    """The names of its own arguments."""

    optimizer: torch.optim.Optimizer
    kept: list[Tensor]
    counted: list[dict[str, float]]

    def __init__(self, optimizer: torch.optim.Optimizer, **options: float) -> None:
        kept = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        counted = [dict(self.counts) for _ in optimizer.param_groups]
        self.__setstate__({"optimizer": optimizer, "kept": kept, "counted": counted, **options})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def flat(self) -> FlatBuffers:
        """The inner optimizer's flat buffers.

        Raises:
            AttributeError: its parameters are not flat.
        """
        return cast(FlatOptimizer, self.optimizer).flat

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; what is kept of it starts where it is."""
        self.optimizer.add_param_group(param_group)
        self.kept += [p.detach().clone() for p in self.param_groups[-1]["params"]]
        self.counted.append(dict(self.counts))

    def follow(self) -> None:
        """Bring what is kept to where parameters are, in their dtype."""
        self.kept = [x.to(p) for x, p in zip(self.kept, self.parameters(), strict=True)]

    def parameters(self) -> list[Tensor]:
        """The parameters of all groups."""
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with what is kept here."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        packed = self.optimizer.state_dict()
        packed["param_groups"] = [
            group | {f"{self.array}_{name}": value for name, value in counted.items()}
            for group, counted in zip(packed["param_groups"], self.counted, strict=True)
        ]
        packed["state"] = {
            number: {**packed["state"].get(number, {}), self.array: x.clone()}
            for number, x in zip(_numbers(packed), self.kept, strict=True)
        }
        for after in self._optimizer_state_dict_post_hooks.values():
            packed = after(self, packed) or packed
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken.

        Raises:
            ValueError: it was taken from an optimizer without this wrapper; nothing has been loaded then.
        """
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            given = before(self, given) or given
        states = [given["state"].get(number, {}) for number in _numbers(given)]
        if not all(self.array in state for state in states):
            raise ValueError(
                f"{type(self).__name__}: the saved state has no {self.array!r} of some parameters: it is "
                "that of an optimizer without it; load that into the inner optimizer, `.optimizer`"
            )
        inner = {
            number: {name: value for name, value in state.items() if name != self.array}
            for number, state in zip(_numbers(given), states, strict=True)
        }
        names = {name: f"{self.array}_{name}" for name in self.counts}
        groups = [
            {name: value for name, value in group.items() if name not in names.values()}
            for group in given["param_groups"]
        ]
        begun = {number: state for number, state in inner.items() if state}
        self.optimizer.load_state_dict(given | {"state": begun, "param_groups": groups})
        self.kept = [
            state[self.array].to(p, copy=True) for state, p in zip(states, self.parameters(), strict=True)
        ]
        self.counted = [{name: group[key] for name, key in names.items()} for group in given["param_groups"]]
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "kept", "counted", *self.options)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({})  # torch's hooks


def _numbers(packed: Mapping[str, Any]) -> list[int]:
    """The numbers that a state dict gives the parameters."""
    return [number for group in packed["param_groups"] for number in group["params"]]
