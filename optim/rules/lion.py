"""Lion."""

from typing import Any

from torch import Tensor

from optim.arithmetic import Values, add
from optim.rule import Rule


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor) -> Values:
    c = m.lerp(g, h.gain1)
    add(p, p, -h.lr, h.weight_decay)
    return {"p": add(p, c.sign_(), -h.lr), "m": m.lerp_(g, h.gain2)}


class Lion(Rule):
    """Lion. Chen et al. 2023, arXiv:2302.06675 v4, Algorithm 2.

    Update (sign(0) = 0):
        c = β₁ m + (1 - β₁) g
        p = p - lr (sign(c) + λ p)
        m = β₂ m + (1 - β₂) g

    State: m (like p, fp32): 4 bytes per parameter.
    Defaults: the authors' code (google/automl).
    Deviations of others: optax has λ = 1e-3 by default; else none known.
    Use: lr 3 to 10 times below and λ 3 to 10 times above AdamW's; batches of 256 upwards. Where gradients of
        ranks differ in rounding, a sign may flip: compare runs to 2 lr per flip.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    elements = ("m",)
    stages = (apply,)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"gain1": 1 - h.beta1, "gain2": 1 - h.beta2}
