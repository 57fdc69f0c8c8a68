"""Amos."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add
from optim.rule import Rule


def grad_norm(h: Any, g: Tensor) -> Values:
    return {"g2": (g, g)}


def layerwise(h: Any, g2: Tensor, v: Tensor, b: Tensor) -> Values:
    g2 = g2 / h.numel
    v = h.beta * v + h.gain * g2
    r = h.debias / v.clamp(min=2**-125)
    c = (1 + h.c_coef * h.lr.sqrt() * b) ** -0.5
    d = 1 / (1 + h.d_coef * (h.lr * h.eta).sqrt() * b)
    gamma = c * h.lr**2 * r * g2
    return {
        "v": v,
        "b": b + gamma * (1 + b),
        "step": d * h.lr * h.eta * r.sqrt(),
        "decay": d * (gamma / 2 + h.extra_l2),
    }


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor | None) -> Values:
    if m is None:
        return {"p": add(add(p, p, -h.decay), g, -h.step)}
    m.lerp_(add(h.step * g, p, h.decay), 1 - h.momentum)
    return {"p": p.sub_(m), "m": m}


class Amos(Rule):
    """Amos. Tian, Parikh 2022, arXiv:2210.11693 v2, Algorithm 1, as in the authors' code.

    Update (t = 1, 2, …; v and b are one number per layer, ξ = `lr`, η = `eta`, mean over one layer):
        v = β v + (1 - β) mean(g²),  r = (1 - βᵗ) / max(v, 2⁻¹²⁵)
        c = 1 / √(1 + c_coef √ξ b),  d = 1 / (1 + d_coef √(ξ η) b)
        γ = c ξ² r mean(g²)
        p = p - d (ξ η √r g + (γ / 2 + extra_l2) p)          with momentum an EMA of this step
        b = b + γ (1 + b)

    State: v, b, with momentum also m (like p, fp32): 8 bytes per tensor, with momentum 4 more per parameter.
    Defaults: the authors' code (google-research/jestimator); it has none for lr and η, which belong to the
    problem.
    Options: `eta`, the expected size of the layer's weights, set per group: for BERT 1 for norms' weights,
        0.5 for biases, √(2 / hidden) for embeddings, √(1 / fan-in) for matrices.
    Deviations of others: pytorch_optimizer guesses η from shapes, adds ε to v, and has `extra_l2` with the
        wrong sign. The authors' per-row slots are not offered: v and b are per tensor.
    Use: pre-training without a decay schedule; lr about 1 / √(number of independent batches).
    """

    lr: float = 1e-3
    eta: float = 1.0
    beta: float = 0.999
    momentum: float = 0.0
    c_coef: float = 0.25
    d_coef: float = 0.25
    extra_l2: float = 0.0

    elements = ("m",)
    layer_states = ("v", "b")
    stages = (grad_norm, layerwise, apply)

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        shapes = super().state_shapes(h, shape)
        return shapes if h["momentum"] else {name: shapes[name] for name in cls.layer_states}

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"gain": 1 - h.beta, "debias": 1 - h.beta**t}
