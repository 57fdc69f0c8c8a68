"""Adafactor."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add, total
from optim.engine.chunks import TensorView
from optim.rule import Rule


def statistics(h: Any, p: Tensor, g: Tensor, v: Tensor | None) -> Values:
    g2 = g * g
    if v is None:
        return {"row_sums": total(g2), "column_sums": total(g2), "p2": (p, p)}
    return {"v": v.lerp_(g2.add_(h.eps1), h.gain2), "p2": (p, p)}


def step_size(h: Any, p2: Tensor) -> Values:
    return {"alpha": h.rho * torch.where(h.scale_parameter, (p2 / h.numel).sqrt().maximum(h.eps2), 1)}


def factor(h: Any, r: Tensor, c: Tensor, row_sums: Tensor, column_sums: Tensor) -> Values:
    if h.repeats > 1:
        row_sums = row_sums.unflatten(-1, (h.repeats, -1)).sum(-2)
    r = r.lerp(row_sums / h.columns + h.eps1, h.gain2)
    c = c.lerp(column_sums / h.rows + h.eps1, h.gain2)
    mean = c.mean(h.across, keepdim=True)  # that of r too; c is whole where rows are spread over workers
    if h.repeats > 1:
        mean = mean.unflatten(-1, (h.repeats, -1)).mean(-2)
    a = (r / mean).rsqrt()
    return {"r": r, "c": c, "a": torch.cat([a] * h.repeats, -1) if h.repeats > 1 else a, "b": c.rsqrt()}


def update_norm(h: Any, g: Tensor, a: Any, b: Any, v: Any) -> Values:
    u = v.rsqrt().mul_(g) if a is None else (g * a).mul_(b)
    return {"u2": (u, u)}


def clipped_step_size(h: Any, u2: Tensor) -> Values:
    return {"step": h.alpha / ((u2 / h.numel).sqrt() / h.clip_threshold).clamp(min=1)}


def apply(h: Any, p: Tensor, g: Tensor, a: Any, b: Any, v: Any, m: Tensor | None) -> Values:
    u, scale = (g, v.rsqrt().mul_(h.step)) if a is None else (g * (h.step * a), b)
    add(p, p, -h.alpha, h.weight_decay)
    if m is None:
        return {"p": p.addcmul_(u, scale, value=-1)}
    m.lerp_(u * scale, 1 - h.beta1)
    return {"p": p.sub_(m), "m": m}


def factored(shape: torch.Size, least: int) -> tuple[int, int] | None:
    """The two largest dimensions, or None where the smaller of them is below `least`."""
    if len(shape) < 2:
        return None
    rows, columns = sorted(sorted(range(len(shape)), key=lambda d: shape[d])[-2:])
    return (rows, columns) if min(shape[rows], shape[columns]) >= least else None


def _with_one(shape: torch.Size, dimension: int) -> torch.Size:
    return torch.Size(1 if d == dimension else size for d, size in enumerate(shape))


class Adafactor(Rule):
    """Adafactor. Shazeer, Stern 2018, arXiv:1804.04235 v1, Algorithms 4 and 5, as in the authors' code.

    Update (t = 1, 2, …; mean over columns in r, over rows in c; RMS over one layer):
        β₂ = 1 - t^decay_rate,  ρ = lr, or min(0.01, 1 / √t), or lr times that
        r = β₂ r + (1 - β₂) mean(g² + ε₁),  c likewise,  V = r c / mean(r)
        of vectors and scalars V = β₂ V + (1 - β₂) (g² + ε₁)
        U = g / √V,  U = U / max(1, RMS(U) / clip_threshold)
        α = ρ max(ε₂, RMS(p))
        p = p - α U - λ α p                                  with β₁: p - m - λ α p, m = β₁ m + (1 - β₁) α U

    State: r, c for tensors of two and more dimensions, else v (fp32); with β₁ also m (like p): rows plus
        columns, 0.016 bytes per parameter at 512 x 512; with β₁ 4 more.
    Defaults: the authors' code (tensor2tensor).
    Options: `lr` None steps relatively, ρ = min(0.01, 1 / √t) (`warmup_init`: min(1e-6 t, 1 / √t));
        `relative_step` makes lr a factor of that, 1 or a schedule's shape; `scale_parameter` False leaves α =
        ρ; the two largest dimensions of a tensor are factored, if the smaller has
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
    relative_step: bool = False
    warmup_init: bool = False
    min_dim_size_to_factor: int = 0

    stages = (statistics, step_size, factor, None, update_norm, clipped_step_size, apply)

    @classmethod
    def tensor_view(cls, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """Rows, columns and, behind them, the taps of convolutions, several columns' side by side."""
        dimensions = factored(shape, h["min_dim_size_to_factor"])
        if dimensions is None:
            return None
        down, across = dimensions
        rows, columns = shape[down], shape[across]
        taps, repeats = math.prod(shape[across + 1 :]), 1
        options = {"rows": rows, "columns": columns, "across": across}
        if not contiguous or rows * columns * taps != shape.numel():
            r, c = _with_one(shape, across), _with_one(shape, down)
            return TensorView(
                {"p": shape, "r": r, "c": c},
                {"row_sums": r, "column_sums": c, "a": r, "b": c},
                options | {"repeats": 1},
            )
        if taps > 1:
            repeats = next((n for n in (1, 2, 4, 8, 16) if n * taps % 16 == 0 and columns % n == 0), 1)
        tail = (repeats * taps,) if taps > 1 else ()
        of_rows, of_columns = (rows, 1, *tail), (1, columns // repeats, *tail)
        views = {"p": (rows, *of_columns[1:]), "r": (rows, 1, *[taps][: len(tail)]), "c": of_columns}
        scratch = {"row_sums": of_rows, "column_sums": of_columns, "a": of_rows, "b": of_columns}
        return TensorView(views, scratch, options | {"across": 1, "repeats": repeats})

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        moment = {} if h["beta1"] is None else {"m": shape}
        dimensions = factored(shape, h["min_dim_size_to_factor"])
        if dimensions is None:
            return {"v": shape} | moment
        down, across = dimensions
        return {"r": _with_one(shape, across), "c": _with_one(shape, down)} | moment

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        ceiling = 1e-6 * t if h.warmup_init else 1e-2
        relative = min(ceiling, t**-0.5)
        rho = relative if h.lr is None else h.lr * relative if h.relative_step else h.lr
        return {"gain2": t**h.decay_rate, "rho": rho}
