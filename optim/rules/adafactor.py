"""Adafactor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.rule import Rule
from optim.stage import Values, over_rows


def estimate(h: Any, p: Tensor, g: Tensor, r: Tensor | None, c: Tensor | None, v: Any) -> Values:
    g2 = g * g + h.eps1
    if r is None or c is None:
        v = h.beta2 * v + h.gain2 * g2
        return {"v": v, "p2": (p, p)}
    r = h.beta2 * r + h.gain2 * mean(g2, h.columns)
    c = h.beta2 * c + h.gain2 * mean(g2, h.rows)
    return {"r": r, "c": c, "a": (r / mean(r, h.rows)).rsqrt(), "b": c.rsqrt(), "p2": (p, p)}


def scale(h: Any, p2: Tensor) -> Values:
    return {"alpha": h.rho * torch.where(h.scale_parameter, (p2 / h.numel).sqrt().maximum(h.eps2), 1)}


def measure(h: Any, g: Tensor, a: Tensor | None, b: Tensor | None, v: Tensor | None) -> Values:
    u = normalised(g, a, b, v)
    return {"u2": (u, u)}


def clip(h: Any, u2: Tensor) -> Values:
    return {"step": h.alpha / ((u2 / h.numel).sqrt() / h.clip_threshold).clamp(min=1)}


def move(
    h: Any, p: Tensor, g: Tensor, a: Tensor | None, b: Tensor | None, v: Tensor | None, m: Tensor | None
) -> Values:
    u = h.step * normalised(g, a, b, v)
    decayed = p - h.weight_decay * h.alpha * p
    if m is None:
        return {"p": decayed - u}
    m = h.beta1 * m + (1 - h.beta1) * u
    return {"p": decayed - m, "m": m}


def normalised(g: Tensor, a: Tensor | None, b: Tensor | None, v: Any) -> Tensor:
    """U = g / √V: V is v, or r c / mean(r) = 1 / (a b)²."""
    return g * v.rsqrt() if a is None or b is None else g * a * b


def mean(x: Tensor, dimension: int) -> Tensor:
    return over_rows(x, "sum") / x.shape[0] if dimension == 0 else x.mean(dimension, keepdim=True)


def factored(shape: torch.Size, least: int) -> tuple[int, int] | None:
    """The two largest dimensions, or None where the smaller of them is below `least`."""
    if len(shape) < 2:
        return None
    rows, columns = sorted(sorted(range(len(shape)), key=lambda d: shape[d])[-2:])
    return (rows, columns) if min(shape[rows], shape[columns]) >= least else None


class Adafactor(Rule):
    """Adafactor. Shazeer, Stern 2018, arXiv:1804.04235 v1, Algorithms 4 and 5, as in the authors' code.

    Update (t = 1, 2, …; mean over columns in r, over rows in c; RMS over one layer):
        β₂ = 1 - t^decay_rate,  ρ = lr, or min(0.01, 1 / √t)
        r = β₂ r + (1 - β₂) mean(g² + ε₁),  c likewise,  V = r c / mean(r)
        of vectors and scalars V = β₂ V + (1 - β₂) (g² + ε₁)
        U = g / √V,  U = U / max(1, RMS(U) / clip_threshold)
        α = ρ max(ε₂, RMS(p))
        p = p - α U - λ α p                                  with β₁: p - m - λ α p, m = β₁ m + (1 - β₁) α U

    State: r, c for tensors of two and more dimensions, else v (fp32); with β₁ also m (like p): rows plus
        columns, 0.016 bytes per parameter at 512 x 512; with β₁ 4 more.
    Defaults: the authors' code (tensor2tensor).
    Options: `lr` None steps relatively (`warmup_init`: ρ = min(1e-6 t, 1 / √t)); `scale_parameter` False
        leaves α = ρ; the two largest dimensions of a tensor are factored, if the smaller has
        `min_dim_size_to_factor`.
    Deviations of others: torch.optim.Adafactor always takes min(lr, 1 / √t), clamps by ε₁ instead of adding
        it, factors the last two dimensions (of convolutions the taps, which saves nothing) and has no β₁;
        timm factors dimensions 0 and 1, and ignores `scale_parameter` where lr is given; optax factors only
        dimensions of 128 and more and does not multiply the decay by the learning rate; pytorch_optimizer
        keeps β₁ in bf16 and caps β₂.
    Use: models whose state must be small; lr None, or a schedule with 1e-3 for fine-tuning.
    """

    lr: float | None = None
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    warmup_init: bool = False
    min_dim_size_to_factor: int = 0

    shaped = True
    stages = (estimate, scale, measure, clip, move)

    @classmethod
    def geometry(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
        dimensions = factored(shape, h["min_dim_size_to_factor"])
        return {} if dimensions is None else {"rows": dimensions[0], "columns": dimensions[1]}

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        moment = {} if h["beta1"] is None else {"m": shape}
        return (cls._factors("r", "c", h, shape) or {"v": shape}) | moment

    @classmethod
    def scratch_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        return cls._factors("a", "b", h, shape)

    @classmethod
    def _factors(
        cls, row: str, column: str, h: Mapping[str, Any], shape: torch.Size
    ) -> dict[str, torch.Size]:
        """Shapes of a number for each row and one for each column."""
        if not (at := cls.geometry(h, shape)):
            return {}
        of_rows, of_columns = list(shape), list(shape)
        of_rows[at["columns"]] = of_columns[at["rows"]] = 1
        return {row: torch.Size(of_rows), column: torch.Size(of_columns)}

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        ceiling = 1e-6 * t if h.warmup_init else 1e-2
        beta2 = 1 - t**h.decay_rate
        return {"beta2": beta2, "gain2": 1 - beta2, "rho": min(ceiling, t**-0.5) if h.lr is None else h.lr}
