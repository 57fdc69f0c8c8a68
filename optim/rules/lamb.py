"""LAMB."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add
from optim.engine.stage import Function
from optim.rule import Rule


def grad_norm(h: Any, g: Tensor) -> Values:
    return {"g2": (g, g)}


def clip_factor(h: Any, g2: Tensor) -> Values:
    return {"shrink": (h.max_norm / g2.sum().sqrt()).clamp(max=1)}


def average(h: Any, g: Tensor, m: Tensor, v: Tensor) -> None:
    add(m.mul_(h.beta1), g, h.gain1, h.shrink)
    add(v.mul_(h.beta2), g, h.gain2, h.shrink, h.shrink, times=g)


def moments(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Values:
    average(h, g, m, v)
    u = update(h, p, m, v)
    return {"m": m, "v": v, "u": u, "p2": (p, p), "u2": (u, u)}


def agreement(h: Any, g: Tensor, m: Tensor, v: Tensor) -> Values:
    average(h, g, m, v)
    kept = (m * g > 0).to(m.dtype)
    return {"m": m, "v": v, "kept": (kept, kept)}


def boost(h: Any, kept: Tensor) -> Values:
    return {"boost": h.numel / (kept + 1)}


def cautious_update(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Values:
    u = update(h, p, m * h.boost * (m * g > 0) if h.cautious else m, v)
    return {"u": u, "p2": (p, p), "u2": (u, u)}


def update(h: Any, p: Tensor, m: Tensor, v: Tensor) -> Tensor:
    return add(h.inside * p, m, h.pace, over=v.sqrt().add_(h.epsilon))


def trust_ratio(h: Any, p2: Tensor, u2: Tensor) -> Values:
    ratio = (p2 / u2).sqrt().minimum(h.ceiling)
    return {"ratio": torch.where(h.adapts & (p2 > 0) & (u2 > 0), ratio, 1)}


def cautious_apply(h: Any, p: Tensor, g: Tensor, u: Tensor | None, m: Tensor, v: Tensor) -> Values:
    if u is None and h.cautious:
        m = m * h.boost * (m * g > 0)
    return {"p": apply(h, p, u, m, v)["p"]}


def apply(h: Any, p: Tensor, u: Tensor | None, m: Tensor, v: Tensor) -> Values:
    if u is None:
        u = update(h, p, m, v)
    add(p, p, -h.lr, h.outside)
    return {"p": add(p, u, -h.lr, h.ratio)}


class LAMB(Rule):
    """LAMB. You et al. 2019, arXiv:1904.00962 v5, Algorithm 2.

    Update (t = 1, 2, …; norms over one layer, the whole tensor):
        m = β₁ m + (1 - β₁) g
        v = β₂ v + (1 - β₂) g²
        u = (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε) + λ p
        p = p - lr (‖p‖ / ‖u‖) u                             ratio 1 where either norm is 0

    State: m, v (each like p, fp32): 8 bytes per parameter.
    Defaults: the authors' (v1 to v3 and ALBERT's code have no bias correction; TFA, apex, timm, optax and v5
    have it).
    Options: `bias_correction`; `grad_averaging` False puts g, not (1 - β₁) g, into m (NVIDIA);
        `max_grad_norm` divides all gradients by max(1, global norm / max_grad_norm) first (NVLAMB);
        `trust_clip` bounds the ratio by 1 (LAMBC); `always_adapt` False gives layers without decay the ratio
        1 (apex, timm); `decoupled_decay` takes λ p out of u; `adapt` False in a group gives its layers the
        ratio 1; `cautious` takes m of no weight whose m g ≤ 0, and n / (k + 1) times that of the other k of a
        layer's n (Liang, Chen, Liu, Liu 2024, arXiv:2411.16085).
    Deviations of others: apex and timm do not adapt layers without decay; DeepSpeed, ColossalAI and jettify
        debias the learning rate after normalising, which shrinks the first thousand steps; pytorch_optimizer
        4.1 debiases m only and clamps ‖p‖ to 10; apex overwrites the gradient.
    Use: batches of 512 to 65536, with warm-up.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    bias_correction: bool = True
    grad_averaging: bool = True
    max_grad_norm: float | None = None
    trust_clip: bool = False
    always_adapt: bool = True
    decoupled_decay: bool = False
    cautious: bool = False

    elements = ("m", "v")
    scratch = ("u",)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, float]:
        debias1 = 1 - h.beta1**t if h.bias_correction else 1.0
        debias2 = 1 - h.beta2**t if h.bias_correction else 1.0
        return {
            "gain1": 1 - h.beta1 if h.grad_averaging else 1.0,
            "gain2": 1 - h.beta2,
            "pace": debias2**0.5 / debias1,  # one division per weight, not three
            "epsilon": h.eps * debias2**0.5,
            "inside": 0.0 if h.decoupled_decay else h.weight_decay,
            "outside": h.weight_decay if h.decoupled_decay else 0.0,
            "adapts": h.adapt and (h.always_adapt or h.weight_decay != 0),
            "ceiling": 1.0 if h.trust_clip else float("inf"),
            "shrink": 1.0,
            "max_norm": h.max_grad_norm or float("inf"),
        }

    stages = (grad_norm, clip_factor, moments, trust_ratio, apply)
    cautious_stages = (agreement, boost, cautious_update, trust_ratio, cautious_apply)

    @classmethod
    def rounds(cls, groups: Sequence[Mapping[str, Any]]) -> tuple[Function | None, ...]:
        clips = any(group["max_grad_norm"] for group in groups)
        cautious = any(group["cautious"] for group in groups)
        return (cls.stages[:2] if clips else ()) + (cls.cautious_stages if cautious else cls.stages[2:])

    @classmethod
    def sums_all_layers(cls, groups: Sequence[Mapping[str, Any]]) -> str | None:
        return "max_grad_norm" if any(group["max_grad_norm"] for group in groups) else None
