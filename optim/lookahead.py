"""Lookahead around any optimizer."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from optim.flat import FlatBuffers, FlatOptimizer


class Lookahead(torch.optim.Optimizer):
    """Lookahead. Zhang, Lucas, Hinton, Ba 2019, arXiv:1907.08610 v2, Algorithm 1.

    Update (θ the weights that the inner optimizer moves, φ the slow ones, φ = θ at the start):
        after every k steps of the inner optimizer φ = φ + α (θ - φ), θ = φ

    State: φ (like the parameter): 4 bytes per parameter; the inner optimizer's state goes on undisturbed.
    Defaults: the paper's k = 5, α = 0.5.
    Deviations of others: timm and jettify do not start φ at θ, so their first synchronisation differs; the
        authors' code leaves φ and the counter out of its `state_dict`.

    Groups, state and defaults are the inner optimizer's own: schedulers, `zero_grad` and `flat` see the same
    things.
    """

    optimizer: torch.optim.Optimizer
    k: int
    alpha: float
    steps: int
    slow: list[Tensor]

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1:
            raise ValueError(f"Invalid k value: {k}")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"Invalid alpha value: {alpha}")
        slow = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
        self.__setstate__({"optimizer": optimizer, "k": k, "alpha": alpha, "steps": 0, "slow": slow})

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; every k-th one ends at the slow weights."""
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.steps % self.k == 0:
            self._synchronise()
        return loss

    @torch.no_grad()
    def _synchronise(self) -> None:
        for number, p in enumerate(self._parameters()):
            slow = self.slow[number] = self.slow[number].to(p)
            p.copy_(slow.lerp_(p, self.alpha))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients as the inner optimizer does."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its slow weights start where it is."""
        self.optimizer.add_param_group(param_group)
        self.slow += [p.detach().clone() for p in self.param_groups[-1]["params"]]

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, the slow weights and the counter."""
        slow = [weights.clone() for weights in self.slow]
        return {"optimizer": self.optimizer.state_dict(), "slow": slow, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken."""
        parameters = self._parameters()
        if len(state_dict["slow"]) != len(parameters):
            raise ValueError(
                f"loaded state dict has {len(state_dict['slow'])} slow weights; "
                f"the optimizer has {len(parameters)} parameters"
            )
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.slow = [saved.to(p, copy=True) for saved, p in zip(state_dict["slow"], parameters, strict=True)]
        self.steps = state_dict["steps"]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("optimizer", "k", "alpha", "steps", "slow")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        super().__setstate__({})  # torch's hooks
