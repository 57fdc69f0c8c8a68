"""Muon in float64 NumPy: Jordan et al. 2024; AdamW (Loshchilov, Hutter 2017) for what is no matrix."""

import math

import numpy as np

from tests.oracles import each_tensor, norm

OPTIONS = [
    {},
    {"nesterov": False, "momentum": 0.8, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3},
    {"ns_coefficients": (2.0, -1.5, 0.5), "adam_betas": (0.8, 0.99), "adam_eps": 1e-3},
]


def muon_start(p, **_):
    return {"m": np.zeros_like(p)} | ({"v": np.zeros_like(p)} if p.ndim < 2 else {})


def newton_schulz(matrix, coefficients, steps, eps):
    """The published iteration, on the side with fewer rows."""
    a, b, c = coefficients
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T, coefficients, steps, eps).T
    x = matrix / max(norm(matrix), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def muon_step(
    w,
    g,
    s,
    lr,
    t,
    weight_decay=0.1,
    momentum=0.95,
    nesterov=True,
    ns_coefficients=(3.4445, -4.7750, 2.0315),
    eps=1e-7,
    ns_steps=5,
    adjust_lr_fn="original",
    adam_betas=(0.9, 0.95),
    adam_eps=1e-10,
    **_,
):
    decayed = w - lr * weight_decay * w
    if w.ndim < 2:
        b1, b2 = adam_betas
        s["m"] = b1 * s["m"] + (1 - b1) * g
        s["v"] = b2 * s["v"] + (1 - b2) * g**2
        return decayed - lr * (s["m"] / (1 - b1**t)) / (np.sqrt(s["v"] / (1 - b2**t)) + adam_eps)
    s["m"] = momentum * s["m"] + (1 - momentum) * g
    b = (1 - momentum) * g + momentum * s["m"] if nesterov else s["m"]
    rows, columns = w.shape[0], w[0].size
    o = newton_schulz(b.reshape(rows, columns), ns_coefficients, ns_steps, eps).reshape(w.shape)
    if adjust_lr_fn == "original":
        return decayed - lr * math.sqrt(max(1.0, rows / columns)) * o
    return decayed - lr * 0.2 * math.sqrt(max(rows, columns)) * o


oracle = each_tensor(muon_step, muon_start)
