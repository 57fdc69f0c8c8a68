"""CAME."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add, total
from optim.engine.chunks import TensorView
from optim.rule import Rule
from optim.rules.adafactor import factored


def statistics(h: Any, g: Tensor, v: Tensor | None) -> Values:
    if v is None:
        return {"row_sums": total(g * g), "column_sums": total(g * g)}
    return {"v": v.lerp_((g * g).add_(h.eps1), h.gain2)}


def factor(h: Any, r: Tensor, c: Tensor, row_sums: Tensor, column_sums: Tensor) -> Values:
    r = r.lerp(row_sums / h.columns + h.eps1, h.gain2)
    c = c.lerp(column_sums / h.rows + h.eps1, h.gain2)
    return {"r": r, "c": c, "a": (r / c.mean(h.across, keepdim=True)).rsqrt(), "b": c.rsqrt()}


def update_norm(h: Any, g: Tensor, a: Any, b: Any, v: Any) -> Values:
    u = update(g, a, b, v)
    return {"u2": (u, u)}


def update(g: Tensor, a: Any, b: Any, v: Any) -> Tensor:
    return v.rsqrt().mul_(g) if a is None else (g * a).mul_(b)


def clipping(h: Any, u2: Tensor) -> Values:
    return {"shrink": 1 / ((u2 / h.numel).sqrt() / h.clip_threshold).clamp(min=1)}


def instability(h: Any, g: Tensor, m: Tensor, a: Any, b: Any, v: Any) -> Values:
    u = update(g, a, b, v) * h.shrink
    m.lerp_(u, h.gain1)
    if a is None:
        return {"m": m}
    e = (u - m).square_()
    return {"m": m, "row_sums": total(e), "column_sums": total(e)}


def confidence(h: Any, rs: Tensor, cs: Tensor, row_sums: Tensor, column_sums: Tensor) -> Values:
    rs = rs.lerp(row_sums / h.columns + h.eps2, h.gain3)
    cs = cs.lerp(column_sums / h.rows + h.eps2, h.gain3)
    return {"rs": rs, "cs": cs, "a": (rs / cs.mean(h.across, keepdim=True)).rsqrt(), "b": cs.rsqrt()}


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor, a: Any, b: Any) -> Values:
    add(p, p, -h.lr, h.weight_decay)
    return {"p": add(p, m if a is None else (m * a).mul_(b), -h.lr)}


class CAME(Rule):
    """CAME. Luo et al. 2023, arXiv:2307.02047, Algorithm 2, as in the authors' code.

    Update (mean over columns in r and R, over rows in c and C; RMS over one layer):
        r = β₂ r + (1 - β₂) mean(g² + ε₁),  c likewise,  V = r c / mean(r)
        U = g / √V,  U = U / max(1, RMS(U) / clip_threshold)
        m = β₁ m + (1 - β₁) U
        R = β₃ R + (1 - β₃) mean((U - m)² + ε₂),  C likewise,  S = R C / mean(R)
        p = p - lr λ p - lr m / √S
    and of vectors and scalars V = β₂ V + (1 - β₂) (g² + ε₁), S = 1.

    State: m (like p, fp32), r, c, R, C (called rs, cs), of vectors m, v: 4.03 bytes per parameter at 512 x
        512.
    Defaults: the authors' code (yangluo7/CAME).
    Deviations of others: the authors' code and pytorch_optimizer factor the last two dimensions, of
        convolutions the taps, which saves nothing; here the two largest are.
    Use: lr 1 to 3 times below AdamW's; β₃ 0.9995 to 0.99995.
    """

    lr: float = 2e-4
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999)
    eps: tuple[float, float] = (1e-30, 1e-16)
    clip_threshold: float = 1.0
    weight_decay: float = 0.0

    stages = (
        statistics,
        None,
        factor,
        None,
        update_norm,
        clipping,
        instability,
        None,
        confidence,
        None,
        apply,
    )

    @classmethod
    def tensor_view(cls, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """Rows and columns in the tensor's own dimensions."""
        dimensions = factored(shape, 0)
        if dimensions is None:
            return None
        down, across = dimensions
        of_rows, of_columns = cls._lines(shape, across), cls._lines(shape, down)
        scratch = {"row_sums": of_rows, "column_sums": of_columns, "a": of_rows, "b": of_columns}
        views = {"p": shape, "r": of_rows, "c": of_columns, "rs": of_rows, "cs": of_columns}
        return TensorView(views, scratch, {"rows": shape[down], "columns": shape[across], "across": across})

    @staticmethod
    def _lines(shape: torch.Size, dimension: int) -> torch.Size:
        return torch.Size(1 if d == dimension else size for d, size in enumerate(shape))

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        dimensions = factored(shape, 0)
        if dimensions is None:
            return {"m": shape, "v": shape}
        down, across = dimensions
        of_rows, of_columns = cls._lines(shape, across), cls._lines(shape, down)
        return {"m": shape, "r": of_rows, "c": of_columns, "rs": of_rows, "cs": of_columns}

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"gain1": 1 - h.beta1, "gain2": 1 - h.beta2, "gain3": 1 - h.beta3}
