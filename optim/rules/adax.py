"""AdaX."""

import math
from typing import Any

from torch import Tensor

from optim.arithmetic import Values, add, plus
from optim.rule import Rule


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Values:
    g = plus(g, p, h.coupled)
    m.lerp_(g, h.gain)
    add(v.mul_(h.keep), g, h.take, times=g)
    add(p, p, -h.lr, h.decoupled_decay)
    return {"p": add(p, m, -h.lr, over=v.sqrt().add_(h.epsilon)), "m": m, "v": v}


class AdaX(Rule):
    """AdaX. Li, Zhang, Wang, Luo 2020, arXiv:2004.09740, Algorithm 1, with ε as in the authors' code.

    Update (t = 1, 2, …):
        g = g + λ p                                          with `decoupled` p = p - lr λ p instead (AdaX-W)
        m = β₁ m + (1 - β₁) g
        V = (1 + β₂) V + β₂ g²
        p = p - lr m √((1 + β₂)ᵗ - 1) / (√V + ε)

    State: m, and v = V / ((1 + β₂)ᵗ - 1), which follows v = (1 - w) v + w g² with w = β₂ / ((1 + β₂)ᵗ - 1)
        and never overflows, where V does after some 900 000 steps in fp32 (each like p, fp32): 8 bytes per
        parameter.
    Defaults: the authors' code (switchablenorms/AdaX) for AdaX; its AdaX-W has lr 5e-3, weight_decay 5e-2.
    Deviations of others: no other maintained library has it; the authors' code overwrites the gradient where
    λ > 0.
    Use: where Adam is used; m is not debiased, so the first steps are short.
    """

    lr: float = 1.5e-3
    betas: tuple[float, float] = (0.9, 1e-4)
    eps: float = 1e-12
    weight_decay: float = 5e-4
    decoupled: bool = False

    elements = ("m", "v")
    stages = (apply,)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        growth = math.expm1(t * math.log1p(h.beta2))
        return {
            "gain": 1 - h.beta1,
            "take": h.beta2 / growth,
            "keep": 1 - h.beta2 / growth,
            "epsilon": h.eps / math.sqrt(growth),
            "coupled": 0.0 if h.decoupled else h.weight_decay,
            "decoupled_decay": h.weight_decay if h.decoupled else 0.0,
        }
