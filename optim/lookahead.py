"""Lookahead around any optimizer."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from optim.wrapper import Wrapper


class Lookahead(Wrapper):
    """Lookahead. Zhang, Lucas, Hinton, Ba 2019, arXiv:1907.08610 v2, Algorithm 1.

    Update (θ the weights that the inner optimizer moves, φ the slow ones, φ = θ at the start):
        after every k steps of the inner optimizer φ = φ + α (θ - φ), θ = φ

    State: φ (like the parameter): 4 bytes per parameter; the inner optimizer's state goes on undisturbed.
    Defaults: the paper's k = 5, α = 0.5.
    Deviations of others: timm and jettify do not start φ at θ, so their first synchronisation differs; the
        authors' code leaves φ and the counter out of its `state_dict`.
    """

    array = "lookahead"
    counts: ClassVar = {"steps": 0}
    options = ("k", "alpha")

    k: int
    alpha: float

    def __init__(self, optimizer: torch.optim.Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        if k < 1:
            raise ValueError(f"Invalid k value: {k}")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"Invalid alpha value: {alpha}")
        super().__init__(optimizer, k=k, alpha=alpha)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; every k-th one ends at the slow weights."""
        loss = self.optimizer.step(closure)
        for counted in self.counted:
            counted["steps"] += 1
        if self.counted[0]["steps"] % self.k == 0:
            self._synchronise()
        return loss

    @torch.no_grad()
    def _synchronise(self) -> None:
        self.follow()
        for p, phi in zip(self.parameters(), self.kept, strict=True):
            p.copy_(phi.lerp_(p, self.alpha))
