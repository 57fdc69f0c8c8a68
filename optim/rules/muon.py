"""Muon."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from optim.arithmetic import Values, add
from optim.engine.chunks import TensorView
from optim.rule import Rule


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor | None) -> Values:
    add(p, p, -h.lr, h.weight_decay)
    if v is None:
        m.lerp_(g, 1 - h.momentum)
        o = orthogonalized(h, g.lerp(m, h.momentum) if h.nesterov else m)
        return {"p": add(p, o, -h.lr, h.scale), "m": m}
    m.lerp_(g, h.gain1)
    add(v.mul_(h.beta2), g, h.gain2, times=g)
    return {"p": add(p, m, -h.lr, h.pace, over=v.sqrt().add_(h.epsilon)), "m": m, "v": v}


def orthogonalized(h: Any, b: Tensor) -> Tensor:
    """Nearly U Vᵀ of b = U S Vᵀ, by iterations of Newton and Schulz."""
    dtype = b.dtype if b.dtype == torch.float64 else getattr(torch, h.ns_dtype)
    (alpha, beta, gamma), steps = h.newton_schulz
    x = b.flatten(1).to(dtype)
    x = x.T if len(x) > x.shape[1] else x
    x = x / x.norm().clamp(min=h.eps)
    for _ in range(steps):
        a = x @ x.T
        x = torch.addmm(x, torch.addmm(a, a, a, beta=beta, alpha=gamma), x, beta=alpha)
    x = x.T if len(x) != len(b) else x
    return x.reshape(b.shape).to(b.dtype)


class Muon(Rule):
    """Muon. Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025, arXiv:2502.16982.

    Update (of matrices B = G; (a, b, c) = `ns_coefficients`):
        M = μ M + (1 - μ) G,  B = (1 - μ) G + μ M            with `nesterov` False B = M
        X = B / ‖B‖, then `ns_steps` times A = X Xᵀ, X = a X + (b A + c A A) X
        p = p - lr λ p - lr s X                              s = √max(1, rows / columns), see `adjust_lr_fn`
    and of all other parameters, and of groups with `adapt` False, AdamW's with `adam_betas`, `adam_eps`.

    State: m: 4 bytes per parameter of a matrix; of what AdamW updates m and v, 8.
    Defaults: torch.optim.Muon's, which are the author's but for lr (his is 0.02); AdamW's of his code.
    Options: `adjust_lr_fn` "match_rms_adamw" takes s = 0.2 √max(rows, columns), so that AdamW's learning rate
        and decay fit (Moonshot): without it give AdamW's groups a learning rate of their own; `ns_dtype` of
        the iterations. Float64 parameters are always worked on in float64. Embeddings and heads belong to
        AdamW: `adapt` False (`no_adapt` in recipes and in `group_parameters`). Tensors of more than two
        dimensions are matrices of their first dimension and the rest.
    Deviations of others: torch.optim.Muon takes matrices alone; the author's code multiplies by lr after the
        decay and has Nesterov's momentum without 1 - μ, which cancels.
    Sharding: needs whole matrices, and refuses DTensors.
    Use: hidden layers of transformers and convolutions; lr 0.02, or AdamW's with "match_rms_adamw".
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-10

    elements = ("m", "v")
    stages = (apply,)
    needs_whole_layers = True

    @classmethod
    def tensor_view(cls, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """A whole matrix, with the factor of its learning rate."""
        if not is_matrix(h, shape):
            return None
        rows, columns = shape[0], math.prod(shape[1:])
        scale = math.sqrt(max(1, rows / columns))
        if h["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        return TensorView({"p": shape}, {}, {"scale": scale}, whole=True)

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        return dict.fromkeys(("m",) if is_matrix(h, shape) else ("m", "v"), shape)

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        debias2 = math.sqrt(1 - h.adam_betas2**t)
        return {
            "newton_schulz": ((h.ns_coefficients1, h.ns_coefficients2, h.ns_coefficients3), h.ns_steps),
            "gain1": 1 - h.adam_betas1,
            "beta2": h.adam_betas2,
            "gain2": 1 - h.adam_betas2,
            "pace": debias2 / (1 - h.adam_betas1**t),
            "epsilon": h.adam_eps * debias2,
        }


def is_matrix(h: Mapping[str, Any], shape: torch.Size) -> bool:
    """Whether Muon's own update is meant for a parameter."""
    return len(shape) >= 2 and bool(h.get("adapt", True))
