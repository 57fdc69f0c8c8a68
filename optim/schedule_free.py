"""Schedule-free learning around any optimizer."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from optim.wrapper import Wrapper


class ScheduleFree(Wrapper):
    """Schedule-free learning. Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky 2024, arXiv:2405.15682,
    Algorithm 1, around any optimizer.

    Update (y the weights that are trained, x those that are evaluated, x = y = z at the start; γ = `lr` of
    the inner optimizer, whose step Δ is that of the gradient at y):
        z = z - γ λ y + Δ
        x = (1 - c) x + c z,  c = γ² / Σ γ²                  γ the largest so far
        y = (1 - β) z + β x

    The model holds y; `eval()` turns it into x, `train()` back, and steps are refused in between. Evaluate
    and save the model after `eval()` alone, with batch norm's statistics taken again (`update_bn`): those of
    training are y's. A warm-up of the rate is worth having, a decay is not needed.

    State: z (like the parameter): 4 bytes per parameter, beside the inner optimizer's.
    Defaults: the authors' code (facebookresearch/schedule_free); `weight_decay` is λ, at y.
    Deviations: none known of the authors' wrapper. Inner optimizers should have no momentum of their own, as
        the paper's Adam has β₁ = 0.
    """

    array = "z"
    counts: ClassVar = {"weight_sum": 0.0, "largest_lr": 0.0, "training": True}
    options = ("momentum", "weight_decay")

    momentum: float
    weight_decay: float

    def __init__(
        self, optimizer: torch.optim.Optimizer, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        super().__init__(optimizer, momentum=momentum, weight_decay=weight_decay)

    @property
    def training(self) -> bool:
        """Whether the model holds y."""
        return bool(self.counted[0]["training"])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the weights once.

        Raises:
            RuntimeError: after `eval()`, whose weights are not those that gradients are taken at.
        """
        if not self.training:
            raise RuntimeError(
                "ScheduleFree: the model holds the weights of eval(); call train() before the step"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow()
        self._exchange()
        self.optimizer.step()
        self._average()
        return loss

    @torch.no_grad()
    def _exchange(self) -> None:
        """Put z where y was, and x where z was."""
        kept = iter(self.kept)
        for group in self.param_groups:
            for p in group["params"]:
                z = next(kept)
                x = p.lerp(z, 1 - 1 / self.momentum)
                if p.grad is not None:
                    z.sub_(p, alpha=float(group["lr"]) * self.weight_decay)
                p.copy_(z)
                z.copy_(x)

    @torch.no_grad()
    def _average(self) -> None:
        """Put y where z is, and z where x is."""
        kept = iter(self.kept)
        for group, counted in zip(self.param_groups, self.counted, strict=True):
            counted["largest_lr"] = max(counted["largest_lr"], float(group["lr"]))
            weight = counted["largest_lr"] ** 2
            counted["weight_sum"] += weight
            c = weight / counted["weight_sum"] if weight else 0.0
            for p in group["params"]:
                x = next(kept)
                z = p.clone()
                p.copy_(z.lerp(x.lerp_(z, c), self.momentum))
                x.copy_(z)

    def eval(self) -> None:
        """Turn the model's weights into x, the average that is evaluated and kept."""
        self._turn(False, 1 - 1 / self.momentum)

    def train(self) -> None:
        """Turn them back into y, at which gradients are taken."""
        self._turn(True, 1 - self.momentum)

    @torch.no_grad()
    def _turn(self, training: bool, share: float) -> None:
        if training != self.training:
            self.follow()
            for p, z in zip(self.parameters(), self.kept, strict=True):
                p.lerp_(z, share)
            for counted in self.counted:
                counted["training"] = training
