"""Adafactor in float64 NumPy. Shazeer, Stern 2018, arXiv:1804.04235, Algorithms 4 and 5."""

import math

import numpy as np

from tests.oracles import each_tensor, rms

OPTIONS = [
    {},
    {"lr": None},
    {"lr": None, "warmup_init": True},
    {"relative_step": True, "warmup_init": True},
    {"scale_parameter": False, "weight_decay": 0.1},
    {"beta1": 0.9, "weight_decay": 0.01},
    {"min_dim_size_to_factor": 5},
    {"clip_threshold": 0.3, "decay_rate": -0.5, "eps": (1e-4, 1e-1)},
]


def two_largest(shape):
    """Row and column dimension: of equal sizes the later ones."""
    order = sorted(range(len(shape)), key=lambda d: (shape[d], d))
    return tuple(sorted(order[-2:]))


def adafactor_start(p, beta1=None, min_dim_size_to_factor=0, **_):
    state = {} if beta1 is None else {"m": np.zeros_like(p)}
    if p.ndim >= 2 and min(p.shape[d] for d in two_largest(p.shape)) >= min_dim_size_to_factor:
        rows, columns = two_largest(p.shape)
        state["r"] = np.zeros([1 if d == columns else n for d, n in enumerate(p.shape)])
        state["c"] = np.zeros([1 if d == rows else n for d, n in enumerate(p.shape)])
    else:
        state["v"] = np.zeros_like(p)
    return state


def adafactor_step(
    x,
    g,
    s,
    lr,
    t,
    eps=(1e-30, 1e-3),
    clip_threshold=1.0,
    decay_rate=-0.8,
    beta1=None,
    weight_decay=0.0,
    scale_parameter=True,
    relative_step=False,
    warmup_init=False,
    **_,
):
    rho = lr
    if lr is None or relative_step:
        rho = min(1e-6 * t if warmup_init else 1e-2, 1 / math.sqrt(t)) * (1.0 if lr is None else lr)
    alpha = max(eps[1], rms(x)) * rho if scale_parameter else rho
    beta2 = 1 - t**decay_rate
    squared = g**2 + eps[0]
    if "r" in s:
        rows, columns = two_largest(x.shape)
        # Algorithm 4 with its sums, from which our means differ by constants that cancel.
        s["r"] = beta2 * s["r"] + (1 - beta2) * squared.sum(columns, keepdims=True) / x.shape[columns]
        s["c"] = beta2 * s["c"] + (1 - beta2) * squared.sum(rows, keepdims=True) / x.shape[rows]
        big_r, big_c = s["r"] * x.shape[columns], s["c"] * x.shape[rows]
        vhat = big_r * big_c / big_r.sum(rows, keepdims=True)
    else:
        vhat = s["v"] = beta2 * s["v"] + (1 - beta2) * squared
    u = g / np.sqrt(vhat)
    u = u / max(1.0, rms(u) / clip_threshold)
    step = alpha * u
    if beta1 is not None:
        step = s["m"] = beta1 * s["m"] + (1 - beta1) * step
    return x - step - weight_decay * alpha * x


oracle = each_tensor(adafactor_step, adafactor_start)
