"""AdaX in float64 NumPy. Li et al. 2020, arXiv:2004.09740, Algorithm 1."""

import math

import numpy as np

from tests.oracles import each_tensor, zeros

OPTIONS = [
    {},
    {"weight_decay": 0.0},
    {"decoupled": True, "weight_decay": 0.05},
    {"betas": (0.5, 1e-2), "eps": 1e-3},
]


def adax_step(theta, g, s, lr, t, betas=(0.9, 1e-4), eps=1e-12, weight_decay=5e-4, decoupled=False, **_):
    b1, b2 = betas
    if not decoupled:
        g = g + weight_decay * theta
    growth = (1 + b2) ** t - 1
    raw = s["V"] = (1 + b2) * s["V"] + b2 * g**2
    s["m"] = b1 * s["m"] + (1 - b1) * g
    s["v"] = raw / growth
    new = theta - lr * math.sqrt(growth) * s["m"] / (np.sqrt(raw) + eps)
    return new - lr * weight_decay * theta if decoupled else new


oracle = each_tensor(adax_step, zeros("m", "v", "V"))
