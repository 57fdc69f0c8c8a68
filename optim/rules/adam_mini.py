"""Adam-mini."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from optim.arithmetic import Values, add, total
from optim.engine.chunks import TensorView
from optim.rule import Rule


def row_squares(h: Any, g: Tensor, v: Tensor | None) -> Values:
    return {"row_sums": total(g * g)} if v is None else {}


def row_moments(h: Any, r: Tensor, row_sums: Tensor) -> Values:
    r = r.lerp(row_sums / h.columns, h.gain2)
    return {"r": r, "a": 1 / (r.sqrt() + h.epsilon)}


def apply(h: Any, p: Tensor, g: Tensor, m: Tensor, v: Tensor | None, a: Any) -> Values:
    add(p, p, -h.lr, h.weight_decay)
    m.lerp_(g, h.gain1)
    if v is None:
        return {"p": add(p, m * a, -h.lr, h.pace), "m": m}
    add(v.mul_(h.beta2), g, h.gain2, times=g)
    return {"p": add(p, m, -h.lr, h.pace, over=v.sqrt().add_(h.epsilon)), "m": m, "v": v}


class AdamMini(Rule):
    """Adam-mini. Zhang et al. 2024, arXiv:2406.16793, Algorithm 1, with a block for each output neuron.

    Update (t = 1, 2, …; r is one number for each row of a matrix, the weights of one output or one token):
        m = β₁ m + (1 - β₁) g
        r = β₂ r + (1 - β₂) mean of g² over the row          of vectors v = β₂ v + (1 - β₂) g², as in AdamW
        p = p - lr λ p - lr (m / (1 - β₁ᵗ)) / (√(r / (1 - β₂ᵗ)) + ε)

    State: m (like p, fp32) and r; of vectors v in place of r: 4 bytes per parameter, and 4 per row.
    Defaults: the authors' code (zyushun/Adam-mini).
    Deviations: the paper has one block for each head of queries and keys, and one for a whole vector; these
        blocks are finer, nearer to AdamW, and need no names of layers. Tensors of more than two dimensions
        have a row for each index of the first.
    Deviations of others: pytorch_optimizer and torchtune copy the authors' code, which finds blocks by names.
    Use: with AdamW's learning rate and decay, for half of its state.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    stages = (row_squares, None, row_moments, None, apply)

    @classmethod
    def tensor_view(cls, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """Rows, and all other dimensions as its columns."""
        if len(shape) < 2:
            return None
        columns = math.prod(shape[1:])
        of_rows = (shape[0], *[1] * (len(shape) - 1))
        views: dict[str, tuple[int, ...]] = {"p": tuple(shape), "r": of_rows}
        if contiguous:
            of_rows = (shape[0], 1)
            views = {"p": (shape[0], columns), "r": of_rows}
        return TensorView(views, {"row_sums": of_rows, "a": of_rows}, {"columns": columns})

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        rows = torch.Size((shape[0], *[1] * (len(shape) - 1))) if len(shape) > 1 else shape
        return {"m": shape, "r" if len(shape) > 1 else "v": rows}

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        debias2 = math.sqrt(1 - h.beta2**t)
        return {
            "gain1": 1 - h.beta1,
            "gain2": 1 - h.beta2,
            "pace": debias2 / (1 - h.beta1**t),
            "epsilon": h.eps * debias2,
        }
