"""SM3."""

from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from optim.rule import Rule
from optim.stage import Values, over_rows


def largest(x: Tensor, axis: int) -> Tensor:
    """The maximum over all axes but one."""
    if axis > 0:
        x = over_rows(x, "amax")
    others = [d for d in range(x.dim()) if d != axis]
    return x.amax(others, keepdim=True) if others else x


def cover(h: Any, *mu: Tensor) -> Values:
    return {"q": reduce(torch.minimum, mu[1:])} if len(mu) > 1 else {}


def move(h: Any, p: Tensor, g: Tensor, m: Tensor | None, q: Tensor | None, *mu: Tensor) -> Values:
    g2 = h.gain * g * g
    if h.variant == "II":
        nu = h.keep * (mu[0] if q is None else torch.minimum(mu[0], q)) + g2
        new_mu = [largest(nu, k) for k in range(len(mu))]
    else:
        new_mu = [h.keep * mu_k + largest(g2, k) for k, mu_k in enumerate(mu)]
        nu = reduce(torch.minimum, new_mu)
    u = torch.where(nu > 0, g * nu.rsqrt(), 0)
    values = {f"mu{k}": mu_k for k, mu_k in enumerate(new_mu)}
    if m is not None:
        u = values["m"] = h.momentum * m + (1 - h.momentum) * u
    return values | {"p": p - h.lr * u}


class SM3(Rule):
    """SM3. Anil, Gupta, Koren, Singer 2019, arXiv:1901.11150 v2, Algorithms SM3-I and SM3-II.

    Update (one accumulator μₖ for each axis k, a number for each slice along it; 0 / 0 = 0):
        ν = minₖ μₖ + g²
        μₖ = max of ν over all other axes
        m = β m + (1 - β) g / √ν
        p = p - lr m

    State: μₖ (fp32), with momentum also m (like p): rows plus columns, 0.016 bytes per parameter at 512 x
        512; with momentum 4 more. Vectors and scalars are diagonal AdaGrad.
    Defaults: momentum 0 for its memory (the paper's is 0.9); the authors' code (google-research/sm3) has no
    default lr.
    Options: `variant` "I": μₖ = μₖ + max of g², ν = minₖ μₖ, a looser bound; `beta` > 0 makes the sums
        averages, ν = β minₖ μₖ + (1 - β) g².
    Deviations of others: the authors' code adds 1e-30 to ν; optax 1e-8, which shows, and fails on scalars;
        pytorch_optimizer always holds a momentum, and lets no average shrink.
    Use: models whose state must be small; lr 0.1 to 0.3 with warm-up, no decay.
    """

    lr: float = 0.1
    momentum: float = 0.0
    beta: float = 0.0
    variant: Literal["I", "II"] = "II"

    shaped = True
    stages = (cover, None, move)

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        def along(axis: int) -> torch.Size:
            return torch.Size(size if d == axis else 1 for d, size in enumerate(shape))

        accumulators = {f"mu{k}": along(k) for k in range(max(1, len(shape)))}
        return accumulators | ({"m": shape} if h["momentum"] else {})

    @classmethod
    def scratch_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        return {"q": torch.Size((1, *shape[1:]))} if len(shape) > 1 else {}

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"keep": h.beta or 1.0, "gain": 1 - h.beta}
