"""LARS."""

from typing import Any, Literal

import torch
from torch import Tensor

from optim.arithmetic import Values, add
from optim.rule import Rule


def norms(h: Any, p: Tensor, g: Tensor) -> Values:
    return {"p2": (p, p), "g2": (g, g)}


def trust_ratio(h: Any, p2: Tensor, g2: Tensor) -> Values:
    ratio = h.trust_coefficient * p2.sqrt() / (g2.sqrt() + h.weight_decay * p2.sqrt() + h.eps)
    ratio = torch.where(h.trust_clip, (ratio / h.lr).clamp(max=1), ratio)
    return {"ratio": torch.where(h.adapts & (p2 > 0) & (g2 > 0), ratio, 1)}


def apply(h: Any, p: Tensor, g: Tensor, v: Tensor) -> Values:
    rate = h.inside * h.ratio
    add(add(v.mul_(h.momentum), g, h.gain, rate), p, h.gain, rate, h.weight_decay)
    if not h.nesterov:
        return {"p": add(p, v, -h.outside), "v": v}
    add(add(p, p, -h.outside, rate, h.weight_decay), g, -h.outside, rate)
    return {"p": add(p, v, -h.outside, h.momentum), "v": v}


class LARS(Rule):
    """LARS. You, Gitman, Ginsburg 2017, arXiv:1708.03888 v3, Algorithm 1.

    Update (norms over one layer, the whole tensor; η = `trust_coefficient`):
        ratio = η ‖p‖ / (‖g‖ + λ ‖p‖ + ε)                    1 where either norm is 0
        v = μ v + lr ratio (g + λ p)
        p = p - v                                            with `nesterov` p - μ v - lr ratio (g + λ p)

    State: v (like p, fp32): 4 bytes per parameter.
    Defaults: the paper's η, μ; ε 0 and λ 0, since recipes differ.
    Options: `momentum_mode` "torch" keeps lr outside the buffer, p = p - lr v: the same at a constant lr;
        `dampening` takes 1 - dampening of each new gradient but the first; `trust_clip` makes the ratio
        min(ratio / lr, 1) (LARC); `always_adapt` False gives layers without decay the ratio 1 (timm); `adapt`
        False in a group gives its layers the ratio 1: they move by plain momentum at lr, as MLPerf's skip
        list.
    Deviations of others: the LAMB paper's "LARS" and jettify's normalise the momentum, not the gradient;
        optax divides by ‖g + λ p‖; timm, apex, pytorch_optimizer keep lr outside the buffer; timm adapts only
        layers with decay; apex and jettify drop the decay where a norm is 0; apex and pytorch_optimizer
        overwrite the gradient.
    Use: convolutional nets with batches of 4096 to 32768: lr 10 to 40 with warm-up, λ 5e-5 to 5e-4.
    """

    lr: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    trust_coefficient: float = 1e-3
    eps: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    momentum_mode: Literal["paper", "torch"] = "paper"
    trust_clip: bool = False
    always_adapt: bool = True

    elements = ("v",)
    stages = (norms, trust_ratio, apply)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {
            "inside": h.lr if h.momentum_mode == "paper" else 1.0,
            "outside": 1.0 if h.momentum_mode == "paper" else h.lr,
            "gain": 1 - h.dampening if t > 1 else 1.0,
            "adapts": h.adapt and (h.always_adapt or h.weight_decay != 0),
        }
