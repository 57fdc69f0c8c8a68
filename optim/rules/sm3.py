"""SM3."""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from optim.arithmetic import Values, add, largest
from optim.engine.chunks import TensorView
from optim.engine.stage import Function
from optim.rule import Rule

TINY = torch.finfo(torch.float32).tiny
"""In place of an accumulator of 0, whose gradients are all 0 too: 0 / 0 = 0."""


def grad_peaks(h: Any, g: Tensor, q: Tensor | None) -> Values:
    if h.variant == "II" or q is None:
        return {}
    g2 = h.gain * g * g
    return {"row_peaks": largest(g2), "column_peaks": largest(g2)}


def lower_bounds(h: Any, row_peaks: Tensor, column_peaks: Tensor, *mu: Tensor) -> Values:
    kept = [h.keep * mu_k for mu_k in mu]
    values = {}
    if h.variant == "I":
        kept = [
            mu_k + peak for mu_k, peak in zip(kept, peaks(h.columns, row_peaks, column_peaks), strict=True)
        ]
        values = {f"mu{k}": mu_k for k, mu_k in enumerate(kept)}
    q = reduce(torch.minimum, kept[1:]).reshape(column_peaks.shape)
    return {"o": kept[0].clamp(min=TINY), "q": q.clamp(min=TINY)} | values


def apply(
    h: Any, p: Tensor, g: Tensor, m: Tensor | None, mu0: Tensor, o: Tensor | None, q: Tensor | None
) -> Values:
    values: dict[str, Any] = {}
    if o is None or q is None:
        values["mu0"] = add(mu0.mul_(h.keep), g, h.gain, times=g)
        nu = values["mu0"].clamp(min=TINY)
    else:
        nu = torch.minimum(o, q)
        if h.variant == "II":
            add(nu, g, h.gain, times=g)
            values = {"row_peaks": largest(nu), "column_peaks": largest(nu)}
    if m is None:
        return values | {"p": add(p, g, -h.lr, times=nu.rsqrt())}
    m.lerp_(nu.rsqrt().mul_(g), 1 - h.momentum)
    return values | {"p": add(p, m, -h.lr), "m": m}


def accumulators(h: Any, row_peaks: Tensor, column_peaks: Tensor) -> Values:
    if h.variant == "I":
        return {}
    return {f"mu{k}": peak for k, peak in enumerate(peaks(h.columns, row_peaks, column_peaks))}


def peaks(columns: tuple[int, ...], row_peaks: Tensor, column_peaks: Tensor) -> list[Tensor]:
    """The maximum of each slice along each axis, from those of rows and of columns, which stand for all axes
    but the first."""
    of_columns = column_peaks.reshape(columns)
    axes = range(1, of_columns.dim())
    return [row_peaks, *(of_columns.amax([d for d in axes if d != k] or 0, keepdim=True) for k in axes)]


def _along(shape: torch.Size, axis: int) -> torch.Size:
    return torch.Size(size if d == axis else 1 for d, size in enumerate(shape))


class SM3(Rule):
    """SM3. Anil, Gupta, Koren, Singer 2019, arXiv:1901.11150 v2, Algorithms SM3-I and SM3-II.

    Update (one accumulator μₖ for each axis k, a number for each slice along it; 0 / 0 = 0):
        ν = minₖ μₖ + g²
        μₖ = max of ν over all other axes
        m = β m + (1 - β) g / √ν
        p = p - lr m

    State: μₖ (fp32), with momentum also m (like p): rows plus columns, 0.016 bytes per parameter at 512 x
        512; with momentum 4 more. Vectors and scalars are diagonal AdaGrad.
    Defaults: momentum 0 for its memory (the paper's is 0.9); the authors' code (google-research/sm3) has no
    default lr.
    Options: `variant` "I": μₖ = μₖ + max of g², ν = minₖ μₖ, a looser bound; `beta` > 0 makes the sums
        averages, ν = β minₖ μₖ + (1 - β) g².
    Deviations of others: the authors' code adds 1e-30 to ν; optax 1e-8, which shows, and fails on scalars;
        pytorch_optimizer always holds a momentum, and lets no average shrink.
    Use: models whose state must be small; lr 0.1 to 0.3 with warm-up, no decay.
    """

    lr: float = 0.1
    momentum: float = 0.0
    beta: float = 0.0
    variant: Literal["I", "II"] = "II"

    stages = (grad_peaks, None, lower_bounds, None, apply, None, accumulators)

    @classmethod
    def rounds(cls, groups: Sequence[Mapping[str, Any]]) -> tuple[Function | None, ...]:
        variants = {group["variant"] for group in groups}
        return cls.stages[0 if "I" in variants else 2 : None if "II" in variants else 5]

    @classmethod
    def tensor_view(cls, h: Mapping[str, Any], shape: torch.Size, contiguous: bool) -> TensorView | None:
        """The slices along the first axis as rows; all other axes are its columns."""
        if len(shape) < 2:
            return None
        columns = (1, *shape[1:])
        of_rows, of_columns = _along(shape, 0), torch.Size(columns)
        if contiguous:
            of_rows, of_columns = of_rows[:2], torch.Size((1, of_columns.numel()))
        views = {f"mu{k}": _along(shape, k) for k in range(1, len(shape))}
        views |= {"p": torch.Size((shape[0], *of_columns[1:])), "mu0": of_rows}
        scratch = {"row_peaks": of_rows, "column_peaks": of_columns, "o": of_rows, "q": of_columns}
        return TensorView(views, scratch, {"columns": columns})

    @classmethod
    def state_shapes(cls, h: Mapping[str, Any], shape: torch.Size) -> dict[str, torch.Size]:
        accumulators = {f"mu{k}": _along(shape, k) for k in range(max(1, len(shape)))}
        return accumulators | ({"m": shape} if h["momentum"] else {})

    @staticmethod
    def numbers(h: Any, t: int) -> dict[str, Any]:
        return {"keep": h.beta or 1.0, "gain": 1 - h.beta}
