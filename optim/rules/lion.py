"""Lion."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from optim.arithmetic import Values, add
from optim.engine.stage import Function
from optim.rule import Rule


def agreement(h: Any, g: Tensor, m: Tensor) -> Values:
    kept = (m.lerp(g, h.gain1) * g > 0).to(g.dtype)
    return {"kept": (kept, kept)}


def boost(h: Any, kept: Tensor) -> Values:
    return {"boost": h.numel / (kept + 1)}


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor) -> Values:
    c = m.lerp(g, h.gain1).sign_()
    if h.cautious:
        c.mul_(c * g > 0).mul_(h.boost)
    add(p, p, -h.lr, h.weight_decay)
    return {"p": add(p, c, -h.lr), "m": m.lerp_(g, h.gain2)}


class Lion(Rule):
    """Lion. Chen et al. 2023, arXiv:2302.06675 v4, Algorithm 2.

    Update (sign(0) = 0):
        c = β₁ m + (1 - β₁) g
        p = p - lr (sign(c) + λ p)
        m = β₂ m + (1 - β₂) g

    State: m (like p, fp32): 4 bytes per parameter.
    Defaults: the authors' code (google/automl).
    Options: `cautious` moves no weight against its gradient, and makes up for it: c = 0 where c g ≤ 0, p = p
        - lr (n / (k + 1) sign(c) + λ p) for k of a layer's n weights that move (Liang, Chen, Liu, Liu 2024,
        arXiv:2411.16085; timm divides by the share that moves, at least 0.001).
    Deviations of others: optax has λ = 1e-3 by default; else none known.
    Use: lr 3 to 10 times below and λ 3 to 10 times above AdamW's; batches of 256 upwards. Where gradients of
        ranks differ in rounding, a sign may flip: compare runs to 2 lr per flip.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    cautious: bool = False

    elements = ("m",)
    stages = (agreement, boost, apply)

    @classmethod
    def rounds(cls, groups: Sequence[Mapping[str, Any]]) -> tuple[Function | None, ...]:
        return cls.stages if any(group["cautious"] for group in groups) else cls.stages[2:]

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"gain1": 1 - h.beta1, "gain2": 1 - h.beta2}
