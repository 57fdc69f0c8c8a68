"""NovoGrad."""

from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add
from optim.rule import Rule


def grad_norm(h: Any, g: Tensor) -> Values:
    return {"g2": (g, g)}


def second_moment(h: Any, g2: Tensor, v: Tensor) -> Values:
    v = torch.where(v > 0, h.beta2 * v + h.gain2 * g2, g2)
    return {"v": v, "scale": torch.where(v > 0, 1 / (v.sqrt() + h.eps), 0)}


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor) -> Values:
    add(add(m.mul_(h.beta1), g, h.gain1, h.scale), p, h.gain1, h.weight_decay)
    return {"p": add(p, m, -h.lr), "m": m}


class NovoGrad(Rule):
    """NovoGrad. Ginsburg et al. 2019, arXiv:1905.11286 v3, Algorithm 1.

    Update (v is one number per layer; norms over one layer, the whole tensor):
        v = β₂ v + (1 - β₂) ‖g‖²                             v = ‖g‖² at the first gradient that is not zero
        m = β₁ m + (g / (√v + ε) + λ p)
        p = p - lr m

    State: m (like p, fp32) and v: 4 bytes per parameter and 4 per tensor.
    Defaults: the authors' code (OpenSeq2Seq); their speech recipes take betas (0.95, 0.5) or (0.8, 0.5).
    Options: `grad_averaging` multiplies the new term by 1 - β₁, at the first step too (NVIDIA, timm).
    Deviations of others: the authors' TensorFlow code has ε inside the root; apex normalises after the
        momentum and debiases v by default; TFA and pytorch_optimizer do not average at the first step;
        pytorch_optimizer and optax keep v = 0 after a zero first gradient, whose successor then moves 7 times
        too far; jettify, NVIDIA and pytorch_optimizer overwrite the gradient.
    Use: speech and vision nets in fp16 or fp32, batches of 512 to 32768, lr 0.01 with cosine or polynomial
    decay.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.95, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_averaging: bool = False

    elements = ("m",)
    layer_states = ("v",)
    stages = (grad_norm, second_moment, apply)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"gain1": 1 - h.beta1 if h.grad_averaging else 1.0, "gain2": 1 - h.beta2}
