"""Funnelled SGD with momentum."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add, plus
from optim.rule import Rule


def inner_products(h: Any, p: Tensor, g: Tensor, u: Tensor) -> Values:
    g = plus(g, p, h.weight_decay)
    return {"ug": (u, g), "u2": (u, u), "g2": (g, g)}


def layer_scale(h: Any, ug: Tensor, u2: Tensor, g2: Tensor, log_s: Tensor) -> Values:
    ug, u2, g2 = (torch.where(h.global_scale, each.sum(), each) for each in (ug, u2, g2))
    cosine = torch.where(u2 * g2 > 0, ug / (u2 * g2).sqrt(), 0)
    log_s = log_s + h.scale_rate * torch.where(h.normalize_alignment, cosine, ug)
    log_s = log_s.clamp(-h.max_log_scale, h.max_log_scale)
    return {"log_s": log_s, "s": log_s.exp()}


def apply(h: Any, p: Tensor, g: Tensor, log_p: Tensor, m: Tensor, u: Tensor) -> Values:
    g = plus(g, p, h.weight_decay)
    alignment = (m * g).sign_() if h.normalize_alignment else m * g
    add(log_p, alignment, h.gain_rate).clamp_(h.least_log_gain, h.most_log_gain)
    m.lerp_(g, h.gain)
    add(u.mul_(h.momentum), g, h.lr, times=log_p.exp())
    return {"p": add(p, u, -h.s), "log_p": log_p, "m": m, "u": u}


class FunnelledSGDM(Rule):
    """Funnelled SGD with momentum. Amid, Anil, Fifty, Warmuth 2022, arXiv:2202.00145.

    Update (p the weights, a a gain per weight, s one scale; alignments with the values of the step before):
        g = g + λ p
        log a = log a + γ_a m g                              kept within ± max_log_gain
        log s = log s + γ_s ⟨u, g⟩                           kept within ± max_log_scale
        m = β m + (1 - β) g
        u = μ u + lr a g
        p = p - s u

    State: log a (called log_p, the paper's p), m, u (each like p, fp32) and log s: 12 bytes per parameter, 4
    per tensor.
    Defaults: ours; there is no official code, and the sources at hand leave the gains open. lr is a tenth of
        what SGD with momentum takes, since s may grow tenfold. γ_a = γ_s = 0 is SGD with momentum exactly.
    Options: `gain_rate` is γ_a, `scale_rate` γ_s; `global_scale` False gives each layer its own s from its
        own ⟨u, g⟩; `normalize_alignment` takes the cosine of u and g for s and the sign of m g for a, free of
        the gradient's scale.
    Deviations: the bounds are ours: exponentials of raw products overflow. No other library has it.
    Use: as SGD with momentum, where its learning rate schedule is to adapt itself.
    """

    lr: float = 0.01
    momentum: float = 0.9
    beta: float = 0.9
    gain_rate: float = 1e-3
    scale_rate: float = 1e-3
    weight_decay: float = 0.0
    global_scale: bool = True
    normalize_alignment: bool = False
    max_log_gain: float = math.log(10)
    max_log_scale: float = math.log(10)

    elements = ("log_p", "m", "u")
    layer_states = ("log_s",)
    stages = (inner_products, layer_scale, apply)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"gain": 1 - h.beta, "least_log_gain": -h.max_log_gain, "most_log_gain": h.max_log_gain}

    @classmethod
    def sums_all_layers(cls, groups: Sequence[Mapping[str, Any]]) -> str | None:
        return "global_scale" if any(group["global_scale"] for group in groups) else None
