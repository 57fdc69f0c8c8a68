"""NovoGrad in float64 NumPy. Ginsburg et al. 2019, arXiv:1905.11286, Algorithm 1."""

import math

import numpy as np

from tests.oracles import each_tensor, norm

OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"grad_averaging": True, "weight_decay": 0.01},
    {"betas": (0.9, 0.25), "eps": 1e-2},
]


def novograd_step(w, g, s, lr, t, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False, **_):
    b1, b2 = betas
    squared = norm(g) ** 2
    s["v"] = np.asarray(squared if s["v"] == 0 else b2 * s["v"] + (1 - b2) * squared)
    normalised = g / (math.sqrt(s["v"]) + eps) if s["v"] > 0 else 0 * g
    term = normalised + weight_decay * w
    s["m"] = b1 * s["m"] + ((1 - b1) if grad_averaging else 1.0) * term
    return w - lr * s["m"]


oracle = each_tensor(novograd_step, lambda p, **_: {"m": np.zeros_like(p), "v": np.zeros(())})
